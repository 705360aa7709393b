"""`depth_plan.json`: written, read, malformed, and what it fills in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.depth.checkpoint import TunedDepth, fit_horizon
from shoal.depth.decaying import DecayingDepth
from shoal.depth.early_termination import EarlyTermination
from shoal.depth.hierarchical import HierarchicalSkip
from shoal.depth.plan import Dense
from shoal.depth.policies import POLICIES
from shoal.depth.skipdecode import SkipDecode
from shoal.depth.unified import UnifiedSkip
from shoal.errors import CheckpointError, InvalidInput


def test_round_trip(tmp_path: Path) -> None:
    assert TunedDepth.load(tmp_path) is None
    tuned = TunedDepth(horizon=40, warmup_layers=2, depths=(1.0, 0.5, 0.2))
    tuned.save(tmp_path)
    assert TunedDepth.load(tmp_path) == tuned
    data = json.loads((tmp_path / "depth_plan.json").read_text())
    assert data == {"policy": "skipdecode", "horizon": 40, "warmup_layers": 2, "depths": [1.0, 0.5, 0.2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "horizon"),
        ("null", "depth_plan.json cannot be read"),
        ("3", "depth_plan.json cannot be read"),
        ("{}", "horizon"),
        ('{"horizon": 40, "horizn": 3}', "unknown field 'horizn', did you mean 'horizon'"),
        ('{"horizon": "40"}', "horizon must be 1 or more clocks, got '40'"),
        ('{"horizon": 0}', "horizon must be 1 or more clocks, got 0"),
        ('{"horizon": 4, "warmup_layers": -1}', "warmup_layers must be 0 or more layers, got -1"),
        ('{"horizon": 4, "depths": [1.0, 0]}', "above 0 and at most 1"),
        ('{"horizon": 4, "depths": 0.5}', "depth_plan.json cannot be read"),
        ('{"horizon": 4, "policy": "calm"}', "policy must be one of skipdecode, .*, got 'calm'"),
        ("\udcff", "depth_plan.json cannot be read"),
    ],
)
def test_malformed_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "depth_plan.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=message) as caught:
        TunedDepth.load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "horizon", "warmup_layers"),
    [({}, 40, 2), ({"horizon": 7}, 7, 2), ({"warmup_layers": 0}, 40, 0), ({"horizon": 1, "warmup_layers": 1}, 1, 1)],
)
def test_fills_only_open_fields(given: dict[str, Any], horizon: int, warmup_layers: int) -> None:
    filled = TunedDepth(horizon=40, warmup_layers=2).fill(SkipDecode(depth=0.5, **given))
    assert filled == SkipDecode(depth=0.5, horizon=horizon, warmup_layers=warmup_layers)


def test_a_horizon_in_generated_tokens_says_nothing_of_columns() -> None:
    filled = TunedDepth(horizon=40, warmup_layers=2).fill(SkipDecode(depth=0.5, clock="column"))
    assert filled == SkipDecode(depth=0.5, clock="column", horizon=None, warmup_layers=2)


@pytest.mark.parametrize("policy", [EarlyTermination, HierarchicalSkip, DecayingDepth])
def test_fills_the_horizon_of_every_policy_that_has_one(policy: Any) -> None:
    tuned = TunedDepth(policy="d3", horizon=40, warmup_layers=2)
    assert tuned.fill(policy(depth=0.5)) == policy(depth=0.5, horizon=40)
    assert tuned.fill(policy(depth=0.5, horizon=7)) == policy(depth=0.5, horizon=7)


@pytest.mark.parametrize("given", [UnifiedSkip(depth=0.5), Dense(), Dense().plan(4), None, SkipDecode])
def test_leaves_alone_what_has_no_open_field(given: Any) -> None:
    assert TunedDepth(horizon=40).fill(given) is given or TunedDepth(horizon=40).fill(given) == given


def test_every_policy_may_be_tuned_for(tmp_path: Path) -> None:
    for policy in POLICIES:
        TunedDepth(policy=policy, horizon=4).save(tmp_path)
        assert TunedDepth.load(tmp_path) == TunedDepth(policy=policy, horizon=4)


def test_horizon_is_the_median_length() -> None:
    assert fit_horizon([20, 48, 90]) == 48
    assert fit_horizon(iter([7])) == 7
    assert fit_horizon([10, 20]) == 15
    for lengths in ([], [3, 0]):
        with pytest.raises(InvalidInput, match="at least one length, each 1 token or more"):
            fit_horizon(lengths)
