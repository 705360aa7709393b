"""Unified Layer Skipping: one set of evenly spread layers for every generated token (Liu et al. 2024, arXiv 2404.06954).

Only the target decides. With L layers, K = floor(L x depth) are kept: the first, the last, and of those between the multiples of
floor(L / (K - 1)), from the bottom, until there are K, as in the public code. Example, L = 12, depth 1/3: K = 4, every 4th: 0, 4,
8, 11.

Where L is not much larger than K the interval is 1 and the kept layers are the lowest ones (L = 12, K = 8: 0..6 and 11); that is
how the authors' rule reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.errors import InvalidPlan


@dataclass(frozen=True, kw_only=True)
class UnifiedSkip:
    """The same evenly spread layers for every generated token; the prompt runs all."""

    depth: float
    """Share of the layers, from 2/L to 1; rounded down to whole layers."""

    def __post_init__(self) -> None:
        if not (isinstance(self.depth, int | float) and 0 < self.depth <= 1):
            raise InvalidPlan(f"depth is a share of the layers, above 0 and at most 1, got {self.depth!r}")

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 64) -> DepthPlan:
        """`ALWAYS` for the kept layers, 0 for the others. Raises `InvalidPlan` where fewer than two would be kept."""
        num_kept = math.floor(num_layers * self.depth + 1e-9)
        if num_kept < min(2, num_layers):
            raise InvalidPlan(
                f"depth {self.depth:.4g} keeps {num_kept} of {num_layers} layers, Unified Layer Skipping at least the first and "
                f"the last: choose between 2/{num_layers} = {2 / num_layers:.3f} and 1"
            )
        kept = {0, num_layers - 1}
        interval = num_layers // max(1, num_kept - 1)
        spread = range(interval, num_layers - 1, interval)
        kept |= set(spread[: num_kept - 2])
        return DepthPlan(tuple(ALWAYS if layer in kept else 0 for layer in range(num_layers)))
