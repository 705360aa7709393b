"""Tables of `judge.py`: training, pairs, rankings, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ranking import HELD_OUT
from shoal.evaluate.markdown import table
from shoal.evaluate.ranking import FIRST_STAGE

BUDGETS = (50, 100, 200)
"""Calls per query."""
PAIR_COLUMNS = {
    "one way": "right, one way",
    "says A": "says A",
    "disagree": "directions disagree",
    "both right": "both right",
    "margin": "margin right",
    "first stage": "first stage right",
}
"""By key, as the table has them; shares of pairs."""


def describe(result: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    settings = result["settings"]
    sizes = " and ".join(map(str, settings["steps"]))
    about = f"Trained for {sizes} steps; {settings['pairs']} pairs and {settings['topics']} topics per collection asked for."
    stages = table(
        ["stage", "prompts", "tokens", "loss at its end", "seconds"],
        [
            [one["stage"], f"{one['num_examples']:,}", f"{one['tokens']:,}", f"{one['final_loss']:.3f}", f"{one['seconds']:.0f}"]
            for one in result["training"]
        ],
    )  # fmt: skip
    rows = [
        [
            name if name in HELD_OUT else f"{name}, held-back topics",
            who,
            str(one["pairs"][0]),
            *(shown(one[column]) for column in PAIR_COLUMNS),
        ]
        for name, models in result["pairs"].items()
        for who, one in models.items()
    ]
    parts = [about, stages, table(["pairs, %", "model", "pairs", *PAIR_COLUMNS.values()], rows)]
    for one in result["rankings"]:
        rows = [[FIRST_STAGE, *[shown(one["first_stage"])] * len(BUDGETS), "", "0", "0", "0"]]
        for ranker, points in one["arms"].items():
            last = points[-1]
            rows.append(
                [
                    ranker,
                    *(shown(point["score"]) for point in points),
                    shown(last["gain"], "+.1f"),
                    f"{last['calls']:.0f}",
                    f"{last['rounds']:.0f}",
                    f"{last['tokens']:,.0f}",
                ]
            )
        header = [f"{one['collection']}, {one['topics']} topics, nDCG@10", *(f"{budget} calls" for budget in BUDGETS)]
        parts.append(table([*header, f"at {BUDGETS[-1]} over first stage", "calls", "rounds", "tokens"], rows))
    return "\n\n".join([*parts, verdict(result)])


def shown(score: Sequence[float], spec: str = ".1f") -> str:
    """A value and its interval."""
    return f"{score[0]:{spec}} [{score[1]:{spec}}, {score[2]:{spec}}]"


def verdict(result: dict[str, Any]) -> str:
    """Where the comparator is above chance and above the first stage, and what that does to rankings."""
    judges = {name: models["judge"] for name, models in result["pairs"].items() if name in HELD_OUT}
    above = [name for name, one in judges.items() if one["margin"][1] > 50]
    lines = [f"- On pairs of test collections the comparator's margin is beyond chance on {listed(above)}."]
    better = [name for name, one in judges.items() if one["margin"][1] > one["first stage"][2]]
    worse = [name for name, one in judges.items() if one["margin"][2] < one["first stage"][1]]
    lines.append(
        f"- Beyond chance it is above the first stage's order on {listed(better)} and below it on {listed(worse)}."
    )
    for one in result["rankings"]:
        points = [(ranker, point) for ranker, rows in one["arms"].items() for point in rows]
        gains = [f"{ranker} at {point['budget']}" for ranker, point in points if point["gain"][1] > 0]
        losses = [f"{ranker} at {point['budget']}" for ranker, point in points if point["gain"][2] < 0]
        lines.append(
            f"- {one['collection']}: of {len(points)} rankings {len(gains)} are above the first stage beyond chance"
            f"{': ' + listed(gains) if gains else ''}; {len(losses)} below{': ' + listed(losses) if losses else ''}."
        )
    return "\n".join(lines)


def listed(names: Sequence[str]) -> str:
    """Names, or none."""
    return ", ".join(names) or "none"
