"""The runs of decode.py as tables, one run or all of them. Standard library and report.py only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report import extent, number
from shoal.evaluate.markdown import table

DECODE_HEADER = (
    *("decode", "layers", "FLOPs", "bytes", "speedup", "min..max"),
    *("bound", "of bound", "ms/pass", "over floor", "tokens/s", "as float32"),
)
TOTAL_HEADER = ("whole request", "layers", "FLOPs", "bytes", "speedup", "min..max", "prompt ms", "total ms")
PEER_HEADER = (
    *("peer", "version", "tokens/s", "ms/pass", "dense / it", "min..max"),
    *("depth 1/2 / it", "min..max", "whole, dense", "whole, 1/2"),
)


def describe(run: dict[str, Any]) -> str:
    """One run as three tables: decoding, whole requests, peers.

    Ratios of the first two are dense over variant: above 1 is less than dense; those of the third are our speed over the peer's.
    """

    def cells(row: dict[str, Any], part: str) -> list[str]:
        return [
            row["variant"],
            number(row, f"{part}_mean_layers", ".1f"),
            number(row, f"{part}_flops_ratio"),
            number(row, f"{part}_bytes_ratio"),
            f"{row[f'{part}_speedup']['median']:.2f}",
            extent(row[f"{part}_speedup"]),
        ]

    passes = run["new_tokens"] - 1
    decode = [
        [
            *cells(row, "decode"),
            number(row, "bound"),
            number(row, "gain_over_bound"),
            f"{1e3 * row['decode_s']['median'] / passes:.2f}",
            number(row, "time_over_floor"),
            f"{row['decode_tokens_per_s']:.0f}",
            agreed(row),
        ]
        for row in run["variants"]
    ]
    total = [
        [
            *cells(row, "total"),
            f"{1e3 * row['prompt_s']['median']:.0f}",
            f"{1e3 * row['total_s']['median']:.0f}",
        ]
        for row in run["variants"]
    ]
    peers = [
        [
            row["peer"],
            row["version"],
            f"{row['decode_tokens_per_s']:.0f}",
            f"{1e3 * row['decode_s']['median'] / passes:.2f}",
            *(
                cell
                for label in ("dense", "depth 1/2")
                for cell in (f"{row['over'][label]['decode']['median']:.2f}", extent(row["over"][label]["decode"]))
            ),
            *(f"{row['over'][label]['total']['median']:.2f}" for label in ("dense", "depth 1/2")),
        ]
        for row in run["peers"]
    ]
    case = run["case"]
    return "\n\n".join(
        [
            f"{case['model']}, {case['dtype']}, batch {case['batch']}: {run['prompt_tokens']} prompt + {run['new_tokens']} new "
            f"tokens, {run['rounds']} rounds; {run['bandwidth_gb_per_s']:.3g} GB/s, {run['peak_gflop_per_s']:.3g} GFLOP/s",
            table(DECODE_HEADER, decode),
            table(TOTAL_HEADER, total),
            *([table(PEER_HEADER, peers)] if peers else []),
            *notes([run]),
        ]
    )


def agreed(row: dict[str, Any]) -> str:
    """Share of float32's tokens before the first difference, and in brackets the earliest and the median place of one."""
    found = row.get("agreement")
    if found is None:
        return ""
    earliest, median = found["first_difference"].values()
    places = "never differs" if earliest is None else f"{earliest}, {median:g}"
    return f"{100 * found['tokens_before_difference']:.0f}% ({places})"


def notes(runs: Sequence[dict[str, Any]]) -> list[str]:
    """How peers computed, and which were absent and why: a list, or nothing."""
    computed = {f"- {row['peer']} {row['version']}: {row['note']}" for run in runs for row in run.get("peers", ())}
    missing: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for row in run.get("absent", ()):
            cases = missing.setdefault((row["peer"], row["reason"]), [])
            case = f"{run['case']['model']} {run['case']['dtype']}"
            if case not in cases:
                cases.append(case)
    absent = [f"- {peer} is absent ({', '.join(cases)}): {reason}" for (peer, reason), cases in missing.items()]
    lines = sorted(computed) + absent
    return ["\n".join(lines)] if lines else []


def peers_of(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A run's peers by name."""
    return {row["peer"]: row for row in run["peers"]}


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """All runs, a row each: dense beside transformers and each depth's speedup with its share of the bound; then all peers."""
    depths = sorted({row["variant"] for run in runs for row in run["variants"] if row["variant"].startswith("depth")})
    header = ["model", "dtype", "batch", "dense tokens/s", "over transformers", "whole request", "time over floor"]
    rows = []
    for run in runs:
        variants = {row["variant"]: row for row in run["variants"]}
        dense = variants["dense"]
        over = peers_of(run).get("transformers", {}).get("over", {}).get("dense")
        rows.append(
            [
                *(str(value) for value in run["case"].values()),
                f"{dense['decode_tokens_per_s']:.0f}",
                *(f"{over[part]['median']:.2f}" if over else "-" for part in ("decode", "total")),
                f"{dense['time_over_floor']:.2f}",
                *(
                    f"{variants[depth]['decode_speedup']['median']:.2f} ({variants[depth]['gain_over_bound']:.2f})"
                    if depth in variants
                    else "-"
                    for depth in depths
                ),
            ]
        )
    return "\n\n".join([table([*header, *depths], rows), *peer_summary(runs)])


def peer_summary(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A table of every peer in every run, with the notes below it; nothing where no run had one in its own process."""
    measured = [run for run in runs if run.get("peers")]
    if not measured:
        return []
    names = list(dict.fromkeys(row["peer"] for run in measured for row in run["peers"]))
    rows = []
    for run in measured:
        dense = next(row for row in run["variants"] if row["variant"] == "dense")
        found = peers_of(run)
        rows.append(
            [
                *(str(value) for value in run["case"].values()),
                f"{dense['decode_tokens_per_s']:.0f}",
                *(beside(found[name]) if name in found else "-" for name in names),
            ]
        )
    apart = any(row.get("earlier_run") for run in measured for row in run["peers"])
    dagger = (
        ["† beside us in an earlier run than the row's other numbers: compare its ratios, not its tokens/s."]
        if apart
        else []
    )
    return [table(["model", "dtype", "batch", "dense tokens/s", *names], rows), *dagger, *notes(runs)]


def beside(row: dict[str, Any]) -> str:
    """A peer's tokens/s; in brackets our speed over it, dense and at depth 1/2; a dagger where its run is an earlier one."""
    dense, half = (row["over"][label]["decode"]["median"] for label in ("dense", "depth 1/2"))
    return f"{row['decode_tokens_per_s']:.0f}{'†' if row.get('earlier_run') else ''} ({dense:.2f}, {half:.2f})"
