"""The kernel's attention by itself, against attention computed token by token in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from shoal.depth.shape import ModelShape
from shoal.models.native.attention import NativeAttention
from shoal.models.passes import LayerWork, Pass
from shoal.models.weights import DecoderConfig, Rotary
from ways import kernel, needs_kernel

pytestmark = needs_kernel
NUM_SLOTS = 6
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=80, database=None)


@dataclass
class Case:
    """A layer's attention: its sizes, its cache, rows that have cached their first positions, and a product's output."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    normed: bool
    dtypes: tuple[torch.dtype, torch.dtype]
    """Of the product's output, and of the cache."""
    capacity: int
    rows: list[tuple[int, int, int]]
    """(slot, start, number of tokens)."""
    gaps: bool
    """Whether the pass holds tokens that the layer does not serve."""
    seed: int
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        size = (NUM_SLOTS, self.num_kv_heads, self.capacity, self.head_dim)
        # NaN wherever nothing has been written: whoever looks there is found out.
        self.keys, self.values = ([torch.full(size, torch.nan, dtype=self.dtypes[1])] for _ in range(2))
        for slot, start, _ in self.rows:
            for tensor in (self.keys[0], self.values[0]):
                tensor[slot, :, :start] = self.random(self.num_kv_heads, start, self.head_dim)
        self.norms = [self.random(self.head_dim) + 1 if self.normed else None for _ in range(2)]
        self.qkv = self.random(sum(row[2] for row in self.rows), self.heads_per_token, self.head_dim).to(self.dtypes[0])
        self.inv_freq = tuple(0.5**i for i in range(self.rotary_dim // 2))

    @property
    def heads_per_token(self) -> int:
        return self.num_heads + 2 * self.num_kv_heads

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def attention(self) -> NativeAttention:
        shape = ModelShape(
            num_layers=1, hidden_size=8, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            intermediate_size=8, gated_mlp=False, vocab_size=8,
        )  # fmt: skip
        config = DecoderConfig(
            family="none", shape=shape, max_positions=1024, norm="rmsnorm", norm_eps=1e-5, activation="relu",
            rotary=Rotary(inv_freq=self.inv_freq) if self.rotary_dim else None,
        )  # fmt: skip
        return NativeAttention(config, self.dtypes[1], [tuple(self.norms)], kernel())

    def run(self, rows: list[tuple[int, int, int]] | None = None, qkv: Tensor | None = None) -> Tensor:
        """[A, H_q, D] of the kernel, which writes the cache."""
        rows, qkv = self.rows if rows is None else rows, self.qkv if qkv is None else qkv
        counts = np.array([count for *_, count in rows])
        firsts = np.cumsum(counts) - counts
        spans = np.array([(first, n, slot, start) for first, (slot, start, n) in zip(firsts, rows, strict=True)])
        positions = np.concatenate([start + np.arange(count) for _, start, count in rows])
        select = None
        if self.gaps:  # every second token of the pass, at positions where the others are not
            select = 1 + 2 * np.arange(len(positions))
            positions = np.stack((np.full_like(positions, 777), positions), axis=1).flatten()
        work = LayerWork(num_tokens=int(counts.sum()), select=select, spans=spans)
        one = Pass(
            token_ids=np.zeros_like(positions), positions=positions, layers=(work,), logit_tokens=np.zeros(0, np.int64)
        )
        out = self.attention().begin(one, self)(0)(qkv.flatten(1))
        return out.view(-1, self.num_heads, self.head_dim)

    def spans_of(self) -> Iterator[tuple[int, int, int, slice]]:
        """(slot, start, end, the row's part of the active tokens)."""
        first = 0
        for slot, start, count in self.rows:
            yield slot, start, start + count, slice(first, first + count)
            first += count

    def new_heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64 queries, keys and values of the active tokens, normed and rotated."""
        q, k, v = self.qkv.double().split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.normed:
            q, k = (reference.normed(x, norm, 1e-5) for x, norm in zip((q, k), self.norms, strict=True))
        positions = [position for _, start, end, _ in self.spans_of() for position in range(start, end)]
        return reference.rotated(q, positions, self.inv_freq), reference.rotated(k, positions, self.inv_freq), v


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any heads, dtypes and rows, often of one token; some end with their slot, the last one of the cache included."""
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([8, 16, 24, 40, 64, 72, 128]))
    capacity = draw(st.sampled_from([16, 48, 64]))
    rows = []
    for slot in draw(st.permutations(range(NUM_SLOTS)))[: draw(st.integers(1, NUM_SLOTS))]:
        count = draw(st.sampled_from([1, 1, 2, 3, 4, 7, 16]))
        start = draw(st.sampled_from([0, capacity - count]) | st.integers(0, capacity - count))
        rows.append((slot, start, count))
    float32, bfloat16 = torch.float32, torch.bfloat16
    return Case(
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 5, 8])),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=draw(st.sampled_from([0, 2, head_dim // 4, head_dim])),
        normed=draw(st.booleans()),
        dtypes=draw(st.sampled_from([(float32, float32), (float32, bfloat16), (bfloat16, bfloat16)])),
        capacity=capacity,
        rows=rows,
        gaps=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


@EXAMPLES
@given(cases())
def test_against_one_token_at_a_time(case: Case) -> None:
    """What comes out, what is written, and that nothing else is: neither read nor written."""
    before = [tensor.clone() for tensor in (case.keys[0], case.values[0])]
    out = case.run()
    assert out.dtype == case.dtypes[0]
    queries, keys, values = case.new_heads()
    half_a_step = {torch.float32: 2**-22, torch.bfloat16: 2**-8}  # float32's counts the rounding on the way
    for slot, start, end, mine in case.spans_of():
        for cached, new in ((case.keys[0], keys), (case.values[0], values)):
            written = cached[slot, :, start:end].transpose(0, 1).double()
            torch.testing.assert_close(written, new[mine], rtol=half_a_step[case.dtypes[1]], atol=2e-6)
        cached_keys, cached_values = (tensor[0][slot, :, :end].transpose(0, 1) for tensor in (case.keys, case.values))
        expected = reference.attention(queries[mine], cached_keys, cached_values)
        torch.testing.assert_close(out[mine].double(), expected, rtol=half_a_step[case.dtypes[0]], atol=1e-5)
        for tensor, old in zip((case.keys[0], case.values[0]), before, strict=True):
            tensor[slot, :, start:end] = torch.nan
            old[slot, :, start:end] = torch.nan
    for tensor, old in zip((case.keys[0], case.values[0]), before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


@EXAMPLES
@given(cases(), st.data())
def test_neither_company_nor_chunks_change_a_bit(case: Case, data: st.DataObject) -> None:
    """Rows in one call against every row alone, each cut at any places into several calls."""
    alone = Case(**{name: getattr(case, name) for name in Case.__dataclass_fields__ if name not in ("keys", "values")})
    together = case.run()
    for row, (slot, start, end, mine) in zip(case.rows, case.spans_of(), strict=True):
        cuts = sorted({start, end, *data.draw(st.lists(st.integers(start, end), max_size=4), label=str(row))})
        parts = [alone.run([(slot, a, b - a)], alone.qkv[mine][a - start : b - start]) for a, b in pairwise(cuts)]
        assert same_bits(torch.cat(parts), together[mine])
    assert same_bits(alone.keys[0], case.keys[0])
    assert same_bits(alone.values[0], case.values[0])


@EXAMPLES
@given(cases())
def test_threads_change_no_bit(case: Case) -> None:
    """Two threads on the same rows."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run()
        torch.set_num_threads(2)
        assert same_bits(case.run(), one)
    finally:
        torch.set_num_threads(threads)
