"""The canonical form that every family's checkpoint is brought into: what the decoder computes with.

Shapes: V vocabulary, P learned positions, d hidden size, I MLP width, H_q and H_kv heads of width D.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shoal.depth.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding: the first `dim` values of each head turn, by `rotate_half` (two halves, not pairs)."""

    inv_freq: tuple[float, ...]
    """dim/2 inverse frequencies, after any scaling (`llama3`, `linear`)."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything about a decoder that is not a weight."""

    family: str
    """Row of the family table, e.g. `"llama"`."""
    shape: ModelShape
    """Sizes; `bytes_per_value` is that of the dtype the weights were loaded in."""
    max_positions: int
    """Longest sequence in tokens, prompt and completion together."""
    norm: Literal["layernorm", "rmsnorm"]
    """Kind of every norm."""
    norm_eps: float
    """Added to the variance."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"]
    """MLP activation; with `shape.gated_mlp` it acts on the gate, which multiplies the up product."""
    rotary: Rotary | None = None
    """None for learned positions."""
    position_offset: int = 0
    """Added to a position before the learned table is looked up (2 for OPT)."""
    parallel_residual: bool = False
    """Whether attention and MLP both read the layer's input (GPT-NeoX) instead of one after the other."""
    sliding_window: int | None = None
    """Longest request that full attention serves exactly; longer ones are refused."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion."""
    fingerprint: str = field(default="", compare=False)
    """Of the stored weights, whatever dtype they are loaded in (`TensorFiles.fingerprint`); empty where no files were read."""


@dataclass(frozen=True)
class LinearWeights:
    """weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class NormWeights:
    """weight [d], bias [d] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    attention_norm: NormWeights
    qkv: LinearWeights
    """[(H_q + 2 H_kv) D, d]: all query heads, then all key heads, then all value heads."""
    q_norm: NormWeights | None = None
    """[D], RMS norm on each query head before the rotation (Qwen3)."""
    k_norm: NormWeights | None = None
    """[D], the same for keys."""
    out: LinearWeights
    """[d, H_q D]."""
    mlp_norm: NormWeights
    up: LinearWeights
    """[I, d], or [2 I, d] with the gate's rows first in a gated MLP."""
    down: LinearWeights
    """[d, I]."""


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """A whole checkpoint in canonical form."""

    embedding: Tensor
    """[V, d]."""
    positions: Tensor | None
    """[P, d], learned positions with the rows that `position_offset` skips; None for rotary models."""
    layers: Iterable[LayerWeights]
    """Bottom first. A loader reads them as they are asked for, once: what packs each and lets it go needs no second copy."""
    final_norm: NormWeights
    head: LinearWeights
    """[V, d]; shares the embedding's memory where the checkpoint ties them."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to -127..127: int8 [out, in] and float32 scale [out], with weight ~ int8 * scale."""
    scale = weight.abs().amax(dim=1).float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale.unsqueeze(1)).round_().to(torch.int8), scale
