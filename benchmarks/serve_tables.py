"""What `serve.py` measured, as tables and as a figure."""

from __future__ import annotations

from typing import Any

from report import extent
from shoal.evaluate.markdown import table

HEADER = ("variant", "requests/s", "tokens/s", "TTFT ms p50 / p95 / p99", "ITL ms p50 / p95 / p99", "good", "goodput/s")
SATURATED_HEADER = ("speedup", "min..max", "forecast tokens/s", "measured / forecast", "min..max", "in passes")


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
            cells.append(f"{row['pass_share']['median']:.0%}")
        rows.append(cells)
    return heading(run) + "\n\n" + table((*HEADER, *SATURATED_HEADER) if saturated else HEADER, rows)


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
