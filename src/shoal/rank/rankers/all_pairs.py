"""PRP-Allpair (Qin et al. 2023): every pair once, documents by wins and half their ties.

Equal scores keep the first stage's order.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.rank.questions import Round, Rounds, Task


@dataclass(frozen=True, kw_only=True)
class AllPairs:
    """One round. Pairs of the first stage's best come first, so that a small budget ranks its head."""

    reuse: bool = True
    """Whether answers are kept; no pair comes twice."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        pairs = [(i, j) for j in range(task.n) for i in range(j)]
        points = [0.0] * task.n
        if pairs:
            for pair, shares in zip(pairs, (yield Round(pairs)), strict=True):
                for document, share in zip(pair, shares, strict=True):
                    points[document] += share
        return sorted(range(task.n), key=lambda document: -points[document])
