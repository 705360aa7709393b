"""The recipe study's routers: FiRST as a second stage of training, Dr.LLM after both stages on a network that stays as it is.

Both are shifted in the end, so that over training prompts a mean share of exactly their depth of the layers runs.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recipe_arms import BUDGETS, Stage, name_of
from shoal import Engine, Sampling
from shoal.depth.first import FirstRouter
from shoal.depth.routers import load_router
from shoal.depth.shape import ModelShape
from shoal.models.checkpoint import read_sizes
from shoal.train.config import TuneConfig
from shoal.train.data import Example, LengthGrouped, collate, read_examples, read_jsonl
from shoal.train.dr_llm import label, train_dr_llm
from shoal.train.first import train_first
from shoal.train.recover import recover
from shoal.train.route import RouteConfig, epoch, shifted_to
from shoal.train.start import load
from shoal.train.state import write_directory
from study import read_json, write_json

PROMPTS, SIMULATIONS = 512, 100
"""Of Dr.LLM's search. A pass of 64 rows takes 0.23 s on one core (12 layers x 64), so 8 batches take about 3 minutes. More
simulations find smaller layer sets: means of 10.8, 10.6, 10.3 and 10.1 of 12 layers at 30, 50, 100 and 200."""
SEARCH_BATCH = 64
MAX_NEW_TOKENS = 80


@dataclass(frozen=True)
class Frozen:
    """A checkpoint whose network is not trained."""

    network: Any
    tokenizer: Any
    shape: ModelShape

    @classmethod
    def load(cls, checkpoint: Path) -> Frozen:
        """What is in the directory `checkpoint`."""
        network, tokenizer = load(str(checkpoint))
        network.train(False).requires_grad_(False)
        network.config.use_cache = False
        return cls(network, tokenizer, read_sizes(checkpoint)[0].shape)

    def examples(self, data: Path) -> list[Example]:
        """The tokenised examples of a JSONL file."""
        return read_examples(data, self.tokenizer, max_positions=self.network.config.max_position_embeddings)

    def collate(self, examples: list[Example]) -> dict[str, Any]:
        """A padded batch."""
        return collate(examples, pad_token_id=self.tokenizer.pad_token_id)


def router_path(home: Path, depth: float) -> Path:
    """Where Dr.LLM's stage `home` has its router for `depth`."""
    return home / f"router-{name_of(depth).replace('/', '_')}"


