"""From "how many layers run at this clock" and "in which order they are given up" to cutoffs."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from shoal.depth.plan import ALWAYS


def nested_cutoffs(needed: Sequence[int], layers_at: Callable[[int], int], horizon: int) -> tuple[int, ...]:
    """Cutoffs of a plan in which layer l runs as long as `needed[l]` layers or more do.

    Args: `layers_at(clock)`: how many layers run, never rising with the clock and constant from `horizon - 1` on.

    >>> nested_cutoffs((1, 3, 2), lambda clock: 3 - clock, horizon=3)  # 3, 2, 1, 1, ... layers; layer 1 goes first
    (2147483647, 1, 2)
    """
    last = layers_at(horizon - 1)
    return tuple(
        # Numbers of layers never rise, so the clocks that are deep enough come first.
        ALWAYS if least <= last else bisect.bisect_right(range(horizon), -least, key=lambda clock: -layers_at(clock))
        for least in needed
    )
