"""What decides the layers of a request, from the fields of a body."""

from __future__ import annotations

from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import Dense, DepthPlan, DepthPolicy
from shoal.depth.policies import POLICIES, policy_at
from shoal.engine.intake import Plan
from shoal.errors import InvalidPlan, nearest
from shoal.serve import schema


def policy_of(tuned: TunedDepth | None, depth: float) -> DepthPolicy:
    """What `depth` alone stands for: the policy that the checkpoint was tuned with, or SkipDecode."""
    return policy_at(tuned.policy if tuned else "skipdecode", depth)


def plan_of(given: schema.Plan) -> Plan:
    """A policy by name with its settings, or a depth plan by its cutoffs. Raises `InvalidPlan`."""
    settings = given.model_dump(exclude_none=True)
    if "cutoffs" in settings:
        unknown = sorted(set(settings) - {"cutoffs", "prompt_layers", "horizon"})
        if unknown:
            raise InvalidPlan(
                f"a plan of cutoffs has no {unknown[0]!r}: it may have prompt_layers and horizon beside them"
            )
        return DepthPlan.from_dict(settings)
    name = settings.pop("policy", None)
    if name == "dense" and not settings:
        return Dense()
    if name not in POLICIES:
        raise InvalidPlan(f"a plan needs cutoffs, or a policy: {nearest(str(name), POLICIES)}; got {name!r}")
    try:
        made: Plan = POLICIES[name](**settings)
    except TypeError as error:
        raise InvalidPlan(f"policy {name!r}: {str(error).partition(') ')[2] or error}") from error
    return made


def asked(body: schema.Depth) -> str | None:
    """The field by which a body decides its layers, if it does."""
    return "depth" if body.depth is not None else "plan" if body.plan is not None else None
