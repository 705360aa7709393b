"""What a pass served, layer by layer, and the least time that it can take.

The floor of a pass is a sum over the layers that ran and the head: each takes its bytes at the bandwidth or its operations at the
peak, the longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from machine import Limits
from shoal import DepthPlan, Engine
from shoal.depth.cost import PassCost, bytes_moved, causal_pairs, flops
from shoal.depth.shape import ModelShape
from shoal.engine.batch import Ints, Rows


@dataclass(frozen=True, kw_only=True)
class Served:
    """One pass."""

    parts: tuple[PassCost, ...]
    """Each layer that ran, and the head."""
    has_prompt: bool
    """Whether any row brought prompt tokens."""

    def floor_s(self, limits: Limits) -> float:
        """Least seconds."""
        return sum(limits.floor_s(part) for part in self.parts)


def layer_cost(shape: ModelShape, *, tokens: int, pairs: int, positions: int) -> PassCost:
    """One layer on `tokens`, with `pairs` of (query, key) and `positions` of the cache read or written."""
    return PassCost(
        flops=flops(shape, layer_tokens=tokens, layer_pairs=pairs, heads=0),
        bytes_moved=bytes_moved(shape, layers_read=1, cached_positions=positions, head=False),
    )


def head_cost(shape: ModelShape, tokens: int) -> PassCost:
    """The head on `tokens`."""
    return PassCost(
        flops=flops(shape, layer_tokens=0, layer_pairs=0, heads=tokens),
        bytes_moved=bytes_moved(shape, layers_read=0, cached_positions=0, head=True),
    )


def prompt_pass(shape: ModelShape, *, batch: int, length: int) -> Served:
    """The pass that reads `batch` prompts of `length` tokens with every layer."""
    layer = layer_cost(shape, tokens=batch * length, pairs=batch * causal_pairs(0, length), positions=batch * length)
    return Served(parts=(layer,) * shape.num_layers + (head_cost(shape, batch),), has_prompt=True)


def decode_floor_s(
    plan: DepthPlan, shape: ModelShape, limits: Limits, *, prompt_tokens: int, new_tokens: int, batch: int
) -> float:
    """Least seconds of the decode passes of a batch at one clock."""
    total = 0.0
    for clock in range(new_tokens - 1):
        keys = batch * (prompt_tokens + clock + 1)
        layer = layer_cost(shape, tokens=batch, pairs=keys, positions=keys)
        total += plan.depth(clock) * limits.floor_s(layer) + limits.floor_s(head_cost(shape, batch))
    return total


@dataclass(frozen=True)
class Recorded:
    """The rows of a pass as they ran."""

    rows: Rows
    prompt_tokens: Ints
    """[R], each row's prompt."""

    def served(self, shape: ModelShape) -> Served:
        """What they cost, layer by layer."""
        rows, starts = self.rows, self.rows.starts[:, None]
        tokens = rows.served.sum(axis=0).tolist()
        pairs = (rows.served * starts + rows.served * (rows.served + 1) // 2).sum(axis=0).tolist()
        positions = ((starts + rows.served) * (rows.served > 0)).sum(axis=0).tolist()
        heads = int((rows.starts + rows.num_tokens >= self.prompt_tokens).sum())
        layers = [
            layer_cost(shape, tokens=a, pairs=b, positions=c)
            for a, b, c in zip(tokens, pairs, positions, strict=True)
            if a
        ]
        return Served(
            parts=(*layers, *([head_cost(shape, heads)] if heads else [])),
            has_prompt=bool((rows.starts < self.prompt_tokens).any()),
        )


@contextmanager
def recording(engine: Engine) -> Iterator[Sequence[Recorded]]:
    """The passes that run within the context, in order. Costs two microseconds each, so timed passes may be recorded."""
    slots, passes = engine.runner.slots, list[Recorded]()
    record = slots.record

    def note(rows: Rows, committed: Ints) -> None:
        passes.append(Recorded(rows, slots.prompt_tokens[rows.slots]))
        record(rows, committed)

    slots.record = note  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del slots.record
