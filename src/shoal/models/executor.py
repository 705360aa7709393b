"""Which decoder runs a checkpoint on this machine.

| weights | processor | products | attention of decode |
|---|---|---|---|
| float32 | AVX2 | kernel | kernel |
| float32 | AVX-512 | oneDNN | kernel |
| bfloat16 | AVX2, AVX-512 without bfloat16 | kernel | kernel |
| bfloat16 | with bfloat16 units | oneDNN | kernel |
| int8 | AVX2 or better | kernel | kernel |
| any but int8 | without the kernel | oneDNN | PyTorch |
| int8 | without the kernel | PyTorch | PyTorch |

The kernel also needs heads of a multiple of 8 values. On CUDA decode passes run as graphs (`graphs.py`).
"""

from __future__ import annotations

import torch

from shoal.depth.shape import ModelShape
from shoal.errors import InvalidInput
from shoal.models.decoder import Decoder
from shoal.models.graphs import GraphDecoder
from shoal.models.native.decoder import NativeDecoder
from shoal.models.native.library import KINDS, Library, library
from shoal.models.weights import DecoderConfig, DecoderWeights

Executor = Decoder | NativeDecoder
"""Both compute the same; the kernel's activations are float32."""


def make_decoder(config: DecoderConfig, weights: DecoderWeights) -> Executor:
    """The fastest decoder here for these weights, which it takes over.

    Raises `InvalidInput` for int8 on a device that is not a CPU.
    """
    device, dtype, shape = weights.embedding.device, weights.embedding.dtype, config.shape
    if device.type != "cpu":
        if shape.quantized:
            raise InvalidInput(f"int8 runs on CPUs only, not on {device}: choose bfloat16 or device='cpu'")
        return GraphDecoder(config, weights) if device.type == "cuda" else Decoder(config, weights)
    kernel = attention_kernel(shape, dtype)
    if kernel is None:
        return Decoder(config, weights)
    if shape.quantized or not has_fast_products(dtype):
        return NativeDecoder(config, weights, kernel)
    return Decoder(config, weights, kernel)


def attention_kernel(shape: ModelShape, dtype: torch.dtype) -> Library | None:
    """The CPU kernel, where it is there and can do the attention of a model of this shape and dtype."""
    return library() if dtype in KINDS and shape.head_dim % 8 == 0 else None


def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype` with more than the 8 float32 lanes that the kernel has."""
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
