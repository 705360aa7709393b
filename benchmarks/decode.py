"""What depth gains in decoding, beside what it could gain at most; and dense decoding beside transformers.

    python benchmarks/decode.py --save                                            (everything: half an hour on 2 cores)
    python benchmarks/decode.py --models OPT-125M --dtypes bfloat16 --batches 32

All rows share one clock. Greedy, random weights, the same checkpoint for both engines, all variants in one process, one after
the other in every round. The bound of a plan is floor(dense) / floor(plan), where the floor of a pass is its bytes at the
bandwidth or its operations at the peak, the longer, cache and head included; both limits are measured in the same rounds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

from machine import Limits, conditions
from models import random_checkpoint, random_prompts
from report import interleaved, paired, parser, print_json, rounded, save, spread, table
from shoal import Dense, DepthPlan, Engine, Sampling, SkipDecode
from shoal.depth.cost import PlanCost, decode_pass_cost
from shoal.depth.shape import ModelShape

DEPTHS = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(1, 5))
PROMPT_TOKENS = 64
NEW_TOKENS = 64
WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one variant."""

    prompt_s: float
    """Seconds until the first token of every row."""
    decode_s: float
    """Seconds from the first token to the last."""
    total_s: float
    """Seconds of the whole call."""
    tokens: list[list[int]]
    """New tokens per row."""


def run_shoal(engine: Engine, prompts: list[list[int]], plan: DepthPlan, new_tokens: int) -> Sample:
    """One batch through our engine."""
    engine.stats.reset()
    began = time.perf_counter()
    generations = engine.generate(prompts, Sampling(max_new_tokens=new_tokens, ignore_eos=True), plan)
    total_s = time.perf_counter() - began
    return Sample(
        prompt_s=engine.stats.prompt_s,
        decode_s=engine.stats.decode_s,
        total_s=total_s,
        tokens=[list(generation.token_ids) for generation in generations],
    )


