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
    cutoffs: Sequence[int], runs_prompt: Sequence[bool], prompt_tokens: int, num_passes: int, draft_tokens: int = 0
) -> np.ndarray:
    """Blocks that one request holds during its prompt (index 0) and during each decode pass (index clock + 1), at most.

    A layer holds the prompt and the positions it has served; it retires after the last pass that it serves. Example: prompt 16,
    cutoffs (ALWAYS, 0, 2): 3 blocks during the prompt, then 2 + 0 + 2, 2 + 0 + 2, 2 + 0 + 0.

    Args: `draft_tokens`: most tokens that a pass verifies beyond its own; positions that no token will have are not among them.

    Returns int64 [num_passes + 1].
    """
    by_pass = np.arange(1, num_passes + 1)[:, None]  # clock + 1, so a layer serves the pass if by_pass <= cutoff
    serving = (np.asarray(cutoffs)[None, :] >= by_pass).sum(axis=1)
    positions = prompt_tokens + np.minimum(by_pass[:, 0] + draft_tokens, num_passes)
    decode = serving * -(-positions // BLOCK_TOKENS)
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


def causal_pairs(start: int, num_tokens: int) -> int:
    """(query, key) pairs when `num_tokens` follow `start` cached ones: `causal_pairs(2, 2) == 3 + 4`."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


def flops(shape: ModelShape, *, layer_tokens: int, layer_pairs: int, heads: int) -> int:
    """Floating-point operations of layers and head.

    Args: `layer_tokens`: tokens summed over the layers that run them; `layer_pairs`: (query, key) pairs summed likewise; `heads`:
    tokens whose logits are computed.
    """
    attention = 4 * shape.num_heads * shape.head_dim * layer_pairs  # scores, and the weighted sum of values
    return 2 * shape.layer_weights * layer_tokens + attention + 2 * shape.head_weights * heads


def bytes_moved(shape: ModelShape, *, layers_read: int, cached_positions: int, head: bool) -> int:
    """Bytes that a pass moves: weights of the layers that ran and of the head once, and the cache.

    Args: `cached_positions`: positions read (of earlier passes) and written (of this one), summed over rows and layers.
    """
    weights = layers_read * shape.layer_weights + shape.head_weights * head
    cached = cached_positions * shape.cache_values_per_token
    return weights * shape.bytes_per_weight + cached * shape.bytes_per_value


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Cost of one decode pass of equal requests at one clock."""

    flops: int
    """Floating-point operations: weights, attention and head, for every row."""
    bytes_moved: int
    """Weights of the active layers and the head once; per row and active layer the cache read and one position written."""


def decode_pass_cost(shape: ModelShape, *, num_active: int, context: int, batch: int) -> PassCost:
    """Cost of a decode pass of `batch` rows that runs `num_active` layers over `context` positions, the new one included."""
    row_flops = flops(shape, layer_tokens=num_active, layer_pairs=num_active * context, heads=1)
    moved = bytes_moved(shape, layers_read=num_active, cached_positions=batch * num_active * context, head=True)
    return PassCost(flops=batch * row_flops, bytes_moved=moved)


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
    prompt_pairs = prompt_layers * causal_pairs(0, prompt_tokens)
    depths = [sum(clock < cutoff for cutoff in cutoffs) for clock in range(num_passes)]
    passes = [
        decode_pass_cost(shape, num_active=depth, context=prompt_tokens + clock + 1, batch=batch)
        for clock, depth in enumerate(depths)
    ]
    return PlanCost(
        prompt_layer_tokens=batch * prompt_layers * prompt_tokens,
        decode_layer_tokens=batch * sum(depths),
        prompt_flops=batch
        * flops(shape, layer_tokens=prompt_layers * prompt_tokens, layer_pairs=prompt_pairs, heads=1),
        decode_flops=sum(one.flops for one in passes),
        prompt_bytes=bytes_moved(
            shape, layers_read=prompt_layers, cached_positions=batch * prompt_layers * prompt_tokens, head=True
        ),
        decode_bytes=sum(one.bytes_moved for one in passes),
        cache_blocks=tuple((batch * cache_blocks_by_pass(cutoffs, runs_prompt, prompt_tokens, num_passes)).tolist()),
        mean_layers=sum(depths) / num_passes if num_passes else float(shape.num_layers),
    )
