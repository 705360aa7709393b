"""The cost of a fixed plan, counted before anything runs.

Two kinds of cost. Layer-tokens and FLOPs add up over rows. Weight bytes do not: a layer is read once per pass if any row needs
it, and the head is read by every pass that emits a token (`docs/architecture.md`, the two kinds of cost).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.depth.shape import ModelShape
from shoal.errors import InvalidInput

BLOCK_TOKENS = 16
"""Positions in one cache block. Blocks are counted per layer and row."""


def blocks(num_positions: int) -> int:
    """Cache blocks that `num_positions` fill: `blocks(16) == 1`, `blocks(17) == 2`."""
    return -(-num_positions // BLOCK_TOKENS)


def cache_blocks_by_pass(
    cutoffs: Sequence[int], runs_prompt: Sequence[bool], prompt_tokens: int, num_passes: int
) -> np.ndarray:
    """Blocks that one request holds during its prompt (index 0) and during each decode pass (index clock + 1).

    A layer holds the prompt and the positions it has served; it retires after the last pass that it serves. Example: prompt 16,
    cutoffs (ALWAYS, 0, 2): 3 blocks during the prompt, then 2 + 0 + 2, 2 + 0 + 2, 2 + 0 + 0.

    Returns int64 [num_passes + 1].
    """
    by_pass = np.arange(1, num_passes + 1)[:, None]  # clock + 1, so a layer serves the pass if by_pass <= cutoff
    serving = (np.asarray(cutoffs)[None, :] >= by_pass).sum(axis=1)
    decode = serving * -(-(prompt_tokens + by_pass[:, 0]) // BLOCK_TOKENS)
    return np.concatenate(([sum(runs_prompt) * blocks(prompt_tokens)], decode))


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """Cost of `batch` equal requests that run together at one clock."""

    prompt_layer_tokens: int
    """Layer x token products of the prompts."""
    decode_layer_tokens: int
    """Layer x token products of the generated tokens that are consumed (`new_tokens - 1` per request)."""
    prompt_flops: int
    """Floating-point operations of the prompts, with the head once per request."""
    decode_flops: int
    """Floating-point operations of the decode passes: weights, attention and head."""
    prompt_bytes: int
    """Bytes the prompt pass moves: weights of its layers and the head once, each row's cache written."""
    decode_bytes: int
    """Bytes the decode passes move: weights of active layers and the head once per pass; per row and active layer the cache of
    earlier positions read and one position written."""
    cache_blocks: tuple[int, ...]
    """Blocks in use during the prompt (index 0) and during each decode pass (index clock + 1)."""
    mean_layers: float
    """Mean number of layers over the decode passes (L where there is none)."""

    @property
    def layer_tokens(self) -> int:
        """Layer-tokens of the whole request."""
        return self.prompt_layer_tokens + self.decode_layer_tokens

    @property
    def flops(self) -> int:
        """FLOPs of the whole request."""
        return self.prompt_flops + self.decode_flops

    @property
    def bytes_moved(self) -> int:
        """Bytes moved by the whole request."""
        return self.prompt_bytes + self.decode_bytes

    @property
    def peak_cache_blocks(self) -> int:
        """Most blocks in use during any pass, often the prompt's."""
        return max(self.cache_blocks)


def attention_flops(shape: ModelShape, num_pairs: int) -> int:
    """FLOPs of one layer's attention over `num_pairs` (query, key) pairs: scores and weighted sum."""
    return 4 * shape.num_heads * shape.head_dim * num_pairs


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Cost of one decode pass of equal requests at one clock."""

    flops: int
    """Floating-point operations: weights, attention and head, for every row."""
    bytes_moved: int
    """Weights of the active layers and the head once; per row and active layer the cache of earlier positions read and one position
    written."""


def decode_pass_cost(shape: ModelShape, *, num_active: int, context: int, batch: int) -> PassCost:
    """Cost of a decode pass of `batch` rows that runs `num_active` layers over `context` positions, the new one included."""
    row_flops = num_active * (2 * shape.layer_weights + attention_flops(shape, context)) + 2 * shape.head_weights
    cached = num_active * context * shape.cache_values_per_token
    weights = num_active * shape.layer_weights + shape.head_weights
    return PassCost(flops=batch * row_flops, bytes_moved=(weights + batch * cached) * shape.bytes_per_value)


def plan_cost(
    cutoffs: Sequence[int],
    runs_prompt: Sequence[bool],
    shape: ModelShape,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
) -> PlanCost:
    """Sum the cost of a request pass by pass; see `DepthPlan.cost`."""
    if min(prompt_tokens, new_tokens, batch) < 1:
        raise InvalidInput(
            f"prompt_tokens, new_tokens and batch must be 1 or more, got {prompt_tokens}, {new_tokens}, {batch}"
        )
    num_passes = new_tokens - 1
    prompt_layers = sum(runs_prompt)
    kv_bytes = shape.cache_values_per_token * shape.bytes_per_value
    layer_bytes = shape.layer_weights * shape.bytes_per_value
    head_bytes = shape.head_weights * shape.bytes_per_value

    causal_pairs = prompt_tokens * (prompt_tokens + 1) // 2
    prompt_flops = prompt_layers * (2 * shape.layer_weights * prompt_tokens + attention_flops(shape, causal_pairs))
    prompt_bytes = prompt_layers * (layer_bytes + batch * prompt_tokens * kv_bytes) + head_bytes

    depths = [sum(clock < cutoff for cutoff in cutoffs) for clock in range(num_passes)]
    passes = [
        decode_pass_cost(shape, num_active=depth, context=prompt_tokens + clock + 1, batch=batch)
        for clock, depth in enumerate(depths)
    ]
    return PlanCost(
        prompt_layer_tokens=batch * prompt_layers * prompt_tokens,
        decode_layer_tokens=batch * sum(depths),
        prompt_flops=batch * (prompt_flops + 2 * shape.head_weights),
        decode_flops=sum(one.flops for one in passes),
        prompt_bytes=prompt_bytes,
        decode_bytes=sum(one.bytes_moved for one in passes),
        cache_blocks=tuple((batch * cache_blocks_by_pass(cutoffs, runs_prompt, prompt_tokens, num_passes)).tolist()),
        mean_layers=sum(depths) / num_passes if num_passes else float(shape.num_layers),
    )
