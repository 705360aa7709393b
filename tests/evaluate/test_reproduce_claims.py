"""Verdicts of a reproduction on scores that were made for them, and the tables."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from made_frontier import arm
from shoal import Dense, EarlyTermination, SkipDecode
from shoal.depth.plan import DepthPlan
from shoal.evaluate.bootstrap import Statistics, quotient
from shoal.evaluate.exactness import Exactness
from shoal.evaluate.reproduce_claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    LEAST_DENSE,
    LEAST_INPUTS,
    NOT_SHOWN,
    Comparison,
    Measured,
    better,
    compare,
    exact,
    judged,
    negligible,
    overall,
)
from shoal.evaluate.reproduce_tables import describe

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


@pytest.mark.parametrize(
    ("gain", "spread", "verdict"),
    [
        (-0.3, 2.0, HOLDS),
        (+2.0, 2.0, HOLDS),  # a gain is no loss
        (-3.0, 2.0, FAILS),
        (-1.0, 2.0, NOT_SHOWN),  # at the margin
        (-0.3, 30.0, NOT_SHOWN),  # too uncertain
    ],
)
def test_a_loss_is_negligible_within_the_margin(gain: float, spread: float, verdict: str):
    found = versus(measured("skipdecode", gain, spread=spread), measured("dense", 0, spread=0), negligible)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(gain)
    assert (found.verdict, found.reason) == (verdict, None)


@pytest.mark.parametrize("other", ["skipdecode-no-warmup", "early-termination"])
@pytest.mark.parametrize(("gain", "verdict"), [(1.0, HOLDS), (-1.0, FAILS), (0.1, NOT_SHOWN)])
def test_one_is_better_where_the_paired_interval_is_on_its_side(other: str, gain: float, verdict: str):
    """The two systems' own intervals overlap in every case: their inputs differ far more than they do."""
    found = versus(measured("skipdecode", gain), measured(other, 0), better)
    assert (found.verdict, found.reason) == (verdict, None)
    assert found.scores is not None
    assert found.scores[0].low < found.scores[1].high
    assert found.scores[1].low < found.scores[0].high


def test_what_numbers_cannot_carry_is_not_shown():
    few = versus(
        measured("skipdecode", 0, inputs=LEAST_INPUTS - 1), measured("dense", 0, inputs=LEAST_INPUTS - 1), negligible
    )
    assert (few.verdict, few.reason) == (NOT_SHOWN, "needs 100 test inputs or more")
    assert few.difference is not None
    ignorant = measured("dense", 0, mean=LEAST_DENSE)
    untaught = versus(measured("skipdecode", 0, mean=LEAST_DENSE), ignorant, negligible, dense=ignorant)
    assert untaught.verdict == NOT_SHOWN
    assert "needs a dense model that has learned the task" in str(untaught.reason)
    missing = versus(None, measured("dense", 0), negligible)
    assert (missing.verdict, missing.difference) == (NOT_SHOWN, None)
    assert "two tokens or more" in str(missing.reason)


def test_schedules_that_differ_are_not_compared():
    """On 12 layers at depth 1/5 no warm-up layer means 4 to 1 layers, one means 3 to 2: the warm-up is not all that differs."""
    with_it, without = (SkipDecode(depth=1 / 5, horizon=20, warmup_layers=w).plan(12) for w in (1, 0))
    ours = measured("skipdecode", 5.0, plan=with_it)
    found = versus(ours, measured("skipdecode-no-warmup", 0, plan=without), better)
    assert found.verdict == NOT_SHOWN
    assert found.reason == "needs more layers: here one runs 3 to 2 of them, the other one 4 to 1"
    terminating = EarlyTermination(depth=1 / 5, horizon=20).plan(12)
    assert versus(ours, measured("early-termination", 0, plan=terminating), better).verdict == HOLDS
    assert versus(ours, measured("dense", 0), negligible).verdict == HOLDS


def test_verdicts_on_exactness_and_over_depths():
    assert exact(EXACT) == HOLDS
    assert exact(replace(EXACT, num_parted=1)) == FAILS
    assert exact(replace(EXACT, num_parted=1, num_near_ties=1)) == HOLDS
    assert exact(replace(EXACT, uncached_nats=0.1)) == FAILS
    assert exact(replace(EXACT, layers_skipped=0)) == NOT_SHOWN
    assert exact(replace(EXACT, most_clocks=1)) == NOT_SHOWN
    assert overall([HOLDS, NOT_SHOWN, FAILS]) == FAILS
    assert overall([]) == NOT_SHOWN


def result() -> dict[str, Any]:
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


def test_the_tables_say_what_was_found():
    made = result()
    assert [claim["verdict"] for claim in made["claims"]] == [NOT_SHOWN, FAILS, HOLDS, HOLDS]
    text = describe(made)
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    for place, (claim, verdict) in enumerate(zip(CLAIMS, (NOT_SHOWN, FAILS, HOLDS, HOLDS), strict=True), 1):
        assert any(cells[:2] == [f"{place}. {claim.title}", f"**{verdict}**"] for cells in lines)
        assert claim.rule in text
    (first,) = (
        cells for cells in lines if cells[0] == "1/2" and cells[-1] == HOLDS and "\N{MINUS SIGN}0.30" in cells[4]
    )
    assert first[1] == "12.00 / 24.00"
    assert "Depth 1/3 needs outputs of two tokens or more" in text
    assert ["1/2", "50%", "55%", "55%", "55%", "75%", "78%", "78%", "78%"] in lines
    assert "9 steps dense, then 9 steps over 4,321 tokens in each way" in text
    assert "at most 1.0e-05 from a pass without a cache" in text


def test_the_tables_do_without_records_of_training():
    made = result()
    made["training"]["dense"] = None
    assert "2 epochs dense, then 2 epochs in each way" in describe(made)
