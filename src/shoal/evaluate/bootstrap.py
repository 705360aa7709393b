"""Scores with 95% bootstrap intervals over inputs, and paired differences between two systems.

A corpus metric is a formula of sums: BLEU of matched and possible n-grams, a rate of errors and slots, a mean of values and ones.
`Statistics` keeps what each input adds to these sums, so a resample is a weighted sum of rows, and two systems are compared on
the *same* resamples (Koehn 2004, paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shoal.errors import InvalidInput

RESAMPLES = 1000
"""Bootstrap resamples behind an interval."""

Floats = NDArray[np.float64]
Formula = Callable[[Floats], Floats]
"""From sums [R, K] to scores [R], each row on its own."""


@dataclass(frozen=True)
class Score:
    """A metric, or a difference of one, with its 95% bootstrap interval over inputs."""

    value: float
    """The metric on all inputs."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def __format__(self, spec: str) -> str:
        """Value and interval, each as the format `spec` says: `f"{score:+.1f}"` is `+0.4 [-0.1, +0.9]`."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return f"{self:.1f}"

    def times(self, factor: float) -> Score:
        """In another unit, such as percent."""
        return Score(factor * self.value, factor * self.low, factor * self.high)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a metric needs of each input."""

    counts: Floats
    """[N, K]: what each input adds to the sums."""
    formula: Formula
    """The metric of the sums."""

    def score(self, *, seed: int = 0) -> Score:
        """The metric with its percentile interval; `seed` draws the resamples."""
        value = self.formula(self.counts.sum(axis=0, keepdims=True))[0]
        return _interval(value, self.formula(resample_weights(len(self.counts), seed) @ self.counts))

    def minus(self, other: Statistics, *, seed: int = 0) -> Score:
        """This system's metric minus that of `other` on the same inputs, by the same resamples.

        Raises `InvalidInput` where the numbers of inputs differ.
        """
        if len(self.counts) != len(other.counts):
            raise InvalidInput(
                f"a paired difference of {len(self.counts)} and {len(other.counts)} inputs: give the same"
            )
        weights = resample_weights(len(self.counts), seed)
        value, differences = (
            self.formula(w @ self.counts) - other.formula(w @ other.counts)
            for w in (np.ones((1, len(self.counts))), weights)
        )
        return _interval(value[0], differences)

    def of(self, inputs: Sequence[int]) -> Statistics:
        """The same of some inputs only."""
        return Statistics(self.counts[list(inputs)], self.formula)


def _interval(value: np.float64, resampled: Floats) -> Score:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(float(value), float(low), float(high))


@lru_cache(maxsize=8)
def resample_weights(num_inputs: int, seed: int) -> Floats:
    """[RESAMPLES, N]: how often each input is drawn in each resample; rows add up to N."""
    draws = np.random.default_rng(seed).integers(num_inputs, size=(RESAMPLES, num_inputs))
    return np.stack([np.bincount(drawn, minlength=num_inputs) for drawn in draws]).astype(np.float64)


def quotient(sums: Floats) -> Floats:
    """The formula of rates and means: first column over second, 0 over 0 being 0."""
    top, bottom = sums[:, 0], sums[:, 1]
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Score:
    """Sum over sum, one pair per input, with a percentile bootstrap interval. Denominators of 1 make it a mean.

    >>> ratio([1, 0, 2], [2, 2, 2]).value
    0.5
    """
    counts = np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=1)
    return Statistics(counts, quotient).score(seed=seed)
