"""`DepthPlan`: nesting, validation, JSON."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from shoal.depth.plan import ALWAYS, Dense, DepthPlan
from shoal.errors import InvalidPlan

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=200)


@st.composite
def plans(draw: st.DrawFn) -> DepthPlan:
    """Any plan of up to 12 layers, with or without reduced prompt layers."""
    cutoffs = draw(st.lists(st.one_of(st.integers(0, 40), st.just(ALWAYS)), min_size=0, max_size=11))
    cutoffs.insert(draw(st.integers(0, len(cutoffs))), ALWAYS)
    idle = [layer for layer, cutoff in enumerate(cutoffs) if cutoff == 0]
    skipped = draw(st.sets(st.sampled_from(idle))) if idle else set()
    reduced = draw(st.booleans())
    kept = tuple(layer for layer in range(len(cutoffs)) if layer not in skipped)
    horizon = draw(st.none() | st.integers(0, 50))
    return DepthPlan(tuple(cutoffs), prompt_layers=kept if reduced else None, horizon=horizon)


@EXAMPLES
@given(plans())
def test_plans_nest(plan: DepthPlan) -> None:
    """A layer that runs at a clock ran at every earlier one and read the prompt, so all that it reads exists."""
    sets = [set(plan.active(clock)) for clock in range(45)]
    assert all(after <= before for before, after in pairwise(sets))
    assert sets[0] <= {layer for layer, runs in enumerate(plan.runs_prompt) if runs}
    assert sets[-1], "some layer always runs"
    schedule = reference.from_cutoffs(plan.cutoffs)
    assert all(schedule(clock) == active for clock, active in enumerate(sets))
    assert [plan.depth(clock) for clock in range(45)] == [len(active) for active in sets]


@EXAMPLES
@given(plans(), st.integers(0, 60))
def test_mean_depth_by_hand(plan: DepthPlan, num_passes: int) -> None:
    ran = sum(len(plan.active(clock)) for clock in range(num_passes))
    expected = ran / (num_passes * plan.num_layers) if num_passes else 1.0
    assert plan.mean_depth(num_passes) == pytest.approx(expected)


@EXAMPLES
@given(plans())
def test_json_round_trip(plan: DepthPlan) -> None:
    again = DepthPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert hash(again) == hash(plan)


def test_dense_runs_everything() -> None:
    plan = Dense().plan(5)
    assert plan.cutoffs == (ALWAYS,) * 5
    assert plan.active(10**6) == (0, 1, 2, 3, 4)
    assert plan.horizon is None


def test_cutoffs_nothing_reaches_are_always() -> None:
    assert DepthPlan((math.inf, 2**80, 3)) == DepthPlan((ALWAYS, ALWAYS, 3))  # type: ignore[arg-type]


def test_prompt_layers_are_a_set() -> None:
    assert DepthPlan((ALWAYS, 0, 4), prompt_layers=(2, 0, 0)).prompt_layers == (0, 2)


@pytest.mark.parametrize(
    ("cutoffs", "fields", "message"),
    [
        ((), {}, "at least one layer"),
        ((ALWAYS, 1.5), {}, r"must be whole numbers, one per layer, got \(2147483647, 1.5\)"),
        ((ALWAYS, "2"), {}, "must be whole numbers"),
        ((ALWAYS, math.nan), {}, "must be whole numbers"),
        (None, {}, "must be whole numbers"),
        ((ALWAYS, -1), {}, f"0 or more .*{ALWAYS}.*, got -1"),
        ((5, 3), {}, "at least one layer must always run"),
        ((ALWAYS, 0), {"prompt_layers": (0, 2)}, r"within 0\.\.1, got \[0, 2\]"),
        ((ALWAYS, 0), {"prompt_layers": (-1, 0)}, r"within 0\.\.1, got \[-1, 0\]"),
        ((ALWAYS, 1, ALWAYS), {"prompt_layers": (0,)}, r"layers \[1, 2\] run for generated tokens"),
        ((ALWAYS,), {"prompt_layers": ()}, r"layers \[0\] run for generated tokens"),
    ],
)
def test_refusals_say_what_is_allowed(cutoffs: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        DepthPlan(cutoffs, **fields)
