"""Random depth plans that sit on the edges: cutoffs around 0, 1, the prompt's end and the horizon."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import reference
from shoal.depth.decaying import DecayingDepth
from shoal.depth.early_termination import EarlyTermination
from shoal.depth.hierarchical import HierarchicalSkip
from shoal.depth.plan import ALWAYS, DepthPlan, DepthPolicy
from shoal.depth.skipdecode import SkipDecode
from shoal.depth.unified import UnifiedSkip
from shoal.engine.intake import Plan


def random_plan(rng: random.Random, num_layers: int, *, prompt_tokens: int, max_new_tokens: int) -> DepthPlan:
    """Any cutoffs, so that plans of several requests form no chain; some leave layers out of the prompt."""
    edges = [0, 1, 2, prompt_tokens - 1, prompt_tokens, max_new_tokens - 2, max_new_tokens - 1, max_new_tokens, ALWAYS]
    cutoffs = [max(0, rng.choice(edges)) for _ in range(num_layers)]
    cutoffs[rng.randrange(num_layers)] = ALWAYS
    if rng.random() < 0.5:
        return DepthPlan(tuple(cutoffs))
    kept = [layer for layer, cutoff in enumerate(cutoffs) if cutoff or rng.random() < 0.5]
    return DepthPlan(tuple(cutoffs), prompt_layers=tuple(kept))


def random_policy(rng: random.Random, num_layers: int) -> DepthPolicy:
    """Any policy with any settings that the model allows; SkipDecode with any clock and prompt layers half of the time."""
    if rng.random() < 0.5:
        return random_skipdecode(rng, num_layers)
    horizon = rng.choice([1, 2, 5, 8, 13, 30])
    lowest, highest = sorted(rng.randint(1, num_layers) for _ in range(2))
    return rng.choice(
        [
            EarlyTermination(min_layers=lowest, max_layers=highest, horizon=horizon),
            UnifiedSkip(depth=rng.uniform(2 / num_layers, 1)),
            HierarchicalSkip(depth=rng.uniform(2 / num_layers, 1), horizon=horizon),
            DecayingDepth(decay=rng.uniform(0.5, 1), min_layers=lowest, horizon=horizon),
        ]
    )


def random_skipdecode(rng: random.Random, num_layers: int) -> SkipDecode:
    """SkipDecode with any bounds, horizon, warm-up, clock and prompt layers."""
    warmup = rng.randrange(num_layers)
    lowest, highest = sorted(rng.randint(warmup + 1, num_layers) for _ in range(2))
    return SkipDecode(
        min_layers=lowest,
        max_layers=highest,
        warmup_layers=warmup,
        horizon=rng.choice([1, 2, 5, 8, 13, 30]),
        clock=rng.choice(["generated", "column"]),
        prompt=rng.choice(["all", "max_layers"]),
    )


def specification(plan: Plan, num_layers: int, prompt_tokens: int) -> tuple[reference.Schedule, Sequence[int] | None]:
    """The reference's schedule and prompt layers for a plan or policy, without asking it which layers it runs."""
    if isinstance(plan, DepthPlan):
        cutoffs = [math.inf if cutoff == ALWAYS else cutoff for cutoff in plan.cutoffs]
        return reference.from_cutoffs(cutoffs), plan.prompt_layers
    match plan:
        case EarlyTermination(min_layers=int(lowest), max_layers=int(highest), horizon=int(horizon)):
            return (
                reference.early_termination(num_layers, min_exit=lowest, max_exit=highest, length=horizon),
                None,
            )
        case UnifiedSkip(depth=depth):
            return reference.unified(num_layers, depth), None
        case HierarchicalSkip(depth=depth, horizon=int(horizon)):
            return reference.hierarchical(num_layers, depth, horizon), None
        case DecayingDepth(decay=float(decay), min_layers=least, horizon=int(horizon)):
            return reference.d3(num_layers, decay=decay, least=least, length=horizon), None
        case SkipDecode():
            return skipdecode_specification(plan, num_layers, prompt_tokens)
        case _:
            return reference.dense(num_layers), None


def skipdecode_specification(
    plan: SkipDecode, num_layers: int, prompt_tokens: int
) -> tuple[reference.Schedule, Sequence[int] | None]:
    """The same for SkipDecode."""
    lowest, highest, warmup, horizon = plan.min_layers, plan.max_layers, plan.warmup_layers, plan.horizon
    assert lowest is not None
    assert highest is not None
    assert warmup is not None
    assert horizon is not None
    schedule = reference.skipdecode(
        num_layers,
        min_exit=lowest,
        max_exit=highest,
        length=horizon,
        warmup=warmup,
        first_clock=prompt_tokens if plan.clock == "column" else 0,
    )
    top = range(num_layers - (highest - warmup), num_layers)
    return schedule, [*range(warmup), *top] if plan.prompt == "max_layers" else None
