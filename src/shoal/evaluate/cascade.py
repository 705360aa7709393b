"""Deferral: a small model answers, and where it seems unsure a larger one answers instead. Lossy, unlike drafting.

Gupta et al. 2024 (arXiv 2404.10136): the small model's own token log-probabilities say how sure it is. Their sum grows with
length, so it defers long answers; their mean leans the other way; a low quantile looks at the worst tokens; a small regression on
several quantiles learns what predicts that deferring helps. A rule is judged by its whole curve, quality against the share that
is deferred: one point of it can be had from any rule. Chance defers at random, and its curve is nearly a straight line between
the two models.

Example: log-probabilities (-0.1, -0.1, -4.0) and (-1, -1): sums -4.2 and -2, means -1.4 and -1, medians -0.1 and -1. The sum and
the mean defer the first answer, the median the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shoal.engine.engine import Engine
from shoal.engine.request import Generation
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput, MissingExtra
from shoal.evaluate.adaptive_curve import AdaptivePoint
from shoal.evaluate.bootstrap import Floats, Score, Statistics
from shoal.evaluate.metrics import METRICS
from shoal.evaluate.tasks import Task, TaskInput

SHARES = tuple(step / 10 for step in range(11))
"""Shares of the inputs that are deferred, a point of the curve each."""
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75)
"""Of token log-probabilities: what the learned rule reads, beside length and mean."""
FOLDS = 5
"""Parts of the inputs: what is learnt on four of them scores the fifth."""
CHANCE = "chance"
LEARNED = "learned"

RULES: Mapping[str, Callable[[Floats], float]] = {
    "sum": lambda logprobs: float(logprobs.sum()),
    "mean": lambda logprobs: float(logprobs.mean()),
    "lowest": lambda logprobs: float(logprobs.min()),
    "quantile 0.1": lambda logprobs: float(np.quantile(logprobs, 0.1)),
    "quantile 0.5": lambda logprobs: float(np.quantile(logprobs, 0.5)),
}
"""How sure an answer is, from its token log-probabilities; the least sure is deferred first."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one model made of the inputs."""

    counts: Floats
    """[N, K], what each adds to the metric's sums."""
    flops: Floats
    """[N], of prompt and answer."""
    logprobs: tuple[Floats, ...]
    """Per input, of the emitted tokens."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A rule at one share."""

    share: float
    """Of the inputs, deferred."""
    score: Score
    """The metric, small and large answers together."""
    flops: float
    """Mean per input: the small model's for all, the large one's for the deferred."""


@dataclass(frozen=True, kw_only=True)
class Deferral:
    """Every rule's curve on one task."""

    metric: str
    """Name in `METRICS`."""
    curves: Mapping[str, tuple[Point, ...]]
    """By rule, in the order of `SHARES`."""
    areas: Mapping[str, float]
    """By rule: the mean of the metric over the curve, less that of chance; above 0 the rule knows something."""
    adaptive: tuple[AdaptivePoint, ...] = ()
    """Where it was asked for: both models write each answer, token by token (`adaptive_curve.py`), by rising share."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def answers(engine: Engine, task: Task, inputs: Sequence[TaskInput], metric: str) -> Answers:
    """Have a model answer, greedily and at full depth."""
    sampling = Sampling(max_new_tokens=task.max_new_tokens, stop=task.stop, logprobs=0)
    done = engine.generate([one.prompt for one in inputs], sampling)
    statistics = METRICS[metric].statistics(
        [one.prompt for one in inputs], [one.references for one in inputs], [one.text.strip() for one in done]
    )
    flops = np.array([float(one.ledger.prompt_flops + one.ledger.decode_flops) for one in done])
    return Answers(counts=statistics.counts, flops=flops, logprobs=tuple(map(token_logprobs, done)))


def token_logprobs(done: Generation) -> Floats:
    """Of a generation's tokens; 0 where it has none."""
    return np.array([one.logprob for one in done.logprobs or ()] or [0.0])


def deferral_curves(small: Answers, large: Answers, metric: str, *, seed: int = 0) -> Deferral:
    """The curve of every rule, of the learned one, and of chance.

    Raises `InvalidInput` for fewer than 2 inputs per fold, `MissingExtra` without scikit-learn.
    """
    num_inputs = len(small.counts)
    if num_inputs < 2 * FOLDS:
        raise InvalidInput(f"a deferral curve needs {2 * FOLDS} inputs or more, got {num_inputs}")
    sure = {name: np.array(list(map(rule, small.logprobs))) for name, rule in RULES.items()}
    sure[LEARNED] = -expected_gain(small, large, metric, seed=seed)
    sure[CHANCE] = np.random.default_rng(seed).random(num_inputs)
    curves = {name: curve(small, large, metric, scores) for name, scores in sure.items()}
    means = {name: float(np.mean([point.score.value for point in points])) for name, points in curves.items()}
    sign = 1 if METRICS[metric].higher_is_better else -1
    return Deferral(
        metric=metric, curves=curves, areas={name: sign * (mean - means[CHANCE]) for name, mean in means.items()}
    )


def curve(small: Answers, large: Answers, metric: str, sure: Floats) -> tuple[Point, ...]:
    """Defer a growing share, the least `sure` [N] first."""
    order = np.argsort(sure, kind="stable")
    points = []
    for share in SHARES:
        deferred = np.zeros(len(sure), dtype=bool)
        deferred[order[: round(share * len(sure))]] = True
        counts = np.where(deferred[:, None], large.counts, small.counts)
        points.append(
            Point(
                share=share,
                score=Statistics(counts, METRICS[metric].formula).score(),
                flops=float((small.flops + deferred * large.flops).mean()),
            )
        )
    return tuple(points)


def expected_gain(small: Answers, large: Answers, metric: str, *, seed: int) -> Floats:
    """[N], how much better the large model's answer is, as a regression on the small one's log-probabilities says; each input by a
    regression that has not seen it."""
    try:
        from sklearn.linear_model import RidgeCV
        from sklearn.model_selection import KFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("a learned deferral rule needs scikit-learn: pip install 'shoal[baselines]'") from error
    features = np.array([[len(one), one.mean(), *np.quantile(one, QUANTILES)] for one in small.logprobs])
    formula = METRICS[metric].formula
    gain = formula(large.counts) - formula(small.counts)  # each input's own score
    sign = 1 if METRICS[metric].higher_is_better else -1
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-1, 4, 11)))
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    predicted: Floats = cross_val_predict(model, features, sign * gain, cv=folds)
    return predicted
