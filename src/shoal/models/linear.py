"""Matrix products with weights packed once.

On CPUs, oneDNN's products are two to three times faster on weights in its own blocked layout than on rows of a plain matrix
(`docs/log.md`), because decode brings few rows and the time goes into reading the weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.models.weights import LinearWeights, quantize

Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]

PACK_ROWS = 32
"""Rows that the packed layout is chosen for; any number of rows may be multiplied."""

INT8_STEP = 32
"""PyTorch's int8 product reads inputs in steps of up to so many values, the last one beyond the row's end (a crash, in 2.13)."""

_ONEDNN_ACTIVATION = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation by name; `gelu_tanh` is the tanh approximation that GPT-2 uses."""
    match activation:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "none":
            return x


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes this weight: a float32 or bfloat16 matrix on a CPU that supports it."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Linear:
    """`activation(x @ weight.T + bias)` for a fixed weight."""

    def __init__(self, weights: LinearWeights, activation: Activation = "none", *, quantized: bool = False) -> None:
        """Packs `weights.weight` [out, in] where the machine can; the plain matrix is then no longer held here.

        `quantized`: hold it in int8 with a scale per row; x has to be bfloat16 then.
        """
        self.out_features, self.in_features = weights.weight.shape
        self.bias = weights.bias
        self.activation = activation
        self.weight = weights.weight
        self.scale: Tensor | None = None
        self.packed = not quantized and can_pack(weights.weight)
        if quantized:
            weight, scale = quantize(weights.weight)
            self.weight = F.pad(weight, (0, -self.in_features % INT8_STEP))
            self.scale = scale.to(weights.weight.dtype)
        elif self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weights.weight.contiguous(), PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] to [N, out], same dtype."""
        if self.packed:
            name, algorithm = _ONEDNN_ACTIVATION[self.activation]
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
            return product
        if self.scale is None:
            return activate(F.linear(x, self.weight, self.bias), self.activation)
        if self.in_features % INT8_STEP:
            x = F.pad(x, (0, -self.in_features % INT8_STEP))
        product = torch._weight_int8pack_mm(x, self.weight, self.scale)
        return activate(product if self.bias is None else product + self.bias, self.activation)
