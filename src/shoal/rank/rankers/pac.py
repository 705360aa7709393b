"""PAC best-k in its cheap form (Agarwal et al. 2022, as adapted for reranking): a pool against anchors, then bubblesort.

Anchors stand at even distances in the first stage's order. Every document of the pool meets every anchor, in one round. The
winners over an anchor are a set, small where the anchor is strong; sets are united from the smallest on until k documents are in,
the k best of them by the first stage are kept and sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.rank.questions import Round, Rounds, Task
from shoal.rank.rankers.bubblesort import bubble


@dataclass(frozen=True, kw_only=True)
class PacBestK:
    """About 3 k times max(3, k / 2) questions and k (k - 1) / 2 more, however many documents there are."""

    pool_factor: int = 3
    """Documents of the pool, in k's."""
    reuse: bool = True
    """Whether answers are kept."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        count = min(max(3, task.k // 2), task.n)
        anchors = sorted({round(place * (task.n - 1) / max(1, count - 1)) for place in range(count)})
        pool = range(min(self.pool_factor * task.k, task.n))
        pairs = [(one, anchor) for one in pool for anchor in anchors if one != anchor]
        winners: dict[int, set[int]] = {anchor: set() for anchor in anchors}
        if pairs:
            for (one, anchor), shares in zip(pairs, (yield Round(pairs)), strict=True):
                if shares[0] > 0.5:
                    winners[anchor].add(one)
        chosen: set[int] = set()
        for beaten in sorted(winners.values(), key=len):
            if len(chosen) >= task.k:
                break
            chosen |= beaten
        head = sorted(chosen)[: task.k]
        head += [one for one in range(task.n) if one not in head][: task.k - len(head)]
        yield from bubble(head, len(head))
        return head
