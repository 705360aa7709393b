"""Our own ranker: the next round is what is expected to gain most NDCG@k.

The first stage's scores are the prior of a belief about relevance (`belief.py`). A question about i and j is worth what their
places would gain if its answer turned them round. With m the difference of their means (i being ahead), v its variance, s the
blur of the noise, the difference's mean after the answer is spread by r = v / sqrt(v + s^2), and

    worth(i, j) = |D(i) - D(j)| E[max(0, -m')],  m' ~ N(m, r^2)
                = |D(i) - D(j)| (r phi(m / r) - m Phi(-m / r))

where D is NDCG's discount at a document's place now, 0 beyond k: nothing is asked about two documents that both lie far outside.
A round is chosen one question after the other; after each, the covariance is what it will be once that question has been answered,
so that a round does not ask the same thing in several ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.rank.questions import Question, Round, Rounds, Task
from shoal.rank.rankers.belief import SQRT_2PI, Belief, Floats, Hypothesis, normal_cdf

HYPOTHESES = tuple(
    Hypothesis(blur, lapse, prior_weight=0.4, prior_sd=1.4, trust=0.7)
    for blur in (0.3, 0.8, 1.6)
    for lapse in (0.02, 0.15)
)
"""Between which the answers decide. The constants were chosen on DL19 and Vaswani (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Ranks from the first call on and never ends by itself but when nothing is worth a call."""

    per_round: int = 10
    """Questions of a round."""
    gain: float = 0.0
    """How much more a document of higher relevance is worth: exp(gain x relevance)."""
    hypotheses: tuple[Hypothesis, ...] = HYPOTHESES
    """About the comparator and the first stage."""
    reuse: bool = True
    """Whether answers are kept; no pair is asked twice."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        belief = Belief(prior_of(task), self.hypotheses)
        discounts = np.zeros(task.n)
        discounts[: task.k] = 1 / np.log2(np.arange(2, task.k + 2))
        asked = np.eye(task.n, dtype=bool)
        left = task.n * (task.n - 1) // 2
        if task.budget is not None:
            left = min(left, task.budget // task.calls_per_question)

        def order() -> list[int]:
            return [int(one) for one in np.argsort(-belief.mean(), kind="stable")]

        while left:
            questions = self._choose(belief, discounts, asked, min(left, self.per_round))
            if not questions:
                break
            answers = yield Round(questions, lambda: [[one] for one in order()])
            for (i, j), shares in zip(questions, answers, strict=True):
                belief.learn(i, j, shares[0])
            left -= len(questions)
        return order()

    def _choose(self, belief: Belief, discounts: Floats, asked: NDArray[np.bool_], count: int) -> list[Question]:
        """The questions of a round; notes them in `asked`, [n, n]."""
        mean, covariance, blur, lapse = belief.mixture()
        place = np.empty(len(mean), dtype=np.int64)
        place[np.argsort(-mean, kind="stable")] = np.arange(len(mean))
        at = discounts[place]
        stake = np.abs(at[:, None] - at[None, :]) * (1 - 2 * lapse)
        if self.gain:
            stake = stake * np.exp(self.gain * np.maximum(mean[:, None], mean[None, :]))
        apart = np.abs(mean[:, None] - mean[None, :])
        # Beyond the first stage's tail nothing is at stake, and most of the work would be there.
        rows = np.flatnonzero(at)
        chosen: list[Question] = []
        for _ in range(count):
            variance = np.diag(covariance)
            spread2 = np.maximum(variance[rows, None] + variance[None, :] - 2 * covariance[rows], 1e-12)
            moved = spread2 / np.sqrt(spread2 + blur**2)
            t = apart[rows] / moved
            worth = stake[rows] * moved * (np.exp(-0.5 * t * t) / SQRT_2PI - t * normal_cdf(-t))
            worth[asked[rows]] = -1.0
            best = int(worth.argmax())
            i, j = int(rows[best // len(mean)]), best % len(mean)
            if worth.flat[best] <= 0:
                break
            chosen.append((i, j))
            asked[i, j] = asked[j, i] = True
            column = covariance[:, i] - covariance[:, j]
            covariance = covariance - np.outer(column, column) / (column[i] - column[j] + blur**2)
        return chosen


def prior_of(task: Task) -> Floats:
    """[n]: the first stage's scores with mean 0 and standard deviation 1; by rank where it tells none, or all the same.

    Ranks stand in as -log(rank + 1), which is about how BM25's scores fall.
    """
    scores = np.asarray(task.scores if task.scores is not None else [], dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # 1e308 squared: as good as none
        tells = len(scores) > 0 and 1e-9 <= scores.std() < np.inf
    if not tells:
        scores = -np.log(np.arange(2.0, task.n + 2.0))
    spread = scores.std()
    result: Floats = (scores - scores.mean()) / spread if spread > 0 else np.zeros(task.n)
    return result
