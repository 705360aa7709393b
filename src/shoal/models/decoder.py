"""The decoder of every family: one forward pass over tokens that may each run a different set of layers.

    for each layer:  its active tokens  ->  norm, qkv, rotate, write cache, attend, out  ->  norm, up, activation, down

A token that a layer does not serve passes through the residual stream unchanged and leaves no key or value there.
Letters: N tokens in the pass, A active in a layer, d hidden size, H_q and H_kv heads of width D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.models.attention import attend
from shoal.models.layout import Layout, lay_out, on
from shoal.models.linear import Linear, activate
from shoal.models.native.attention import NativeAttention
from shoal.models.native.library import Library
from shoal.models.passes import LayerCaches, Pass
from shoal.models.weights import DecoderConfig, DecoderWeights, LayerWeights, NormWeights, Rotary

Attend = Callable[[Tensor], Tensor]
"""From qkv [A, (H_q + 2 H_kv) D] of a layer's active tokens to their attention [A, H_q D]; the cache has them afterwards."""


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
        quantized = shape.quantized
        self.qkv = Linear(weights.qkv, quantized=quantized)
        self.q_norm = Norm(weights.q_norm, config) if weights.q_norm else None
        self.k_norm = Norm(weights.k_norm, config) if weights.k_norm else None
        self.out = Linear(weights.out, quantized=quantized)
        self.mlp_norm = Norm(weights.mlp_norm, config)
        self.up = Linear(weights.up, "none" if self.gated else config.activation, quantized=quantized)
        self.down = Linear(weights.down, quantized=quantized)
        self.num_tokens_run = 0  # counted here, where the products run, to hold the planned counts against

    def __call__(self, x: Tensor, attend_heads: Attend) -> None:
        """Add the layer's output to x [A, d] in place; `attend_heads` writes its keys and values into the cache."""
        self.num_tokens_run += x.shape[0]
        attention = self.out(attend_heads(self.qkv(self.attention_norm(x))))
        if self.parallel_residual:
            x.add_(attention + self.mlp(self.mlp_norm(x)))
        else:
            x.add_(attention)
            x.add_(self.mlp(self.mlp_norm(x)))

    def attend(
        self, qkv: Tensor, layout: Layout, keys: Tensor, values: Tensor, cos_sin: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Self-attention over the cache, from qkv [A, (H_q + 2 H_kv) D] to [A, H_q D]."""
        heads = qkv.view(-1, sum(self.head_split), self.head_dim)
        q, k, v = torch.split(heads, self.head_split, dim=1)
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos_sin is not None:
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        keys[layout.slots, :, layout.positions] = k
        values[layout.slots, :, layout.positions] = v
        return attend(q, keys, values, layout)

    def mlp(self, x: Tensor) -> Tensor:
        """MLP of normed x [A, d], to [A, d]."""
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = activate(gate, self.activation) * up
        return self.down(x)


class Decoder:
    """A decoder-only transformer of any supported family, by PyTorch's operations."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, library: Library | None = None) -> None:
        """Takes the weights over: packed products replace plain matrices, so drop `weights` afterwards.

        `library`: the CPU kernel, which then does the attention of decode passes.
        """
        self.config = config
        self.embedding = weights.embedding
        self.position_table = weights.positions
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.rotary = RotaryTable(config.rotary, self.device) if config.rotary else None
        self.layers = [DecoderLayer(layer, config) for layer in weights.layers]
        self.native_attention: NativeAttention | None = None
        if library:
            norms = [
                (layer.q_norm.weight if layer.q_norm else None, layer.k_norm.weight if layer.k_norm else None)
                for layer in self.layers
            ]
            self.native_attention = NativeAttention(config, self.dtype, norms, library)
        self.final_norm = Norm(weights.final_norm, config)
        self.head = Linear(weights.head, quantized=config.shape.quantized)

    @torch.inference_mode()
    def __call__(self, work: Pass, cache: LayerCaches) -> Tensor:
        """Run one pass.

        Returns logits [len(work.logit_tokens), V] in the model's dtype; the keys and values of every (layer, token) that ran
        are in `cache` afterwards.
        """
        x = self.embed(work)
        attention = self.attention(work, cache)
        for index, (layer, active) in enumerate(zip(self.layers, work.layers, strict=True)):
            self.show(work, index, x)
            if active is None:
                continue
            attend_heads = attention(index)
            if active.select is None:  # the leading tokens: a view, updated in place
                layer(x[: active.num_tokens], attend_heads)
            else:
                select = on(self.device, active.select)
                picked = x[select]
                layer(picked, attend_heads)
                x[select] = picked
        self.show(work, len(self.layers), x)

        return self.logits(x[on(self.device, work.logit_tokens)])

    # The parts of a pass, for those who stop between layers (`baselines/`); they call them in inference mode.

    def embed(self, work: Pass) -> Tensor:
        """States [N, d] of the pass's tokens before the first layer that they run."""
        x = F.embedding(on(self.device, work.token_ids), self.embedding)
        if self.position_table is not None:
            positions = on(self.device, work.positions) + self.config.position_offset
            x += F.embedding(positions, self.position_table)
        if work.given:
            x[on(self.device, work.given.tokens)] = work.given.states.to(x.dtype)
        return x

    def show(self, work: Pass, level: int, x: Tensor) -> None:
        """Let those who read states see x [N, d] before layer `level`, or after the last."""
        if work.state_sums:
            work.state_sums.add(level, x)
        for watched in work.watched:
            watched.show(level, x)

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: states [n, d] after any layer to logits [n, V]."""
        return self.head(self.final_norm(x))

    def attention(self, work: Pass, cache: LayerCaches) -> Callable[[int], Attend]:
        """Each layer's attention: by the kernel where there is one and every row brings one token, else by PyTorch."""
        distinct = {id(active): active for active in work.layers if active is not None}
        one_each = work.trees is None and all(active.num_tokens == len(active.spans) for active in distinct.values())
        if self.native_attention and one_each:
            return self.native_attention.begin(work, cache)

        layouts = {key: lay_out(active, cache.keys[0], work.trees) for key, active in distinct.items()}
        cos_sin = self.rotary(on(self.device, work.positions), self.dtype) if self.rotary else None

        def of_layer(index: int) -> Attend:
            layout = layouts[id(work.layers[index])]
            chosen = slice(layout.num_tokens) if layout.select is None else layout.select
            here = None if cos_sin is None else (cos_sin[0][chosen], cos_sin[1][chosen])
            return lambda qkv: self.layers[index].attend(qkv, layout, cache.keys[index], cache.values[index], here)

        return of_layer
