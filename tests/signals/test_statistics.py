"""Statistics of traces against plain ones, one trace at a time."""

from __future__ import annotations

import math
import statistics as plain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.entropy import EntropyTrace
from shoal.errors import InvalidInput
from shoal.signals.statistics import DISTRIBUTION, FEATURES, FULL, STATISTICS, columns_of, statistics


def slowly(trace: EntropyTrace) -> dict[str, float]:
    """By the paper's definitions, in Python's own numbers."""
    x, nlls, n = list(trace.entropies), list(trace.nlls), len(trace.entropies)
    mean, std = math.fsum(x) / n, plain.stdev(x) if n > 1 else 0.0
    ranked = sorted(x)

    def quantile(share: float) -> float:
        place = share * (n - 1)
        below = math.floor(place)
        return ranked[below] + (place - below) * (ranked[min(below + 1, n - 1)] - ranked[below])

    probabilities = [math.exp(-nll) for nll in nlls]
    return {
        "mean": mean,
        "std": std,
        "max": max(x),
        **{f"q{share}": quantile(share / 100) for share in (10, 25, 50, 75, 90)},
        "skewness": math.fsum((value - mean) ** 3 for value in x) / n / (std**3 + 1e-8),
        "kurtosis": math.fsum((value - mean) ** 4 for value in x) / n / (std**4 + 1e-8),
        "sea": math.fsum(x),
        "nll_mean": math.fsum(nlls) / n,
        "nll_max": max(nlls),
        "nll_sum": math.fsum(nlls),
        "lntp": math.prod(p ** (1 / n) for p in probabilities),
        "mtp": min(probabilities),
        "perplexity": math.exp(math.fsum(nlls) / n),
        "length": n,
    }


VALUES = st.floats(0, 12, allow_subnormal=False)
TRACES = st.lists(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=30), min_size=1, max_size=8)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(made=TRACES)
def test_they_equal_a_slow_reference(made: list[list[tuple[float, float]]]) -> None:
    """Of all lengths together, one token among them."""
    traces = [EntropyTrace(top_k=20, entropies=tuple(e for e, _ in m), nlls=tuple(n for _, n in m)) for m in made]
    for row, trace in zip(statistics(traces), traces, strict=True):
        assert dict(zip(STATISTICS, row, strict=True)) == pytest.approx(slowly(trace), rel=1e-6, abs=1e-6)


def test_company_does_not_matter() -> None:
    """Of more traces than are padded together, one of them far longer, each row is what it is alone."""
    rng = np.random.default_rng(0)
    traces = [
        EntropyTrace(top_k=20, entropies=tuple(x := rng.gamma(1.0, size=n)), nlls=tuple(x))
        for n in [3000, *rng.integers(1, 9, 600).tolist()]
    ]
    alone = np.concatenate([statistics([trace]) for trace in traces])
    np.testing.assert_allclose(statistics(traces), alone, rtol=1e-9, atol=1e-12)


def test_numpy_agrees_on_the_distribution() -> None:
    x = np.random.default_rng(0).gamma(1.0, size=23)
    (row,) = statistics([EntropyTrace(top_k=20, entropies=tuple(x), nlls=tuple(x))])
    got: dict[str, Any] = dict(zip(STATISTICS, row, strict=True))
    assert got["std"] == pytest.approx(np.std(x, ddof=1))
    for share in (10, 25, 50, 75, 90):
        assert got[f"q{share}"] == pytest.approx(np.quantile(x, share / 100))


def test_one_token_and_equal_ones() -> None:
    """No spread is 0, not NaN."""
    for entropies in ((0.7,), (0.7, 0.7, 0.7), (0.0, 0.0)):
        (row,) = statistics([EntropyTrace(top_k=20, entropies=entropies, nlls=entropies)])
        got = dict(zip(STATISTICS, row, strict=True))
        assert np.isfinite(row).all()
        assert (got["std"], got["skewness"], got["kurtosis"]) == pytest.approx((0, 0, 0), abs=1e-6)


def test_the_sets() -> None:
    assert [len(FEATURES[name]) for name in ("17d", "11d", "10d", "3d", "1d")] == [17, 11, 10, 3, 1]
    assert FEATURES["11d"] == (*DISTRIBUTION, "sea")
    assert [STATISTICS[column] for column in columns_of("17d")] == list(FULL)
    assert [STATISTICS[column] for column in columns_of("3d")] == ["max", "sea", "nll_sum"]


def test_a_trace_without_tokens() -> None:
    empty = EntropyTrace(top_k=20, entropies=(), nlls=())
    with pytest.raises(InvalidInput, match="trace 0 has no tokens"):
        statistics([empty])
    assert statistics([]).shape == (0, 18)
