"""What a small model and short prompts leave of the savings: the fixed cost of a pass, and the prompt's share of a request.

    python benchmarks/short_requests.py --save

*Fixed cost*: seconds of a decode pass at 2, 4, .. L layers, and the straight line through them; beside it the matrix products of a
dense pass run alone, on the same rows. What is left is attention, norms, sampling and Python.
*Prompt*: whole requests of 35 prompt + 29 new tokens (the averages of the E2E data), with every layer for the prompt and with
only the layers that the first generated token runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decode import counted
from machine import conditions, seconds
from models import random_checkpoint, random_prompts
from report import interleaved, paired, parser, print_json, rounded, save, spread
from samples import Sample, run_shoal
from shoal import Dense, Engine, SkipDecode
from shoal.evaluate.markdown import table
from shoal.models.decoder import Decoder
from shoal.models.native.decoder import NativeDecoder

DEPTHS = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 5))
PROMPT_TOKENS = 35
NEW_TOKENS = 29


def products_s(decoder: Decoder | NativeDecoder, rows: int) -> float | None:
    """Seconds of the matrix products of one dense pass over `rows` tokens: four per layer, and the head. None where the kernel runs
    whole passes: its products cannot be called alone."""
    if isinstance(decoder, NativeDecoder):
        return None
    products = [p for layer in decoder.layers for p in (layer.qkv, layer.out, layer.up, layer.down)] + [decoder.head]
    inputs = [torch.randn(rows, product.in_features).to(decoder.dtype) for product in products]
    repeats = 20
    with torch.inference_mode():
        return statistics.median(
            seconds(lambda: [product(x) for product, x in zip(products, inputs, strict=True)]) for _ in range(repeats)
        )


def fixed_cost(engine: Engine, batch: int, rounds: int) -> dict[str, Any]:
    """Time of a decode pass against active layers, and the products' part of it."""
    num_layers, passes = engine.shape.num_layers, NEW_TOKENS - 1
    prompts = random_prompts(engine.shape.vocab_size, num_prompts=batch, num_tokens=PROMPT_TOKENS)
    depths = range(2, num_layers + 1, 2)
    plans = {str(k): SkipDecode(min_layers=k, max_layers=k).plan(num_layers) for k in depths}
    variants = {label: partial(run_shoal, engine, prompts, plan, NEW_TOKENS) for label, plan in plans.items()}
    products: list[float | None] = []
    interleaved(variants, 1)
    samples = interleaved(variants, rounds, between=lambda: products.append(products_s(engine.runner.decoder, batch)))
    pass_s = {k: [sample.decode_s / passes for sample in samples[str(k)]] for k in depths}
    medians = [statistics.median(pass_s[k]) for k in depths]
    slope, fixed = np.polyfit(list(depths), medians, 1)
    unexplained = np.var(medians - (fixed + slope * np.array(depths)))
    dense_s, known = medians[-1], [one for one in products if one is not None]
    beyond = (
        {
            "products_s": spread(known),
            "beyond_products_s": rounded(dense_s - statistics.median(known)),
            "beyond_products_share": rounded(1 - statistics.median(known) / dense_s),
        }
        if known
        else {}
    )
    return {
        "pass_s_by_layers": {str(k): spread(pass_s[k]) for k in depths},
        "fixed_s": rounded(fixed),
        "layer_s": rounded(slope),
        "r_squared": rounded(1 - unexplained / np.var(medians)),
        **beyond,
    }


