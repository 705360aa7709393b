"""`plan.cost` against a sum over every product of every pass, written down anew."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.depth.cost import blocks
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.depth.shape import ModelShape
from shoal.errors import InvalidInput, InvalidPlan

SHAPE = ModelShape(
    num_layers=4, hidden_size=48, num_heads=6, num_kv_heads=2, head_dim=10, intermediate_size=76, gated_mlp=True,
    vocab_size=263, bytes_per_value=2,
)  # fmt: skip


def test_shape_by_hand() -> None:
    """Query and output 48 x 60, key and value 48 x 20, and three (or two) MLP products of 48 x 76."""
    assert SHAPE.layer_weights == 2 * 48 * 60 + 2 * 48 * 20 + 3 * 48 * 76
    assert replace(SHAPE, gated_mlp=False).layer_weights == 2 * 48 * 60 + 2 * 48 * 20 + 2 * 48 * 76
    assert SHAPE.head_weights == 48 * 263
    assert SHAPE.cache_values_per_token == 2 * 2 * 10


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    cutoffs=st.lists(st.integers(0, 30) | st.just(ALWAYS), min_size=3, max_size=3),
    reduced=st.booleans(),
    prompt_tokens=st.integers(1, 40),
    new_tokens=st.integers(1, 40),
    batch=st.integers(1, 5),
)
def test_sum_over_passes(cutoffs: list[int], reduced: bool, prompt_tokens: int, new_tokens: int, batch: int) -> None:
    """Every (layer, token) product, every (query, key) pair, every weight and cached value is counted one by one."""
    cutoffs = [ALWAYS, *cutoffs]
    prompt_layers = [layer for layer, cutoff in enumerate(cutoffs) if cutoff or not reduced]
    plan = DepthPlan(tuple(cutoffs), prompt_layers=tuple(prompt_layers) if reduced else None)
    cost = plan.cost(SHAPE, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)

    token_flops, pair_flops = 2 * SHAPE.layer_weights, 2 * (2 * SHAPE.num_heads * SHAPE.head_dim)
    head_flops = 2 * SHAPE.head_weights
    layer_bytes, head_bytes = 2 * SHAPE.layer_weights, 2 * SHAPE.head_weights
    kv_bytes = 2 * SHAPE.cache_values_per_token

    tokens = flops = 0
    for _ in range(batch):
        flops += head_flops  # of the last prompt token
        for _ in prompt_layers:
            for position in range(prompt_tokens):
                tokens += 1
                flops += token_flops + pair_flops * (position + 1)
    assert (cost.prompt_layer_tokens, cost.prompt_flops) == (tokens, flops)
    written = batch * len(prompt_layers) * prompt_tokens
    assert cost.prompt_bytes == len(prompt_layers) * layer_bytes + head_bytes + written * kv_bytes

    tokens = flops = moved = 0
    held = [batch * len(prompt_layers) * math.ceil(prompt_tokens / 16)]
    for clock in range(new_tokens - 1):
        active = [layer for layer in range(4) if clock < cutoffs[layer]]
        context = prompt_tokens + clock + 1
        moved += len(active) * layer_bytes + head_bytes
        for _ in range(batch):
            tokens += len(active)
            flops += head_flops + len(active) * (token_flops + pair_flops * context)
            moved += len(active) * kv_bytes * ((context - 1) + 1)  # earlier positions read, one written
        held.append(batch * len(active) * math.ceil(context / 16))
    assert (cost.decode_layer_tokens, cost.decode_flops, cost.decode_bytes) == (tokens, flops, moved)
    assert cost.cache_blocks == tuple(held)
    assert cost.peak_cache_blocks == max(held)
    passes = batch * (new_tokens - 1)
    assert cost.mean_layers == pytest.approx(tokens / passes if passes else 4)

    assert cost.layer_tokens == cost.prompt_layer_tokens + cost.decode_layer_tokens
    assert cost.flops == cost.prompt_flops + cost.decode_flops
    assert cost.bytes_moved == cost.prompt_bytes + cost.decode_bytes


def test_blocks_worked_example() -> None:
    """Prompt 16, cutoffs (ALWAYS, 0, 2): 3 blocks during the prompt, then 2 + 0 + 2, 2 + 0 + 2, 2 + 0 + 0."""
    shape = replace(SHAPE, num_layers=3)
    cost = DepthPlan((ALWAYS, 0, 2)).cost(shape, prompt_tokens=16, new_tokens=4)
    assert cost.cache_blocks == (3, 4, 4, 2)
    assert [blocks(n) for n in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_weights_are_shared_and_rows_are_not() -> None:
    """Two rows cost twice the FLOPs and cache of one, and read the weights once."""
    plan = DepthPlan((ALWAYS, 2, 5, ALWAYS))
    one = plan.cost(SHAPE, prompt_tokens=10, new_tokens=9)
    two = plan.cost(SHAPE, prompt_tokens=10, new_tokens=9, batch=2)
    assert (two.flops, two.layer_tokens) == (2 * one.flops, 2 * one.layer_tokens)
    assert two.cache_blocks == tuple(2 * held for held in one.cache_blocks)
    assert one.bytes_moved < two.bytes_moved < 2 * one.bytes_moved
    assert two.mean_layers == one.mean_layers


def test_refusals() -> None:
    with pytest.raises(InvalidPlan, match="the plan is for 2 layers, the model has 4"):
        DepthPlan((ALWAYS, 0)).cost(SHAPE, prompt_tokens=1, new_tokens=1)
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(InvalidInput, match=f"must be 1 or more, got {sizes[0]}, {sizes[1]}, {sizes[2]}"):
            DepthPlan((ALWAYS,) * 4).cost(SHAPE, prompt_tokens=sizes[0], new_tokens=sizes[1], batch=sizes[2])
