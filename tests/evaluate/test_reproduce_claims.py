"""Verdicts of a reproduction on scores that were made for them, and the tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from made_reproduction import EXACT, measured, reproduction, versus
from shoal import EarlyTermination, SkipDecode
from shoal.evaluate.reproduce_claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    LEAST_DENSE,
    LEAST_INPUTS,
    NOT_SHOWN,
    better,
    exact,
    negligible,
    overall,
)
from shoal.evaluate.reproduce_tables import describe


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


def test_the_tables_say_what_was_found():
    made = reproduction()
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
    made = reproduction()
    made["training"]["dense"] = None
    assert "2 epochs dense, then 2 epochs in each way" in describe(made)
