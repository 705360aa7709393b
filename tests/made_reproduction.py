"""A reproduction with scores made by hand, as `shoal reproduce` would write it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from made_frontier import arm
from shoal import Dense, EarlyTermination, SkipDecode
from shoal.depth.plan import DepthPlan
from shoal.evaluate.bootstrap import Statistics, quotient
from shoal.evaluate.exactness import Exactness
from shoal.evaluate.reproduce_claims import Comparison, Measured, better, compare, judged, negligible

NUM_LAYERS, NUM_INPUTS = 24, 400
PLANS = {
    "dense": Dense().plan(NUM_LAYERS),
    "skipdecode": SkipDecode(depth=1 / 2, horizon=20).plan(NUM_LAYERS),
    "skipdecode-no-warmup": SkipDecode(depth=1 / 2, horizon=20, warmup_layers=0).plan(NUM_LAYERS),
    "early-termination": EarlyTermination(depth=1 / 2, horizon=20).plan(NUM_LAYERS),
}
EXACT = Exactness(
    num_requests=32, num_tokens=900, layers_skipped=9000, most_clocks=30, num_parted=0, num_near_ties=0,
    company_nats=0.0, uncached_nats=1e-5,
)  # fmt: skip


def measured(
    name: str,
    gain: float,
    *,
    spread: float = 2.0,
    inputs: int = NUM_INPUTS,
    mean: float = 60.0,
    plan: DepthPlan | None = None,
) -> Measured:
    """A checkpoint whose score on each input is the shared one, of about `mean`, plus a gain that varies by `spread`."""
    shared = np.random.default_rng(0).normal(mean, 15.0, inputs)
    own = np.random.default_rng(len(name)).normal(0, spread, inputs)
    scores = shared + gain + own - own.mean()
    statistics = Statistics(np.stack([scores, np.ones(inputs)], axis=1), quotient)
    policy = name.removesuffix("-no-warmup")
    made = arm(policy, 1.0 if policy == "dense" else 1 / 2, mean, num_layers=NUM_LAYERS)
    made = replace(made, plan=(plan or PLANS[name]).to_dict(), scores={"bleu": statistics.score()})
    return Measured(checkpoint=name, arm=made, statistics=statistics)


def versus(ours: Measured | None, other: Measured | None, judge: Any, dense: Measured | None = None) -> Comparison:
    names = ("skipdecode", other.checkpoint if other else "dense")
    return compare(
        1 / 2, ours, other, dense or measured("dense", 0), names=names, metric="bleu", judge=judge, seed=0
    )  # fmt: skip


def reproduction() -> dict[str, Any]:
    """The content of a `reproduction.json`, as `reproduce` would write it."""
    ours, dense = measured("skipdecode", -0.3), measured("dense", 0)
    several = [
        [versus(ours, dense, negligible), replace(versus(None, dense, negligible), depth=1 / 3)],
        [versus(ours, measured("skipdecode-no-warmup", 3), better)],
        [versus(ours, measured("early-termination", -3), better)],
    ]
    made = {
        "model": {"name": "opt-1.3b", "num_layers": NUM_LAYERS},
        "data": {"test_inputs": NUM_INPUTS},
        "settings": {"steps": None, "epochs": 2.0, "batch_size": 128, "learning_rate": 2e-5, "seed": 0},
        "horizon": 20,
        "metric": {"name": "bleu", "label": "BLEU"},
        "training": {
            name: {"steps": 9, "tokens": 4321, "final_loss": 1.0} for name in ("fine-tuned", "dense", "skipdecode")
        },
        "arms": [{"checkpoint": "skipdecode", "depth": 1 / 2, "savings": asdict(ours.arm.savings)}],
        "claims": judged(several, EXACT),
    }
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]
