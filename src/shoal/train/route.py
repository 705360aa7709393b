"""Train a router for a checkpoint: FiRST (gates on the frozen network) or Dr.LLM (labels by search, then routers)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.depth.layer_router import LayerRouter
from shoal.depth.routers import ROUTERS
from shoal.errors import InvalidInput, nearest
from shoal.models.checkpoint import read_sizes
from shoal.models.directory import resolve
from shoal.train.config import TuneConfig
from shoal.train.data import Example, LengthGrouped, collate, read_examples
from shoal.train.dr_llm import label, prompt_states, train_dr_llm
from shoal.train.first import train_first
from shoal.train.start import load
from shoal.train.state import write_directory


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """How to train a router."""

    kind: Literal["first", "dr-llm"]
    """Which router, a name in `shoal.depth.routers.ROUTERS`."""
    depth: float
    """Mean share of the layers that the data's prompts are to get; in the end scores are shifted to meet it."""
    steps: int = 200
    """Optimizer steps of the router."""
    simulations: int = 50
    """Dr.LLM: layer sets that are tried per example; the paper takes 50 to 200."""
    batch_size: int = 64
    """Examples per step, and per search."""
    learning_rate: float = 1e-3
    """AdamW's, constant."""
    seed: int = 0
    """Of data order, search and random weights."""

    def __post_init__(self) -> None:
        if self.kind not in ROUTERS:
            raise InvalidInput(f"unknown router {self.kind!r}: {nearest(self.kind, ROUTERS)}")
        if not 0 < self.depth <= 1:
            raise InvalidInput(f"depth is a share of the layers, above 0 and at most 1, got {self.depth}")
        for name in ("steps", "simulations", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise InvalidInput(f"{name} must be above 0, got {getattr(self, name)}")


Report = Callable[[str, int, int], None]
"""(what is being done, how many of it are done, of how many)."""


def train_router(
    model: str, data: Path, output: Path, config: RouteConfig, *, report: Report = lambda what, done, total: None
) -> LayerRouter:
    """Train a router for the checkpoint `model` on the JSONL file `data`, and write it into the new directory `output`.

    The network stays as it is. Raises `InvalidInput` for bad data, an output that exists, or (Dr.LLM) a model that gets none of the
    completions right.
    """
    if output.exists():
        raise InvalidInput(f"{output} exists already: choose another output or remove it")
    loaded, tokenizer = load(model)
    network: Any = loaded.train(False).requires_grad_(False)
    network.config.use_cache = False
    examples = read_examples(data, tokenizer, max_positions=network.config.max_position_embeddings)
    shape = read_sizes(resolve(model))[0].shape
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    torch.manual_seed(config.seed)
    router: LayerRouter
    if config.kind == "first":
        batches = itertools.islice(epochs(examples, pad, config), config.steps)
        router = train_first(
            network,
            shape,
            batches,
            depth=config.depth,
            learning_rate=config.learning_rate,
            report=lambda step: report("training the router", step, config.steps),
        )
    else:
        labelled = label(
            network,
            shape,
            epoch(examples, pad, config),
            simulations=config.simulations,
            seed=config.seed,
            report=lambda searched: report("searching layer sets", searched, len(examples)),
        )
        router = train_dr_llm(
            shape, *labelled, steps=config.steps, batch_size=config.batch_size, learning_rate=config.learning_rate
        )
    router = shifted_to(config.depth, router, network, epoch(examples, pad, config))
    write_directory(output, router.save)
    return router


def epoch(
    examples: Sequence[Example], pad_token_id: int, config: RouteConfig | TuneConfig, number: int = 0
) -> Iterator[dict[str, Any]]:
    """All examples once, in padded batches; the seed and the epoch's number decide the order."""
    order = LengthGrouped(examples, batch_size=config.batch_size, seed=config.seed)
    order.set_epoch(number)
    places = list(order)
    for start in range(0, len(places), config.batch_size):
        chosen = [examples[place] for place in places[start : start + config.batch_size]]
        yield collate(chosen, pad_token_id=pad_token_id)


def epochs(examples: Sequence[Example], pad_token_id: int, config: RouteConfig) -> Iterator[dict[str, Any]]:
    """Epoch after epoch, without end."""
    for number in itertools.count():
        yield from epoch(examples, pad_token_id, config, number)


def shifted_to(depth: float, router: LayerRouter, network: Any, batches: Iterator[dict[str, Any]]) -> LayerRouter:
    """`router` with its scores moved by one number: over the prompts of `batches` a mean share of `depth` of the layers runs."""
    return router.moved(shift(depth, router, torch.cat([prompt_scores(router, network, batch) for batch in batches])))


def prompt_scores(router: LayerRouter, network: Any, batch: dict[str, Any]) -> Tensor:
    """Scores [batch, L] of a batch's prompts, on the CPU; those that the engine makes where `network` is not training."""
    states, present = prompt_states(network, batch, router.num_windows)
    return torch.stack([router.scores(row[:, there]) for row, there in zip(states.cpu(), present.cpu(), strict=True)])


def shift(depth: float, router: LayerRouter, scores: Tensor) -> float:
    """What has to be added to `scores` [n, L] so that a mean share of `depth` of the layers runs. Raises `InvalidInput`."""
    free = [layer for layer in range(router.shape.num_layers) if layer not in router.kept_layers]
    wanted = (depth * router.shape.num_layers - len(router.kept_layers)) / max(1, len(free))
    if wanted < 0:
        raise InvalidInput(
            f"depth {depth:.4g} is below the {len(router.kept_layers)} of {router.shape.num_layers} layers that always run"
        )
    ranked = scores[:, free].flatten().sort(descending=True).values
    last = min(len(ranked), round(wanted * len(ranked)))
    above = ranked[last - 1] if last > 0 else ranked[0] + 1
    below = ranked[last] if last < len(ranked) else ranked[-1] - 1
    return -float((above + below) / 2)
