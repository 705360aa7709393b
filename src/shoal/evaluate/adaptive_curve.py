"""Entropy Adaptive Decoding as a curve: two models write each answer together, and a threshold says how much the large one writes.

Thresholds in bits mean something else for every pair of models, so they are taken from the small model's own texts: where it
writes alone, a share s of its tokens (20%, 40%, ...) has a mean entropy above threshold t(s). What the large model writes from
there on has other entropies, so the share of tokens that it does write is another, and measured. The ends are exact: at 0% the
small model writes everything, at 100% the large one everything but the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.baselines.entropy_adaptive import AdaptiveConfig, AdaptiveText, adaptive_decode, mean_of_last
from shoal.engine.engine import Engine
from shoal.engine.intake import encode
from shoal.engine.text import TextStream
from shoal.errors import InvalidInput
from shoal.evaluate.bootstrap import Score
from shoal.evaluate.metrics import METRICS
from shoal.evaluate.tasks import Task, TaskInput

ADAPTIVE_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the small model's tokens above a threshold, a point of the curve each."""
WRITES_ALL = -1.0
"""A threshold in bits below every entropy."""


@dataclass(frozen=True, kw_only=True)
class AdaptivePoint:
    """The two models at one threshold."""

    share: float
    """Of the tokens that the small model writes alone: above the threshold. Where the point stands in a table."""
    threshold_bits: float
    """Mean entropy above which the large model writes."""
    by_large: float
    """Share of the tokens that it wrote."""
    score: Score
    """The metric."""
    flops: float
    """Mean per input, of both models, what they read after each other included."""


def adaptive_curve(
    small: Engine,
    large: Engine,
    task: Task,
    inputs: Sequence[TaskInput],
    metric: str,
    *,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[AdaptivePoint, ...]:
    """A point per share, greedily and at full depth, one text at a time.

    Args: `report(what, done, total)`: how many texts are written.

    Raises `InvalidInput` where the models do not share a tokenizer, or an input does not fit one of them.
    """
    if small.tokenizer.get_vocab() != large.tokenizer.get_vocab():
        raise InvalidInput("two models that write one text must share a tokenizer: these have different ones")
    prompts = [encode(one.prompt, small.tokenizer) for one in inputs]
    total = len(inputs) * len(ADAPTIVE_SHARES)
    thresholds: list[float] = [float("inf")]
    points: list[AdaptivePoint] = []
    for share in ADAPTIVE_SHARES:
        config = AdaptiveConfig(threshold_bits=thresholds[len(points)], max_new_tokens=task.max_new_tokens)
        texts: list[AdaptiveText] = []
        outputs: list[str] = []
        for prompt in prompts:
            stream = TextStream(large.tokenizer, task.stop, streaming=False)
            texts.append(adaptive_decode(small.runner.decoder, large.runner.decoder, prompt, config, stream=stream))
            stream.finish()
            outputs.append(stream.text.strip())
            report("token by token", len(points) * len(inputs) + len(texts), total)
        if not points:
            thresholds = thresholds_of(texts, config.window)
        points.append(
            AdaptivePoint(
                share=share,
                threshold_bits=thresholds[len(points)],
                by_large=sum(map(sum, (text.by_large for text in texts))) / sum(len(text.token_ids) for text in texts),
                score=METRICS[metric]
                .statistics([one.prompt for one in inputs], [one.references for one in inputs], outputs)
                .score(),
                flops=float(np.mean([text.flops for text in texts])),
            )
        )
    return tuple(points)


def thresholds_of(texts: Sequence[AdaptiveText], window: int) -> list[float]:
    """The threshold of each share, from texts that the small model wrote alone: from what no mean exceeds to what all do."""
    means = [mean_of_last(text.entropies[: at + 1], window) for text in texts for at in range(len(text.entropies))]
    between = np.quantile(means, [1 - share for share in ADAPTIVE_SHARES[:-1]]).tolist()
    return [*between, WRITES_ALL]
