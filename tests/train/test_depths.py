"""Which depth a batch is trained at: evenly, or by need."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.depth.plan import ALWAYS
from shoal.depth.policies import POLICIES
from shoal.errors import InvalidPlan
from shoal.train.depths import EVEN_ROUNDS, KEPT, RecentLosses, by_need, even, plans_for, shares

DEPTHS = (1.0, 1 / 2, 1 / 4)


def losses(*values: float) -> RecentLosses:
    """One loss for each of `DEPTHS`."""
    recent = RecentLosses()
    for depth, value in zip(DEPTHS, values, strict=True):
        recent.add(depth, value)
    return recent


def test_even_rounds_use_every_depth_once_and_repeatably():
    drawn = [even(4, batch, seed=3) for batch in range(40)]
    assert drawn == [even(4, batch, seed=3) for batch in range(40)]
    assert drawn != [even(4, batch, seed=4) for batch in range(40)]
    for cycle in range(0, 40, 4):
        assert sorted(drawn[cycle : cycle + 4]) == [0, 1, 2, 3]
    assert len({tuple(drawn[cycle : cycle + 4]) for cycle in range(0, 40, 4)}) > 1


@pytest.mark.parametrize("policy", POLICIES)
def test_plans_are_those_of_the_policy(policy):
    dense, half = plans_for(policy, (1.0, 0.5), 12, horizon=8, warmup_layers=1)
    assert dense.cutoffs == (ALWAYS,) * 12
    assert half == POLICIES[policy](depth=0.5).plan(12, prompt_tokens=0, max_new_tokens=8)
    with pytest.raises(InvalidPlan):
        plans_for(policy, (0.01,), 12, horizon=8, warmup_layers=1)


def test_warmup_layers_reach_the_policy_that_has_them():
    (plan,) = plans_for("skipdecode", (0.25,), 12, horizon=8, warmup_layers=0)
    assert plan.cutoffs[0] == 0


def test_shares_are_those_of_the_worked_example():
    assert shares(DEPTHS, losses(2.0, 2.1, 2.3)) == pytest.approx([1 / 6, 1 / 6 + 1 / 8, 1 / 6 + 3 / 8])
    assert shares(DEPTHS, losses(2.0, 1.9, 2.3)) == pytest.approx([1 / 6, 1 / 6, 1 / 6 + 1 / 2])
    assert shares(DEPTHS, losses(2.0, 1.9, 2.0)) == pytest.approx([1 / 3] * 3)
    assert shares((1.0, *DEPTHS), losses(2.0, 2.1, 2.3)) == pytest.approx([1 / 8, 1 / 8, 1 / 8 + 1 / 8, 1 / 8 + 3 / 8])


@given(st.lists(st.floats(0, 20), min_size=3, max_size=3))
def test_shares_are_probabilities_and_no_depth_is_forgotten(values):
    found = shares(DEPTHS, losses(*values))
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 1 / 6 - 1e-9


def test_recent_means_forget_and_survive_a_save():
    recent = RecentLosses()
    for loss in (4.0, 2.0, 1.0):
        recent.add(0.5, loss)
    expected = (4 * KEPT**2 + 2 * KEPT + 1) / (KEPT**2 + KEPT + 1)
    assert recent.mean(0.5) == pytest.approx(expected)
    assert RecentLosses.from_state(recent.state()).mean(0.5) == recent.mean(0.5)


def test_need_starts_evenly_and_then_follows_the_losses():
    recent, first = losses(2.0, 2.0, 3.0), EVEN_ROUNDS * len(DEPTHS)
    for batch in range(first):
        assert by_need(DEPTHS, RecentLosses(), batch, seed=5) == even(3, batch, seed=5)
    drawn = [by_need(DEPTHS, recent, batch, seed=5) for batch in range(first, first + 600)]
    assert drawn == [by_need(DEPTHS, recent, batch, seed=5) for batch in range(first, first + 600)]
    counts = Counter(drawn)
    assert counts[2] == pytest.approx(400, abs=50)
    assert counts[0] == pytest.approx(100, abs=40)
