"""How fast prompts are read, beside other engines and beside the machine's floor.

    python benchmarks/prefill.py --save

Every layer, one new token: from the request until every row has it. The protocol is decode.py's: random weights, the same
checkpoint for all engines, one after the other in every round. The floor is that of one pass (served.py).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from decode_tables import notes
from machine import Limits, conditions
from models import random_checkpoint, random_prompts
from peers.client import Absent, Peer
from report import extent, interleaved, parser, print_json, rounded, save, spread
from samples import (
    Sample,
    absences,
    add_peer_options,
    peer_row,
    peer_variants,
    run_shoal,
    started,
    tokens_per_s,
    without_failed,
    workplace,
)
from served import prompt_pass
from shoal import Dense, Engine
from shoal.evaluate.markdown import table

CASES = ((1, 64), (1, 512), (8, 64), (8, 512), (32, 64))
"""(batch, prompt tokens)."""
QUICK_CASES = ((1, 8), (2, 8))


def measure(name: str, dtype: str, options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """The runs of one model in one dtype."""
    cases = QUICK_CASES if options.quick else CASES
    checkpoint = random_checkpoint(name, directory)
    engine = Engine.from_pretrained(
        checkpoint,
        dtype=dtype,
        max_batch=max(batch for batch, _ in cases),
        max_pass_tokens=max(batch * length for batch, length in cases),
        cache_gib=2,
    )
    with started(options.peers, checkpoint, dtype, threads=options.threads) as (peers, absent):
        for batch, length in cases:
            run = measure_case(engine, peers, absent, batch, length, options)
            case = {"model": name, "dtype": dtype, "batch": batch, "prompt_tokens": length}
            yield {"case": case, "conditions": conditions(), **run}


def measure_case(
    engine: Engine,
    peers: Sequence[Peer],
    absent: Sequence[Absent],
    batch: int,
    length: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Every engine on one batch."""
    shape = engine.shape
    prompts = random_prompts(shape.vocab_size, num_prompts=batch, num_tokens=length)
    variants: dict[str, Callable[[], Sample | Absent]] = {
        "shoal": partial(run_shoal, engine, prompts, Dense().plan(shape.num_layers), 1),
        **peer_variants(peers, batch=batch, prompt_tokens=length, new_tokens=1),
    }
    limits = Limits(engine.runner.decoder, rows=batch * length, quick=options.quick)
    limits.measure()
    interleaved(variants, 1)
    samples, failed = without_failed(interleaved(variants, options.rounds, between=limits.measure))

    ours = {"dense": samples["shoal"]}
    total_s = spread([s.total_s for s in ours["dense"]])
    floor_s = prompt_pass(shape, batch=batch, length=length).floor_s(limits)
    beside = [peer_row(peer, samples[peer.name], ours, ("total",)) for peer in peers if peer.name in samples]
    for row in beside:
        row["prompt_tokens_per_s"] = tokens_per_s(batch * length, row["total_s"])
    return {
        "rounds": options.rounds,
        **limits.to_dict(),
        "total_s": total_s,
        "prompt_tokens_per_s": tokens_per_s(batch * length, total_s),
        "floor_s": rounded(floor_s),
        "time_over_floor": rounded(total_s["median"] / floor_s),
        "peers": beside,
        "absent": absences([*absent, *failed]),
    }


HEADER = (
    "model",
    "dtype",
    "batch",
    "prompt",
    "engine",
    "tokens/s",
    "ms",
    "min..max",
    "over floor",
    "ours over it",
    "min..max",
)


def describe(runs: Sequence[dict[str, Any]]) -> str:
    """Runs as one table, and how the peers computed."""
    rows = []
    for run in runs:
        case = [str(value) for value in run["case"].values()]
        rows.append([*case, "shoal", *cells(run), f"{run['time_over_floor']:.2f}", "", ""])
        for row in run["peers"]:
            over = row["over"]["dense"]["total"]
            rows.append([*case, row["peer"], *cells(row), "", f"{over['median']:.2f}", extent(over)])
    return "\n\n".join([table(HEADER, rows), *notes(runs)])


def cells(row: dict[str, Any]) -> list[str]:
    """Speed and time of one engine."""
    in_ms = {key: 1e3 * value for key, value in row["total_s"].items()}
    return [f"{row['prompt_tokens_per_s']:.0f}", f"{in_ms['median']:.1f}", f"{in_ms['min']:.1f}..{in_ms['max']:.1f}"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M", "Llama-300M"])
    options.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    add_peer_options(options)
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.rounds = ["OPT-quick", "Llama-quick"], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with workplace(chosen.keep) as directory:
        for name in chosen.models:
            for dtype in chosen.dtypes:
                for run in measure(name, dtype, chosen, directory):
                    print(describe([run]), end="\n\n", flush=True)
                    if chosen.save:
                        save("prefill", [run])
                    runs.append(run)
                gc.collect()  # the engine goes before the next one comes
    print_json("prefill", runs)


if __name__ == "__main__":
    main()
