"""The compiled kernel (`kernels.c`) and its structures, field by field.

The package's build compiles it where a C compiler is at hand (`hatch_build.py`); without it everything runs through PyTorch. Its
threads are those of the OpenMP runtime that PyTorch has loaded.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("kernels.so")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""`Kind` in vectors.h."""
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""`Activation` in vectors.h."""
PANEL = 16
"""Output columns of one panel, in vectors.h."""
QUERIES = 4
"""Queries that attention handles together, in attention.h."""


class Runtime(Structure):
    """Entry points of the OpenMP runtime."""

    _fields_ = (("parallel", c_void_p), ("thread", c_void_p), ("threads", c_void_p))


class Product(Structure):
    """A packed weight."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("num_in", c_int64),
        ("num_out", c_int64),
        ("kind", c_int64),
    )


class Norm(Structure):
    """float32 [d] each; bias may be null."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class Layer(Structure):
    """One decoder layer, and how many tokens it has run."""

    _fields_ = (
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Product),
        ("out", Product),
        ("up", Product),
        ("down", Product),
        ("num_tokens_run", c_int64),
    )


class Heads(Structure):
    """What attention needs to know of a model."""

    _fields_ = (
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dim", c_int64),
        ("cache_kind", c_int64),
        ("norm_eps", c_float),
    )


class Embedding(Structure):
    """Token and position embeddings; rows null where they are the head's."""

    _fields_ = (("rows", c_void_p), ("kind", c_int64), ("positions", c_void_p), ("offset", c_int64))


class Model(Structure):
    """A decoder."""

    _fields_ = (
        ("heads", Heads),
        ("hidden", c_int64),
        ("num_layers", c_int64),
        ("rms", c_int64),
        ("activation", c_int64),
        ("gated", c_int64),
        ("parallel_residual", c_int64),
        ("norm_eps", c_float),
        ("embedding", Embedding),
        ("layers", POINTER(Layer)),
        ("final_norm", Norm),
        ("head", Product),
    )


class Work(Structure):
    """The tokens that a layer serves."""

    _fields_ = (("num_tokens", c_int64), ("tokens", c_void_p), ("num_spans", c_int64), ("spans", c_void_p))


class Attention(Structure):
    """One layer's attention; see attention.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("qkv", c_void_p),
        ("out", c_void_p),
        ("kind", c_int64),
        ("below", c_void_p),
        ("among", c_void_p),
    )


class Pass(Structure):
    """One pass over all layers; see kernels.c."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("works", POINTER(POINTER(Work))),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("capacity", c_int64),
        ("num_logits", c_int64),
        ("logit_tokens", c_void_p),
        ("logits", c_void_p),
        ("normed", c_void_p),
        ("normed_mlp", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("up", c_void_p),
        ("scratch", c_void_p),
        ("groups", c_void_p),
        ("num_groups", c_int64),
        ("sums", c_void_p),
        ("given", c_void_p),
        ("states", c_void_p),
        ("below", c_void_p),
        ("among", c_void_p),
        ("first_layer", c_int64),
        ("end_layer", c_int64),
    )


class Library:
    """The kernel, loaded."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` or `AttributeError` where the file or an entry point is not there."""
        kernels = ctypes.CDLL(str(path))
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        entry_points = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        self.runtime = Runtime(*(ctypes.cast(getattr(torch_library, name), c_void_p) for name in entry_points))
        self._pass, self._attend = kernels.shoal_pass, kernels.shoal_attend
        self._pass.argtypes = (POINTER(Runtime), c_int64, POINTER(Model), POINTER(Pass))
        self._attend.argtypes = (POINTER(Runtime), c_int64, POINTER(Heads), POINTER(Attention), POINTER(Work), c_void_p)
        self._pack = kernels.shoal_pack
        self._pack.argtypes = (POINTER(Runtime), c_int64, POINTER(Product), c_void_p, c_int64, c_int64)
        self._pass.restype = self._attend.restype = self._pack.restype = None

    def run_pass(self, model: Model, one: Pass) -> None:
        """Run one pass with as many threads as PyTorch's operations take."""
        self._pass(self.runtime, torch.get_num_threads(), model, one)

    def attend(self, heads: Heads, attention: Attention, work: Work, scratch: Tensor) -> None:
        """Run one layer's attention."""
        self._attend(self.runtime, torch.get_num_threads(), heads, attention, work, scratch.data_ptr())

    def pack(self, to: Product, rows: Tensor, *, gated: bool) -> None:
        """Write `rows` [out, in], float32 or bfloat16 and contiguous, into the panels and scales of `to`."""
        self._pack(self.runtime, torch.get_num_threads(), to, rows.data_ptr(), KINDS[rows.dtype], gated)


@cache
def library() -> Library | None:
    """The kernel, or None where it was not built or this processor cannot run it."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    try:
        return Library(LIBRARY)
    except (OSError, AttributeError):
        return None


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's values begin; None stays null."""
    return None if tensor is None else tensor.data_ptr()
