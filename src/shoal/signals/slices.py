"""What a sentinel says of slices: accuracy with an interval, how far the slice is from what the sentinel knows, what to label next.

    estimate    mean of P(correct) over the slice's responses
    interval    95% of the accuracies of as many responses drawn with replacement, each right with its own P: what counting labels
                would show if P were right, a binomial's (of one response, 0% or 100%). That P is right on a slice of another kind
                it cannot say; `leave_one_out` measures that
    outside     share of responses of which a statistic lies outside its range in training
    drift       how far the slice's mean of a statistic lies outside the means of the training slices, in standard deviations of the
                training responses, for the statistic where that is most; more than 0.5 beyond what chance does to a mean of so few
                responses, and the estimate is not to be trusted (alarm)

Beside every estimate stand two baselines that see no entropy distribution: a logistic regression on length alone, and ATC (Garg et
al. 2022): the share of responses whose mean log-probability exceeds a threshold, set so that the share equals the accuracy in
training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import InvalidInput
from shoal.signals.sentinel import Sentinel, enough
from shoal.signals.statistics import STATISTICS, Floats
from shoal.signals.traces import Traced

DRIFT_ALARM = 0.5
"""Standard deviations outside the training slices from which an estimate is not to be trusted."""
CHANCE = 2.0
"""Standard errors of a slice's mean that are put down to chance."""
MOST_DRIFT = 1000.0
"""What a drift is at most: a statistic that was the same all through training has no standard deviation."""


@dataclass(frozen=True, kw_only=True)
class SliceEstimate:
    """One slice."""

    name: str
    count: int
    """Responses."""
    estimate: float
    """Accuracy, 0 to 1."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""
    outside: float
    """Share of responses that are unlike those in training."""
    drift: float
    """Standard deviations outside the training slices."""
    drifted: str
    """The statistic where that is most."""
    length_only: float
    """What length alone would estimate."""
    atc: float
    """What ATC would estimate."""
    accuracy: float | None
    """By the labels, where all responses have one."""
    mean_entropy: float
    """Mean over responses of their mean entropy, nats."""
    mean_nll_sum: float
    """Mean over responses of the negative log-probability of the whole; of greedy ones, of G-NLL."""

    @property
    def alarm(self) -> bool:
        """Whether the slice is too far from what the sentinel was fitted on, more than chance explains.

        A mean of n responses has a standard error of 1 / sqrt(n) standard deviations: with n = 4, drift has to exceed 0.5 + 2 / 2.
        """
        return self.drift - CHANCE / math.sqrt(self.count) > DRIFT_ALARM

    @property
    def drift_said(self) -> str:
        """How far it has drifted, as a clause."""
        if self.drift == MOST_DRIFT:
            return f"its {self.drifted} did not vary in training, and here it is another"
        return f"its {self.drifted} lies {self.drift:.2f} standard deviations outside the slices of the training"


@dataclass(frozen=True, kw_only=True)
class Affine:
    """accuracy = factor x estimate + offset, within 0 and 1: for a model whose estimates are off by a constant."""

    factor: float = 1.0
    offset: float = 0.0

    @classmethod
    def fit(cls, estimates: Sequence[SliceEstimate]) -> Affine:
        """From labelled slices, weighed by their counts. One slice, or equal estimates, give an offset alone.

        Raises `InvalidInput` without a labelled slice.
        """
        labelled = [one for one in estimates if one.accuracy is not None]
        if not labelled:
            raise InvalidInput("recalibration needs a slice in which every response has a label ('correct': 0 or 1)")
        x = np.array([one.estimate for one in labelled])
        y = np.array([one.accuracy for one in labelled], dtype=float)
        weights = np.array([one.count for one in labelled], dtype=float)
        mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
        spread = float((weights * (x - mean_x) ** 2).sum())
        factor = float((weights * (x - mean_x) * (y - mean_y)).sum()) / spread if spread > 1e-12 else 1.0
        if factor <= 0:  # labels that turn the order around say that the estimates know nothing here
            raise InvalidInput(
                "the labelled slices contradict the order of the estimates: fit the sentinel anew instead"
            )
        return cls(factor=factor, offset=float(mean_y - factor * mean_x))

    def apply(self, one: SliceEstimate) -> SliceEstimate:
        """The estimate and its interval, recalibrated."""
        estimate, low, high = (
            min(1.0, max(0.0, self.factor * value + self.offset)) for value in (one.estimate, one.low, one.high)
        )
        return replace(one, estimate=estimate, low=low, high=high)


def estimate_slices(sentinel: Sentinel, traced: Sequence[Traced]) -> list[SliceEstimate]:
    """Every slice among the responses, in order of appearance. Raises `InvalidInput` where their k is not the sentinel's."""
    values = sentinel.read([one.trace for one in traced])
    names = list(dict.fromkeys(one.slice for one in traced))
    belongs = np.array([one.slice for one in traced])
    labels = np.array([np.nan if one.correct is None else float(one.correct) for one in traced])
    known = Known(sentinel)
    return [estimate_slice(known, name, values[belongs == name], labels[belongs == name]) for name in names]


