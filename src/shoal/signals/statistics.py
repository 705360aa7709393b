"""What a decoding-entropy trace says in a few numbers (Entropy Sentinel, arXiv 2601.09001: eleven in v1, seventeen in v4).

Of the entropies x of one response, n tokens: mean, unbiased standard deviation, largest, five quantiles, skewness, kurtosis (not
excess), and their sum, which is called SEA. Of the negative log-probabilities of its tokens: mean, largest and sum; LNTP, the
geometric mean of the tokens' probabilities; MTP, the lowest of them; and the perplexity. LNTP and MTP are the paper's
definitions; its repository computes something else under these names.

A response of one token has no standard deviation: it counts as 0, and so do skewness and kurtosis, as in a trace that is constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.engine.entropy import EntropyTrace
from shoal.errors import InvalidInput

Floats = NDArray[np.float64]

QUANTILES = (0.10, 0.25, 0.50, 0.75, 0.90)
"""Of the entropies, with linear interpolation."""
SMALL = 1e-8
"""Added below the moments, as in the paper's code."""

GROUP = 256
"""Traces that are padded together."""

DISTRIBUTION = ("mean", "std", "max", "q10", "q25", "q50", "q75", "q90", "skewness", "kurtosis")
"""How the entropies are distributed: v4's ten."""
FULL = (*DISTRIBUTION, "sea", "nll_mean", "nll_max", "nll_sum", "lntp", "mtp", "perplexity")
"""All seventeen."""
STATISTICS = (*FULL, "length")
"""The columns: all seventeen, and the tokens of the response, which only the baseline reads."""
FEATURES: dict[str, tuple[str, ...]] = {
    "17d": FULL,
    "11d": (*DISTRIBUTION, "sea"),
    "10d": DISTRIBUTION,
    "3d": ("max", "sea", "nll_sum"),
    "1d": ("sea",),
}
"""Sets that a sentinel may read, by name: v1's eleven and those of v4."""


def statistics(traces: Sequence[EntropyTrace]) -> Floats:
    """[N, 18], a row of `STATISTICS` per trace. Raises `InvalidInput` for a trace of no tokens.

    Traces of about the same length go together, padded to the longest of them: [GROUP, n].
    """
    lengths = np.array([len(trace.entropies) for trace in traces], dtype=np.int64)
    if not lengths.all():
        raise InvalidInput(f"trace {int(np.flatnonzero(lengths == 0)[0])} has no tokens: leave such responses out")
    order, rows = np.argsort(lengths, kind="stable"), np.zeros((len(traces), len(STATISTICS)))
    for begin in range(0, len(traces), GROUP):
        places = order[begin : begin + GROUP]
        rows[places] = statistics_of([traces[place] for place in places], lengths[places])
    return rows


def statistics_of(traces: Sequence[EntropyTrace], lengths: NDArray[np.int64]) -> Floats:
    """[N, 18], all in one go over traces padded to the longest."""
    entropies, nlls = (
        padded([getattr(trace, name) for trace in traces], int(lengths.max())) for name in ("entropies", "nlls")
    )
    nll_mean, nll_max = nlls.sum(axis=1) / lengths, largest(nlls, lengths)
    columns = [
        *distribution(entropies, lengths),
        entropies.sum(axis=1),
        nll_mean,
        nll_max,
        nlls.sum(axis=1),
        np.exp(-nll_mean),
        np.exp(-nll_max),
        np.exp(np.minimum(nll_mean, 88.0)),  # e^88.7 is the end of float32, in which forests read
        lengths.astype(float),
    ]
    return np.stack(columns, axis=1)


def columns_of(features: str) -> list[int]:
    """The columns of a set of `FEATURES`."""
    return [STATISTICS.index(name) for name in FEATURES[features]]


def padded(rows: Sequence[Sequence[float]], width: int) -> Floats:
    """[N, width] with zeros behind each row."""
    filled = np.zeros((len(rows), width))
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
    return filled


def largest(values: Floats, lengths: NDArray[np.int64]) -> Floats:
    """[N], of the first `lengths` of each row."""
    found: Floats = np.where(np.arange(values.shape[1]) < lengths[:, None], values, -np.inf).max(axis=1)
    return found


def distribution(values: Floats, lengths: NDArray[np.int64]) -> list[Floats]:
    """The columns of `DISTRIBUTION`, [N] each, of values padded with zeros."""
    inside = np.arange(values.shape[1]) < lengths[:, None]
    mean = values.sum(axis=1) / lengths
    away = np.where(inside, values - mean[:, None], 0.0)
    std = np.sqrt((away**2).sum(axis=1) / np.maximum(lengths - 1, 1))
    ranked = np.sort(np.where(inside, values, np.inf), axis=1)
    rows = np.arange(len(values))
    quantiles = []
    for share in QUANTILES:
        place = share * (lengths - 1)
        below = place.astype(np.int64)
        low, high = ranked[rows, below], ranked[rows, np.minimum(below + 1, lengths - 1)]
        quantiles.append(low + (place - below) * (high - low))
    third, fourth = ((away**power).sum(axis=1) / lengths for power in (3, 4))
    moments = [third / (std**3 + SMALL), fourth / (std**4 + SMALL)]
    return [mean, std, ranked[rows, lengths - 1], *quantiles, *moments]
