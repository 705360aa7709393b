"""SkipDecode against its specification: the table, the bounds, the mean, active sets, both clocks, the prompt's layers."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from shoal.depth.plan import ALWAYS
from shoal.depth.skipdecode import SkipDecode, exit_at, exit_bounds
from shoal.errors import InvalidPlan

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=300)


@st.composite
def bounded(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(L, W, m, M, N) that the method allows."""
    num_layers = draw(st.integers(1, 40))
    warmup = draw(st.integers(0, num_layers - 1))
    lowest = draw(st.integers(warmup + 1, num_layers))
    highest = draw(st.integers(lowest, num_layers))
    return num_layers, warmup, lowest, highest, draw(st.integers(1, 200))


@pytest.mark.parametrize(
    ("num_layers", "bounds"),
    [(24, {2: (6, 18), 3: (4, 12), 4: (3, 9), 5: (3, 7)}), (32, {2: (8, 24), 3: (5, 16), 4: (4, 12), 5: (3, 10)})],
)
def test_table_of_default_bounds(num_layers: int, bounds: dict[int, tuple[int, int]]) -> None:
    """The rule's table for OPT-1.3B and OPT-6.7B: (m, M) for what the paper calls 2x to 5x, and all layers for 1x."""
    for speedup, expected in bounds.items():
        assert exit_bounds(num_layers, 1 / speedup, 1) == expected
        assert SkipDecode(depth=1 / speedup).bounds(num_layers) == expected
    assert exit_bounds(num_layers, 1.0, 1) == (num_layers, num_layers)


@EXAMPLES
@given(st.integers(2, 64), st.data())
def test_bounds_for_a_depth(num_layers: int, data: st.DataObject) -> None:
    """W+1 <= m <= M <= L, and (m + M) / 2 is the nearest half layer to L x depth."""
    warmup = data.draw(st.integers(0, num_layers - 1))
    depth = data.draw(st.floats((warmup + 1) / num_layers, 1.0))
    lowest, highest = exit_bounds(num_layers, depth, warmup)
    assert warmup + 1 <= lowest <= highest <= num_layers
    assert abs((lowest + highest) / 2 - num_layers * depth) <= 0.25 + 1e-6
    assert (lowest, highest) == reference.exits_for_depth(num_layers, depth, warmup)


@EXAMPLES
@given(bounded())
def test_exit_points_fall_within_their_bounds(given_bounds: tuple[int, int, int, int, int]) -> None:
    """Never rising, from M to m, the exact formula rounded halves up; their mean over N is (M+m)/2 to half a layer."""
    _, _, lowest, highest, horizon = given_bounds
    exits = [exit_at(clock, lowest, highest, horizon) for clock in range(2 * horizon)]
    assert all(before >= after for before, after in pairwise(exits))
    assert exits[0] == (highest if horizon > 1 else lowest)
    assert set(exits[horizon - 1 :]) == {lowest}
    for clock, got in enumerate(exits):
        progress = Fraction(min(clock, horizon - 1), horizon - 1) if horizon > 1 else Fraction(1)
        assert got == math.floor(highest - (highest - lowest) * progress + Fraction(1, 2))
    if horizon > 1:  # a horizon of one clock is at the minimum from the start
        assert abs(sum(exits[:horizon]) / horizon - (lowest + highest) / 2) <= 0.5


@EXAMPLES
@given(bounded(), st.integers(0, 50), st.sampled_from(["generated", "column"]))
def test_active_sets_are_the_specifications(
    given_bounds: tuple[int, int, int, int, int], prompt_tokens: int, clock: str
) -> None:
    """Cutoffs give at every clock the bottom W and the top exit(i) - W layers, on both clocks, past the horizon too."""
    num_layers, warmup, lowest, highest, horizon = given_bounds
    policy = SkipDecode(
        min_layers=lowest, max_layers=highest, horizon=horizon, warmup_layers=warmup, clock=clock
    )  # fmt: skip
    plan = policy.plan(num_layers, prompt_tokens=prompt_tokens, max_new_tokens=999)
    expected = reference.skipdecode(
        num_layers, min_exit=lowest, max_exit=highest, length=horizon, warmup=warmup,
        first_clock=prompt_tokens if clock == "column" else 0,
    )  # fmt: skip
    for i in range(horizon + 5):
        assert set(plan.active(i)) == expected(i)
        assert plan.depth(i) == len(expected(i))
    assert plan.prompt_layers is None
    left = max(0, horizon - prompt_tokens) if clock == "column" else horizon
    assert plan.horizon == (left if lowest < highest else None)
    if plan.horizon is not None:  # from there on nothing changes
        assert plan.active(plan.horizon) == plan.active(ALWAYS - 1)


