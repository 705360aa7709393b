"""What lossless drafting gains and costs: the same requests with and without it, in one engine, by turns.

    python benchmarks/drafting.py --save --gates
    python benchmarks/drafting.py --models OPT-125M --batches 1 --texts edit

Weights are random, so texts are scripted: a logits processor makes requests emit a given text, with and without drafting, and
lookups see what they would see with a model that writes it.

    edit    the prompt again with a token in 16 changed, as when a document is edited: nearly all of it can be copied
    free    tokens drawn at temperature 1: nothing repeats, and whatever is drafted is wrong
    greedy  what the random model writes by itself, which runs in circles

A shallow self-draft of a random model is hardly ever right; `self` on the shipped model, which was tuned for it, is measured with
--models shoal-e2e on its own prompts. Tokens of all variants are compared.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gates import print_gates
from machine import conditions
from models import random_checkpoint, random_prompts
from report import extent, interleaved, paired, parser, print_json, rounded, save, spread
from samples import workplace
from shoal import Engine, Sampling, SkipDecode
from shoal.draft import SelfDraft, Trigram
from shoal.engine.drafting import DraftStats
from shoal.evaluate.markdown import table

PROMPT_TOKENS, NEW_TOKENS = 128, 96
EDIT_EVERY = 16
PROMPTS = Path(__file__).parents[1] / "examples" / "prompts.txt"
RUNS = itertools.count()
LOOKUPS = ("ngram", "suffix", "trigram", "auto")
SMALL = {"OPT-125M": "OPT-125M-2", "OPT-quick": "OPT-quick"}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of a batch."""

    decode_s: float
    """Seconds from every row's first token until every row's last."""
    draft_s: float
    """Of which for proposing and deciding."""
    steps: int
    """Passes that decoded."""
    tokens: list[tuple[int, ...]]
    stats: DraftStats


@dataclass(frozen=True)
class Script:
    """A logits processor that leaves one token to choose."""

    prompt_tokens: int
    tokens: Sequence[int]

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, -torch.inf)
        forced[self.tokens[len(token_ids) - self.prompt_tokens]] = 0
        return forced


def samplings(text: str, prompts: Sequence[list[int]], new_tokens: int, vocab_size: int) -> list[Sampling]:
    """How each request comes to emit the text."""
    plain = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    if text == "greedy":
        return [plain] * len(prompts)
    if text == "free":
        return [replace(plain, temperature=1.0, seed=seed) for seed in range(len(prompts))]
    rng = random.Random("edits")
    made = []
    for prompt in prompts:
        edited = [rng.randrange(vocab_size) if place % EDIT_EVERY == 7 else token for place, token in enumerate(prompt)]
        made.append(replace(plain, processor=Script(len(prompt), (edited * 8)[:new_tokens])))
    return made


def fresh(draft: object) -> object:
    """Rounds repeat their texts: a table that has seen them would know what comes."""
    return Trigram(scope=f"run {next(RUNS)}") if draft == "trigram" else draft


def run(engine: Engine, prompts: Sequence[list[int]], how: Sequence[Sampling], draft: object) -> Sample:
    """One batch; all prompts are read in the first pass."""
    engine.stats.reset()
    draft = fresh(draft)
    stats: list[DraftStats] = []
    tokens: list[tuple[int, ...]] = [()] * len(prompts)
    for index, (prompt, sampling) in enumerate(zip(prompts, how, strict=True)):
        engine.add(prompt, sampling, draft=draft, index=index, streaming=False)
    began, first, steps = time.perf_counter(), 0.0, 0
    while engine.has_work:
        chunks = engine.step()
        first = first or time.perf_counter() - began
        steps += 1
        for chunk in chunks:
            if chunk.generation is not None:
                tokens[chunk.index] = chunk.generation.token_ids
                stats.append(chunk.generation.drafting or DraftStats())
    return Sample(
        decode_s=time.perf_counter() - began - first,
        draft_s=engine.stats.draft_s,
        steps=steps - 1,
        tokens=tokens,
        stats=sum(stats, DraftStats()),
    )


