"""From outcomes of pairs to one rating per document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.rank.questions import Question, Shares

Floats = NDArray[np.float64]
PRIOR_GAMES = 0.5
"""Games, half of them won, that every document has played against one of rating 0: ratings stay finite, and equal without games."""


def wins_of(n: int, questions: Sequence[Question], answers: Sequence[Shares]) -> Floats:
    """[n, n]: how much row beat column; a share counts as part of a win."""
    wins = np.zeros((n, n))
    for (i, j), (share_i, share_j) in zip(questions, answers, strict=True):
        wins[i, j] += share_i
        wins[j, i] += share_j
    return wins


def bradley_terry(n: int, questions: Sequence[Question], answers: Sequence[Shares], *, steps: int = 30) -> Floats:
    """[n]: log-strengths of largest posterior under P(i beats j) = s_i / (s_i + s_j), by Hunter's MM steps (2004, eq. 3).

    `PRIOR_GAMES` against a document of strength 1 make it proper.
    """
    wins = wins_of(n, questions, answers)
    games = wins + wins.T
    won = wins.sum(axis=1) + PRIOR_GAMES / 2
    strength = np.ones(n)
    for _ in range(steps):
        met = (games / (strength[:, None] + strength[None, :])).sum(axis=1) + PRIOR_GAMES / (strength + 1)
        strength = won / met
    result: Floats = np.log(strength)
    return result


def spectral(n: int, questions: Sequence[Question], answers: Sequence[Shares], *, steps: int = 200) -> Floats:
    """[n]: log of the stationary distribution of a walk that goes to winners (rank centrality, Negahban et al. 2012): the
    first stage of Spectral-MLE (Chen and Suh 2015). Its second stage, the likelihood, is `bradley_terry`.

    Unlike theirs, every document is joined to every other by a drawn part of `PRIOR_GAMES`, so that the walk reaches all: a pair
    that never met weighs as much as one that did.
    """
    wins = wins_of(n, questions, answers) + PRIOR_GAMES / (2 * n)
    np.fill_diagonal(wins, 0.0)
    games = wins + wins.T
    np.fill_diagonal(games, 1.0)
    walk = (wins / games).T / n  # from i to j with the share of games that j won
    np.fill_diagonal(walk, 1.0 - walk.sum(axis=1))
    walk = np.linalg.matrix_power(walk, steps)
    result: Floats = np.log(np.maximum(walk.mean(axis=0), 1e-300))
    return result
