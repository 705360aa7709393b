"""Early termination: the bottom layers only, on SkipDecode's schedule.

What SkipDecode is compared with in its paper (Del Corro et al. 2023, arXiv 2307.02628): as many layers at every position, but the
lowest ones, and the head reads the state where they end. The paper argues that skipping is better, since the layers next to the
head always run.

Example, L = 6, m = 2, M = 4, N = 5: 4 4 3 3 2 2 2 ... layers, so the cutoffs are (ALWAYS, ALWAYS, 4, 2, 0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.depth.nested import nested_cutoffs
from shoal.depth.plan import DepthPlan
from shoal.depth.skipdecode import exit_at, exit_bounds
from shoal.errors import InvalidPlan


@dataclass(frozen=True, kw_only=True)
class EarlyTermination:
    """Generated tokens leave the model early; the prompt runs all layers. Give either `depth` or both bounds."""

    depth: float | None = None
    """Mean share of the layers over the horizon, from 2/L to 1; falls as in `SkipDecode` with one warm-up layer."""
    min_layers: int | None = None
    """Layers that run from the horizon on (m)."""
    max_layers: int | None = None
    """Layers that run at clock 0 (M); the same number as `min_layers` makes one exit for all tokens."""
    horizon: int | None = None
    """Clocks over which the depth falls. None: the checkpoint's, else the request's `max_new_tokens`."""

    def __post_init__(self) -> None:
        if (self.depth is None) == (self.min_layers is None and self.max_layers is None):
            raise InvalidPlan("give EarlyTermination either depth, or min_layers and max_layers")
        if (self.min_layers is None) != (self.max_layers is None):
            raise InvalidPlan("min_layers and max_layers go together: one of them is missing")
        if self.depth is not None and not (isinstance(self.depth, int | float) and 0 < self.depth <= 1):
            raise InvalidPlan(f"depth is a share of the layers, above 0 and at most 1, got {self.depth!r}")
        for name in ("min_layers", "max_layers", "horizon"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise InvalidPlan(f"{name} must be a whole number, 1 or more, got {value!r}")
        if self.min_layers is not None and self.max_layers is not None and self.min_layers > self.max_layers:
            raise InvalidPlan(f"min_layers {self.min_layers} is above max_layers {self.max_layers}")

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 64) -> DepthPlan:
        """The cutoffs: layer l runs while more than l layers do."""
        horizon = self.horizon or max_new_tokens
        if self.depth is not None:
            m, top = exit_bounds(num_layers, self.depth, 1 if num_layers > 1 else 0)
        else:
            assert self.min_layers is not None
            assert self.max_layers is not None
            m, top = self.min_layers, self.max_layers
        if top > num_layers:
            raise InvalidPlan(f"max_layers must be at most {num_layers}, the model's layers, got {top}")
        needed = range(1, num_layers + 1)
        cutoffs = nested_cutoffs(needed, lambda clock: exit_at(clock, m, top, horizon), horizon)
        return DepthPlan(cutoffs, horizon=horizon if m < top else None)
