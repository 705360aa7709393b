"""What both uses of the kernel share, a whole pass and attention alone: spans, cache addresses, rotary angles."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from shoal.models.native.library import KINDS, QUERIES, Attention, Heads, Library, Work, address
from shoal.models.passes import LayerCaches, LayerWork, Pass
from shoal.models.weights import DecoderConfig, Rotary


class Angles:
    """float32 cosines and sines of a pass's positions."""

    def __init__(self, rotary: Rotary) -> None:
        self.inv_freq = torch.tensor(rotary.inv_freq, dtype=torch.float32)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [N] to cos and sin, each [N, dim / 2]."""
        angles = torch.outer(positions.float(), self.inv_freq)
        return angles.cos(), angles.sin()


def heads(config: DecoderConfig, cache_dtype: torch.dtype) -> Heads:
    """The part of a model that attention is about."""
    shape = config.shape
    return Heads(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rotary_dim=2 * len(config.rotary.inv_freq) if config.rotary else 0,
        cache_kind=KINDS[cache_dtype],
        norm_eps=config.norm_eps,
    )


def scratch(model: Heads, capacity: int) -> int:
    """float32 values that attention needs beside its input and output: per thread its queries and their scores."""
    head_dim: int = model.head_dim
    return torch.get_num_threads() * QUERIES * (head_dim + -(-capacity // 8) * 8)


def native_work(work: LayerWork) -> Work:
    """`work` as the kernel reads it; its arrays must live as long."""
    select = None if work.select is None else work.select.ctypes.data
    return Work(work.num_tokens, select, len(work.spans), work.spans.ctypes.data)


def work_addresses(layers: Sequence[LayerWork | None]) -> ctypes.Array[ctypes._Pointer[Work]]:
    """One pointer per layer, null where no token runs it. The array keeps what they point to alive."""
    array = (ctypes.POINTER(Work) * len(layers))()
    last = None
    for layer, work in enumerate(layers):
        if work is not None:
            # Neighbours mostly share theirs.
            array[layer] = array[layer - 1] if work is last else ctypes.pointer(native_work(work))
        last = work
    return array


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Where each layer's cache begins."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class NativeAttention:
    """Decode attention by the kernel, between products that PyTorch runs."""

    def __init__(
        self,
        config: DecoderConfig,
        cache_dtype: torch.dtype,
        norms: Sequence[tuple[Tensor | None, Tensor | None]],
        library: Library,
    ) -> None:
        """`norms`: weights [D] of each layer's norms of query and key heads."""
        self.library = library
        self.norms = [tuple(None if weight is None else weight.float() for weight in pair) for pair in norms]
        self.heads = heads(config, cache_dtype)
        self.angles = Angles(config.rotary) if config.rotary else None
        self.scratch = torch.empty(0)

    def begin(self, one: Pass, cache: LayerCaches) -> Callable[[int], Callable[[Tensor], Tensor]]:
        """The attention of each layer of a pass: from qkv [A, (H_q + 2 H_kv) D] to [A, H_q D], float32 or bfloat16."""
        capacity = cache.keys[0].shape[2]
        size = scratch(self.heads, capacity)
        if len(self.scratch) < size:
            self.scratch = torch.empty(size)
        cos, sin = self.angles(torch.from_numpy(one.positions)) if self.angles else (None, None)
        works = {id(work): native_work(work) for work in one.layers if work is not None}

        def attend(index: int, qkv: Tensor) -> Tensor:
            out = qkv.new_empty(len(qkv), self.heads.num_heads * self.heads.head_dim)
            q_norm, k_norm = self.norms[index]
            attention = Attention(
                keys=address(cache.keys[index]),
                values=address(cache.values[index]),
                capacity=capacity,
                q_norm=address(q_norm),
                k_norm=address(k_norm),
                cos=address(cos),
                sin=address(sin),
                qkv=address(qkv),
                out=address(out),
                kind=KINDS[qkv.dtype],
            )
            self.library.attend(self.heads, attention, works[id(one.layers[index])], self.scratch)
            return out

        return lambda index: partial(attend, index)
