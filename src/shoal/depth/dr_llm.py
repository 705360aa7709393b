"""Dr.LLM: small routers on a frozen model decide per layer (Heakl et al. 2025, arXiv 2510.12773); skip and run, without repeats.

Per layer Linear, GELU, Linear with 128 hidden units; the prompt's states are cut into 8 windows, each mean gives logits, which are
averaged. The released code decides anew at each decode step, which leaves gaps in the cache; here the prompt decides once. A layer
that repeats is no depth plan, so that action is left out. Labels come from a tree search (`train/dr_llm.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.depth.layer_router import LayerRouter, normed
from shoal.depth.shape import ModelShape

HIDDEN = 128
SKIP, RUN = 0, 1


class DrLLMRouter(LayerRouter):
    """Tensors: `up` [L, 128, d], `up_bias` [L, 128], `down` [L, 2, 128], `down_bias` [L, 2]; outputs are skip and run."""

    kind = "dr-llm"
    num_windows = 8

    @classmethod
    def sizes(cls, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        layers, d = shape.num_layers, shape.hidden_size
        return {
            "up": (layers, HIDDEN, d),
            "up_bias": (layers, HIDDEN),
            "down": (layers, 2, HIDDEN),
            "down_bias": (layers, 2),
        }

    def scores(self, states: Tensor) -> Tensor:
        """How much the logit of run is above that of skip."""
        logits = router_logits(self.tensors, states)
        return logits[:, RUN] - logits[:, SKIP]

    def moved(self, by: float) -> DrLLMRouter:
        """The same with `by` added to every score."""
        bias = self.tensors["down_bias"].clone()
        bias[:, RUN] += by
        return replace(self, tensors={**self.tensors, "down_bias": bias})


def router_logits(tensors: Mapping[str, Tensor], states: Tensor, present: Tensor | None = None) -> Tensor:
    """Logits [..., L, 2], averaged over windows, from states [..., L, windows, d]; what training differentiates.

    `present` [..., windows] says which windows there are, where prompts in a batch are shorter than others.
    """
    hidden = F.gelu(torch.einsum("...lwd,lhd->...lwh", normed(states), tensors["up"]) + tensors["up_bias"][:, None])
    logits = torch.einsum("...lwh,loh->...lwo", hidden, tensors["down"]) + tensors["down_bias"][:, None]
    if present is None:
        return logits.mean(dim=-2)
    weights = (present / present.sum(dim=-1, keepdim=True))[..., None, :, None]
    return (logits * weights).sum(dim=-2)
