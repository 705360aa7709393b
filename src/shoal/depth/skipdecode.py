"""SkipDecode: one exit point per position, never rising, the bottom layers skipped (Del Corro et al. 2023, arXiv 2307.02628).

The paper's equation could not be read in any source; this is our reading. With L layers, W warm-up layers, M = `max_layers`,
m = `min_layers`, N = horizon and clock i:

    E(i)    = M - (M - m) * min(i, N-1) / (N-1)              (N = 1: E = m)
    exit(i) = clamp(floor(E(i) + 1/2), m, M)                 layers that run, warm-up included
    A(i)    = {0..W-1} ∪ {L-(exit(i)-W) .. L-1}              the bottom W and the top exit(i)-W

Example, L = 6, W = 1, m = 2, M = 4, N = 5: exit = 4 4 3 3 2 2 2 ..., so layer 3 serves 2 clocks, layer 4 serves 4, layers 0
and 5 always, layers 1 and 2 none: cutoffs (ALWAYS, 0, 0, 2, 4, ALWAYS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shoal.depth.nested import nested_cutoffs
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.errors import InvalidPlan


def round_half_up(x: float) -> int:
    """Round to the nearest integer, halves up, whatever the last bit of `x` says."""
    return math.floor(x + 0.5 + 1e-9)


def exit_bounds(num_layers: int, depth: float, warmup_layers: int) -> tuple[int, int]:
    """(m, M) for a mean depth: T = round(2 L depth), M = min(L, round(1.5 L depth)), m = max(W+1, T-M), M = T-m.

    >>> exit_bounds(24, 1 / 2, 1), exit_bounds(24, 1 / 5, 1), exit_bounds(32, 1 / 3, 1)
    ((6, 18), (3, 7), (5, 16))

    Raises `InvalidPlan` outside `(W+1)/L <= depth <= 1`.
    """
    lowest = (warmup_layers + 1) / num_layers
    if not lowest - 1e-9 <= depth <= 1:
        raise InvalidPlan(
            f"depth {depth:.4g} is outside what {num_layers} layers with {warmup_layers} warm-up allow: "
            f"choose between {warmup_layers + 1}/{num_layers} = {lowest:.3f} and 1"
        )
    total = round_half_up(2 * num_layers * depth)
    highest = min(num_layers, round_half_up(1.5 * num_layers * depth))
    minimum = max(warmup_layers + 1, total - highest)
    return minimum, max(minimum, total - minimum)


@dataclass(frozen=True, kw_only=True)
class SkipDecode:
    """The depth policy of the SkipDecode paper. Give either `depth` or both `min_layers` and `max_layers`."""

    depth: float | None = None
    """Mean share of layers over the horizon, from (warmup_layers + 1) / L to 1. 1/2 is what the paper calls a speedup of 2x."""
    min_layers: int | None = None
    """Layers that run from the horizon on, warm-up included (m)."""
    max_layers: int | None = None
    """Layers that run at clock 0, warm-up included (M)."""
    horizon: int | None = None
    """Clocks over which the depth falls from M to m (N). None: the one in the checkpoint's `depth_plan.json`, else the
    request's `max_new_tokens`. The paper takes a median length, see `fit_horizon`. On the column clock it counts columns, and
    None is the request's prompt and `max_new_tokens` together: depth is a mean over both, so generated tokens run less."""
    warmup_layers: int | None = None
    """Bottom layers that always run (W). None: the checkpoint's, else 1."""
    clock: Literal["generated", "column"] = "generated"
    """What the decay counts: generated tokens, or columns of the whole sequence, in which case the prompt uses up the decay."""
    prompt: Literal["all", "max_layers"] = "all"
    """Layers that the prompt runs: all L, or only those that run at clock 0, which also cuts the time to the first token."""

    def __post_init__(self) -> None:
        if (self.depth is None) == (self.min_layers is None and self.max_layers is None):
            raise InvalidPlan("give SkipDecode either depth, or min_layers and max_layers")
        if (self.min_layers is None) != (self.max_layers is None):
            raise InvalidPlan("min_layers and max_layers go together: one of them is missing")
        for name in ("min_layers", "max_layers", "horizon", "warmup_layers"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise InvalidPlan(f"{name} must be a whole number, got {value!r}")
        if self.min_layers is not None and self.max_layers is not None and self.min_layers > self.max_layers:
            raise InvalidPlan(f"min_layers {self.min_layers} is above max_layers {self.max_layers}")
        if self.depth is not None and not (isinstance(self.depth, int | float) and 0 < self.depth <= 1):
            raise InvalidPlan(f"depth is a share of the layers, above 0 and at most 1, got {self.depth!r}")
        if self.horizon is not None and self.horizon < 1:
            raise InvalidPlan(f"horizon must be 1 or more clocks, got {self.horizon}")
        if self.warmup_layers is not None and self.warmup_layers < 0:
            raise InvalidPlan(f"warmup_layers must be 0 or more, got {self.warmup_layers}")
        if self.clock not in ("generated", "column"):
            raise InvalidPlan(f"clock must be 'generated' or 'column', got {self.clock!r}")
        if self.prompt not in ("all", "max_layers"):
            raise InvalidPlan(f"prompt must be 'all' or 'max_layers', got {self.prompt!r}")

    def bounds(self, num_layers: int) -> tuple[int, int]:
        """(m, M) for a model of `num_layers`. Raises `InvalidPlan` with the allowed range."""
        warmup = 1 if self.warmup_layers is None else self.warmup_layers
        if warmup >= num_layers:
            raise InvalidPlan(
                f"warmup_layers must be at most {num_layers - 1} for a model of {num_layers} layers, got {warmup}"
            )
        if self.depth is not None:
            return exit_bounds(num_layers, self.depth, warmup)
        assert self.min_layers is not None
        assert self.max_layers is not None
        if not warmup + 1 <= self.min_layers <= self.max_layers <= num_layers:
            raise InvalidPlan(
                f"min_layers {self.min_layers} and max_layers {self.max_layers} must lie within "
                f"warmup_layers + 1 = {warmup + 1} and {num_layers}"
            )
        return self.min_layers, self.max_layers

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 64) -> DepthPlan:
        """The cutoffs: c_l = number of clocks with exit(i) >= L - l + W for l >= W, and ALWAYS for the warm-up layers."""
        warmup = 1 if self.warmup_layers is None else self.warmup_layers
        # On the column clock the first decode pass happens at column `prompt_tokens`: that part of the decay is over.
        passed = prompt_tokens if self.clock == "column" else 0
        horizon = self.horizon or passed + max_new_tokens
        m, top = self.bounds(num_layers)

        needed = [0 if layer < warmup else num_layers - layer + warmup for layer in range(num_layers)]
        cutoffs = nested_cutoffs(needed, lambda clock: exit_at(clock, m, top, horizon), horizon)
        prompt_layers = None
        if self.prompt == "max_layers":
            prompt_layers = (*range(warmup), *range(num_layers - (top - warmup), num_layers))
        return DepthPlan(
            tuple(cutoff if cutoff >= ALWAYS else max(0, cutoff - passed) for cutoff in cutoffs),
            prompt_layers=prompt_layers,
            horizon=max(0, horizon - passed) if m < top else None,
        )


def exit_at(clock: int, m: int, top: int, horizon: int) -> int:
    """exit(i): layers that run at `clock`, between m and M = `top`."""
    if horizon == 1:
        return m
    exact = top - (top - m) * min(clock, horizon - 1) / (horizon - 1)
    return min(max(round_half_up(exact), m), top)
