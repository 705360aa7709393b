"""The decoder of every family: one forward pass over tokens that may each run a different set of layers.

    for each layer:  its active tokens  ->  norm, qkv, rotate, write cache, attend, out  ->  norm, up, activation, down

A token that a layer does not serve passes through the residual stream unchanged and leaves no key or value there.
Letters: N tokens in the pass, A active in a layer, d hidden size, H_q and H_kv heads of width D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.models.attention import attend
from shoal.models.linear import Linear, activate
from shoal.models.passes import LayerWork, Pass
from shoal.models.weights import DecoderConfig, DecoderWeights, LayerWeights, NormWeights, Rotary


class LayerCaches(Protocol):
    """Where the decoder finds each layer's keys and values."""

    @property
    def keys(self) -> Sequence[Tensor]:
        """Per layer [slots, H_kv, S, D]."""
        ...

    @property
    def values(self) -> Sequence[Tensor]:
        """Per layer [slots, H_kv, S, D]."""
        ...


class Norm:
    """LayerNorm or RMSNorm over the last dimension, in float32 for RMSNorm as the checkpoints' own code does."""

    def __init__(self, weights: NormWeights, config: DecoderConfig) -> None:
        self.weight, self.bias = weights.weight, weights.bias
        self.rms = config.norm == "rmsnorm"
        self.eps = config.norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] to the same shape and dtype."""
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RotaryTable:
    """Cosines and sines for positions, computed once per pass and cut per layer."""

    def __init__(self, rotary: Rotary, device: torch.device) -> None:
        self.inv_freq = torch.tensor(rotary.inv_freq, dtype=torch.float32, device=device)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [N] to cos and sin, each [N, 1, dim]."""
        angles = torch.outer(positions.float(), self.inv_freq).repeat(1, 2).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [A, H, D] on its first `cos.shape[-1]` values per head: x cos + rotate_half(x) sin."""
    dim = cos.shape[-1]
    turned, kept = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


class DecoderLayer:
    """One layer's products, on active tokens only."""

    def __init__(self, weights: LayerWeights, config: DecoderConfig) -> None:
        shape = config.shape
        self.head_split = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        self.head_dim = shape.head_dim
        self.parallel_residual = config.parallel_residual
        self.gated = shape.gated_mlp
        self.activation = config.activation
        self.attention_norm = Norm(weights.attention_norm, config)
        self.qkv = Linear(weights.qkv)
        self.q_norm = Norm(weights.q_norm, config) if weights.q_norm else None
        self.k_norm = Norm(weights.k_norm, config) if weights.k_norm else None
        self.out = Linear(weights.out)
        self.mlp_norm = Norm(weights.mlp_norm, config)
        self.up = Linear(weights.up, "none" if self.gated else config.activation)
        self.down = Linear(weights.down)
        self.num_tokens_run = 0  # counted here, where the products run, to hold the planned counts against

    def __call__(
        self, x: Tensor, work: LayerWork, keys: Tensor, values: Tensor, cos_sin: tuple[Tensor, Tensor] | None
    ) -> None:
        """Add the layer's output to x [A, d] in place, and write its keys and values into the cache."""
        self.num_tokens_run += x.shape[0]
        attention = self.attention(self.attention_norm(x), work, keys, values, cos_sin)
        if self.parallel_residual:
            x.add_(attention + self.mlp(self.mlp_norm(x)))
        else:
            x.add_(attention)
            x.add_(self.mlp(self.mlp_norm(x)))

    def attention(
        self, x: Tensor, work: LayerWork, keys: Tensor, values: Tensor, cos_sin: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Self-attention of normed x [A, d] over the cache, to [A, d]."""
        heads = self.qkv(x).view(-1, sum(self.head_split), self.head_dim)
        q, k, v = torch.split(heads, self.head_split, dim=1)
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos_sin is not None:
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        keys[work.slots, :, work.positions] = k
        values[work.slots, :, work.positions] = v
        return self.out(attend(q, keys, values, work))

    def mlp(self, x: Tensor) -> Tensor:
        """MLP of normed x [A, d], to [A, d]."""
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = activate(gate, self.activation) * up
        return self.down(x)


class Decoder:
    """A decoder-only transformer of any supported family."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights) -> None:
        """Takes the weights over: packed products replace plain matrices, so drop `weights` afterwards."""
        self.config = config
        self.embedding = weights.embedding
        self.position_table = weights.positions
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.rotary = RotaryTable(config.rotary, self.device) if config.rotary else None
        self.layers = [DecoderLayer(layer, config) for layer in weights.layers]
        self.final_norm = Norm(weights.final_norm, config)
        self.head = Linear(weights.head)

    @torch.inference_mode()
    def __call__(self, work: Pass, cache: LayerCaches) -> Tensor:
        """Run one pass.

        Returns logits [len(work.logit_tokens), V] in the model's dtype; the keys and values of every (layer, token) that ran
        are in `cache` afterwards.
        """
        x = F.embedding(work.token_ids, self.embedding)
        if self.position_table is not None:
            x += F.embedding(work.positions + self.config.position_offset, self.position_table)
        cos_sin = self.rotary(work.positions, self.dtype) if self.rotary else None

        for index, (layer, active) in enumerate(zip(self.layers, work.layers, strict=True)):
            if active is None:
                continue
            keys, values = cache.keys[index], cache.values[index]
            if active.select is None:  # the leading tokens: a view, updated in place
                here = None if cos_sin is None else (cos_sin[0][: active.num_tokens], cos_sin[1][: active.num_tokens])
                layer(x[: active.num_tokens], active, keys, values, here)
            else:
                here = None if cos_sin is None else (cos_sin[0][active.select], cos_sin[1][active.select])
                picked = x[active.select]
                layer(picked, active, keys, values, here)
                x[active.select] = picked

        return self.head(self.final_norm(x[work.logit_tokens]))
