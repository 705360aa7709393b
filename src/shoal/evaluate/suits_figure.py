"""The picture of `suits`: change per layer on the left, agreement and loss against depth on the right."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import Any

from shoal.depth.policies import POLICIES
from shoal.errors import MissingExtra
from shoal.evaluate.suits import Outcome, Suitability
from shoal.evaluate.suits_advice import KEPT_AGREEMENT, KEPT_LOSS, advice
from shoal.files import replaced

COLORS = ("#0b3c5d", "#e08e0b", "#3fa796", "#a23b72", "#6b7a8f")
MARKERS = ("o", "s", "D", "^", "v")
GENERATED, PROMPT = "#1f77a4", "#b9c6cf"


def require_matplotlib() -> Any:
    """matplotlib's `Figure`. Raises `MissingExtra`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("figures need matplotlib: pip install 'shoal[plot]'") from error
    return Figure


def draw(found: Suitability, path: Path) -> None:
    """Write the picture; `path` appears whole. Raises `MissingExtra`."""
    figure = require_matplotlib()(figsize=(12, 5.6), layout="constrained")
    from PIL import Image  # comes with matplotlib

    grid = figure.add_gridspec(2, 2, width_ratios=(5, 6), height_ratios=(5, 4))
    left, top = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    bottom = figure.add_subplot(grid[1, 1], sharex=top)
    draw_layers(left, found)
    draw_policies(top, bottom, found)
    for panel in (left, top, bottom):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e6e9ec")
        panel.set_axisbelow(True)
    source = "completions that it wrote itself" if found.self_written else "given completions"
    figure.suptitle(
        f"{found.model}: {found.num_layers} layers, {found.num_examples} examples, {found.num_tokens} decode passes over {source}",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    figure.supxlabel(textwrap.fill(advice(found), 165), x=0.01, ha="left", fontsize=9.5)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    with replaced(path) as partial:
        # A palette looks the same and takes a third of the bytes.
        Image.open(drawn).convert("RGB").quantize(128).save(partial, format="PNG", optimize=True)


def draw_layers(panel: Any, found: Suitability) -> None:
    """Bars: relative change. Lines with markers: how far the direction turns, 1 - cosine."""
    layers = range(found.num_layers)
    for shift, name, color, part in (
        (-0.2, "prompt", PROMPT, "prompt"),
        (0.2, "generated tokens", GENERATED, "completion"),
    ):
        change = [getattr(layer, f"{part}_change") for layer in found.layers]
        turned = [1 - getattr(layer, f"{part}_cosine") for layer in found.layers]
        panel.bar([layer + shift for layer in layers], change, width=0.4, color=color, label=f"relative change, {name}")
        marks = {
            "color": "white",
            "markeredgecolor": "#33424d" if part == "completion" else "#7d8c96",
            "linestyle": "none",
        }
        panel.plot(
            [layer + shift for layer in layers], turned, marker="o", ms=4.5, label=f"1 - cosine, {name}", **marks
        )
    panel.set(xlabel="layer (0 is the bottom)", ylim=(0, None), xlim=(-0.8, found.num_layers - 0.2))
    panel.xaxis.get_major_locator().set_params(integer=True)
    head(panel, "How much each layer changes a token's state", columns=2)


def draw_policies(top: Any, bottom: Any, found: Suitability) -> None:
    """A line per policy from the dense model at depth 1, with 95% intervals."""
    for number, policy in enumerate(POLICIES):
        outcomes: list[Outcome] = [outcome for outcome in found.outcomes if outcome.policy == policy]
        if not outcomes:
            continue
        color = COLORS[number % len(COLORS)]
        style = {"marker": MARKERS[number % len(MARKERS)], "ms": 5, "lw": 1.6, "color": color, "label": policy}
        depths = [1.0, *(outcome.realised_depth for outcome in outcomes)]
        for panel, name, dense in ((top, "agreement", 1.0), (bottom, "loss_increase", 0.0)):
            scores = [getattr(outcome, name) for outcome in outcomes]
            panel.plot(depths, [dense, *(score.value for score in scores)], **style)
            lows, highs = ([dense, *(getattr(score, end) for score in scores)] for end in ("low", "high"))
            panel.fill_between(depths, lows, highs, color=color, alpha=0.1, lw=0)
    top.axhline(KEPT_AGREEMENT, color="#8a979f", lw=0.8, ls="--")
    bottom.axhline(KEPT_LOSS, color="#8a979f", lw=0.8, ls="--")
    lowest = min((outcome.agreement.low for outcome in found.outcomes), default=0.0)
    top.set(ylabel="agreement with full depth", ylim=(min(0.8, math.floor(10 * lowest) / 10), 1.01))
    top.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    top.tick_params(labelbottom=False)
    bottom.set(
        ylabel="loss increase, nats", xlabel="share of the layers that a generated token runs", xlim=(None, 1.02)
    )
    head(top, "What each policy costs, shaded: 95% intervals over examples", columns=3)


def head(panel: Any, title: str, *, columns: int) -> None:
    """The title, and below it a legend of two lines: inside the panel it would hide something on some model."""
    panel.set_title(title, loc="left", fontsize=11, pad=42)
    panel.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