def whole_requests(engine: Engine, batch: int, rounds: int) -> list[dict[str, Any]]:
    """The savings of whole requests, with and without reduced-depth prefill."""
    num_layers = engine.shape.num_layers
    sizes = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "batch": batch}
    prompts = random_prompts(engine.shape.vocab_size, num_prompts=batch, num_tokens=PROMPT_TOKENS)
    plans = {"dense": Dense().plan(num_layers)}
    for depth in DEPTHS:
        policy = {"depth": float(depth), "horizon": NEW_TOKENS - 1}
        plans[f"depth {depth}"] = SkipDecode(**policy).plan(num_layers)
        plans[f"depth {depth}, prompt too"] = SkipDecode(**policy, prompt="max_layers").plan(num_layers)
    variants = {label: partial(run_shoal, engine, prompts, plan, NEW_TOKENS) for label, plan in plans.items()}
    interleaved(variants, 1)
    samples: dict[str, list[Sample]] = interleaved(variants, rounds)
    dense_cost, dense = plans["dense"].cost(engine.shape, **sizes), samples["dense"]
    return [
        {
            "variant": label,
            "prompt_layers": sum(plans[label].runs_prompt),
            "prompt_s": spread([s.prompt_s for s in timed]),
            "decode_s": spread([s.decode_s for s in timed]),
            "total_s": spread([s.total_s for s in timed]),
            **counted(plans[label].cost(engine.shape, **sizes), dense_cost, **sizes),
            "decode_speedup": paired([s.decode_s for s in dense], [s.decode_s for s in timed]),
            "total_speedup": paired([s.total_s for s in dense], [s.total_s for s in timed]),
        }
        for label, timed in samples.items()
    ]


def measure(engine: Engine, name: str, dtype: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both parts at one batch size."""
    run = {
        "case": {"model": name, "dtype": dtype, "batch": batch},
        "conditions": conditions(),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": options.rounds,
        "fixed_cost": fixed_cost(engine, batch, options.rounds),
        "variants": whole_requests(engine, batch, options.rounds),
    }
    print(describe(run), end="\n\n", flush=True)
    return run


HEADER = (
    *("whole request", "prompt layers", "layers", "FLOPs", "bytes", "speedup", "min..max"),
    *("decode speedup", "prompt ms", "total ms"),
)


def describe(run: dict[str, Any]) -> str:
    """One run: the fixed cost in a sentence, the requests in a table."""
    case, fixed = run["case"], run["fixed_cost"]
    rows = [
        [
            row["variant"],
            str(row["prompt_layers"]),
            f"{row['total_mean_layers']:.1f}",
            f"{row['total_flops_ratio']:.2f}",
            f"{row['total_bytes_ratio']:.2f}",
            f"{row['total_speedup']['median']:.2f}",
            f"{row['total_speedup']['min']:.2f}..{row['total_speedup']['max']:.2f}",
            f"{row['decode_speedup']['median']:.2f}",
            f"{1e3 * row['prompt_s']['median']:.1f}",
            f"{1e3 * row['total_s']['median']:.1f}",
        ]
        for row in run["variants"]
    ]
    beyond = ""
    if "beyond_products_share" in fixed:
        beyond = f"; {100 * fixed['beyond_products_share']:.0f}% of a dense one is beyond its products"
    return (
        f"{case['model']}, {case['dtype']}, batch {case['batch']}: {run['prompt_tokens']} prompt + {run['new_tokens']} new tokens, "
        f"{run['rounds']} rounds. A decode pass takes {1e3 * fixed['fixed_s']:.2f} ms + {1e3 * fixed['layer_s']:.3f} ms per layer "
        f"(R² {fixed['r_squared']:.3f}){beyond}.\n\n" + table(HEADER, rows)
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-10M", "OPT-125M"])
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.batches, chosen.rounds = ["OPT-quick"], [1, 2], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen.models:
            checkpoint = random_checkpoint(name, Path(directory))
            engine = Engine.from_pretrained(checkpoint, dtype=chosen.dtype, max_batch=max(chosen.batches), cache_gib=2)
            runs += [measure(engine, name, chosen.dtype, batch, chosen) for batch in chosen.batches]
    if chosen.save:
        save("short_requests", runs)
    print_json("short_requests", runs)


if __name__ == "__main__":
    main()
