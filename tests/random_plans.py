"""Random depth plans that sit on the edges: cutoffs around 0, 1, the prompt's end and the horizon."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import reference
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.depth.skipdecode import SkipDecode
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


def random_policy(rng: random.Random, num_layers: int) -> SkipDecode:
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
    if not isinstance(plan, SkipDecode):
        return reference.dense(num_layers), None
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
