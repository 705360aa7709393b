"""What a beginning that prompts share saves: computed once and copied, or computed by every prompt.

    python benchmarks/prefixes.py --save

One model with random weights and 32 prompts of 256 tokens, of which the first 64, 128 or 192 are the same, as in a round of a
ranking; the prompts are new in every round, so each round computes its beginning once. *Computed* is the share of the prompts'
layer-tokens that a batch with sharing computes, from its ledgers; the time is that of the whole batch, one token each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from machine import conditions
from models import random_checkpoint
from report import extent, interleaved, paired, parser, print_json, rounded, save, spread
from samples import workplace
from shoal import Engine, Sampling
from shoal.evaluate.markdown import table

PROMPTS, PROMPT_TOKENS, SHARED = 32, 256, (64, 128, 192)


def measure(name: str, dtype: str, options: Any, directory: Path) -> dict[str, Any]:
    """The run of one model."""
    length, shares = (24, (8, 16)) if options.quick else (PROMPT_TOKENS, SHARED)
    engine = Engine.from_pretrained(random_checkpoint(name, directory), dtype=dtype, max_batch=PROMPTS, cache_gib=2)
    generator = torch.Generator().manual_seed(1)
    sampling = Sampling(max_new_tokens=1, ignore_eos=True)

    def draw(num_shared: int) -> list[list[int]]:
        drawn = torch.randint(engine.shape.vocab_size, (PROMPTS, length), generator=generator)
        drawn[:, :num_shared] = drawn[0, :num_shared]
        rows: list[list[int]] = drawn.tolist()
        return rows

    prompts: dict[int, list[list[int]]] = {}

    def draw_all() -> None:
        prompts.update((num_shared, draw(num_shared)) for num_shared in shares)

    def batch(num_shared: int, shared_tokens: int) -> tuple[float, int]:
        began = time.perf_counter()
        done = engine.generate(prompts[num_shared], sampling, shared_tokens=shared_tokens)
        return time.perf_counter() - began, sum(one.ledger.shared_prompt_tokens for one in done)

    variants: dict[str, Callable[[], tuple[float, int]]] = {}
    for num_shared in shares:
        variants[f"{num_shared} computed"] = partial(batch, num_shared, 0)
        variants[f"{num_shared} shared"] = partial(batch, num_shared, num_shared)
    interleaved(variants, 1, between=draw_all)
    samples = interleaved(variants, options.rounds, between=draw_all)
    rows = []
    for num_shared in shares:
        whole, shared = ([s for s, _ in samples[f"{num_shared} {how}"]] for how in ("computed", "shared"))
        copied = samples[f"{num_shared} shared"][0][1]
        rows.append(
            {
                "shared_tokens": num_shared,
                "computed": rounded(1 - copied / (PROMPTS * length)),
                "whole_s": spread(whole),
                "shared_s": spread(shared),
                "speedup": paired(whole, shared),
            }
        )
    return {
        "case": {"model": name, "dtype": dtype, "prompts": PROMPTS, "prompt_tokens": length},
        "conditions": conditions(),
        "rounds": options.rounds,
        "rows": rows,
    }


def describe(run: dict[str, Any]) -> str:
    """A row per length of the beginning."""
    case = run["case"]
    title = f"{case['model']}, {case['dtype']}, {case['prompts']} prompts of {case['prompt_tokens']} tokens, {run['rounds']} rounds"
    rows = [
        [
            str(row["shared_tokens"]),
            f"{row['computed']:.0%}",
            f"{row['whole_s']['median']:.2f}",
            f"{row['shared_s']['median']:.2f}",
            f"{1 / row['computed']:.2f}",
            f"{row['speedup']['median']:.2f}",
            extent(row["speedup"]),
        ]
        for row in run["rows"]
    ]
    return (
        title
        + "\n\n"
        + table(["shared", "computed", "whole, s", "shared, s", "1 / computed", "speedup", "min..max"], rows)
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M"])
    options.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    options.add_argument("--keep", type=Path, help="a directory for checkpoints, which stay")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.rounds = ["OPT-quick"], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with workplace(chosen.keep) as directory:
        for name in chosen.models:
            for dtype in chosen.dtypes:
                run = measure(name, dtype, chosen, directory)
                print(describe(run), end="\n\n", flush=True)
                if chosen.save:
                    save("prefixes", [run])
                runs.append(run)
    print_json("prefixes", runs)


if __name__ == "__main__":
    main()
