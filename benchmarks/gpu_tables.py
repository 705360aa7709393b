"""What `gpu.py` prints of a run."""

from __future__ import annotations

from typing import Any

from report import extent, number
from shoal.evaluate.markdown import table

HEADER = (
    *("variant", "layers", "speedup", "min..max", "bound", "of bound"),
    *("ms/pass", "GB/s", "of bandwidth", "tokens/s", "prompt ms", "total ms"),
)


def describe(run: dict[str, Any]) -> str:
    """One run as a table; speedups are of decoding, over our dense."""
    case = run["case"]
    title = f"{case['model']}, {case['dtype']}, batch {case['batch']} on {case['device']}"
    if "skipped" in run:
        return f"{title}: skipped, {run['skipped']}"
    rows = [
        [
            row["variant"],
            number(row, "decode_mean_layers", ".1f"),
            f"{row['decode_speedup']['median']:.2f}",
            extent(row["decode_speedup"]),
            number(row, "bound"),
            number(row, "gain_over_bound"),
            f"{1e3 * row['decode_s']['median'] / (run['new_tokens'] - 1):.3f}",
            number(row, "bytes_gb_per_s", ".0f"),
            number(row, "bytes_over_bandwidth"),
            f"{row['decode_tokens_per_s']:.0f}",
            f"{1e3 * row['prompt_s']['median']:.1f}",
            f"{1e3 * row['total_s']['median']:.1f}",
        ]
        for row in run["variants"]
    ]
    absent = f"; without transformers: {run['without_peer']}" if "without_peer" in run else ""
    return (
        f"{title}: {run['prompt_tokens']} prompt + {run['new_tokens']} new tokens, {run['rounds']} rounds; "
        f"{run['bandwidth_gb_per_s']:.4g} GB/s, {run['peak_gflop_per_s']:.4g} GFLOP/s{absent}\n\n{table(HEADER, rows)}"
    )
