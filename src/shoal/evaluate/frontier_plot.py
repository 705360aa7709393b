"""A frontier as a picture: quality against the layers of a generated token, and against the FLOPs of a whole request."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from shoal.errors import MissingExtra
from shoal.evaluate.frontier_result import Arm, FrontierResult

COLORS = ("#0b3c5d", "#e08e0b", "#3fa796", "#a23b72", "#6b7a8f", "#7d4f2a", "#5b8e2d", "#c0392b")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def plot_frontier(result: FrontierResult, path: Path) -> None:
    """Write the figure (the format follows the suffix). Raises `MissingExtra` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("figures need matplotlib: pip install 'shoal[plot]'") from error
    metric = result.metrics[0]
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    costs: tuple[tuple[str, Callable[[Arm], float]], ...] = (
        ("mean layers per generated token", lambda arm: arm.realised_mean_layers),
        ("GFLOPs per request, prompt included", lambda arm: (arm.savings.request.flops.value or 0) / 1e9),
    )
    for panel, (label, cost) in zip(panels, costs, strict=True):
        _draw(panel, result, cost)
        panel.set_xlabel(label)
        panel.set_xlim(0, None)
        panel.grid(axis="y", color="#e6e9ec")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    better = "higher" if metric.higher_is_better else "lower"
    panels[0].set_ylabel(f"{metric.label} ({better} is better)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(
        f"{Path(result.task).name}, {result.conditions['num_inputs']} inputs; 95% intervals",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _draw(panel: Any, result: FrontierResult, cost: Callable[[Arm], float]) -> None:
    """A line per model and policy, from its dense arm to the shallowest; a model that only ran dense is a point."""
    name = result.metrics[0].name
    dense = {arm.model: arm for arm in result.arms if arm.policy == "dense"}
    lines = [
        (model, policy, list(arms))
        for (model, policy), arms in groupby(result.arms, key=lambda arm: (arm.model, arm.policy))
        if policy != "dense"
    ]
    prefix = {model: f"{model}: " if len(dense) > 1 else "" for model in dense}
    for number, (model, policy, arms) in enumerate(lines):
        points = sorted([*arms, dense[model]], key=cost)
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        x, scores = [cost(arm) for arm in points], [arm.scores[name] for arm in points]
        panel.fill_between(x, [s.low for s in scores], [s.high for s in scores], color=color, alpha=0.12, lw=0)
        panel.plot(
            x, [s.value for s in scores], marker=marker, ms=5, lw=1.6, color=color, label=f"{prefix[model]}{policy}"
        )
    for number, (model, arm) in enumerate(dense.items()):
        score = arm.scores[name]
        own_line = any(model == line for line, *_ in lines)
        panel.errorbar(
            [cost(arm)],
            [score.value],
            yerr=[[max(0, score.value - score.low)], [max(0, score.high - score.value)]],
            fmt=MARKERS[(number + 3) % len(MARKERS)],
            ms=9,
            capsize=3,
            color="#222222" if own_line else COLORS[(len(lines) + number) % len(COLORS)],
            zorder=5,
            label=f"{prefix[model]}dense ({arm.num_layers} layers)",
        )
