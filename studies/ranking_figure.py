"""The curves of `ranking.py` as a picture: quality against calls, one panel per collection and comparator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.evaluate.ranking import FIRST_STAGE
from shoal.files import replaced

COLORS = {
    "adaptive": "#5b4bb5", "all-pairs": "#e08e0b", "mohajer": "#3fa796", "heapsort": "#b23a48", "quicksort": "#0b3c5d",
    "pac": "#8a9a5b", "tournament": "#c77dbb",
}  # fmt: skip
"""Those that are drawn, asked in a drawn direction; the table has all."""


def draw(result: dict[str, Any], path: Path, budgets: tuple[int, ...]) -> None:
    """nDCG@10 of the rankers, the first stage as a line; shaded: 95% intervals over topics of the adaptive ranker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "shoal"})
    collections = list(dict.fromkeys(one["collection"] for one in result["curves"]))
    figure, axes = plt.subplots(
        2, len(collections), figsize=(3.4 * len(collections), 5.4), layout="constrained", squeeze=False, sharex=True
    )
    for one in result["curves"]:
        panel = axes[int(one["noise"] == "mismatched"), collections.index(one["collection"])]
        panel.axhline(one["scores"][FIRST_STAGE][0][0], color="#9aa3ab", lw=1, ls="--", label="first stage")
        for name, color in reversed(COLORS.items()):
            means, lows, highs = zip(*one["scores"][f"{name} [random]"], strict=True)
            ours = name == "adaptive"
            panel.plot(budgets, means, "o-", ms=3, lw=2 if ours else 1, color=color, label=name)
            if ours:
                panel.fill_between(budgets, lows, highs, color=color, alpha=0.12, lw=0)
        panel.set_title(f"{one['collection']}, {one['topics']} topics, {one['noise']}", fontsize=9)
    for panel in axes[-1]:
        panel.set(xlabel="calls", xticks=budgets)
    for row in axes:
        row[0].set_ylabel("nDCG@10")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    with replaced(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
    plt.close(figure)