def train_first_stage(
    start: Path, data: Path, home: Path, stage: Stage, config: TuneConfig, watch: Callable[..., None]
) -> dict[str, Any]:
    """FiRST: a router on the frozen network `start`, then LoRA adapters under it; both go into `home / "checkpoint"`. Its report.

    Of the stage's batches, in the order that other arms read them in, the router reads the first ones; recovery reads the examples
    of all others, once each.
    """
    (depth,), router_steps = stage.depths, max(1, round(stage.router_share * config.steps))
    frozen = Frozen.load(start)
    examples = frozen.examples(data)
    batches = in_order(examples, config)
    read, left = batches[:router_steps], [place for batch in batches[router_steps:] for place in batch]
    if not (home / "router").is_dir():
        trained = train_first(
            frozen.network,
            frozen.shape,
            (frozen.collate([examples[place] for place in batch]) for batch in read),
            depth=depth,
            learning_rate=RouteConfig(kind="first", depth=depth).learning_rate,
            report=lambda step: watch(step, len(read)) if step % 20 == 0 else None,
        )
        write_directory(home / "router", trained.save)
    router = load_router(home / "router")
    assert isinstance(router, FirstRouter)
    rows = read_jsonl(data)
    lines = [json.dumps({"prompt": rows[place][1], "completion": rows[place][2]}, ensure_ascii=False) for place in left]
    (home / "recovery.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    depths = TuneConfig().depths  # the router decides about layers, so `recover` wants the default here
    done = recover(
        str(start),
        router,
        home / "recovery.jsonl",
        home / "checkpoint",
        replace(config, depths=depths, steps=len(batches) - router_steps),
        depth=depth,
        resume=(home / "checkpoint.tuning").is_dir(),
        report=watch,
    )

    def tokens(some: list[list[int]]) -> int:
        return sum(int(frozen.collate([examples[place] for place in batch])["attention_mask"].sum()) for batch in some)

    return {
        "steps": router_steps + done.steps,
        "tokens": tokens(read) + done.tokens,
        "tokens_as_grouped": tokens(batches),
        "regrouped_examples": len(left),
        "router_steps": router_steps,
        "final_loss": round(done.final_loss, 4),
    }


def in_order(examples: list[Example], config: TuneConfig) -> list[list[int]]:
    """Places of the examples of every step, in the order in which `tune` reads them with this config."""
    order, batches, number = LengthGrouped(examples, batch_size=config.batch_size, seed=config.seed), [], 0
    assert config.steps is not None
    while len(batches) < config.steps:
        order.set_epoch(number)
        places = list(order)
        batches += [places[i : i + config.batch_size] for i in range(0, len(places), config.batch_size)]
        number += 1
    return batches[: config.steps]


def some_of(examples: list[Example], count: int, seed: int) -> list[Example]:
    """`count` examples with different prompts, drawn by `seed`; all prompts where there are fewer."""
    by_prompt = {tuple(example.prompt): example for example in examples}
    drawn = sorted(by_prompt)
    random.Random(f"prompts/{seed}").shuffle(drawn)
    return [by_prompt[prompt] for prompt in drawn[:count]]


def search_routers(checkpoint: Path, data: Path, home: Path, *, seed: int, threads: int, quick: bool) -> dict[str, Any]:
    """Dr.LLM: one search and one training of routers for the network in `checkpoint`, then shifted to each budget below 1.

    Labels are the smallest layer sets that keep the network's *own* greedy answer token by token. With the data's completions there
    would be none: not one of 128 was the most probable text of a dense network.
    """
    record = home / "report.json"
    if record.is_file():
        found: dict[str, Any] = read_json(record)
        return found
    home.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    frozen = Frozen.load(checkpoint)
    prompts = [one.prompt for one in some_of(frozen.examples(data), 16 if quick else PROMPTS, seed)]
    config = RouteConfig(
        kind="dr-llm", depth=1, simulations=4 if quick else SIMULATIONS, batch_size=SEARCH_BATCH, seed=seed
    )
    engine = Engine.from_pretrained(checkpoint, dtype="float32", threads=threads, cache_gib=1)
    done = engine.generate(prompts, sampling=Sampling(max_new_tokens=8 if quick else MAX_NEW_TOKENS))
    answers = [Example(prompt, list(one.token_ids)) for prompt, one in zip(prompts, done, strict=True)]

    def watch(searched: int) -> None:
        print(f"{home.name} searched {searched}/{len(answers)} {time.perf_counter() - began:.0f} s", flush=True)

    batches = epoch(answers, frozen.tokenizer.pad_token_id, config)
    states, present, labels = label(
        frozen.network, frozen.shape, batches, simulations=config.simulations, seed=seed, report=watch
    )
    search_s = time.perf_counter() - began
    torch.manual_seed(seed)
    router = train_dr_llm(
        frozen.shape,
        states,
        present,
        labels,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
    )
    for depth in BUDGETS[1:]:
        shutil.rmtree(router_path(home, depth), ignore_errors=True)  # of a run that ended before its report
        order = epoch(answers, frozen.tokenizer.pad_token_id, config)
        write_directory(router_path(home, depth), shifted_to(depth, router, frozen.network, order).save)
    report = {
        "prompts": len(answers),
        "labelled": len(labels),
        "simulations": config.simulations,
        "mean_layers_of_labels": round(float(labels.sum(dim=1).float().mean()), 2),
        "router_steps": config.steps,
        "search_s": round(search_s, 1),
        "router_s": round(time.perf_counter() - began - search_s, 1),
    }
    write_json(record, report)
    return report
