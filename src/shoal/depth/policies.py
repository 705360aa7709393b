"""Depth policies by name, for commands and files."""

from __future__ import annotations

from typing import Any

from shoal.depth.decaying import DecayingDepth
from shoal.depth.early_termination import EarlyTermination
from shoal.depth.hierarchical import HierarchicalSkip
from shoal.depth.plan import Dense, DepthPolicy
from shoal.depth.skipdecode import SkipDecode
from shoal.depth.unified import UnifiedSkip
from shoal.errors import InvalidPlan, nearest

POLICIES: dict[str, Any] = {
    "skipdecode": SkipDecode,
    "early-termination": EarlyTermination,
    "unified": UnifiedSkip,
    "hierarchical": HierarchicalSkip,
    "d3": DecayingDepth,
}
"""Policies that make a plan from a mean depth, without looking at the prompt."""


def policy_at(name: str, depth: float, *, horizon: int | None = None, **settings: Any) -> DepthPolicy:
    """The policy `name` at a mean depth, `Dense` at 1. `settings`: further fields of its class.

    A horizon is left out where the policy has none (Unified Layer Skipping). Raises `InvalidPlan` for unknown names and settings.
    """
    if name not in POLICIES:
        raise InvalidPlan(f"unknown policy {name!r}: {nearest(name, POLICIES)}")
    policy, fields = POLICIES[name], POLICIES[name].__dataclass_fields__
    for setting in settings:
        if setting not in fields:
            raise InvalidPlan(f"the policy {name!r} has no setting {setting!r}, {nearest(setting, fields)}")
    if depth == 1:
        return Dense()
    if "horizon" in fields:
        settings["horizon"] = horizon
    made: DepthPolicy = policy(depth=depth, **settings)
    return made
