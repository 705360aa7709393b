"""Hierarchical Skip Decoding: steps of evenly spread layers that halve as the text grows (Zhu et al. 2024, arXiv 2403.14919).

The paper's exact rule could not be read in any source; this is our reading. Level j keeps the first layer, the last, and every
2^j-th:

    L = 12     level 0: all 12     level 1: 0 2 4 6 8 10 11     level 2: 0 4 8 11     level 3: 0 8 11     level 4: 0 11

Levels nest, so the cache stays exact. Two neighbouring levels share the horizon such that their mean is the target: depth 1/2 of
12 layers is 6 layers, between level 1 (7) and level 2 (4), so level 1 serves two thirds of the clocks and level 2 the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.depth.nested import nested_cutoffs
from shoal.depth.plan import DepthPlan
from shoal.depth.skipdecode import round_half_up
from shoal.errors import InvalidPlan


@dataclass(frozen=True, kw_only=True)
class HierarchicalSkip:
    """Evenly spread layers, fewer from a certain clock on."""

    depth: float
    """Mean share of the layers over the horizon, from 2/L to 1."""
    horizon: int | None = None
    """Clocks over which the mean is taken. None: the checkpoint's, else the request's `max_new_tokens`."""

    def __post_init__(self) -> None:
        if not (isinstance(self.depth, int | float) and 0 < self.depth <= 1):
            raise InvalidPlan(f"depth is a share of the layers, above 0 and at most 1, got {self.depth!r}")
        if self.horizon is not None and not (isinstance(self.horizon, int) and self.horizon >= 1):
            raise InvalidPlan(f"horizon must be 1 or more clocks, got {self.horizon!r}")

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 64) -> DepthPlan:
        """Cutoffs: `ALWAYS` for the shallower level, the clock of the step for what only the deeper one keeps."""
        target, horizon = num_layers * self.depth, self.horizon or max_new_tokens
        num_levels = max(1, (num_layers - 1).bit_length())
        sizes = [len(level(num_layers, j)) for j in range(num_levels + 1)]
        if target < sizes[-1] - 1e-9:
            raise InvalidPlan(
                f"depth {self.depth:.4g} is below the last level of {num_layers} layers, {sizes[-1]} of them: "
                f"choose between {sizes[-1]}/{num_layers} = {sizes[-1] / num_layers:.3f} and 1"
            )
        lower = next(j for j, size in enumerate(sizes) if size <= target + 1e-9)
        upper = max(0, lower - 1)
        step = 0
        if sizes[upper] > sizes[lower]:
            step = round_half_up(horizon * (target - sizes[lower]) / (sizes[upper] - sizes[lower]))
        # In numbers of layers: what the lower level keeps is needed always, what the upper one adds as long as that many run.
        keeps = dict.fromkeys(level(num_layers, lower), sizes[lower])
        adds = {layer: sizes[upper] for layer in level(num_layers, upper) if layer not in keeps}
        never = num_layers + 1
        needed = [keeps.get(layer, adds.get(layer, never)) for layer in range(num_layers)]
        cutoffs = nested_cutoffs(
            needed, lambda clock: sizes[upper] if clock < step else sizes[lower], max(horizon, step + 1)
        )
        return DepthPlan(cutoffs, horizon=horizon if 0 < step < horizon else None)


def level(num_layers: int, step: int) -> list[int]:
    """Layers of a level: the first, the last, and every 2^`step`-th.

    >>> level(12, 2)
    [0, 4, 8, 11]
    """
    return sorted({*range(0, num_layers, 2**step), num_layers - 1})
