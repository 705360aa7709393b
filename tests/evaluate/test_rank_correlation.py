"""Spearman's correlation, against scipy's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidInput
from shoal.evaluate.rank_correlation import rank_correlation, ranks

NAMES = ("skipdecode", "unified", "d3", "hierarchical", "early-termination")
few_values = st.lists(st.integers(-3, 3).map(float), min_size=len(NAMES), max_size=len(NAMES))


def test_by_hand() -> None:
    untuned = {"unified": 0.9, "d3": 0.7, "skipdecode": 0.5}
    assert rank_correlation(untuned, {"d3": 61.0, "unified": 64.0, "skipdecode": 63.0}) == pytest.approx(0.5)
    assert rank_correlation(untuned, {name: -score for name, score in untuned.items()}) == pytest.approx(-1)
    assert rank_correlation(untuned, {name: score**9 for name, score in untuned.items()}) == pytest.approx(1)
    assert math.isnan(rank_correlation(untuned, dict.fromkeys(untuned, 1.0)))
    assert ranks([5.0, 1.0, 5.0]).tolist() == [2.5, 1.0, 2.5]


@given(few_values, few_values)
@settings(deadline=None)  # the first call imports scipy
def test_as_scipy(first: list[float], second: list[float]) -> None:
    """Ties among them; where one side is constant both say that there is no order."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed (extra 'baselines')")
    ours = rank_correlation(dict(zip(NAMES, first, strict=True)), dict(zip(NAMES, second, strict=True)))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic)


@pytest.mark.parametrize(
    ("untuned", "tuned"), [({"d3": 1.0}, {"d3": 2.0}), ({}, {}), ({"d3": 1.0, "unified": 2.0}, {"d3": 2.0})]
)
def test_different_policies_are_refused(untuned: dict[str, float], tuned: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="the same two policies or more"):
        rank_correlation(untuned, tuned)
