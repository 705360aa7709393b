"""What `serve.py` measured, as tables and as a figure.

python benchmarks/serve_tables.py            (draws results/serve.svg)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report import RESULTS, extent, load
from shoal.evaluate.markdown import table

FIGURE = RESULTS / "serve.svg"

HEADER = ("variant", "requests/s", "tokens/s", "TTFT ms p50 / p95 / p99", "ITL ms p50 / p95 / p99", "good", "goodput/s")
SATURATED_HEADER = ("speedup", "min..max", "forecast tokens/s", "measured / forecast", "min..max", "in passes")


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """Goodput of all loads side by side, then each load."""
    poisson = [run for run in runs if run["case"]["load"] != "saturated"]
    parts = [describe(run) for run in reversed(runs)]
    if poisson:
        labels = [row["variant"] for row in poisson[0]["variants"]]
        rows = [
            [f"{run['rate_per_s']:.2f}", *(goodput(run, label) for label in labels)]
            for run in sorted(poisson, key=lambda run: float(run["rate_per_s"]))
        ]
        parts.insert(0, "Goodput, requests/s, by requests/s offered\n\n" + table(("offered", *labels), rows))
    if FIGURE.is_file():
        parts.insert(0, f"![Goodput against offered load](results/{FIGURE.name})")
    return "\n\n".join(parts)


def goodput(run: dict[str, Any], label: str) -> str:
    """Of one variant, where it was measured."""
    return next((f"{row['goodput_per_s']:.2f}" for row in run["variants"] if row["variant"] == label), "-")


def draw(runs: Sequence[dict[str, Any]]) -> None:
    """Goodput against offered load, a line per variant."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters, not outlines: a tenth of the size
    matplotlib.rcParams["svg.hashsalt"] = "serve"  # the same file from the same numbers
    from matplotlib import pyplot

    poisson = sorted((run for run in runs if "rate_per_s" in run), key=lambda run: float(run["rate_per_s"]))
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    most = max(row["offered_per_s"] for run in poisson for row in run["variants"])
    axes.plot([0, most], [0, most], color="0.8", linewidth=1)
    for label in [row["variant"] for row in poisson[0]["variants"]]:
        points = [row for run in poisson for row in run["variants"] if row["variant"] == label]
        axes.plot(
            [row["offered_per_s"] for row in points],
            [row["goodput_per_s"] for row in points],
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set_xlabel("requests/s offered")
    axes.set_ylabel("requests/s within the target")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, bbox_inches="tight", metadata={"Date": None})


def describe(run: dict[str, Any]) -> str:
    """One load as a table."""
    saturated = run["case"]["load"] == "saturated"
    rows = []
    for row in run["variants"]:
        cells = [
            row["variant"],
            f"{row['achieved_per_s']['median']:.2f}",
            f"{row['tokens_per_s']['median']:.0f}",
            in_ms(row["ttft_s"]),
            in_ms(row["itl_s"]),
            f"{row['good_share']:.0%}",
            f"{row['goodput_per_s']:.2f}",
        ]
        if saturated:
            cells += [f"{row['speedup']['median']:.2f}", extent(row["speedup"])]
            if "over_forecast" in row:
                over = row["over_forecast"]
                cells += [f"{row['forecast_tokens_per_s']['median']:.0f}", f"{over['median']:.3f}", extent(over)]
            else:
                cells += ["-", "-", "-"]
            cells.append(f"{row['pass_share']['median']:.0%}" if "pass_share" in row else "-")
        rows.append(cells)
    header = (*HEADER, *SATURATED_HEADER) if saturated else HEADER
    return heading(run) + "\n\n" + table(header, rows)


def heading(run: dict[str, Any]) -> str:
    """What the load was, and the target."""
    case, target = run["case"], run["target"]
    load = (
        f"{2 * run['slots']} clients in a closed loop"
        if case["load"] == "saturated"
        else f"Poisson arrivals, {run['rate_per_s']:.2f} requests/s, {float(case['load']):.0%} of the dense capacity"
    )
    return (
        f"{case['model']}, {case['dtype']}, {run['slots']} slots, {run['rounds']} rounds: {load}. Alone, dense: TTFT "
        f"{1e3 * target['alone_ttft_s']:.0f} ms, TPOT {1e3 * target['alone_tpot_s']:.1f} ms; good: at most "
        f"{1e3 * target['ttft_at_most_s']:.0f} and {1e3 * target['tpot_at_most_s']:.1f} ms."
    )


def in_ms(of: dict[str, float]) -> str:
    """Three percentiles."""
    return " / ".join(f"{1e3 * seconds:.0f}" for seconds in of.values())


if __name__ == "__main__":
    draw(load("serve"))
