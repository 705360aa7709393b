"""D3: the number of layers decays geometrically, the middle ones go first (Fan et al. 2025, arXiv 2503.08524).

The paper keeps floor(L a^i) layers at step i and drops middle ones, without training. Which of the middle ones is our reading:
from the middle outwards, so that k layers are the lowest ceil(k/2) and the highest floor(k/2). The decay stops at `min_layers`,
or at the horizon.

Example, L = 6, a = 0.8, horizon 6, one layer at least: 6, 4 (4.8), 3 (3.84), 3 (3.07), 2 (2.46), 1 (1.97) layers, so the cutoffs
are (ALWAYS, 4, 1, 1, 2, 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.depth.nested import nested_cutoffs
from shoal.depth.plan import DepthPlan
from shoal.errors import InvalidPlan


@dataclass(frozen=True, kw_only=True)
class DecayingDepth:
    """The depth policy of D3. Give either `depth` or `decay`."""

    depth: float | None = None
    """Mean share of the layers over the horizon, from min_layers/L to 1; the decay is fitted to it."""
    decay: float | None = None
    """Factor a from one clock to the next, above 0 and at most 1."""
    min_layers: int = 2
    """Fewest layers."""
    horizon: int | None = None
    """Clocks over which the depth falls. None: the checkpoint's, else the request's `max_new_tokens`."""

    def __post_init__(self) -> None:
        if (self.depth is None) == (self.decay is None):
            raise InvalidPlan("give DecayingDepth either depth or decay")
        for name in ("depth", "decay"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value <= 1):
                raise InvalidPlan(f"{name} must be above 0 and at most 1, got {value!r}")
        if not (isinstance(self.min_layers, int) and self.min_layers >= 1):
            raise InvalidPlan(f"min_layers must be 1 or more, got {self.min_layers!r}")
        if self.horizon is not None and not (isinstance(self.horizon, int) and self.horizon >= 1):
            raise InvalidPlan(f"horizon must be 1 or more clocks, got {self.horizon!r}")

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 64) -> DepthPlan:
        """The cutoffs. Raises `InvalidPlan` for a depth that `min_layers` does not allow."""
        if self.min_layers > num_layers:
            raise InvalidPlan(f"min_layers must be at most {num_layers}, the model's layers, got {self.min_layers}")
        horizon = self.horizon or max_new_tokens
        decay = fit_decay(num_layers, self.depth, self.min_layers, horizon) if self.decay is None else self.decay

        def layers_at(clock: int) -> int:
            return decayed(num_layers, decay, self.min_layers, min(clock, horizon - 1))

        # Layer l is the (l+1)-th of the lower ones, so it takes 2l + 1 layers to be among them; the t-th from the top takes 2t + 2.
        needed = [min(2 * layer + 1, 2 * (num_layers - layer)) for layer in range(num_layers)]
        falls = layers_at(horizon - 1) < layers_at(0)
        return DepthPlan(nested_cutoffs(needed, layers_at, horizon), horizon=horizon if falls else None)


def decayed(num_layers: int, decay: float, min_layers: int, clock: int) -> int:
    """max(min_layers, floor(L a^i))."""
    return max(min_layers, math.floor(num_layers * decay**clock + 1e-9))


def fit_decay(num_layers: int, depth: float | None, min_layers: int, horizon: int) -> float:
    """The decay whose mean over the horizon comes nearest to `depth`; the mean rises with it, in steps."""
    assert depth is not None
    if depth * num_layers < min_layers - 1e-9:
        raise InvalidPlan(
            f"depth {depth:.4g} is below min_layers {min_layers} of {num_layers}: choose between "
            f"{min_layers}/{num_layers} = {min_layers / num_layers:.3f} and 1"
        )

    def error(decay: float) -> float:
        total = sum(decayed(num_layers, decay, min_layers, clock) for clock in range(horizon))
        return total / (horizon * num_layers) - depth

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if error(middle) > 0 else (middle, high)
    return min(low, high, key=lambda decay: abs(error(decay)))