class Known:
    """A sentinel, with what estimates are compared with: baselines, and where its training responses lie."""

    def __init__(self, sentinel: Sentinel) -> None:
        self.sentinel = sentinel
        values, slices = sentinel.values, np.array(sentinel.slices)
        used = sentinel.columns
        self.low, self.high = values[:, used].min(axis=0), values[:, used].max(axis=0)
        self.std = np.maximum(values[:, used].std(axis=0), 1e-9)
        means = np.stack([values[slices == name][:, used].mean(axis=0) for name in dict.fromkeys(sentinel.slices)])
        self.lowest_mean, self.highest_mean = means.min(axis=0), means.max(axis=0)
        self.length_model = length_model(values, sentinel.correct)
        self.atc_threshold = atc_threshold(confidence(values), sentinel.correct)


def estimate_slice(known: Known, name: str, values: Floats, labels: Floats) -> SliceEstimate:
    """One slice from its statistics [N, 18] and labels [N], NaN where there is none."""
    sentinel = known.sentinel
    used = values[:, sentinel.columns]
    p = sentinel.probabilities(values)
    mean = used.mean(axis=0)
    away = np.maximum(known.lowest_mean - mean, mean - known.highest_mean).clip(min=0) / known.std
    low, high = interval(p)
    entropy, nll = (float(values[:, STATISTICS.index(column)].mean()) for column in ("mean", "nll_sum"))
    return SliceEstimate(
        name=name,
        count=len(values),
        estimate=float(p.mean()),
        low=low,
        high=high,
        outside=float(((used < known.low) | (used > known.high)).any(axis=1).mean()),
        drift=min(float(away.max()), MOST_DRIFT),
        drifted=STATISTICS[sentinel.columns[int(away.argmax())]],
        length_only=float(known.length_model.predict_proba(log_lengths(values))[:, 1].mean()),
        atc=float((confidence(values) >= known.atc_threshold).mean()),
        accuracy=None if np.isnan(labels).any() else float(labels.mean()),
        mean_entropy=entropy,
        mean_nll_sum=nll,
    )


def interval(p: Floats) -> tuple[float, float]:
    """95% of the accuracies of N responses drawn with replacement from probabilities [N], each right with its own.

    A response so drawn is right with the mean of p, whichever it is: the number of right ones is binomial.
    """
    from scipy.stats import binom

    low, high = binom.ppf([0.025, 0.975], len(p), min(1.0, p.mean())) / len(p)
    return float(low), float(high)


def label_next(estimates: Sequence[SliceEstimate]) -> str | None:
    """The slice of which labels would tell most; None where all have them.

    The rule: of slices with an alarm the one that has drifted furthest; without an alarm, the one with the widest interval.
    """
    open_ = [one for one in estimates if one.accuracy is None]
    if not open_:
        return None
    return max(open_, key=lambda one: (one.drift if one.alarm else 0.0, one.high - one.low)).name


def leave_one_out(sentinel: Sentinel) -> list[SliceEstimate]:
    """Each training slice, estimated by a sentinel fitted on the others: what to expect on slices that nobody has labelled.

    Slices without which too few right or wrong responses are left are passed over. Raises `InvalidInput` with fewer than three.
    """
    names = list(dict.fromkeys(sentinel.slices))
    if len(names) < 3:
        raise InvalidInput(f"leaving one slice out needs three slices or more, there are {len(names)}")
    found, slices = [], np.array(sentinel.slices)
    for name in names:
        inside = slices == name
        if not enough(sentinel.correct[~inside]):
            continue
        known = Known(sentinel.without(name))
        labels = sentinel.correct[inside].astype(float)
        found.append(estimate_slice(known, name, sentinel.values[inside], labels))
    return found


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far estimates are from labels."""

    mean_absolute_error: float
    """Over slices, each the same weight; shares, not percent."""
    rank_correlation: float
    """Spearman's, NaN where all estimates or all accuracies are equal."""


def errors_of(found: Sequence[SliceEstimate]) -> dict[str, Errors]:
    """Of the sentinel, of length alone and of ATC, over slices that all have labels, two or more."""
    from scipy.stats import spearmanr

    accuracy = np.array([one.accuracy for one in found], dtype=float)
    errors = {}
    for name, column in (("sentinel", "estimate"), ("length alone", "length_only"), ("ATC", "atc")):
        estimated = np.array([getattr(one, column) for one in found])
        constant = np.ptp(estimated) == 0 or np.ptp(accuracy) == 0
        errors[name] = Errors(
            mean_absolute_error=float(np.abs(estimated - accuracy).mean()),
            rank_correlation=float("nan") if constant else float(spearmanr(estimated, accuracy).statistic),
        )
    return errors


def log_lengths(values: Floats) -> Floats:
    """[N, 1], what the length-only baseline reads."""
    found: Floats = np.log(values[:, [STATISTICS.index("length")]])
    return found


def length_model(values: Floats, correct: NDArray[np.bool_]) -> Any:
    """Logistic regression on the logarithm of the length."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression().fit(log_lengths(values), correct)


def confidence(values: Floats) -> Floats:
    """[N], mean log-probability of a response's tokens: what ATC puts its threshold on."""
    found: Floats = -values[:, STATISTICS.index("nll_mean")]
    return found


def atc_threshold(scores: Floats, correct: NDArray[np.bool_]) -> float:
    """The score from which as many responses lie above as are right.

    >>> atc_threshold(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, False, True, False]))
    0.4
    """
    ranked = np.sort(scores)[::-1]
    right = int(correct.sum())
    return float(ranked[right - 1]) if right else float("inf")