def measure(
    engine: Engine, case: dict[str, Any], prompts: Sequence[list[int]], how: Sequence[Sampling], drafts: dict[str, object],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """All ways to draft for one batch of one text, in rounds."""
    variants: dict[str, Callable[[], Sample]] = {"none": partial(run, engine, prompts, how, None)}
    variants |= {name: partial(run, engine, prompts, how, draft) for name, draft in drafts.items()}
    interleaved(variants, 2)  # the engine learns what passes cost
    samples = interleaved(variants, options.rounds)
    plain = samples["none"]
    rows = []
    for name, runs in samples.items():
        stats = runs[-1].stats
        decode_s = spread([one.decode_s for one in runs])
        rows.append(
            {
                "draft": name,
                "decode_s": decode_s,
                "speedup": paired([one.decode_s for one in plain], [one.decode_s for one in runs]),
                "tokens_per_pass": rounded(sum(map(len, runs[-1].tokens)) / len(prompts) / max(1, runs[-1].steps)),
                "acceptance": None if stats.acceptance is None else rounded(stats.acceptance),
                "passes_with_draft": rounded(stats.passes / max(1, stats.passes + stats.passes_without)),
                "draft_share": spread([one.draft_s / one.decode_s for one in runs]),
                "off": stats.off,
                "same_tokens": rounded(
                    sum(ours == theirs for ours, theirs in zip(runs[-1].tokens, plain[-1].tokens, strict=True))
                    / len(prompts)
                ),
            }
        )
    result = {"case": case, "conditions": conditions(), "rounds": options.rounds, "variants": rows}
    print(describe(result), end="\n\n", flush=True)
    return result


HEADER = (
    "draft",
    "speedup",
    "min..max",
    "tokens per pass",
    "accepted",
    "passes with a draft",
    "drafting's share",
    "same tokens",
)


def describe(result: dict[str, Any]) -> str:
    """One case as a table. Speedup: wall clock of decoding without drafting over that with it."""
    rows = [
        [
            row["draft"],
            f"{row['speedup']['median']:.2f}",
            extent(row["speedup"]),
            f"{row['tokens_per_pass']:.2f}",
            "-" if row["acceptance"] is None else f"{100 * row['acceptance']:.0f}%",
            f"{100 * row['passes_with_draft']:.0f}%",
            f"{100 * row['draft_share']['median']:.1f}%",
            f"{100 * row['same_tokens']:.0f}%",
        ]
        for row in result["variants"]
        if row["draft"] != "none"
    ]
    case = result["case"]
    about = f"{case['model']}, {case['dtype']}, {case['text']}, batch {case['batch']}, {result['conditions']['cpu']}"
    return f"{about}\n\n" + table(HEADER, rows)


def shipped_prompts(engine: Engine, count: int) -> list[list[int]]:
    """The example prompts of the shipped model, over and over."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    tokens = [list(engine.tokenizer(line).input_ids) for line in lines]
    return (tokens * (count // len(tokens) + 1))[:count]


def of_shipped(options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """Self-drafting at several depths on the model that was tuned for all of them."""
    engine = Engine.from_pretrained("shoal-e2e", dtype=options.dtype, max_batch=max(options.batches), cache_gib=1)
    depths = {
        f"self at {name}": SelfDraft(plan=SkipDecode(depth=depth))
        for name, depth in (("1/2", 1 / 2), ("1/3", 1 / 3), ("1/5", 1 / 5))
    }
    fixed = {f"{name}, 4 tokens": replace(draft, tokens=4) for name, draft in depths.items()}
    for batch in options.batches:
        prompts = shipped_prompts(engine, batch)
        case = {"model": "shoal-e2e", "dtype": options.dtype, "text": "E2E", "batch": batch}
        how = [Sampling(max_new_tokens=64)] * batch
        runs.append(measure(engine, case, prompts, how, {**depths, **fixed, "auto": "auto"}, options))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M", "shoal-e2e"])
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    options.add_argument("--texts", nargs="+", choices=["edit", "free", "greedy"], default=["edit", "free", "greedy"])
    options.add_argument("--keep", type=Path, help="keep checkpoints in this directory")
    chosen = options.parse_args()
    prompt_tokens, new_tokens = PROMPT_TOKENS, NEW_TOKENS
    if chosen.quick:
        chosen.models, chosen.batches, chosen.rounds = ["OPT-quick"], [2], 2
        prompt_tokens, new_tokens = 32, 24
    torch.set_num_threads(chosen.threads)
    runs: list[dict[str, Any]] = []
    with workplace(chosen.keep) as directory:
        for name in chosen.models:
            if name == "shoal-e2e":
                of_shipped(chosen, runs)
                continue
            checkpoint, small = random_checkpoint(name, directory), random_checkpoint(SMALL[name], directory)
            most = max(chosen.batches)
            engine = Engine.from_pretrained(
                checkpoint, dtype=chosen.dtype, max_batch=most, max_pass_tokens=most * (prompt_tokens + 32), cache_gib=4
            )
            vocab_size = engine.shape.vocab_size
            drafts = {**{lookup: lookup for lookup in LOOKUPS}, "self": "self", "small model": str(small)}
            for text in chosen.texts:
                for batch in chosen.batches:
                    prompts = random_prompts(vocab_size, num_prompts=batch, num_tokens=prompt_tokens)
                    case = {"model": name, "dtype": chosen.dtype, "text": text, "batch": batch}
                    how = samplings(text, prompts, new_tokens, vocab_size)
                    runs.append(measure(engine, case, prompts, how, drafts, chosen))
            gc.collect()
    if chosen.save:
        save("drafting", runs)
    if chosen.gates:
        print_gates("drafting", runs)
    print_json("drafting", runs)


if __name__ == "__main__":
    main()
