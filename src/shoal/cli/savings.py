"""The four savings of a run: mean layers, FLOPs, bytes moved, wall clock; each for decode and for the whole request."""

from __future__ import annotations

from rich.table import Table

from shoal.cli.format import quantity, share
from shoal.engine.run_cost import RunCost


def savings_table(run: RunCost, dense: RunCost | None = None) -> Table:
    """The four savings of `run`.

    Its dense figures are counted for the same tokens in the same passes; what drafting takes beyond the plan is not among them.
    Only wall clock needs a dense run that was measured; it is compared per emitted token, because a dense run of the same
    prompts may emit more or fewer.
    """
    ledger, stats = run.ledger, run.stats
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for part in ("decode", "whole request"):
        table.add_column(part, justify="right")
        table.add_column("dense", justify="right", style="dim")
        table.add_column("of dense", justify="right", style="green")

    def row(label: str, decode: tuple[float, float | None], whole: tuple[float, float | None], unit: str = "") -> None:
        cells = [label]
        for spent, full in (decode, whole):
            cells += [
                quantity(spent, unit),
                *(("", "") if full is None else (quantity(full, unit), share(spent, full))),
            ]
        table.add_row(*cells)

    passes = max(1, ledger.decode_passes)
    consumed = max(1, ledger.prompt_tokens + ledger.decode_passes)
    dense_layer_tokens = ledger.dense_prompt_layer_tokens + ledger.dense_decode_layer_tokens
    row(
        "mean layers",
        (ledger.decode_layer_tokens / passes, ledger.dense_decode_layer_tokens / passes),
        (ledger.layer_tokens / consumed, dense_layer_tokens / consumed),
    )
    row(
        "FLOPs",
        (ledger.decode_flops, ledger.dense_decode_flops),
        (ledger.prompt_flops + ledger.decode_flops, ledger.dense_prompt_flops + ledger.dense_decode_flops),
    )
    row(
        "bytes moved",
        (stats.decode_bytes, stats.dense_decode_bytes),
        (stats.prompt_bytes + stats.decode_bytes, stats.dense_prompt_bytes + stats.dense_decode_bytes),
        unit="B",
    )
    row(
        "time per token",
        (run.decode_s_per_token, dense.decode_s_per_token if dense else None),
        (run.total_s_per_token, dense.total_s_per_token if dense else None),
        unit="s",
    )
    return table
