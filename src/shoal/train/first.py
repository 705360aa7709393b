"""FiRST (arXiv 2410.12513): a router per layer, trained with gates on a frozen network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shoal.depth.first import FirstRouter
from shoal.depth.shape import ModelShape
from shoal.train.data import prompt_columns
from shoal.train.gates import gated_context, window_means

SPENDING = 10.0
"""Weight of (mean gate - depth)^2 beside the cross-entropy."""


def train_first(
    network: Any,
    shape: ModelShape,
    batches: Iterable[dict[str, Any]],
    *,
    depth: float,
    learning_rate: float,
    report: Callable[[int], None] = lambda steps: None,
) -> FirstRouter:
    """Train on `batches`, one step each, towards a mean share of `depth` of the layers; `report(steps)` after each.

    A gate is 1 where the sigmoid of the score is one half or more, else 0, and its gradient is the sigmoid's (straight through):
    what is trained is what will run. How FiRST does it is not stated in the sources that we could read; this is our reading.
    """
    tensors = {name: torch.zeros(size) for name, size in FirstRouter.sizes(shape).items()}
    tensors["bias"] += 1  # everything runs at first
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    router = FirstRouter(shape=shape, tensors=tensors)
    optimizer = torch.optim.AdamW(tensors.values(), lr=learning_rate)
    for step, batch in enumerate(batches):
        gates: list[Tensor] = []
        with gated_context(network, router_gate(router, batch, gates), prompt_columns=prompt_columns(batch)):
            loss = network(**batch).loss
        spent = torch.stack(gates).mean()
        optimizer.zero_grad()
        (loss + SPENDING * (spent - depth) ** 2).backward()
        optimizer.step()
        report(step + 1)
    return FirstRouter(shape=shape, tensors={name: tensor.detach() for name, tensor in tensors.items()})


def router_gate(router: FirstRouter, batch: dict[str, Any], gates: list[Tensor]) -> Callable[[int, Tensor], Tensor]:
    """The gate of each layer and row, decided from the layer's own input; appended to `gates`, [batch] per layer."""
    columns = prompt_columns(batch)
    mask = batch["attention_mask"][:, :columns]

    def gate(layer: int, states: Tensor) -> Tensor:
        means, _ = window_means(states[:, :columns].float(), mask, 1)
        soft = router.score(layer, means[:, 0]).sigmoid()
        hard = (soft >= 0.5).float()
        made = torch.ones_like(hard) if layer in router.kept_layers else hard + soft - soft.detach()
        gates.append(made)
        return made

    return gate
