"""Packed weights hold what they were made from: panels taken apart again, as products.h describes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.models.native.library import KINDS, PANEL
from shoal.models.native.packing import Packed
from shoal.models.weights import LinearWeights, quantize
from ways import kernel, needs_kernel

pytestmark = needs_kernel

HALF = PANEL // 2
SIZES = [(1, 1), (7, 3), (16, 8), (17, 5), (31, 48), (32, 1), (64, 33), (263, 48)]
GATED_SIZES = [(2, 1), (6, 4), (16, 8), (30, 5), (34, 3), (152, 48)]
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def pack(weights: LinearWeights, dtype: torch.dtype, *, gated: bool = False) -> Packed:
    return Packed(weights, dtype, kernel(), gated=gated)


def weights_of(out: int, num_in: int, dtype: torch.dtype) -> LinearWeights:
    """Random; in int8 packed from bfloat16, with rows of very different size and one of zeros."""
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, num_in, generator=generator)
    if dtype == torch.int8:
        weight *= torch.logspace(-6, 3, out)[:, None]
        weight[out // 2] = 0
    stored = torch.bfloat16 if dtype == torch.int8 else dtype
    return LinearWeights(weight.to(stored), torch.randn(out, generator=generator).to(stored))


def columns(packed: Packed) -> Tensor:
    """float32 [panels * PANEL, in]: output columns in the order of the panels, filled ones included."""
    num_in = packed.in_features
    if packed.panels.dtype == torch.bfloat16:  # words of two: column j, column j + 8
        words = packed.panels.reshape(-1, num_in, HALF, 2)
        return torch.cat((words[..., 0], words[..., 1]), dim=2).transpose(1, 2).reshape(-1, num_in).float()
    return packed.panels.reshape(-1, num_in, PANEL).transpose(1, 2).reshape(-1, num_in).float()


def in_order(values: Tensor, out: int, *, gated: bool) -> Tensor:
    """Columns of panels brought into the order of the weight's rows; a gated panel holds 8 of the gate and 8 of the up product."""
    if not gated:
        return values[:out]
    halves = values.reshape(-1, 2, HALF, *values.shape[1:])
    return torch.cat([halves[:, half].reshape(-1, *values.shape[1:])[: out // 2] for half in (0, 1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out", "num_in", "gated"), [(*size, False) for size in SIZES] + [(*size, True) for size in GATED_SIZES]
)
def test_what_is_packed_is_held(out: int, num_in: int, gated: bool, dtype: torch.dtype) -> None:
    """float32 and bfloat16 exactly, int8 to half a step of its row; columns that fill the last panel are 0."""
    weights = weights_of(out, num_in, dtype)
    packed = pack(weights, dtype, gated=gated)
    assert packed.panels.dtype == dtype
    assert packed.panels.is_contiguous()
    assert packed.panels.data_ptr() != weights.weight.data_ptr(), "the checkpoint's own matrix can go"
    product = packed.product
    assert (product.num_in, product.num_out, product.kind) == (num_in, out, KINDS[dtype])
    assert product.weight == packed.panels.data_ptr()

    values = columns(packed)
    num_panels = -(-(out // 2) // HALF) if gated else -(-out // PANEL)
    assert len(values) == num_panels * PANEL
    held = in_order(values, out, gated=gated)
    bias = packed.bias
    assert bias is not None
    assert bias.dtype == torch.float32
    assert len(bias) == len(values), "the kernel reads a whole panel's"
    assert torch.equal(in_order(bias, out, gated=gated), weights.bias.float())  # type: ignore[union-attr]
    if dtype != torch.int8:
        assert packed.scale is None
        assert torch.equal(held, weights.weight.float())
    else:
        assert packed.scale is not None
        assert len(packed.scale) == len(values)
        scale = in_order(packed.scale, out, gated=gated)[:, None]
        torch.testing.assert_close(
            scale.flatten() * 127, weights.weight.abs().amax(dim=1).float(), rtol=1e-6, atol=1e-30
        )
        error = (held * scale - weights.weight.float()).abs()
        assert (error <= scale * 0.5001).all()
        assert held.abs().max() <= 127
    filled = torch.ones(len(values), dtype=torch.bool)
    index = in_order(torch.arange(len(values)), out, gated=gated)
    filled[index] = False
    assert not values[filled].any()


def test_no_bias() -> None:
    packed = pack(LinearWeights(torch.randn(20, 8)), torch.float32)
    assert packed.bias is None
    assert packed.product.bias is None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_what_quantize_makes_of_a_weight(stored: torch.dtype) -> None:
    weights = LinearWeights(torch.randn(40, 51).to(stored))
    packed = pack(weights, torch.int8)
    values, scale = quantize(weights.weight)
    assert torch.equal(columns(packed)[:40], values.float())
    assert packed.scale is not None
    assert torch.equal(packed.scale[:40], scale)


def test_other_dtypes_are_rounded_as_pytorch_rounds_them() -> None:
    weight = torch.cat((torch.randn(10, 9), torch.full((1, 9), torch.inf), torch.full((1, 9), torch.nan)))
    assert torch.equal(columns(pack(LinearWeights(weight), torch.bfloat16))[:11], weight.bfloat16().float()[:11])
    assert columns(pack(LinearWeights(weight), torch.bfloat16))[11].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_so_in_int8(bad: float) -> None:
    """Its outputs become NaN, so the request fails with "not finite" instead of going on with made-up weights."""
    weight = torch.randn(20, 16)
    weight[3, 5] = bad
    packed = pack(LinearWeights(weight), torch.int8)
    assert packed.scale is not None
    assert packed.scale[3].isnan()
    assert packed.scale.isnan().sum() == 1
