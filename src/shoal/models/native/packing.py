"""Weights as the kernel reads them: panels of 16 output columns (products.h)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.models.native.library import KINDS, PANEL, Library, Product, address
from shoal.models.weights import LinearWeights

HALF = PANEL // 2


class Packed:
    """One product's weight in panels.

    Attributes: `panels`, the packed values; `scale` float32 per output column (int8 only); `product`, what the kernel is given.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype, library: Library, *, gated: bool = False) -> None:
        """Pack `weights.weight` [out, in], float32 or bfloat16.

        Args: `dtype` float32, bfloat16, or int8 for symmetric quantisation per output column (`quantize`); `gated`: the upper
        half of the rows is the gate and the lower the up product; both come into one panel.
        """
        self.out_features, self.in_features = out, num_in = weights.weight.shape
        num_panels = -(-(out // 2) // HALF) if gated else -(-out // PANEL)
        self.panels = torch.empty(num_panels, num_in, PANEL, dtype=dtype)
        self.scale = torch.empty(num_panels * PANEL) if dtype == torch.int8 else None
        self.bias = None if weights.bias is None else _columns(weights.bias.float(), gated=gated)
        self.product = Product(address(self.panels), address(self.scale), address(self.bias), num_in, out, KINDS[dtype])
        library.pack(self.product, weights.weight.contiguous(), gated=gated)


def _columns(values: Tensor, *, gated: bool) -> Tensor:
    """[panels * PANEL]: a value per row of a weight in the order of the panels' columns, the last panel filled with zeros."""
    if not gated:
        return F.pad(values, (0, -len(values) % PANEL))
    halves = [F.pad(half, (0, -len(half) % HALF)).view(-1, HALF) for half in values.chunk(2)]
    return torch.cat(halves, dim=1).flatten()
