"""Curves of quality against calls as JSON, as tables and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shoal import __version__
from shoal.errors import InvalidInput
from shoal.evaluate.bootstrap import Score
from shoal.evaluate.markdown import table
from shoal.evaluate.ranking import FIRST_STAGE, MEASURES, Curve, Point, RankingResult
from shoal.files import replaced, write_json

WIDTH, HEIGHT, MARGIN = 720, 360, 44
COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#be123c", "#0f766e", "#a16207", "#475569", "#1d4ed8", "#9d174d")


def to_dict(result: RankingResult) -> dict[str, Any]:
    """As `from_dict` reads it."""
    return asdict(result)


def from_dict(kept: dict[str, Any]) -> RankingResult:
    """A result from its file. Raises `InvalidInput` where it is none."""
    try:
        curves = tuple(
            Curve(label=curve["label"], points=tuple(Point(**point) for point in curve["points"]))
            for curve in kept["curves"]
        )
        return RankingResult(**{**kept, "curves": curves})
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"this is no result of shoal evaluate rank: {error}") from None


def write_results(results: Sequence[RankingResult], directory: Path) -> Path:
    """`COLLECTION.json` each and `report.html`; returns the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    for result in results:
        write_json(directory / f"{result.collection}.json", to_dict(result), indent=None)
    path = directory / "report.html"
    with replaced(path) as partial:
        partial.write_text(render(results), encoding="utf-8")
    return path


def rows(result: RankingResult, measure: str = MEASURES[0]) -> list[list[str]]:
    """Per arm: values at every budget in percent, with their intervals."""
    budgets = result.settings["budgets"]
    lines = [[FIRST_STAGE, *(f"{percent(result.score(FIRST_STAGE, budget, measure)):.1f}" for budget in budgets)]]
    for curve in result.curves:
        lines.append(
            [curve.label, *(f"{percent(result.score(curve.label, budget, measure)):.1f}" for budget in budgets)]
        )
    return lines


def markdown(result: RankingResult, measure: str = MEASURES[0]) -> str:
    """A table of one measure."""
    return table([f"{measure}, {result.collection}", *map(str, result.settings["budgets"])], rows(result, measure))


def versus(result: RankingResult, ours: str, measure: str = MEASURES[0]) -> list[tuple[int, str, Score]]:
    """Per budget the best other arm, and our difference to it in points."""
    found = []
    for budget in result.settings["budgets"]:
        others = [curve.label for curve in result.curves if not curve.label.startswith(f"{ours} [")]
        own = [curve.label for curve in result.curves if curve.label.startswith(f"{ours} [")]
        if not others or not own:
            continue

        def mean(label: str, budget: int = budget) -> float:
            return result.score(label, budget, measure).value

        best = max(others, key=mean)
        found.append((budget, best, percent(result.difference(own[0], best, budget, measure))))
    return found


def percent(score: Score) -> Score:
    """In points."""
    return score.times(100)


def render(results: Sequence[RankingResult]) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("shoal.evaluate", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = environment.loader.get_source(environment, "ranking.css")[0]  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("ranking.html").render(
        results=results,
        version=__version__,
        measures=MEASURES,
        rows=rows,
        versus=versus,
        chart=chart,
        style=Markup(style),
        style_hash=f"sha256-{digest}",
    )


def chart(result: RankingResult, measure: str = MEASURES[0]) -> dict[str, Any]:
    """Lines and bands in the units of an SVG of WIDTH x HEIGHT."""
    budgets = result.settings["budgets"]
    scores = {
        curve.label: [result.score(curve.label, budget, measure) for budget in budgets] for curve in result.curves
    }
    start = result.score(FIRST_STAGE, budgets[0], measure)
    low = min([start.low, *(one.low for line in scores.values() for one in line)])
    high = max([start.high, *(one.high for line in scores.values() for one in line)])
    low, high = low - 0.01, high + 0.01

    def x(budget: float) -> float:
        at: float = MARGIN + (WIDTH - 2 * MARGIN) * budget / budgets[-1]
        return round(at, 1)

    def y(value: float) -> float:
        at: float = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / (high - low)
        return round(at, 1)

    lines = []
    for place, (label, line) in enumerate(scores.items()):
        values = [(x(0), y(start.value)), *((x(b), y(one.value)) for b, one in zip(budgets, line, strict=True))]
        upper = [(x(b), y(one.high)) for b, one in zip(budgets, line, strict=True)]
        lower = [(x(b), y(one.low)) for b, one in zip(budgets, line, strict=True)]
        lines.append(
            {
                "label": label,
                "colour": COLOURS[place % len(COLOURS)],
                "dash": "" if place < len(COLOURS) else "5 3",
                "line": " ".join(f"{a},{b}" for a, b in values),
                "band": " ".join(f"{a},{b}" for a, b in [*upper, *reversed(lower)]),
            }
        )
    ticks = [low + (high - low) * part / 4 for part in range(5)]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "lines": lines,
        "x": [(x(budget), budget) for budget in (0, *budgets)],
        "y": [(y(tick), f"{100 * tick:.0f}") for tick in ticks],
        "base": HEIGHT - MARGIN,
        "left": MARGIN,
        "right": WIDTH - MARGIN,
    }
