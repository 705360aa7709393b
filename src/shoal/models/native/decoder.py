"""The decoder on a CPU with every layer of a pass in one call of the kernel.

It computes what `models/decoder.py` computes, with the residual stream and all activations in float32. A token's logits do
not depend on the batch around it, to the last bit: every sum is taken in the same order whatever runs beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.models.memory import drop_freed
from shoal.models.native.attention import Angles, addresses, heads, scratch, work_addresses
from shoal.models.native.library import ACTIVATIONS, KINDS, Embedding, Layer, Library, Model, Norm, address
from shoal.models.native.library import Pass as NativePass
from shoal.models.native.packing import Packed
from shoal.models.passes import LayerCaches, Pass
from shoal.models.weights import DecoderConfig, DecoderWeights, LayerWeights, LinearWeights, NormWeights

KEPT_TOKENS = 256
"""Buffers of passes with more tokens than this (prompts) go back to the system after the pass."""


class NativeDecoder:
    """A decoder-only transformer of any supported family, on the CPU kernel."""

    device = torch.device("cpu")

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, library: Library) -> None:
        """Takes the weights over: panels replace plain matrices, so drop `weights` afterwards."""
        self.config, self.library = config, library
        self.dtype = weights.embedding.dtype  # of the cache
        self.weight_dtype = torch.int8 if config.shape.quantized else self.dtype
        self._kept: list[Tensor | Packed] = []  # what the kernel holds addresses of
        self.head = self._pack(weights.head)
        drop_freed()  # the largest matrix by far; what packing it took would stand beside all layers
        shape = config.shape
        self.layers = (Layer * shape.num_layers)(*map(self._layer, weights.layers))
        self.model = Model(
            heads=heads(config, self.dtype),
            hidden=shape.hidden_size,
            num_layers=shape.num_layers,
            rms=config.norm == "rmsnorm",
            activation=ACTIVATIONS[config.activation],
            gated=shape.gated_mlp,
            parallel_residual=config.parallel_residual,
            norm_eps=config.norm_eps,
            embedding=self._embedding(weights),
            layers=self.layers,
            final_norm=self._norm(weights.final_norm),
            head=self.head.product,
        )
        self.angles = Angles(config.rotary) if config.rotary else None
        self._widths = {
            "x": shape.hidden_size,
            "normed": shape.hidden_size,
            "normed_mlp": shape.hidden_size if config.parallel_residual else 0,
            "qkv": (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim,
            "attended": shape.num_heads * shape.head_dim,
            "up": shape.intermediate_size,
        }
        self._pass = NativePass()
        self._buffers: dict[str, Tensor] = {}
        self._room = (0, 0, 0)

    def __call__(self, work: Pass, cache: LayerCaches) -> Tensor:
        """Run one pass; see `Decoder`. The logits are float32, and the next pass overwrites them."""
        num_logits, capacity = len(work.logit_tokens), cache.keys[0].shape[2]
        cos, sin = self.angles(torch.from_numpy(work.positions)) if self.angles else (None, None)
        one = self._pass
        self._make_room(len(work.token_ids), num_logits, scratch(self.model.heads, capacity))
        one.num_tokens, one.num_logits, one.capacity = len(work.token_ids), num_logits, capacity
        one.token_ids, one.positions = work.token_ids.ctypes.data, work.positions.ctypes.data
        one.logit_tokens = work.logit_tokens.ctypes.data
        one.cos, one.sin = address(cos), address(sin)
        one.works = work_addresses(work.layers)
        one.keys, one.values = addresses(cache.keys), addresses(cache.values)
        sums = work.state_sums
        one.groups, one.sums = (sums.groups.ctypes.data, sums.sums.data_ptr()) if sums else (None, None)
        one.num_groups = sums.sums.shape[1] if sums else 0
        given = None
        if work.given:
            given = np.full(len(work.token_ids), -1)
            given[work.given.tokens] = np.arange(len(work.given.tokens))
        one.given = given.ctypes.data if given is not None else None
        one.states = work.given.states.data_ptr() if work.given else None
        one.below, one.among = (
            (work.trees.below.ctypes.data, work.trees.among.ctypes.data) if work.trees else (None, None)
        )
        self._run(one, work)
        logits = self._buffers["logits"][:num_logits]
        if len(work.token_ids) > KEPT_TOKENS:
            self._buffers, self._room = {}, (0, 0, 0)
        return logits

    def _run(self, one: NativePass, work: Pass) -> None:
        """The whole pass in one call, or layer by layer where somebody sees its states."""
        num_layers = self.config.shape.num_layers
        one.first_layer, one.end_layer = -1, num_layers
        if not work.watched:
            self.library.run_pass(self.model, one)
            return
        states = self._buffers["x"][: one.num_tokens]
        for level in range(num_layers + 1):  # each call ends before layer `level`, the last one with the logits
            one.first_layer, one.end_layer = level - 1, level
            self.library.run_pass(self.model, one)
            for watched in work.watched:
                watched.show(level, states)

    def _make_room(self, *needed: int) -> None:
        """Buffers for a pass of so many tokens, logits and values of scratch: those of the last one where they are large enough,
        so that a decode step allocates nothing."""
        if all(need <= room for need, room in zip(needed, self._room, strict=True)):
            return
        num_tokens, num_logits, num_scratch = map(max, needed, self._room)
        self._room = num_tokens, num_logits, num_scratch
        self._buffers = {name: torch.empty(num_tokens, width) for name, width in self._widths.items()}
        self._buffers["logits"] = torch.empty(num_logits, self.config.shape.vocab_size)
        self._buffers["scratch"] = torch.empty(num_scratch)
        for name, buffer in self._buffers.items():
            setattr(self._pass, name, buffer.data_ptr())

    def _embedding(self, weights: DecoderWeights) -> Embedding:
        """Rows of their own are kept only where the head is another matrix."""
        tied = weights.head.weight.data_ptr() == weights.embedding.data_ptr()
        if not tied:
            self._kept.append(weights.embedding)
        return Embedding(
            rows=None if tied else address(weights.embedding),
            kind=KINDS[self.dtype],
            positions=self._keep(weights.positions),
            offset=self.config.position_offset,
        )

    def _keep(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 copy that lives as long as the decoder."""
        if tensor is None:
            return None
        copy = tensor.float().contiguous()
        self._kept.append(copy)
        return address(copy)

    def _norm(self, weights: NormWeights) -> Norm:
        return Norm(self._keep(weights.weight), self._keep(weights.bias))

    def _pack(self, weights: LinearWeights, *, gated: bool = False) -> Packed:
        packed = Packed(weights, self.weight_dtype, self.library, gated=gated)
        self._kept.append(packed)
        return packed

    def _layer(self, weights: LayerWeights) -> Layer:
        gated = self.config.shape.gated_mlp
        return Layer(
            attention_norm=self._norm(weights.attention_norm),
            mlp_norm=self._norm(weights.mlp_norm),
            q_norm=self._keep(weights.q_norm.weight) if weights.q_norm else None,
            k_norm=self._keep(weights.k_norm.weight) if weights.k_norm else None,
            qkv=self._pack(weights.qkv).product,
            out=self._pack(weights.out).product,
            up=self._pack(weights.up, gated=gated).product,
            down=self._pack(weights.down).product,
        )
