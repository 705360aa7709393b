"""Directions, margins and answers that cannot be read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidInput
from shoal.rank import Oracle, Reading, Task, ranker_named, run
from shoal.rank.executor import Cost, ask
from shoal.rank.questions import Question, Shares
from shoal.rank.simulate import NoiseModel, Simulated


class Scripted:
    """A comparator by a table of log-odds for what stands first; None cannot be read."""

    def __init__(self, table: dict[Question, float | None]) -> None:
        self.table = table

    def read(self, presentations: Sequence[Question]) -> list[Reading]:
        told = [self.table[shown] for shown in presentations]
        return [Reading(None if one is None else (one / 2, -one / 2)) for one in told]


def answer(table: dict[Question, float | None], question: Question = (0, 1), **settings: object) -> Shares:
    (shares,) = ask(Oracle(comparator=Scripted(table), **settings), [question], Cost(), batch=1)  # type: ignore[arg-type]
    return shares


@pytest.mark.parametrize(
    ("forward", "backward", "wanted"),
    [
        (1.0, -1.0, (1.0, 0.0)),
        (-1.0, 1.0, (0.0, 1.0)),
        (1.0, 1.0, (0.5, 0.5)),  # it likes what stands first
        (-1.0, -1.0, (0.5, 0.5)),
        (None, -1.0, (0.5, 0.5)),  # half an answer is a tie, not a guess
        (0.0, -1.0, (0.5, 0.5)),
    ],
)
def test_both_directions(forward: float | None, backward: float | None, wanted: Shares) -> None:
    """A winner needs both."""
    assert answer({(0, 1): forward, (1, 0): backward}, direction="both") == wanted


@given(true=st.floats(-4, 4), bias=st.floats(-4, 4))
def test_margins_cancel_an_additive_bias(true: float, bias: float) -> None:
    """Averaged on the log-odds scale, both directions give sigma of the difference without the bias."""
    shares = answer({(0, 1): true + bias, (1, 0): -true + bias}, direction="both", soft=True)
    assert shares[0] == pytest.approx(1 / (1 + math.exp(-true)), abs=1e-9)
    assert sum(shares) == pytest.approx(1)


def test_one_direction_keeps_its_bias() -> None:
    """The document that the question names first is shown first."""
    table: dict[Question, float | None] = {(0, 1): 2.0, (1, 0): 2.0}
    assert answer(table, (0, 1), direction="one") == (1.0, 0.0)
    assert answer(table, (1, 0), direction="one") == (1.0, 0.0)


def test_random_direction_is_antisymmetric_and_cancels_bias() -> None:
    """One call; (i, j) and (j, i) agree always, and a pure position bias wins half of the pairs."""
    comparator = Simulated([0.0] * 60, NoiseModel(position_bias=3.0))
    oracle = Oracle(comparator=comparator, direction="random", seed=4)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    cost = Cost()
    first = ask(oracle, pairs, cost, batch=1)
    second = ask(oracle, [pair[::-1] for pair in pairs], Cost(), batch=1)
    assert cost.calls == len(pairs)
    assert first == [shares[::-1] for shares in second]
    wins = sum(shares[0] for shares in first) / len(pairs)
    assert abs(wins - 0.5) < 4 * math.sqrt(0.25 / len(pairs))


def test_unreadable_answers_are_counted() -> None:
    """A model that answers nothing: every call counts, every answer is a tie, and the first stage's order stays."""
    oracle = Oracle(comparator=Simulated(list(range(12)), NoiseModel(unparsed=1.0)), direction="random")
    for name in ("quicksort", "heapsort", "bubblesort", "mohajer", "adaptive"):
        done = run(ranker_named(name), oracle, Task(n=12, k=3, budget=40))
        assert done.cost.unparsed == done.cost.calls > 0
        assert done.order[:3] == [0, 1, 2], name


def test_sets_are_shuffled_back() -> None:
    """Shares of a set stand by document, however it was shown."""
    grades = [0.0, 3.0, 1.0, 2.0]
    for direction in ("one", "both", "random"):
        oracle = Oracle(comparator=Simulated(grades), direction=direction)  # type: ignore[arg-type]
        (shares,) = ask(oracle, [(2, 0, 3, 1)], Cost(), batch=1)
        assert list(np.argsort(shares)) == [1, 0, 2, 3]
    with pytest.raises(InvalidInput, match="direction"):
        Oracle(comparator=Simulated(grades), direction="two")  # type: ignore[arg-type]
