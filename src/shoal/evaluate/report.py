"""A frontier as one HTML page that needs nothing else: no server, no network, no other file.

The page is `page/report.html` with its style and script put inside. Tables are written here; charts are drawn by `page/report.js`
from the numbers that `charts` prepares. Its content security policy lets nothing else run or load, whatever the outputs of a model
hold, and every text of the result is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shoal import __version__
from shoal.evaluate.bootstrap import Score
from shoal.evaluate.frontier_result import Arm, FrontierResult, MetricInfo, Spending
from shoal.evaluate.winners import DENSE, budgets, digits, number, reference, series, summary, written
from shoal.files import replaced

FILE_NAME = "report.html"
PARTS = {"decode": "decode", "request": "whole request"}
"""Parts of a request that the four savings are given for."""
SAVINGS = {"mean_layers": "layers per token", "flops": "FLOPs", "bytes": "bytes moved", "seconds": "wall clock"}
"""The four savings."""
SCALES = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15))


def write_report(result: FrontierResult, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path`, which holds either what it held or all of it; returns the path."""
    path = Path(path)
    with replaced(path) as partial:
        # What UTF-8 cannot hold (half of a surrogate pair) becomes a character reference.
        partial.write_bytes(render(result).encode("utf-8", errors="xmlcharrefreplace"))
    return path


def render(result: FrontierResult) -> str:
    """The page as HTML."""
    pages = PackageLoader("shoal.evaluate", "page")
    environment = Environment(
        loader=pages,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (pages.get_source(environment, f"report.{end}")[0] for end in ("css", "js"))
    return environment.get_template("report.html").render(
        result=result,
        version=__version__,
        summary=summary(result),
        budgets=budgets(result),
        dense=reference(result),
        charts=charts(result),
        units=units(result.arms),
        parts=PARTS,
        savings=SAVINGS,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        written=written,
        series=lambda arm: series(result, arm),
        plain=lambda score, metric: number(score.value, digits(result, metric)),
        interval=lambda score, metric: interval(score, digits(result, metric)),
        change=lambda score, metric: number(score.value, digits(result, metric), sign=True),
        verdict=verdict,
        shown=shown,
    )


def _hash(text: str) -> str:
    """The only inline text of its kind that the page's content security policy allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def interval(score: Score, decimals: int) -> str:
    """The interval of a score as text, `64.0 to 65.8`."""
    return f"{number(score.low, decimals)} to {number(score.high, decimals)}"


def verdict(delta: Score, metric: MetricInfo) -> str:
    """What a paired difference to dense says: `better`, `worse`, or `same` where its interval holds 0."""
    if delta.low <= 0 <= delta.high:
        return "same"
    return "better" if (delta.value > 0) == metric.higher_is_better else "worse"


def shown(value: Any) -> str:
    """A value of `settings` or `conditions` as text."""
    if isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def units(arms: Sequence[Arm]) -> dict[str, tuple[str, float]]:
    """One unit for a whole column, so that its numbers can be compared: by `part.saving` its name and size."""
    columns = {}
    for part in PARTS:
        for saving in SAVINGS:
            values = [getattr(spending(arm, part), saving).value for arm in arms]
            largest = max((value for value in values if value is not None), default=0.0)
            if saving == "mean_layers":
                unit = ("", 1.0)
            elif saving == "seconds":
                unit = ("s", 1.0) if largest >= 1 else ("ms", 1e-3)
            else:
                prefix, size = next((scale for scale in reversed(SCALES) if largest >= scale[1]), SCALES[0])
                unit = (prefix + {"flops": "FLOP", "bytes": "B"}[saving], size)
            columns[f"{part}.{saving}"] = unit
    return columns


def spending(arm: Arm, part: str) -> Spending:
    """The savings of one of `PARTS`."""
    found: Spending = getattr(arm.savings, part)
    return found


def charts(result: FrontierResult) -> dict[str, Any]:
    """What the script draws, as JSON."""
    names = list(dict.fromkeys(series(result, arm) for arm in result.arms))
    dense = reference(result)
    return {
        "metrics": [
            {"name": m.name, "label": m.label, "higher": m.higher_is_better, "digits": digits(result, m)}
            for m in result.metrics
        ],
        "costs": [
            {"name": f"{part}.{saving}", "label": f"{saving_label}, {part_label}"}
            for part, part_label in PARTS.items()
            for saving, saving_label in SAVINGS.items()
        ],
        "depths": [
            [depth, written(depth)]
            for depth in sorted({arm.depth for arm in result.arms if arm.policy != DENSE}, reverse=True)
        ],
        "series": names,
        "bands": list(dict.fromkeys(band.label for arm in result.arms for band in arm.by_length)),
        "arms": [
            {
                "name": arm.name,
                "series": names.index(series(result, arm)),
                "dense": arm.policy == DENSE,
                "reference": arm is dense,
                "depth": arm.depth,
                "layers": f"{arm.realised_mean_layers:.2f} of {arm.num_layers} layers",
                "scores": {name: triple(score) for name, score in arm.scores.items()},
                "costs": costs(arm, dense),
                "lengths": {band.label: {n: triple(s) for n, s in band.scores.items()} for band in arm.by_length},
                "losses": [[p.position, p.loss, p.count] for p in arm.loss_by_position],
            }
            for arm in result.arms
        ],
    }


def costs(arm: Arm, dense: Arm | None) -> dict[str, float]:
    """By `part.saving`: the arm's cost over the first dense arm's; what was not measured, or has another unit, is left out.

    Arms of the same model are compared for equal tokens, so that one that writes less does not look cheaper. Layers of a model with
    another number of them are another unit.
    """
    shares = {}
    for part in PARTS:
        for saving in SAVINGS:
            own = getattr(spending(arm, part), saving)
            whole = getattr(spending(dense, part), saving).value if dense is not None else None
            if dense is None or arm.model == dense.model:
                share = own.of_dense
            elif own.value is None or not whole or (saving == "mean_layers" and arm.num_layers != dense.num_layers):
                share = None
            else:
                share = own.value / whole
            if share is not None:
                shares[f"{part}.{saving}"] = share
    return shares


def triple(score: Score) -> list[float]:
    """[value, low, high]."""
    return [score.value, score.low, score.high]
