"""Single-elimination brackets, redrawn, all matches pooled into Bradley-Terry ratings (VARCO Arena, Son et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.rank.aggregate import bradley_terry
from shoal.rank.questions import Question, Round, Rounds, Shares, Standing, Task


@dataclass(frozen=True, kw_only=True)
class Tournament:
    """n - 1 questions per bracket, in about log2 n rounds."""

    brackets: int = 4
    """Drawn anew each time."""
    reuse: bool = True
    """Whether answers are kept: a match that comes again is not played again."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        generator = np.random.default_rng([task.seed, task.n])
        asked: list[Question] = []
        told: list[Shares] = []

        def rated() -> list[int]:
            return [int(one) for one in np.argsort(-bradley_terry(task.n, asked, told), kind="stable")]

        def standing() -> Standing:
            return [[one] for one in rated()] if asked else []

        for _ in range(self.brackets):
            alive = [int(one) for one in generator.permutation(task.n)]
            while len(alive) > 1:
                pairs = list(zip(alive[::2], alive[1::2], strict=False))
                answers = yield Round(pairs, standing)
                asked += pairs
                told += answers
                winners = [
                    pair[0] if shares[0] >= shares[1] else pair[1] for pair, shares in zip(pairs, answers, strict=True)
                ]
                alive = winners + alive[2 * len(pairs) :]
        return rated()
