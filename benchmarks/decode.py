"""What depth gains in decoding, beside what it could gain at most; and decoding beside other engines.

    python benchmarks/decode.py --save --gates                                    (everything: hours on 2 cores, saved case by case)
    python benchmarks/decode.py --models OPT-125M --dtypes bfloat16 --batches 32 --peers openvino

All rows share one clock (clocks.py has others). Greedy, random weights, the same checkpoint for all engines, all variants one after
the other in every round; peers wait in processes of their own. The bound of a plan is floor(dense) / floor(plan), head and cache
included (served.py), from a bandwidth and a peak that are measured in the same rounds.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agreement import agreement
from decode_tables import describe
from gates import print_gates
from machine import Limits, conditions
from models import random_checkpoint, random_prompts
from peers.client import Absent, Peer
from report import interleaved, load, paired, parser, print_json, rounded, save, spread
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
from served import decode_floor_s
from shoal import Dense, Engine, SkipDecode
from shoal.depth.cost import PlanCost

DEPTHS = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(1, 5))
PROMPT_TOKENS = 64
NEW_TOKENS = 64
WARM_UP_TOKENS = 8
CACHE_GIB = 4
"""128 rows of Llama-300M in float32 take 3.2."""

Tokens = list[list[int]]


def measure(
    name: str, dtype: str, exact: dict[tuple[int, str], Tokens], options: argparse.Namespace, directory: Path
) -> Iterator[dict[str, Any]]:
    """The runs of one model in one dtype, one per batch size.

    Args: `exact`: what float32 emitted per batch size and variant, filled by it and compared with afterwards.
    """
    checkpoint = random_checkpoint(name, directory)
    most = max(options.batches)
    engine = Engine.from_pretrained(
        checkpoint,
        dtype=dtype,
        max_batch=most,
        max_pass_tokens=most * PROMPT_TOKENS,  # all prompts in one pass, so that all rows share a clock
        cache_gib=CACHE_GIB,
    )
    with started(options.peers, checkpoint, dtype, threads=options.threads) as (peers, absent):
        for batch in options.batches:
            run, tokens = measure_batch(engine, peers, absent, batch, options)
            if dtype == "float32":
                exact |= {(batch, label): emitted for label, emitted in tokens.items()}
            else:
                for row in run["variants"]:
                    if (expected := exact.get((batch, row["variant"]))) is not None:
                        row["agreement"] = agreement(expected, tokens[row["variant"]])
            yield {"case": {"model": name, "dtype": dtype, "batch": batch}, "conditions": conditions(), **run}


def measure_batch(
    engine: Engine, peers: Sequence[Peer], absent: Sequence[Absent], batch: int, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Tokens]]:
    """All variants at one batch size: the run, and what ours emitted."""
    prompt_tokens, new_tokens = (8, 8) if options.quick else (PROMPT_TOKENS, NEW_TOKENS)
    shape = engine.shape
    prompts = random_prompts(shape.vocab_size, num_prompts=batch, num_tokens=prompt_tokens)
    plans = {"dense": Dense().plan(shape.num_layers)}
    for depth in options.depths:
        plans[f"depth {depth}"] = SkipDecode(depth=float(depth), horizon=new_tokens - 1).plan(shape.num_layers)

    def variants(num_tokens: int) -> dict[str, Callable[[], Sample | Absent]]:
        ours = {label: partial(run_shoal, engine, prompts, plan, num_tokens) for label, plan in plans.items()}
        theirs = peer_variants(peers, batch=batch, prompt_tokens=prompt_tokens, new_tokens=num_tokens)
        return {**ours, **theirs}

    limits = Limits(engine.runner.decoder, rows=batch, quick=options.quick)
    limits.measure()
    interleaved(variants(min(WARM_UP_TOKENS, new_tokens)), 1)
    samples, failed = without_failed(interleaved(variants(new_tokens), options.rounds, between=limits.measure))

    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch}
    decoded = batch * (new_tokens - 1)
    ours = {label: samples[label] for label in plans}
    dense_cost = plans["dense"].cost(shape, **sizes)
    floors = {label: decode_floor_s(plan, shape, limits, **sizes) for label, plan in plans.items()}
    rows = []
    for label, plan in plans.items():
        decode_s = spread([s.decode_s for s in ours[label]])
        speedup = paired([s.decode_s for s in ours["dense"]], [s.decode_s for s in ours[label]])
        bound = floors["dense"] / floors[label]
        rows.append(
            {
                "variant": label,
                "prompt_s": spread([s.prompt_s for s in ours[label]]),
                "decode_s": decode_s,
                "total_s": spread([s.total_s for s in ours[label]]),
                "decode_tokens_per_s": tokens_per_s(decoded, decode_s),
                "decode_speedup": speedup,
                "total_speedup": paired([s.total_s for s in ours["dense"]], [s.total_s for s in ours[label]]),
                **counted(plan.cost(shape, **sizes), dense_cost, **sizes),
                "floor_s": rounded(floors[label]),
                "time_over_floor": rounded(decode_s["median"] / floors[label]),
                "bound": rounded(bound),
                "gain_over_bound": rounded(speedup["median"] / bound),
            }
        )
    beside = [
        peer_row(peer, samples[peer.name], ours, ("prompt", "decode", "total"))
        for peer in peers
        if peer.name in samples
    ]
    for row in beside:
        row["decode_tokens_per_s"] = tokens_per_s(decoded, row["decode_s"])
    run = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": options.rounds,
        **limits.to_dict(),
        "variants": rows,
        "peers": beside,
        "absent": absences([*absent, *failed]),
    }
    return run, {label: timed[0].tokens for label, timed in ours.items()}


def with_earlier_peers(run: dict[str, Any]) -> dict[str, Any]:
    """The run, and the peers that an earlier run of its case had and it did not: their ratios stand, as of that run."""
    earlier = next((kept for kept in load("decode") if kept["case"] == run["case"]), None)
    measured = {row["peer"] for row in run["peers"]}
    kept = [] if earlier is None else [row for row in earlier["peers"] if row["peer"] not in measured]
    return {**run, "peers": [*run["peers"], *({**row, "earlier_run": True} for row in kept)]}


def counted(cost: PlanCost, dense: PlanCost, *, prompt_tokens: int, new_tokens: int, batch: int) -> dict[str, float]:
    """The savings that are counted, not timed: mean layers, and how many times fewer FLOPs and bytes than dense."""
    return {
        "decode_mean_layers": rounded(cost.mean_layers),
        "total_mean_layers": rounded(cost.layer_tokens / (batch * (prompt_tokens + new_tokens - 1))),
        "decode_flops_ratio": rounded(dense.decode_flops / cost.decode_flops),
        "total_flops_ratio": rounded(dense.flops / cost.flops),
        "decode_bytes_ratio": rounded(dense.decode_bytes / cost.decode_bytes),
        "total_bytes_ratio": rounded(dense.bytes_moved / cost.bytes_moved),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M", "Llama-300M"])
    options.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16", "int8"], help="float32 first, to compare with"
    )
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    options.add_argument("--depths", nargs="+", type=Fraction, default=DEPTHS, help="1/2 must be among them")
    add_peer_options(options)
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.batches, chosen.rounds = ["OPT-quick", "Llama-quick"], [1, 2], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with workplace(chosen.keep) as directory:
        for name in chosen.models:
            exact: dict[tuple[int, str], Tokens] = {}
            for dtype in chosen.dtypes:
                for run in measure(name, dtype, exact, chosen, directory):
                    print(describe(run), end="\n\n", flush=True)
                    if chosen.save:
                        save("decode", [with_earlier_peers(run)])
                    runs.append(run)
                gc.collect()  # the engine goes before the next one comes
    if chosen.gates:
        print_gates("decode", runs)
    print_json("decode", runs)


if __name__ == "__main__":
    main()
