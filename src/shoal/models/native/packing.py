"""Weights as the kernel reads them: panels of 16 output columns (products.h)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.models.native.library import KINDS, PANEL, Product, address
from shoal.models.weights import LinearWeights, quantize

HALF = PANEL // 2


class Packed:
    """One product's weight in panels.

    Attributes: `panels`, the packed values; `scale` float32 per output column (int8 only); `product`, what the kernel is given.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype, *, gated: bool = False) -> None:
        """Pack `weights.weight` [out, in].

        Args: `dtype` float32, bfloat16, or int8 for symmetric quantisation per output column; `gated`: the upper half of the
        rows is the gate and the lower the up product; both come into one panel.
        """
        weight = weights.weight
        out, num_in = weight.shape
        self.out_features, self.in_features = out, num_in
        self.scale = self.bias = None
        scale = None
        if dtype == torch.int8:
            weight, scale = quantize(weight)
        self.panels = _panels(_columns(weight.to(dtype), gated=gated))
        if scale is not None:
            self.scale = _columns(scale.view(out, 1), gated=gated).flatten()
        if weights.bias is not None:
            self.bias = _columns(weights.bias.float().view(out, 1), gated=gated).flatten()
        self.product = Product(address(self.panels), address(self.scale), address(self.bias), num_in, out, KINDS[dtype])


def _columns(rows: Tensor, *, gated: bool) -> Tensor:
    """[panels, PANEL, in]: rows of a weight by panel, the last one filled with zeros."""
    if not gated:
        return F.pad(rows, (0, 0, 0, -len(rows) % PANEL)).view(-1, PANEL, rows.shape[1])
    gate, up = (F.pad(half, (0, 0, 0, -len(half) % HALF)).view(-1, HALF, rows.shape[1]) for half in rows.chunk(2))
    return torch.cat((gate, up), dim=1)


def _panels(columns: Tensor) -> Tensor:
    """The order in which the kernel reads: by k; bfloat16 columns j and j + 8 beside each other."""
    if columns.dtype == torch.bfloat16:
        return columns.view(len(columns), 2, HALF, -1).permute(0, 3, 2, 1).contiguous()
    return columns.transpose(1, 2).contiguous()
