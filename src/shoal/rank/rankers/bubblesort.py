"""Bubblesort from the bottom up, one pass per place that matters.

Each comparison needs the one before it, so rounds are single questions. Neighbours meet again in later passes; where answers are
kept (`reuse`) those cost nothing, and on lists that are nearly sorted that is most of them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from shoal.rank.questions import Round, Rounds, Shares, Task, beats


@dataclass(frozen=True, kw_only=True)
class Bubblesort:
    """k passes, pass p over the places below p."""

    reuse: bool = True
    """Whether answers are kept."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        order = list(range(task.n))
        yield from bubble(order, task.k)
        return order


def bubble(order: list[int], passes: int, before: list[int] | None = None) -> Generator[Round, list[Shares], None]:
    """Sort `order` in place so that its first `passes` places are right; `before` are documents that are known to come first.

    Passes of n - 1, n - 2, ... comparisons: 99 + ... + 90 = 945 for 10 of 100.
    """
    for done in range(min(passes, len(order) - 1)):
        for place in range(len(order) - 1, done, -1):
            question = (order[place], order[place - 1])
            (shares,) = yield Round([question], lambda: [[one] for one in (*(before or ()), *order)])
            if beats(shares):
                order[place - 1], order[place] = order[place], order[place - 1]
