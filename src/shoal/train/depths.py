"""Which depth the next batch is trained at: evenly, or by need.

*Evenly*: each round of as many batches as there are depths uses every one once, in a shuffled order.

*By need*: half of the draws are even; the other half go by each depth's recent loss minus the recent dense loss, where it is
above 0. Depths 1, 1/2, 1/4 with recent losses 2.0, 2.1, 2.3 are drawn with 1/6, 1/6 + 1/8 and 1/6 + 3/8. *Recent* is a mean that
forgets a tenth with each draw of that depth. The first rounds are even, until every depth has losses. This rule is ours.

Both are functions of the seed, the batch's number and (by need) the losses so far, which are saved with each state: a run that
resumes, or another process of the same run, draws the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from shoal.depth.plan import Dense, DepthPlan
from shoal.depth.policies import POLICIES, policy_at

KEPT = 0.9
"""Share of a recent loss that stays when the next one is added."""
EVEN_ROUNDS = 2
"""Rounds that are drawn evenly before need is known."""


def plans_for(
    policy: str, depths: Sequence[float], num_layers: int, *, horizon: int, warmup_layers: int
) -> list[DepthPlan]:
    """The plan of each depth; 1 is dense. Raises `InvalidPlan` with the allowed range."""
    settings = {"warmup_layers": warmup_layers} if "warmup_layers" in POLICIES[policy].__dataclass_fields__ else {}
    return [
        policy_at(policy, depth, horizon=horizon, **settings).plan(num_layers, prompt_tokens=0, max_new_tokens=horizon)
        if depth != 1
        else Dense().plan(num_layers)
        for depth in depths
    ]


def even(num_depths: int, batch: int, *, seed: int) -> int:
    """The depth (its place in the list) of the batch with this number, evenly."""
    cycle, place = divmod(batch, num_depths)
    order = list(range(num_depths))
    random.Random(f"{seed}/{cycle}").shuffle(order)
    return order[place]


def by_need(depths: Sequence[float], recent: RecentLosses, batch: int, *, seed: int) -> int:
    """The depth (its place in `depths`, which has 1 among them) of the batch with this number, by need."""
    if batch < EVEN_ROUNDS * len(depths):
        return even(len(depths), batch, seed=seed)
    return random.Random(f"{seed}/need/{batch}").choices(range(len(depths)), shares(depths, recent))[0]


def shares(depths: Sequence[float], recent: RecentLosses) -> list[float]:
    """Probability of each place in `depths`. A depth named twice has twice the even part and its need once."""
    dense = recent.mean(1.0)
    excess = [
        max(0.0, recent.mean(depth) - dense) if depths.index(depth) == i else 0.0 for i, depth in enumerate(depths)
    ]
    total = sum(excess)
    if total == 0:
        return [1 / len(depths)] * len(depths)
    return [0.5 / len(depths) + 0.5 * part / total for part in excess]


class RecentLosses(TrainerCallback, ExportableState):
    """A mean loss per depth that forgets. As a callback with state, the Trainer saves it and brings it back."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, depth: float, loss: float) -> None:
        """Take in the loss of a batch at `depth`."""
        total, weight = self.sums.get(repr(depth), (0.0, 0.0))
        self.sums[repr(depth)] = [KEPT * total + loss, KEPT * weight + 1]

    def mean(self, depth: float) -> float:
        """The recent mean at `depth`, which must have a loss."""
        total, weight = self.sums[repr(depth)]
        return total / weight

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps."""
        return {"args": {}, "attributes": {"sums": self.sums}}
