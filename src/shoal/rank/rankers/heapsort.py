"""Heapsort that stops at k: build a heap, take its root k times (PRP-Sorting, Qin et al. 2023; setwise, Zhuang et al. 2024).

Every question depends on the answer before it, so a round is one question and batching gains nothing but both directions of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from shoal.rank.questions import Round, Rounds, Shares, Standing, Task, goes_first


@dataclass(frozen=True, kw_only=True)
class Heapsort:
    """By pairs, two per level: the better child, and whether it beats its parent. Or one setwise question per level."""

    children: int = 2
    """Of a node."""
    setwise: bool = False
    """Whether a question holds a parent and all its children."""
    reuse: bool = True
    """Whether answers are kept."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        heap = list(range(task.n))
        taken: list[int] = []

        def standing() -> Standing:
            return [[document] for document in taken]

        for node in reversed(range((task.n - 2) // self.children + 1)):
            yield from self._sift(heap, node, standing)
        while len(taken) < task.k:
            taken.append(heap[0])
            last = heap.pop()
            if heap and len(taken) < task.k:
                heap[0] = last
                yield from self._sift(heap, 0, standing)
        return taken

    def _sift(
        self, heap: list[int], node: int, standing: Callable[[], Standing]
    ) -> Generator[Round, list[Shares], None]:
        """Let the document at `node` sink below children that beat it."""
        while (first := self.children * node + 1) < len(heap):
            places = list(range(first, min(first + self.children, len(heap))))
            if self.setwise:
                (shares,) = yield Round([(heap[node], *(heap[place] for place in places))], standing)
                shown = [node, *places]
                winner = max(shown, key=lambda place: (shares[shown.index(place)], -heap[place]))
                if winner == node:
                    return
            else:
                winner = places[0]
                for place in places[1:]:
                    question = (heap[place], heap[winner])
                    (shares,) = yield Round([question], standing)
                    winner = place if goes_first(question, shares) else winner
                question = (heap[winner], heap[node])
                (shares,) = yield Round([question], standing)
                if not goes_first(question, shares):
                    return
            heap[node], heap[winner] = heap[winner], heap[node]
            node = winner
