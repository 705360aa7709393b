"""What rankers and oracles exchange: rounds of questions, and shares of preference.

A document is its place in the first stage's order, 0 being the best there. A *question* is two documents or more: which of them is
most relevant? Its answer is a *share* of preference per document, adding up to 1. Of a pair (i, j): (1, 0) says i, (0, 1) says j,
(0.5, 0.5) is a tie, and a comparator that tells its margin gives the numbers between.

A ranker is a generator of rounds. Questions of one round do not depend on each other's answers, so they may share a batch:

    answers = yield Round([(0, 1), (2, 3)], standing)      two matches
    answers = yield Round([(0, 2)], standing)              their winners
    return [0, 2]
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

Question = tuple[int, ...]
"""Documents, in the order in which they are shown where the direction is fixed."""
Shares = tuple[float, ...]
"""Preference per document of a question."""
Standing = Sequence[Sequence[int]]
"""What is known of the order: groups of documents, the best group first. Documents in no group come last."""


@dataclass(frozen=True)
class Round:
    """Questions that may be asked together."""

    questions: Sequence[Question]
    """One or more."""
    standing: Callable[[], Standing] = lambda: ()
    """What is known before their answers; called only where the budget ends here, or somebody looks."""


Rounds = Generator[Round, list[Shares], list[int]]
"""Yields rounds, is sent their answers, returns documents from the best on; those left out follow in the first stage's order."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a ranker is told."""

    n: int
    """Documents."""
    k: int
    """Places that matter."""
    budget: int | None = None
    """Calls that may be made; None for as many as it takes."""
    batch: int = 1
    """Prompts that run together."""
    calls_per_question: int = 1
    """Of a pair."""
    scores: Sequence[float] | None = None
    """The first stage's, falling, where it tells them."""
    seed: int = 0
    """Of what a ranker draws."""


class Ranker(Protocol):
    """A way to rank by questions. Frozen, and the same for every query."""

    @property
    def reuse(self) -> bool:
        """Whether a question that was answered is not asked again."""

    def rounds(self, task: Task) -> Rounds:
        """The rounds of one query."""


def beats(shares: Shares) -> bool:
    """Whether the first of a pair is preferred; a tie is no win."""
    return shares[0] > 0.5


def goes_first(question: Question, shares: Shares) -> bool:
    """Whether the first of a pair is preferred; a tie goes to the one that the first stage prefers."""
    return shares[0] > 0.5 or (shares[0] == 0.5 and question[0] < question[1])


def settle(n: int, standing: Standing, questions: Sequence[Question] = (), answers: Sequence[Shares] = ()) -> list[int]:
    """All documents in order, from what is known: known winners first, then the first stage's order.

    Within a group, those that won in a round that was not finished come first, by how much they won.

    >>> settle(5, [[4], [1, 2]], [(1, 2)], [(0.0, 1.0)])
    [4, 2, 1, 0, 3]
    """
    won = [0.0] * n
    for question, shares in zip(questions, answers, strict=False):
        for document, share in zip(question, shares, strict=True):
            won[document] += share - 1 / len(question)
    order: list[int] = []
    placed = [False] * n
    for group in standing:
        for document in sorted(group, key=lambda one: -max(0.0, won[one])):
            if not placed[document]:
                placed[document] = True
                order.append(document)
    rest = [document for document in range(n) if not placed[document]]
    return order + sorted(rest, key=lambda one: -max(0.0, won[one]))
