"""Who wins at each budget of a frontier, and whether the intervals tell.

A budget is a nominal depth. The arms that compete at it are the plans of that depth and, of other models, the dense arms that
take no more decode FLOPs: a small dense model is the baseline that a plan has to beat.

An arm wins if its interval overlaps with nobody else's. Arms share their inputs, so this is cautious: two that overlap may still
differ in a paired comparison, but two that do not overlap differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from shoal.evaluate.frontier_result import Arm, FrontierResult, MetricInfo

DENSE = "dense"
"""`Arm.policy` of an arm that runs every layer."""
TOLERANCE = 1.05
"""A dense model that takes this many times the FLOPs of a budget's plans still fits it: layers come in whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The arms that compete at one nominal depth, by the task's main metric."""

    depth: float
    """Nominal share of the layers."""
    best: Arm
    """The one with the best score."""
    tied: tuple[Arm, ...]
    """Others whose interval overlaps with the best one's, best first."""
    behind: tuple[Arm, ...]
    """The rest, best first."""


def reference(result: FrontierResult) -> Arm | None:
    """The arm that others are drawn against: the first dense one."""
    return next((arm for arm in result.arms if arm.policy == DENSE), None)


def budgets(result: FrontierResult) -> list[Budget]:
    """Every nominal depth below 1, deepest first."""
    metric, dense = result.metrics[0], reference(result)
    depths = sorted({arm.depth for arm in result.arms if arm.policy != DENSE}, reverse=True)
    found = []
    for depth in depths:
        plans = [arm for arm in result.arms if arm.policy != DENSE and arm.depth == depth]
        most = max((arm.savings.decode.flops.value or 0 for arm in plans), default=0) * TOLERANCE
        small = [
            arm
            for arm in result.arms
            if arm.policy == DENSE and arm is not dense and (arm.savings.decode.flops.value or float("inf")) <= most
        ]
        sign = 1 if metric.higher_is_better else -1
        ranked = sorted(plans + small, key=lambda arm: -sign * arm.scores[metric.name].value)
        best, others = ranked[0], ranked[1:]
        tied = tuple(arm for arm in others if overlap(arm, best, metric))
        found.append(Budget(depth=depth, best=best, tied=tied, behind=tuple(arm for arm in others if arm not in tied)))
    return found


def overlap(one: Arm, other: Arm, metric: MetricInfo) -> bool:
    """Whether the intervals of two arms have a value in common."""
    a, b = one.scores[metric.name], other.scores[metric.name]
    return a.low <= b.high and b.low <= a.high


def summary(result: FrontierResult) -> str:
    """One sentence: the dense score, then who wins at each budget, or that nobody does."""
    metric, dense = result.metrics[0], reference(result)
    better = "higher" if metric.higher_is_better else "lower"
    opening = f"By {metric.label} ({better} is better"
    if dense is not None:
        opening += f"; every layer: {number(dense.scores[metric.name].value, digits(result, metric))}"
    clauses = [
        _clause(result, list(group)) for _, group in groupby(budgets(result), key=lambda budget: _names(result, budget))
    ]
    return f"{opening}), {'; '.join(clauses)}." if clauses else f"{opening}), there is no arm that skips layers."


def _names(result: FrontierResult, budget: Budget) -> tuple[str, ...]:
    """What budgets that share a clause have in common: who leads, and who ties."""
    return (series(result, budget.best), *sorted(series(result, arm) for arm in budget.tied))


def _clause(result: FrontierResult, group: Sequence[Budget]) -> str:
    metric = result.metrics[0]
    where = listed([written(budget.depth) for budget in group])
    values = [number(budget.best.scores[metric.name].value, digits(result, metric)) for budget in group]
    scores = listed(values if len(set(values)) > 1 else values[:1])
    name = series(result, group[0].best)
    at = f"at {'depth' if len(group) == 1 else 'depths'} {where}"
    if not group[0].tied:
        alone = all(not budget.behind for budget in group)
        return f"{at} {name} {'is alone' if alone else 'wins'} ({scores})"
    tied = [series(result, arm) for arm in group[0].tied]
    others = listed(tied) if len(tied) <= 3 else f"{len(tied)} others"
    return f"{at} nobody wins: {name} scores best ({scores}), but its interval overlaps that of {others}"


def series(result: FrontierResult, arm: Arm) -> str:
    """What arms at several depths have in common: the policy, after the model's name where there are several models."""
    return arm.policy if len(result.model) == 1 else f"{arm.model} {arm.policy}"


def written(depth: float) -> str:
    """A depth as people write it.

    >>> written(0.5), written(0.33), written(0.2), written(0.45)
    ('1/2', '1/3', '1/5', '0.45')
    """
    simple = Fraction(depth).limit_denominator(6)
    return str(simple) if abs(simple - depth) < 0.005 else f"{depth:g}"


def listed(words: Sequence[str]) -> str:
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def digits(result: FrontierResult, metric: MetricInfo) -> int:
    """Decimals of a metric, 1 to 4, as its intervals call for: half-widths of 0.4 need 1, of 0.02 need 2."""
    scores = [arm.delta.get(metric.name, arm.scores[metric.name]) for arm in result.arms]
    widths = [(score.high - score.low) / 2 for score in scores if score.high > score.low]
    return min(4, max(1, math.ceil(-math.log10(statistics.median(widths))))) if widths else 2


def number(value: float, decimals: int, *, sign: bool = False) -> str:
    """With a true minus sign, and `+` where `sign` is asked for.

    >>> number(-0.5, 1), number(0.5, 1, sign=True), number(-0.01, 1, sign=True)
    ('−0.5', '+0.5', '0.0')
    """
    rounded = round(value, decimals) + 0.0
    if rounded == 0:
        return f"{0:.{decimals}f}"
    return f"{rounded:{'+' if sign else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")