class Clock(StoppingCriteria):
    """Never stops anything; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run_transformers(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> Sample:
    """One batch through `generate`: greedy, with its default cache, and nothing that ends a row early."""
    input_ids = torch.tensor(prompts)
    clock = Clock()
    began = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=[clock],
    )
    total_s = time.perf_counter() - began
    return Sample(
        prompt_s=clock.times[0] - began,
        decode_s=clock.times[-1] - clock.times[0],
        total_s=total_s,
        tokens=output[:, input_ids.shape[1] :].tolist(),
    )


def floor_s(
    plan: DepthPlan, shape: ModelShape, limits: Limits, *, prompt_tokens: int, new_tokens: int, batch: int
) -> float:
    """Least seconds of the decode passes of a batch at one clock, pass by pass."""
    return sum(
        limits.floor_s(
            decode_pass_cost(shape, num_active=plan.depth(clock), context=prompt_tokens + clock + 1, batch=batch)
        )
        for clock in range(new_tokens - 1)
    )


def measure(
    name: str, dtype: str, batches: list[int], options: argparse.Namespace, directory: Path
) -> list[dict[str, Any]]:
    """The runs of one model in one dtype, one per batch size."""
    checkpoint = random_checkpoint(name, directory)
    engine = Engine.from_pretrained(checkpoint, dtype=dtype, max_batch=max(batches), cache_gib=2)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    return [measure_batch(engine, model, name, dtype, batch, options) for batch in batches]


def measure_batch(
    engine: Engine, model: PreTrainedModel, name: str, dtype: str, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """All variants at one batch size."""
    prompt_tokens, new_tokens = (8, 8) if options.quick else (PROMPT_TOKENS, NEW_TOKENS)
    shape = engine.shape
    prompts = random_prompts(shape.vocab_size, num_prompts=batch, num_tokens=prompt_tokens)
    plans = {"dense": Dense().plan(shape.num_layers)}
    for depth in DEPTHS:
        plans[f"depth {depth}"] = SkipDecode(depth=float(depth), horizon=new_tokens - 1).plan(shape.num_layers)

    def variants(num_tokens: int) -> dict[str, Callable[[], Sample]]:
        ours = {label: partial(run_shoal, engine, prompts, plan, num_tokens) for label, plan in plans.items()}
        return {**ours, "transformers": partial(run_transformers, model, prompts, num_tokens)}

    limits = Limits(engine.runner.decoder.head, rows=batch, dtype=engine.runner.decoder.dtype, quick=options.quick)
    limits.measure()
    interleaved(variants(min(WARM_UP_TOKENS, new_tokens)), 1)
    samples = interleaved(variants(new_tokens), options.rounds, between=limits.measure)

    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch}
    dense, dense_cost = samples["dense"], plans["dense"].cost(shape, **sizes)
    dense_floor_s = floor_s(plans["dense"], shape, limits, **sizes)
    rows = []
    for label, timed in samples.items():
        row: dict[str, Any] = {
            "variant": label,
            "prompt_s": spread([s.prompt_s for s in timed]),
            "decode_s": spread([s.decode_s for s in timed]),
            "total_s": spread([s.total_s for s in timed]),
            "decode_tokens_per_s": rounded(batch * (new_tokens - 1) / statistics.median(s.decode_s for s in timed)),
            "decode_speedup": paired([s.decode_s for s in dense], [s.decode_s for s in timed]),
            "total_speedup": paired([s.total_s for s in dense], [s.total_s for s in timed]),
        }
        if label in plans:
            floor = floor_s(plans[label], shape, limits, **sizes)
            bound = dense_floor_s / floor
            row |= counted(plans[label].cost(shape, **sizes), dense_cost, **sizes) | {
                "floor_s": rounded(floor),
                "time_over_floor": rounded(row["decode_s"]["median"] / floor),
                "bound": rounded(bound),
                "gain_over_bound": rounded(row["decode_speedup"]["median"] / bound),
            }
        rows.append(row)
    peer = samples["transformers"]
    same = [ours == theirs for ours, theirs in zip(dense[0].tokens, peer[0].tokens, strict=True)]
    run = {
        "case": {"model": name, "dtype": dtype, "batch": batch},
        "conditions": conditions(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": options.rounds,
        "bandwidth_gb_per_s": rounded(limits.bandwidth / 1e9),
        "peak_gflop_per_s": rounded(limits.peak / 1e9),
        "dense_over_transformers": {
            "decode": paired([s.decode_s for s in peer], [s.decode_s for s in dense]),
            "total": paired([s.total_s for s in peer], [s.total_s for s in dense]),
            "same_completions": rounded(sum(same) / batch),
        },
        "variants": rows,
    }
    print(describe(run), end="\n\n", flush=True)
    return run


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


DECODE_HEADER = (
    *("decode", "layers", "FLOPs", "bytes", "speedup", "min..max"),
    *("bound", "of bound", "ms/pass", "over floor", "tokens/s"),
)
TOTAL_HEADER = ("whole request", "layers", "FLOPs", "bytes", "speedup", "min..max", "prompt ms", "total ms")


def describe(run: dict[str, Any]) -> str:
    """One run as two tables, decoding and whole requests. Ratios are dense over variant: above 1 is less than dense."""

    def cells(row: dict[str, Any], part: str) -> list[str]:
        speedup = row[f"{part}_speedup"]
        return [
            row["variant"],
            number(row, f"{part}_mean_layers", ".1f"),
            number(row, f"{part}_flops_ratio"),
            number(row, f"{part}_bytes_ratio"),
            f"{speedup['median']:.2f}",
            f"{speedup['min']:.2f}..{speedup['max']:.2f}",
        ]

    decode = [
        [
            *cells(row, "decode"),
            number(row, "bound"),
            number(row, "gain_over_bound"),
            f"{1e3 * row['decode_s']['median'] / (run['new_tokens'] - 1):.2f}",
            number(row, "time_over_floor"),
            f"{row['decode_tokens_per_s']:.0f}",
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
    case = run["case"]
    return "\n\n".join(
        [
            f"{case['model']}, {case['dtype']}, batch {case['batch']}: {run['prompt_tokens']} prompt + {run['new_tokens']} new "
            f"tokens, {run['rounds']} rounds; {run['bandwidth_gb_per_s']:.3g} GB/s, {run['peak_gflop_per_s']:.3g} GFLOP/s",
            table(DECODE_HEADER, decode),
            table(TOTAL_HEADER, total),
        ]
    )


def number(row: dict[str, Any], key: str, form: str = ".2f") -> str:
    """A number that not every variant has."""
    return f"{row[key]:{form}}" if key in row else ""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M", "Llama-300M"])
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options.add_argument("--batches", nargs="+", type=int, default=[32, 8, 1])
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.batches, chosen.rounds = ["OPT-quick", "Llama-quick"], [2, 1], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen.models:
            for dtype in chosen.dtypes:
                done = measure(name, dtype, chosen.batches, chosen, Path(directory))
                gc.collect()
                if chosen.save:
                    save("decode", done)
                runs += done
    print_json("decode", runs)


if __name__ == "__main__":
    main()
