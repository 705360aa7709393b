"""Windows that slide from the bottom to the top: PRP-Sliding-K (windows of two, K passes; Qin et al. 2023) and listwise ranking
(one pass of windows of 20 by 10; Sun et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import InvalidInput
from shoal.rank.questions import Round, Rounds, Task


@dataclass(frozen=True, kw_only=True)
class Sliding:
    """Each window is put in order and its upper part meets the next one."""

    window: int = 2
    """Documents of a question."""
    stride: int = 1
    """Places between windows."""
    passes: int | None = None
    """From bottom to top; None for k."""
    reuse: bool = True
    """Whether answers are kept."""

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.window:
            raise InvalidInput(f"stride must be 1 to window - 1 = {self.window - 1}, got {self.stride}")

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        order = list(range(task.n))
        for _ in range(task.k if self.passes is None else self.passes):
            for start in window_starts(task.n, self.window, self.stride):
                shown = order[start : start + self.window]
                if len(shown) < 2:
                    continue
                (shares,) = yield Round([tuple(shown)], lambda: [[one] for one in order])
                ranked = sorted(range(len(shown)), key=lambda one: -shares[one])
                order[start : start + self.window] = [shown[one] for one in ranked]
        return order


def window_starts(n: int, window: int, stride: int) -> list[int]:
    """Where windows begin, from the bottom up; the last one begins at the top.

    >>> window_starts(10, 4, 2), window_starts(9, 4, 2), window_starts(3, 4, 2)
    ([6, 4, 2, 0], [5, 3, 1, 0], [0])
    """
    starts = list(range(max(0, n - window), 0, -stride))
    return [*starts, 0]
