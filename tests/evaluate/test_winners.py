"""Who wins at each budget, in numbers and in words."""

from __future__ import annotations

from dataclasses import replace

from made_frontier import FLOPS, SER, arm, frontier
from shoal.evaluate.frontier_result import Arm, FrontierResult
from shoal.evaluate.winners import budgets, series, summary


def result_of(*arms: Arm, **changes: object) -> FrontierResult:
    models = tuple(dict.fromkeys(one.model for one in arms))
    return replace(frontier(), arms=arms, model=models, **changes)  # type: ignore[arg-type]


def test_an_arm_wins_where_no_interval_overlaps_its_own():
    result = result_of(
        arm("dense", 1.0, 65.0), arm("skipdecode", 0.5, 64.5), arm("unified", 0.5, 62.5), arm("d3", 0.5, 62.4)
    )
    (budget,) = budgets(result)
    assert [series(result, one) for one in (budget.best, *budget.tied, *budget.behind)] == [
        "skipdecode",
        "unified",
        "d3",
    ]
    assert len(budget.tied) == 1, "62.5 + 1 touches 64.5 - 1, 62.4 + 1 does not"
    assert summary(result) == (
        "By BLEU (higher is better; every layer: 65.0), at depth 1/2 nobody wins: skipdecode scores best (64.5), "
        "but its interval overlaps that of unified."
    )
    clear = result_of(arm("dense", 1.0, 65.0), arm("skipdecode", 0.5, 64.5), arm("d3", 0.5, 62.4))
    assert summary(clear) == "By BLEU (higher is better; every layer: 65.0), at depth 1/2 skipdecode wins (64.5)."


def test_lower_is_better_turns_the_order_round():
    result = result_of(arm("skipdecode", 0.5, 60.0), arm("unified", 0.5, 30.0), metrics=(SER,))
    (budget,) = budgets(result)
    assert budget.best.policy == "skipdecode", "4.0% errors are fewer than 7.0%"
    assert summary(result) == "By Slot error rate (lower is better), at depth 1/2 skipdecode wins (4.00)."


def test_a_small_dense_model_competes_where_it_fits():
    """3 of 12 layers' FLOPs: below the plans of 1/2 and 1/3, above those of 1/5 (0.1 + 0.9/5 of dense, and 5%)."""
    small = arm("dense", 1.0, 64.9, model="small", flops=0.3 * FLOPS, num_layers=3)
    plans = [arm("skipdecode", depth, 60.0) for depth in (0.5, 1 / 3, 0.2)]
    result = result_of(arm("dense", 1.0, 65.0), *plans, small)
    assert [budget.best.model for budget in budgets(result)] == ["small", "small", "shoal-e2e"]
    assert summary(result) == (
        "By BLEU (higher is better; every layer: 65.0), at depths 1/2 and 1/3 small dense wins (64.9); "
        "at depth 1/5 shoal-e2e skipdecode is alone (60.0)."
    )


def test_no_plan_at_all():
    result = result_of(arm("dense", 1.0, 65.0))
    assert budgets(result) == []
    assert summary(result).endswith("there is no arm that skips layers.")
