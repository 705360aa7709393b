"""What the entropy trace adds to decoding.

    python benchmarks/entropy.py --save --gates

One model with random weights, one batch, greedy, every layer: without a trace, with the entropies of the top 20 tokens, and with
those of the full vocabulary, one after the other in every round. Tokens are the same; what is compared is the time from every row's
first token to its last.
"""

from __future__ import annotations

import argparse
import gc
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gates import print_gates
from machine import conditions
from models import random_checkpoint, random_prompts
from report import extent, interleaved, paired, parser, print_json, save, spread
from samples import run_shoal, workplace
from shoal import Dense, Engine
from shoal.evaluate.markdown import table

PROMPT_TOKENS, NEW_TOKENS = 64, 64
TRACES = {"none": None, "top 20": 20, "full vocabulary": "full"}


def measure(name: str, dtype: str, batch: int, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The run of one model, dtype and batch size."""
    prompt_tokens, new_tokens = (8, 8) if options.quick else (PROMPT_TOKENS, NEW_TOKENS)
    engine = Engine.from_pretrained(
        random_checkpoint(name, directory),
        dtype=dtype,
        max_batch=batch,
        max_pass_tokens=batch * prompt_tokens,
        cache_gib=1,
    )
    prompts = random_prompts(engine.shape.vocab_size, num_prompts=batch, num_tokens=prompt_tokens)
    plan = Dense().plan(engine.shape.num_layers)
    variants = {
        label: partial(run_shoal, engine, prompts, plan, new_tokens, entropy_top_k=top_k)
        for label, top_k in TRACES.items()
    }
    warm = interleaved(variants, 1)
    assert len({str(runs[0].tokens) for runs in warm.values()}) == 1, "a trace changed a token"
    samples = interleaved(variants, options.rounds)
    plain = [sample.decode_s for sample in samples["none"]]
    return {
        "case": {"model": name, "dtype": dtype, "batch": batch},
        "conditions": conditions(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "variants": [
            {
                "trace": label,
                "decode_s": spread([sample.decode_s for sample in timed]),
                "over_none": paired([sample.decode_s for sample in timed], plain),
            }
            for label, timed in samples.items()
        ],
    }


def describe(runs: list[dict[str, Any]]) -> str:
    """A row per case and trace."""
    rows = [
        [
            f"{run['case']['model']}, {run['case']['dtype']}, batch {run['case']['batch']}",
            row["trace"],
            f"{1e3 * row['decode_s']['median'] / (run['new_tokens'] - 1):.2f}",
            f"{100 * (row['over_none']['median'] - 1):+.1f}%",
            extent(row["over_none"]),
        ]
        for run in runs
        for row in run["variants"]
    ]
    return table(["case", "trace", "ms per pass", "over none", "ratios of rounds"], rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M"])
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options.add_argument("--batches", nargs="+", type=int, default=[8])
    options.add_argument("--keep", type=Path, help="a directory for checkpoints, which stay")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.rounds = ["OPT-quick"], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with workplace(chosen.keep) as directory:
        for name in chosen.models:
            for dtype in chosen.dtypes:
                for batch in chosen.batches:
                    run = measure(name, dtype, batch, chosen, directory)
                    print(describe([run]), end="\n\n", flush=True)
                    if chosen.save:
                        save("entropy", [run])
                    runs.append(run)
                    gc.collect()  # the engine goes before the next one comes
    if chosen.gates:
        print_gates("entropy", runs)
    print_json("entropy", runs)


if __name__ == "__main__":
    main()
