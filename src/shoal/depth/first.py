"""FiRST: a router per layer reads the prompt and fixes the layers of the whole completion (Jain et al. 2024, arXiv 2410.12513).

The set is constant per sequence, so the cache stays exact. Sizes of the routers are not stated in the sources that we could read;
ours is the smallest that can: the score of layer l is w_l . x_l + b_l, x_l being the mean of the prompt's states before the layer
over its root mean square. Routers are trained first, with soft gates; LoRA adapters then recover quality (`train/first.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shoal.depth.layer_router import LayerRouter, normed
from shoal.depth.shape import ModelShape


class FirstRouter(LayerRouter):
    """Tensors: `weight` [L, d], `bias` [L]."""

    kind = "first"
    num_windows = 1

    @classmethod
    def sizes(cls, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {"weight": (shape.num_layers, shape.hidden_size), "bias": (shape.num_layers,)}

    def scores(self, states: Tensor) -> Tensor:
        """w . x + b per layer; a sigmoid of it is the gate that training saw, so 0 is a gate of one half."""
        means = states.mean(dim=1)
        return torch.stack([self.score(layer, mean) for layer, mean in enumerate(means)])

    def score(self, layer: int, mean: Tensor) -> Tensor:
        """The score [...] of one layer from mean states [..., d] before it."""
        return normed(mean) @ self.tensors["weight"][layer] + self.tensors["bias"][layer]

    def moved(self, by: float) -> FirstRouter:
        """The same with `by` added to every score."""
        return replace(self, tensors={**self.tensors, "bias": self.tensors["bias"] + by})
