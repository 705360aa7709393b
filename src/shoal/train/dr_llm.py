"""Dr.LLM (arXiv 2510.12773): labels from a search over layer sets, then small routers on the frozen network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.depth.dr_llm import RUN, SKIP, DrLLMRouter, router_logits
from shoal.depth.shape import ModelShape
from shoal.errors import InvalidInput
from shoal.train.data import IGNORED, prompt_columns
from shoal.train.depth_context import decoder_layers
from shoal.train.gates import gated_context, window_means
from shoal.train.layer_search import Search, Skipped, search

FOCUS = 2.0
"""Gamma of the focal loss."""
REPEATS = 0.999
"""Beta of the class weights (1 - beta) / (1 - beta^n) for a decision with n labels (effective numbers)."""


def label(
    network: Any,
    shape: ModelShape,
    batches: Iterable[dict[str, Any]],
    *,
    simulations: int,
    seed: int,
    report: Callable[[int], None] = lambda searched: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search the layer sets of every example once.

    Returns prompt states [examples, L, windows, d], bool [examples, windows] for the windows that there are, and labels
    [examples, L], of those examples that the model answers. Raises `InvalidInput` where there is none.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    searched = 0
    for number, batch in enumerate(batches):
        rows = range(len(batch["input_ids"]))
        searches = [Search(shape.num_layers, kept_layers=(0,), seed=f"{seed}/{number}/{row}") for row in rows]
        search(searches, functools.partial(rewards, network, batch), simulations=simulations)
        states, present = prompt_states(network, batch, DrLLMRouter.num_windows)
        for row, one in enumerate(searches):
            if one.best is not None:
                wanted = torch.tensor([SKIP if layer in one.best else RUN for layer in range(shape.num_layers)])
                found.append((states[row], present[row], wanted))
        searched += len(rows)
        report(searched)
    if not found:
        raise InvalidInput(
            "the model gets no completion of the data right token by token, so there is nothing to learn from: use data with short "
            "answers that it knows, or the router 'first'"
        )
    states, present, labels = (torch.stack(column) for column in zip(*found, strict=True))
    return states, present, labels


@torch.no_grad()
def rewards(network: Any, batch: dict[str, Any], skipped: Sequence[Skipped]) -> list[float]:
    """Per row 1 where every token of the completion is the most probable one under teacher forcing, without the row's layers."""

    def gate(layer: int, states: Tensor) -> Tensor:
        return torch.tensor([float(layer not in one) for one in skipped])

    with gated_context(network, gate, prompt_columns=prompt_columns(batch)):
        best = network(**batch).logits.argmax(dim=-1)
    right = (best == batch["labels"]) | (batch["labels"] == IGNORED)
    return [float(all_right) for all_right in right.all(dim=1)]


@torch.no_grad()
def prompt_states(network: Any, batch: dict[str, Any], num_windows: int) -> tuple[Tensor, Tensor]:
    """Means [batch, L, windows, d] of the prompts' states before each layer, and which windows there are [batch, windows]."""
    columns = prompt_columns(batch)
    mask = batch["attention_mask"][:, :columns]
    means: list[Tensor] = []

    def read(_: Any, args: tuple[Tensor, ...]) -> None:
        means.append(window_means(args[0].float(), mask, num_windows)[0])

    hooks = [layer.register_forward_pre_hook(read) for layer in decoder_layers(network)]
    prompts = {name: batch[name][:, :columns] for name in ("input_ids", "attention_mask", "position_ids")}
    try:
        network(**prompts, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    present = torch.arange(num_windows, device=mask.device) < mask.sum(dim=1, keepdim=True)
    return torch.stack(means, dim=1), present


def train_dr_llm(
    shape: ModelShape,
    states: Tensor,
    present: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> DrLLMRouter:
    """Fit routers to labels: focal loss, gamma 2, classes weighted by effective numbers. Layer 0 always runs."""
    tensors = {
        name: torch.nn.init.normal_(torch.empty(size), std=0.02) if len(size) == 3 else torch.zeros(size)
        for name, size in DrLLMRouter.sizes(shape).items()
    }
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    counts = torch.tensor([float((labels == choice).sum()) for choice in (SKIP, RUN)])
    weights = (1 - REPEATS) / (1 - REPEATS ** counts.clamp(min=1))
    optimizer = torch.optim.AdamW(tensors.values(), lr=learning_rate)
    for _ in range(steps):
        rows = torch.randint(len(labels), (min(batch_size, len(labels)),))
        logits = router_logits(tensors, states[rows], present[rows])
        optimizer.zero_grad()
        torch.autograd.backward(focal_loss(logits, labels[rows], weights))
        optimizer.step()
    return DrLLMRouter(shape=shape, tensors={name: tensor.detach() for name, tensor in tensors.items()})


def focal_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of -(1 - p)^gamma ln p, p being the probability of the label. logits [..., 2], labels [...], weights [2]."""
    log_p = logits.log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
    weight = weights[labels]
    loss = weight * (1 - log_p.exp()) ** FOCUS * -log_p
    return loss.sum() / weight.sum()
