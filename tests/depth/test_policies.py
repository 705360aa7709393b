"""The policies beside SkipDecode: their layer sets against the reference, their means, their bounds, and the registry."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_plans import random_policy, specification
from shoal.depth.decaying import DecayingDepth
from shoal.depth.early_termination import EarlyTermination
from shoal.depth.hierarchical import HierarchicalSkip
from shoal.depth.plan import ALWAYS, Dense
from shoal.depth.policies import POLICIES, policy_at
from shoal.depth.skipdecode import SkipDecode
from shoal.depth.unified import UnifiedSkip
from shoal.errors import InvalidPlan

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=300)


@EXAMPLES
@given(st.integers(2, 40), st.integers(0, 10**6), st.integers(1, 20))
def test_layer_sets_are_those_of_the_reference(num_layers: int, seed: int, prompt_tokens: int) -> None:
    """Any policy with any settings, at every clock up to well beyond its horizon; prompts run the layers that it names."""
    policy = random_policy(random.Random(seed), num_layers)
    plan = policy.plan(num_layers, prompt_tokens=prompt_tokens, max_new_tokens=16)
    schedule, prompt_layers = specification(policy, num_layers, prompt_tokens)
    for clock in range(40):
        assert set(plan.active(clock)) == schedule(clock), (policy, clock)
    assert plan.prompt_layers is None or list(plan.prompt_layers) == sorted(prompt_layers or [])


@EXAMPLES
@given(st.sampled_from(sorted(POLICIES)), st.integers(8, 48), st.floats(0.3, 1), st.integers(16, 80))
def test_the_mean_is_what_was_asked_for(name: str, num_layers: int, depth: float, horizon: int) -> None:
    """Over the horizon, to what whole layers cost: Unified rounds down, SkipDecode's bounds to half layers, D3 starts with all."""
    plan = policy_at(name, depth, horizon=horizon).plan(num_layers, prompt_tokens=4, max_new_tokens=horizon)
    layers = num_layers * plan.mean_depth(horizon)
    off = {"unified": 1.0, "skipdecode": 1.0, "early-termination": 1.0, "d3": 1.0 + num_layers / horizon}.get(
        name, 0.51
    )
    assert abs(layers - num_layers * depth) <= off + num_layers / horizon


def test_worked_examples() -> None:
    """Those of the docstrings."""

    def kept(cutoffs: tuple[int, ...]) -> list[int]:
        return [layer for layer, cutoff in enumerate(cutoffs) if cutoff == ALWAYS]

    assert kept(UnifiedSkip(depth=1 / 3).plan(12).cutoffs) == [0, 4, 8, 11]
    assert kept(UnifiedSkip(depth=2 / 3).plan(12).cutoffs) == [0, 1, 2, 3, 4, 5, 6, 11]
    assert HierarchicalSkip(depth=1 / 2, horizon=30).plan(12).cutoffs == (
        *(ALWAYS, 0, 20, 0, ALWAYS, 0, 20, 0, ALWAYS, 0, 20, ALWAYS),
    )
    assert DecayingDepth(decay=0.8, min_layers=1, horizon=6).plan(6).cutoffs == (ALWAYS, 4, 1, 1, 2, 5)
    assert EarlyTermination(min_layers=2, max_layers=4, horizon=5).plan(6).cutoffs == (ALWAYS, ALWAYS, 4, 2, 0, 0)


def test_early_termination_runs_as_many_layers_as_skipdecode() -> None:
    for depth in (2 / 3, 1 / 2, 1 / 3, 1 / 5):
        skips = SkipDecode(depth=depth, horizon=26).plan(12, max_new_tokens=26)
        ends = EarlyTermination(depth=depth, horizon=26).plan(12)
        assert [skips.depth(clock) for clock in range(40)] == [ends.depth(clock) for clock in range(40)]
        assert ends.horizon == skips.horizon


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_horizon_that_is_left_open_is_the_longest_completion(name: str) -> None:
    open_, given_ = policy_at(name, 1 / 2), policy_at(name, 1 / 2, horizon=20)
    assert open_.plan(12, prompt_tokens=3, max_new_tokens=20) == given_.plan(12, prompt_tokens=3, max_new_tokens=64)


def test_depth_one_is_dense() -> None:
    assert all(policy_at(name, 1) == Dense() for name in POLICIES)
    for policy in (UnifiedSkip, HierarchicalSkip, DecayingDepth, EarlyTermination):
        assert policy(depth=1).plan(7).cutoffs == (ALWAYS,) * 7


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: UnifiedSkip(depth=0.1).plan(12), "choose between 2/12"),
        (lambda: UnifiedSkip(depth=1.5), "at most 1"),
        (lambda: HierarchicalSkip(depth=0.1).plan(12), "choose between 2/12"),
        (lambda: HierarchicalSkip(depth=0.5, horizon=0), "1 or more clocks"),
        (lambda: DecayingDepth(depth=0.1).plan(12), "choose between 2/12"),
        (lambda: DecayingDepth(depth=0.5, decay=0.9), "either depth or decay"),
        (lambda: DecayingDepth(decay=0.9, min_layers=13).plan(12), "at most 12"),
        (lambda: DecayingDepth(decay=0.9, min_layers=0), "1 or more"),
        (lambda: EarlyTermination(), "either depth, or"),
        (lambda: EarlyTermination(min_layers=3), "one of them is missing"),
        (lambda: EarlyTermination(min_layers=5, max_layers=3), "above max_layers"),
        (lambda: EarlyTermination(min_layers=5, max_layers=13).plan(12), "at most 12"),
        (lambda: policy_at("skipdecod", 0.5), "did you mean 'skipdecode'"),
        (lambda: policy_at("unified", 0.5, warmup_layers=2), "no setting 'warmup_layers'"),
    ],
)
def test_what_cannot_be_is_refused(make: object, says: str) -> None:
    with pytest.raises(InvalidPlan, match=says):
        make()  # type: ignore[operator]
