"""Who answers questions: a comparator that sees documents in some order, and the directions in which it is asked.

A comparator has a position bias: it may prefer whatever stands first. Four ways to ask for a pair (i, j):

    one      i first. One call; the bias stays.
    both     i first and j first. Two calls; i wins only where both say so, anything else is a tie (Qin et al. 2023).
    random   one of the two, drawn. One call; in the mean over draws an additive bias cancels, so the answer is antisymmetric.
    margin   `soft=True` with any of these: the share is sigma(logit_i - logit_j), averaged over directions as log-odds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from shoal.engine.sampling import uniform_noise
from shoal.errors import InvalidInput
from shoal.lm.contract import Usage
from shoal.rank.questions import Question, Shares

NOTHING = Usage()
Direction = Literal["one", "both", "random"]


@dataclass(frozen=True)
class Reading:
    """What a comparator said of one presentation."""

    logits: tuple[float, ...] | None
    """How much it prefers each document, in the order shown, up to a constant; None where its answer could not be read."""
    usage: Usage = NOTHING
    """What it took."""


class Comparator(Protocol):
    """Sees two documents or more in an order, and says how much it prefers each."""

    def read(self, presentations: Sequence[Question]) -> list[Reading]:
        """One call each, all at once."""


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """A comparator and the directions in which it is asked."""

    comparator: Comparator
    """Who compares."""
    direction: Direction = "random"
    """See above. Of more than two documents: as given, also reversed, or shuffled."""
    soft: bool = False
    """Whether a share is the comparator's margin, or a vote."""
    seed: int = 0
    """Of the directions drawn."""

    def __post_init__(self) -> None:
        if self.direction not in ("one", "both", "random"):
            raise InvalidInput(f"direction must be one, both or random, got {self.direction!r}")

    @property
    def calls_per_question(self) -> int:
        """Presentations of a question."""
        return 2 if self.direction == "both" else 1

    @property
    def ordered(self) -> bool:
        """Whether (i, j) is another question than (j, i)."""
        return self.direction == "one"

    def presentations(self, question: Question) -> tuple[Question, ...]:
        """The orders in which its documents are shown."""
        if self.direction == "one":
            return (question,)
        if self.direction == "both":
            return (question, question[::-1])
        if len(question) == 2:
            i, j = min(question), max(question)
            return ((i, j),) if uniform_noise(self.seed, i, j) < 0.5 else ((j, i),)
        drawn = np.random.default_rng([self.seed, *question]).permutation(len(question))
        return (tuple(question[place] for place in drawn),)

    def combine(self, question: Question, shown: Sequence[Question], readings: Sequence[Reading]) -> Shares:
        """The answer from what was said of each presentation. One that could not be read says nothing."""
        told = [
            None if reading.logits is None else dict(zip(order, reading.logits, strict=True))
            for order, reading in zip(shown, readings, strict=True)
        ]
        if self.soft:
            known = [one for one in told if one is not None]
            if not known:
                return (1 / len(question),) * len(question)
            # the mean over all presentations: of one that says nothing the log-odds are 0
            logits = [sum(centred(one)[document] for one in known) / len(told) for document in question]
            return softmax(logits)
        votes = [tie(question) if one is None else vote(question, one) for one in told]
        if len(question) == 2:
            return votes[0] if all(one == votes[0] for one in votes) else tie(question)
        shares = np.mean(votes, axis=0)
        return tuple(map(float, shares))


def tie(question: Question) -> Shares:
    """Nobody is preferred."""
    return (1 / len(question),) * len(question)


def vote(question: Question, logits: dict[int, float]) -> Shares:
    """Of a pair all to the winner; of more, by place, so that a list keeps its order. Equal logits share.

    >>> vote((4, 7), {4: 0.1, 7: 0.3}), vote((0, 1, 2), {0: 1.0, 1: 3.0, 2: 1.0})
    ((0.0, 1.0), (0.16666666666666666, 0.6666666666666666, 0.16666666666666666))
    """
    if len(question) == 2:
        i, j = (logits[document] for document in question)
        return (1.0, 0.0) if i > j else (0.0, 1.0) if i < j else (0.5, 0.5)
    values = [logits[document] for document in question]
    points = [sum((value > other) + 0.5 * (value == other) for other in values) - 0.5 for value in values]
    return tuple(point / sum(points) for point in points)


def centred(logits: dict[int, float]) -> dict[int, float]:
    """With mean 0, so that presentations can be averaged."""
    mean = sum(logits.values()) / len(logits)
    return {document: logit - mean for document, logit in logits.items()}


def softmax(logits: Sequence[float]) -> Shares:
    """
    >>> softmax([0.0, 0.0])
    (0.5, 0.5)
    """
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return tuple(weight / sum(weights) for weight in weights)
