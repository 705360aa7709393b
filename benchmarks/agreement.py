"""How often bfloat16 and int8 emit the tokens that float32 emits, greedily, dense and at depth.

    python benchmarks/agreement.py --save

On the model that ships with Shoal, with meaning representations put together from its slots; `--model random` takes random weights
and random prompts. All engines load the same checkpoint. Once two completions part they are different texts, so what counts is
how far they agree: the share of float32's tokens that come before the first difference.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from machine import conditions
from models import random_checkpoint, random_prompts
from report import parser, print_json, rounded, save
from shoal import Dense, Engine, Generation, Sampling, SkipDecode
from shoal.evaluate.markdown import table
from shoal.models.directory import SHIPPED

MODEL = "shoal-e2e"
DEPTHS = (Fraction(1), Fraction(1, 2), Fraction(1, 5))
SLOTS = (
    ("name", ("The Mill", "Zizzi", "Green Man", "Cocum")),
    ("eatType", ("pub", "coffee shop", "restaurant")),
    ("food", ("French", "Italian", "Fast food", "Chinese")),
    ("priceRange", ("cheap", "£20-25")),
    ("area", ("riverside", "city centre")),
    ("familyFriendly", ("yes", "no")),
)


def meaning_representations() -> list[str]:
    """Every combination of the slots' values, 384 of them."""
    names = [name for name, _ in SLOTS]
    return [
        ", ".join(f"{name}[{value}]" for name, value in zip(names, values, strict=True))
        for values in itertools.product(*(values for _, values in SLOTS))
    ]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, the end of a shorter sequence included; None if they are equal."""
    if tuple(a) == tuple(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def agreement(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How far `got` follows `expected`, row by row."""
    differences = [first_difference(a, b) for a, b in zip(expected, got, strict=True)]
    places = [place for place in differences if place is not None]
    agreeing = sum(len(a) if place is None else place for a, place in zip(expected, differences, strict=True))
    return {
        "completions": len(expected),
        "tokens": sum(map(len, expected)),
        "same_completions": rounded(1 - len(places) / len(expected)),
        "tokens_before_difference": rounded(agreeing / sum(map(len, expected))),
        "first_difference": {
            "earliest": min(places, default=None),
            "median": statistics.median(places) if places else None,
        },
    }


def compare(expected: Sequence[Generation], got: Sequence[Generation]) -> dict[str, Any]:
    """`agreement` of completions, and the depth that they ran at."""
    mean_layers = sum(g.ledger.decode_layer_tokens for g in expected) / sum(g.ledger.decode_passes for g in expected)
    return {
        "mean_layers": rounded(mean_layers),
        **agreement([g.token_ids for g in expected], [g.token_ids for g in got]),
    }


HEADER = ("depth", "mean layers", "completions", "tokens", "same completions", "tokens before", "earliest", "median")


def describe(run: dict[str, Any]) -> str:
    """One run as a table."""
    rows = [
        [
            row["depth"],
            f"{row['mean_layers']:.2f}",
            str(row["completions"]),
            str(row["tokens"]),
            f"{100 * row['same_completions']:.1f}%",
            f"{100 * row['tokens_before_difference']:.1f}%",
            *("-" if place is None else f"{place:g}" for place in row["first_difference"].values()),
        ]
        for row in run["variants"]
    ]
    dtype = run["case"]["dtype"]
    return (
        f"{run['case']['model']}: {dtype} against float32, batch {run['case']['batch']}, greedy; equal completions, tokens before "
        "the first difference, and where the earliest and the median difference is\n\n" + table(HEADER, rows)
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=MODEL if (SHIPPED / MODEL).is_dir() else "random")
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"], help="beside float32")
    options.add_argument("--prompts", type=int, default=384, help="how many")
    options.add_argument("--batch", type=int, default=32)
    chosen = options.parse_args()
    if chosen.quick:
        chosen.prompts, chosen.batch = 6, 3
    torch.set_num_threads(chosen.threads)
    sampling = Sampling(max_new_tokens=12 if chosen.quick else 64)
    with tempfile.TemporaryDirectory() as directory:
        if chosen.model == "random":
            path: str | Path = random_checkpoint("OPT-quick" if chosen.quick else "OPT-10M", Path(directory))
        else:
            path = chosen.model
        engines = {
            dtype: Engine.from_pretrained(path, dtype=dtype, max_batch=chosen.batch)
            for dtype in ("float32", *chosen.dtypes)
        }
    if chosen.model == "random":
        vocab_size = engines["float32"].shape.vocab_size
        prompts: list[Any] = random_prompts(vocab_size, num_prompts=chosen.prompts, num_tokens=35)
    else:
        every = meaning_representations()
        prompts = every[:: max(1, len(every) // chosen.prompts)][: chosen.prompts]

    plans = {depth: Dense() if depth == 1 else SkipDecode(depth=float(depth)) for depth in DEPTHS}
    expected = {depth: engines["float32"].generate(prompts, sampling, plan) for depth, plan in plans.items()}
    runs = []
    for dtype in chosen.dtypes:
        rows = []
        for depth, plan in plans.items():
            got = engines[dtype].generate(prompts, sampling, plan)
            rows.append({"depth": str(depth), **compare(expected[depth], got)})
        run = {
            "case": {"model": str(chosen.model), "batch": chosen.batch, "dtype": dtype},
            "conditions": conditions(),
            "max_new_tokens": sampling.max_new_tokens,
            "variants": rows,
        }
        print(describe(run), end="\n\n", flush=True)
        runs.append(run)
    if chosen.save:
        save("agreement", runs)
    print_json("agreement", runs)


if __name__ == "__main__":
    main()
