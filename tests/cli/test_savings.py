"""The table of the four savings, on numbers small enough to check by hand."""

from __future__ import annotations

import io

from rich.console import Console

from shoal.cli.savings import savings_table
from shoal.engine.ledger import EngineStats, Ledger
from shoal.engine.run_cost import RunCost


def rows(run: RunCost, dense: RunCost | None) -> list[list[str]]:
    out = io.StringIO()
    Console(file=out, width=200).print(savings_table(run, dense))
    return [
        line.replace("bytes moved", "bytes").replace("mean layers", "layers").split()
        for line in out.getvalue().splitlines()[1:]
    ]


def cost(decode_s: float, new_tokens: int) -> RunCost:
    """10 prompt tokens and 4 passes of a model with 6 layers, 2 of which decode."""
    ledger = Ledger(
        prompt_tokens=10, new_tokens=new_tokens, decode_passes=4,
        prompt_layer_tokens=60, decode_layer_tokens=8, dense_prompt_layer_tokens=60, dense_decode_layer_tokens=24,
        prompt_flops=600, decode_flops=100, dense_prompt_flops=600, dense_decode_flops=400,
    )  # fmt: skip
    stats = EngineStats(
        prompt_bytes=1024, decode_bytes=1024, dense_prompt_bytes=1024, dense_decode_bytes=3072, prompt_s=1.0, decode_s=decode_s
    )  # fmt: skip
    return RunCost(ledger=ledger, stats=stats)


def test_each_saving_for_decode_and_for_the_whole_request() -> None:
    """Whole request: 68 of 84 layer-tokens over 14 consumed tokens are 4.86 of 6 layers."""
    layers, flops, moved, clock = rows(cost(1.0, 5), None)
    assert layers == ["layers", "2", "6", "33%", "4.86", "6", "81%"]
    assert flops == ["FLOPs", "100", "400", "25%", "700", "1.00", "k", "70%"]
    assert moved == ["bytes", "1.00", "KiB", "3.00", "KiB", "33%", "2.00", "KiB", "4.00", "KiB", "50%"]
    assert clock == ["time", "per", "token", "200", "ms", "400", "ms"]


def test_wall_clock_is_compared_per_token_and_only_with_a_run() -> None:
    """The dense run took 4 s and 1 s for 10 tokens: 400 ms of decode per token, where this one took 200."""
    *_, clock = rows(cost(1.0, 5), cost(4.0, 10))
    assert clock == ["time", "per", "token", "200", "ms", "400", "ms", "50%", "400", "ms", "500", "ms", "80%"]
