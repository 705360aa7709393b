"""Which threshold is low enough to save and high enough to trust: Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052).

CALM uses it so: for each threshold of a descending grid the hypothesis "the risk exceeds delta" is tested on prompts that the model
was not tuned on; testing goes on downward while hypotheses are rejected at level epsilon, and stops at the first that is not. With
probability at least 1 - epsilon over the draw of the prompts, every threshold passed has a risk of at most delta: tests in a
fixed order need no correction for their number. Example, delta 0.1, epsilon 0.05:

    threshold   1.0    0.9    0.8    0.7
    mean loss   0.01   0.03   0.06   0.08
    p-value     0.001  0.02   0.11   not tested        certified: 0.9
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shoal.baselines.calm import Calm, ExitCompletion, generate
from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.engine.intake import Prompt, prompts_of
from shoal.errors import InvalidInput, MissingExtra

GRID = tuple(round(1 - step / 20, 2) for step in range(20))
"""1, 0.95, ... 0.05."""

Loss = Callable[[ExitCompletion, ExitCompletion], float]
"""`loss(early, full)` in [0, 1]: what exits have spoilt in one completion. Both have the `index` of their prompt, so that a loss
may look up references, e.g. max(0, error(early) - error(full)) for what the paper calls risk consistency."""


@dataclass(frozen=True, kw_only=True)
class Tested:
    """One threshold of the grid."""

    threshold: float
    """Lambda of `Calm`."""
    mean_loss: float
    """Over the calibration prompts."""
    p_value: float
    """Of the hypothesis that its risk exceeds delta."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What came of a test."""

    threshold: float | None
    """The lowest threshold certified; None where not even the highest was: more prompts, or a larger delta, are needed."""
    tested: tuple[Tested, ...]
    """In the order of the tests; the last one may be the one that was not rejected."""
    delta: float
    """Risk allowed."""
    epsilon: float
    """Probability that the answer is wrong."""


def learn_then_test(
    losses_at: Callable[[float], Sequence[float]],
    *,
    delta: float,
    epsilon: float = 0.05,
    thresholds: Sequence[float] = GRID,
) -> Calibration:
    """Fixed-sequence testing down a grid of thresholds.

    Args:
        losses_at: the losses of the calibration prompts under a threshold, each in [0, 1]; asked for as the tests come to it.
        delta: risk (expected loss) allowed, above 0 and below 1.
        epsilon: level of the tests, above 0 and below 1.
        thresholds: descending.

    Raises `InvalidInput` for values outside these ranges, losses included.
    """
    for name, value in {"delta": delta, "epsilon": epsilon}.items():
        if not 0 < value < 1:
            raise InvalidInput(f"{name} must be above 0 and below 1, got {value}")
    if not thresholds or any(later >= earlier for earlier, later in itertools.pairwise(thresholds)):
        raise InvalidInput(f"thresholds must be descending, and one at least, got {tuple(thresholds)}")
    tested: list[Tested] = []
    certified: float | None = None
    for threshold in thresholds:
        losses = np.asarray(losses_at(threshold), dtype=float)
        if not losses.size or not ((losses >= 0) & (losses <= 1)).all():
            raise InvalidInput(
                f"losses must be in 0..1, one per prompt, got {losses.tolist()[:5]} at threshold {threshold}"
            )
        p_value = hoeffding_bentkus(float(losses.mean()), len(losses), delta)
        tested.append(Tested(threshold=threshold, mean_loss=float(losses.mean()), p_value=p_value))
        if p_value > epsilon:
            break
        certified = threshold
    return Calibration(threshold=certified, tested=tuple(tested), delta=delta, epsilon=epsilon)


def hoeffding_bentkus(mean_loss: float, num_losses: int, delta: float) -> float:
    """A p-value for "the expected loss exceeds delta", given the mean of n independent losses in [0, 1].

    The smaller of two bounds on the probability of so small a mean (Bates et al. 2021, arXiv 2101.02703, as Learn-then-Test uses
    it): Hoeffding's in its tight form, exp(-n KL(min(mean, delta) || delta)), and Bentkus's, e P(Bin(n, delta) <= ceil(n mean)).
    CALM's own p-value is the weaker exp(-2 n max(0, delta - mean)^2), which is never smaller.

    Raises `MissingExtra` without SciPy.
    """
    try:
        from scipy.stats import binom
    except ImportError as error:
        raise MissingExtra("calibration needs SciPy: pip install 'shoal[baselines]'") from error
    low = min(mean_loss, delta)
    divergence = (low * math.log(low / delta) if low > 0 else 0.0) + (1 - low) * math.log((1 - low) / (1 - delta))
    hoeffding = math.exp(-num_losses * divergence)
    # Means of floats: 0.1 * 30 is a little above 3, and must not be rounded up to 4.
    bentkus = math.e * float(binom.cdf(math.ceil(num_losses * mean_loss - 1e-9), num_losses, delta))
    return min(1.0, hoeffding, bentkus)


def textual_inconsistency(early: ExitCompletion, full: ExitCompletion) -> float:
    """1 - ROUGE-L (F-measure) of the text with exits against the full model's: 0 where they are equal. Raises `MissingExtra`."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtra("ROUGE-L needs rouge-score: pip install 'shoal[evaluate]'") from error
    if early.token_ids == full.token_ids:
        return 0.0
    return 1.0 - float(RougeScorer(["rougeL"]).score(full.text, early.text)["rougeL"].fmeasure)


def calibrate(
    model: LayerwiseDecoder,
    prompts: Prompt | Iterable[Prompt],
    rule: Calm,
    *,
    delta: float,
    epsilon: float = 0.05,
    thresholds: Sequence[float] = GRID,
    loss: Loss = textual_inconsistency,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> Calibration:
    """The lowest threshold of `rule` whose loss against the full model stays within `delta`, with confidence 1 - `epsilon`.

    The full model is `rule` with exits off, in the same code. `rule.threshold` itself plays no part.

    Args:
        prompts: independent draws of those to come, and none that the classifier or the model was trained on.
        loss: of one completion; the default compares texts and so needs a tokenizer.
        others: as of `learn_then_test` and `generate`.
    """
    if loss is textual_inconsistency and model.tokenizer is None:
        raise InvalidInput(
            "textual_inconsistency compares texts, and this checkpoint has no tokenizer: give another loss"
        )
    listed = prompts_of(prompts)

    def completions_at(threshold: float) -> tuple[ExitCompletion, ...]:
        at = replace(rule, threshold=threshold)
        return generate(model, listed, at, max_new_tokens=max_new_tokens, batch_size=batch_size).completions

    full = completions_at(2.0)

    def losses_at(threshold: float) -> list[float]:
        return [loss(early, whole) for early, whole in zip(completions_at(threshold), full, strict=True)]

    return learn_then_test(losses_at, delta=delta, epsilon=epsilon, thresholds=thresholds)