def test_column_clock_worked_example() -> None:
    """L = 6, W = 1, m = 2, M = 4, N = 5 exits 4 4 3 3 2 2: after a prompt of 3 the first decode pass is at column 3."""
    policy = SkipDecode(min_layers=2, max_layers=4, horizon=5, clock="column")
    assert policy.plan(6, prompt_tokens=0).cutoffs == (ALWAYS, 0, 0, 2, 4, ALWAYS)
    assert policy.plan(6, prompt_tokens=3).cutoffs == (ALWAYS, 0, 0, 0, 1, ALWAYS)
    assert policy.plan(6, prompt_tokens=99).cutoffs == (ALWAYS, 0, 0, 0, 0, ALWAYS)


@EXAMPLES
@given(bounded())
def test_reduced_prompt_runs_what_the_first_clock_may_run(given_bounds: tuple[int, int, int, int, int]) -> None:
    num_layers, warmup, lowest, highest, horizon = given_bounds
    policy = SkipDecode(
        min_layers=lowest, max_layers=highest, horizon=horizon, warmup_layers=warmup, prompt="max_layers"
    )  # fmt: skip
    plan = policy.plan(num_layers)
    expected = set(range(warmup)) | set(range(num_layers - (highest - warmup), num_layers))
    assert set(plan.prompt_layers or ()) == expected
    assert sum(plan.runs_prompt) == highest


def test_open_horizon_is_the_requests_length() -> None:
    """In generated tokens; in columns with the prompt's, so that the completion still sees a decay."""
    policy = SkipDecode(depth=0.5)
    assert policy.plan(8, max_new_tokens=20) == SkipDecode(depth=0.5, horizon=20).plan(8, max_new_tokens=99)
    column = SkipDecode(depth=0.5, clock="column")
    told = SkipDecode(depth=0.5, clock="column", horizon=30)
    assert column.plan(8, prompt_tokens=10, max_new_tokens=20) == told.plan(8, prompt_tokens=10)


def test_a_long_horizon_costs_nothing_to_plan() -> None:
    """A billion clocks: the middle one is where half of the decay is over."""
    plan = SkipDecode(min_layers=2, max_layers=4, horizon=10**9 + 1).plan(6)
    assert plan.cutoffs == (ALWAYS, 0, 0, 250_000_001, 750_000_001, ALWAYS)


@pytest.mark.parametrize(
    ("fields", "num_layers", "message"),
    [
        ({}, 12, "either depth, or min_layers and max_layers"),
        ({"depth": 0.5, "min_layers": 2, "max_layers": 4}, 12, "either depth, or min_layers and max_layers"),
        ({"min_layers": 2}, 12, "one of them is missing"),
        ({"max_layers": 2}, 12, "one of them is missing"),
        ({"min_layers": 5, "max_layers": 4}, 12, "min_layers 5 is above max_layers 4"),
        ({"depth": 0.0}, 12, "above 0 and at most 1, got 0.0"),
        ({"depth": 1.01}, 12, "above 0 and at most 1, got 1.01"),
        ({"depth": "0.5"}, 12, "above 0 and at most 1, got '0.5'"),
        ({"min_layers": 2.5, "max_layers": 4}, 12, "min_layers must be a whole number, got 2.5"),
        ({"depth": 0.5, "horizon": 2.5}, 12, "horizon must be a whole number, got 2.5"),
        ({"depth": 0.5, "warmup_layers": "1"}, 12, "warmup_layers must be a whole number, got '1'"),
        ({"depth": math.nan}, 12, "above 0 and at most 1, got nan"),
        ({"depth": 0.5, "horizon": 0}, 12, "1 or more clocks, got 0"),
        ({"depth": 0.5, "warmup_layers": -1}, 12, "0 or more, got -1"),
        ({"depth": 0.5, "clock": "wall"}, 12, "'generated' or 'column', got 'wall'"),
        ({"depth": 0.5, "prompt": "none"}, 12, "'all' or 'max_layers', got 'none'"),
        ({"depth": 0.1}, 12, r"depth 0.1 is outside .* between 2/12 = 0.167 and 1"),
        ({"depth": 0.3, "warmup_layers": 4}, 12, r"12 layers with 4 warm-up .* between 5/12 = 0.417 and 1"),
        ({"min_layers": 1, "max_layers": 4}, 12, r"within warmup_layers \+ 1 = 2 and 12"),
        ({"min_layers": 2, "max_layers": 13}, 12, r"within warmup_layers \+ 1 = 2 and 12"),
        ({"depth": 0.5, "warmup_layers": 12}, 12, "warmup_layers must be at most 11 for a model of 12 layers, got 12"),
        ({"min_layers": 9, "max_layers": 9, "warmup_layers": 9}, 8, "at most 7 for a model of 8 layers, got 9"),
    ],
)
def test_refusals_name_the_range(fields: dict[str, Any], num_layers: int, message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        SkipDecode(**fields).plan(num_layers)
