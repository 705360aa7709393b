"""Slices over time as one HTML page that needs nothing else: no server, no network, no script.

Every text is escaped, and the page's content security policy lets nothing run or load but its own style.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shoal import __version__
from shoal.files import replaced
from shoal.signals.slices import DRIFT_ALARM, SliceEstimate, label_next
from shoal.signals.watch import Watch, Window

WIDTH, HEIGHT = 640, 120
"""Of a slice's chart, in its own units."""
MOST_WINDOWS = 200
"""Windows that a chart shows, the last ones."""


def write_dashboard(watch: Watch, path: Path, *, refresh_s: float) -> None:
    """Write the page to `path`, whole or not at all; browsers load it again every `refresh_s`."""
    page = render(watch, refresh_s=refresh_s)
    with replaced(path) as partial:
        partial.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def render(watch: Watch, *, refresh_s: float) -> str:
    """The page as HTML."""
    pages = PackageLoader("shoal.signals", "page")
    environment = Environment(
        loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = pages.get_source(environment, "dashboard.css")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    latest = watch.latest()
    return environment.get_template("dashboard.html").render(
        version=__version__,
        style=Markup(style),
        style_hash=f"sha256-{digest}",
        refresh_s=max(1, round(refresh_s)),
        watch=watch,
        slices=[(one, chart([w for w in watch.windows if w.estimate.name == one.name])) for one in latest],
        alarms=[one.name for one in latest if one.alarm],
        next=label_next(latest),
        drift_alarm=DRIFT_ALARM,
        percent=percent,
        size=(WIDTH, HEIGHT),
    )


def percent(share: float) -> str:
    """A share as text, `64.2%`."""
    return f"{100 * share:.1f}%"


def chart(windows: list[Window]) -> dict[str, str]:
    """SVG points of a slice's windows: the interval as a band, the estimate as a line, and its last point."""
    shown: list[SliceEstimate] = [window.estimate for window in windows[-MOST_WINDOWS:]]
    step = WIDTH / max(1, len(shown) - 1) if len(shown) > 1 else WIDTH

    def points(values: list[float], *, backwards: bool = False) -> str:
        placed = [(place * step, HEIGHT * (1 - value)) for place, value in enumerate(values)]
        if len(placed) == 1:  # one window is a line, not a dot
            placed.append((float(WIDTH), placed[0][1]))
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (reversed(placed) if backwards else placed))

    low, high = [one.low for one in shown], [one.high for one in shown]
    return {"band": f"{points(high)} {points(low, backwards=True)}", "line": points([one.estimate for one in shown])}
