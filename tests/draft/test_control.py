"""How much is drafted: goodput with prices that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.draft.control import LEAST_GAIN, TRIAL_TOKENS, lengths, model_length
from shoal.engine.slots import SlotTable
from shoal.engine.step_time import Work

NUM_LAYERS = 4


class Prices:
    """Seconds by the number of logits of a pass."""

    def __init__(self, per_pass: float, per_logit: float) -> None:
        self.per_pass, self.per_logit = per_pass, per_logit

    def seconds(self, work: Work) -> float | None:
        return self.per_pass + self.per_logit * float(work[-1])


class Unmeasured:
    def seconds(self, work: Work) -> float | None:
        return None


@pytest.fixture
def slots() -> SlotTable:
    table = SlotTable(4, NUM_LAYERS)
    cutoffs: NDArray[Any] = table.cutoffs
    cutoffs[:] = 100
    table.num_computed[:] = 10
    table.prompt_tokens[:] = 10
    return table


def best(chances: dict[int, list[float]], num_rows: int, prices: Prices) -> float:
    """Goodput of the best number of tokens, by trying all: the likeliest first."""
    ranked = sorted((chance for row in chances.values() for chance in row), reverse=True)
    plain = LEAST_GAIN * num_rows / (prices.per_pass + prices.per_logit * num_rows)
    return max(
        [plain]
        + [
            (num_rows + sum(ranked[:count])) / (prices.per_pass + prices.per_logit * (num_rows + count))
            for count in range(1, len(ranked) + 1)
        ]
    )


@pytest.mark.parametrize("per_logit", [0.0, 0.1, 0.5, 2.0, 50.0])
def test_the_best_goodput(slots: SlotTable, per_logit: float) -> None:
    """Close to the best of all numbers; free tokens are all taken, dear ones never."""
    prices = Prices(10, per_logit)
    chances = {0: [0.9, 0.8, 0.7, 0.5, 0.3, 0.1], 2: [0.95, 0.2], 3: [0.06]}
    tokens = {0: 1, 1: 1, 2: 1, 3: 1}
    got = lengths(chances, tokens, slots, prices, 100)  # type: ignore[arg-type]
    expected = 4 + sum(sum(chances[slot][:count]) for slot, count in got.items())
    goodput = expected / (10 + per_logit * (4 + sum(got.values())))
    assert goodput >= best(chances, 4, prices) / LEAST_GAIN
    if per_logit == 0:
        assert got == {0: 6, 2: 2, 3: 1}
    if per_logit == 50:
        assert got == {}


def test_room_is_kept(slots: SlotTable) -> None:
    """The likeliest tokens of all rows get it."""
    got = lengths({0: [0.9, 0.8], 1: [0.85, 0.1]}, {0: 1, 1: 1}, slots, Prices(1, 0), 3)  # type: ignore[arg-type]
    assert got == {0: 2, 1: 1}
    assert lengths({0: [0.9]}, {0: 1}, slots, Prices(1, 0), 0) == {}  # type: ignore[arg-type]


def test_a_few_tokens_where_nothing_is_known(slots: SlotTable) -> None:
    got = lengths({0: [0.9] * 20}, {0: 1}, slots, Unmeasured(), 100)  # type: ignore[arg-type]
    assert got == {0: TRIAL_TOKENS}
    assert model_length(0.9, [0], 8, None, {0: 1}, slots, Prices(1, 0)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chance", "draft_s", "expected"),
    [(0.9, 0.0, 8), (0.9, 10.0, 0), (0.02, 0.1, 0), (0.5, 1.0, 2)],
)
def test_models_draft_while_it_pays(slots: SlotTable, chance: float, draft_s: float, expected: int) -> None:
    """Passes of 10 s, whatever they verify."""
    assert model_length(chance, [0, 1], 8, draft_s, {0: 1, 1: 1}, slots, Prices(10, 0)) == expected  # type: ignore[arg-type]


def test_the_example(slots: SlotTable) -> None:
    """10 ms with one token, 11 with two, 14 with three; chances 0.9 and 0.5."""

    class Example:
        def seconds(self, work: Work) -> float | None:
            return {1: 0.010, 2: 0.011, 3: 0.014}[int(work[-1])]

    assert lengths({0: [0.9, 0.5]}, {0: 1}, slots, Example(), 9) == {0: 1}  # type: ignore[arg-type]
    assert np.isclose(1.9 / 0.011, 172.7, atol=0.1)
