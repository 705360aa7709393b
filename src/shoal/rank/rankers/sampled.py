"""A round of pairs drawn beforehand, and one rating from all of them: Bradley-Terry, or a spectral one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shoal.rank.aggregate import bradley_terry, spectral
from shoal.rank.questions import Round, Rounds, Task


@dataclass(frozen=True, kw_only=True)
class SampledPairs:
    """Rings through all documents in drawn orders, so that each is in as many pairs as any other. One round, whatever the batch."""

    aggregate: Literal["bradley-terry", "spectral"]
    """How outcomes become ratings."""
    rings: int = 4
    """n pairs each."""
    reuse: bool = True
    """Whether answers are kept."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        generator = np.random.default_rng([task.seed, task.n])
        affordable = None if task.budget is None else task.budget // task.calls_per_question
        pairs: dict[tuple[int, int], None] = {}
        for _ in range(self.rings if task.n > 2 else 1):
            ring = [int(one) for one in generator.permutation(task.n)]
            for i, j in zip(ring, ring[1:] + ring[:1], strict=True):
                if i != j:
                    pairs.setdefault((min(i, j), max(i, j)))
        questions = list(pairs)[:affordable]
        if not questions:
            return []
        answers = yield Round(questions)
        rate = bradley_terry if self.aggregate == "bradley-terry" else spectral
        return [int(one) for one in np.argsort(-rate(task.n, questions, answers), kind="stable")]
