"""How much is drafted: goodput with prices that are known."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from shoal.draft.control import LEAST_GAIN, TRIAL_TOKENS, PassSeconds, lengths, model_length


def prices(per_pass: float, per_token: float, num_rows: int) -> PassSeconds:
    """A pass whose seconds grow with its tokens."""
    return lambda added: per_pass + per_token * (num_rows + sum(added.values()))


def unmeasured(added: Mapping[int, int]) -> float | None:
    return None


def best(chances: dict[int, list[float]], num_rows: int, seconds: PassSeconds) -> float:
    """Goodput of the best number of tokens, by trying all: the likeliest first."""
    ranked = sorted((chance for row in chances.values() for chance in row), reverse=True)
    goodputs = [(num_rows + sum(ranked[:count])) / (seconds({0: count}) or 0) for count in range(len(ranked) + 1)]
    return max(LEAST_GAIN * goodputs[0], *goodputs[1:])


@pytest.mark.parametrize("per_token", [0.0, 0.1, 0.5, 2.0, 50.0])
def test_the_best_goodput(per_token: float) -> None:
    """Close to the best of all numbers; free tokens are all taken, dear ones never."""
    chances = {0: [0.9, 0.8, 0.7, 0.5, 0.3, 0.1], 2: [0.95, 0.2], 3: [0.06]}
    seconds = prices(10, per_token, 4)
    got = lengths(chances, 4, seconds, 100)
    expected = 4 + sum(sum(chances[slot][:count]) for slot, count in got.items())
    assert expected / (seconds(got) or 0) >= best(chances, 4, seconds) / LEAST_GAIN
    if per_token == 0:
        assert got == {0: 6, 2: 2, 3: 1}
    if per_token == 50:
        assert got == {}


def test_room_is_kept() -> None:
    """The likeliest tokens of all rows get it."""
    assert lengths({0: [0.9, 0.8], 1: [0.85, 0.1]}, 2, prices(1, 0, 2), 3) == {0: 2, 1: 1}
    assert lengths({0: [0.9]}, 1, prices(1, 0, 1), 0) == {}


def test_a_few_tokens_where_nothing_is_known() -> None:
    assert lengths({0: [0.9] * 20}, 1, unmeasured, 100) == {0: TRIAL_TOKENS}
    assert model_length(0.9, [0], 1, prices(1, 0, 1), most=8, draft_s=None) is None
    assert model_length(0.9, [0], 1, unmeasured, most=8, draft_s=1.0) is None


def test_one_step_beyond_what_is_measured() -> None:
    """Two more tokens are known and good, three are not known: three are tried, by lookups and by models."""

    def seconds(added: Mapping[int, int]) -> float | None:
        return 10.0 if sum(added.values()) <= 2 else None

    assert lengths({0: [0.9] * 8}, 1, seconds, 100) == {0: 3}
    assert model_length(0.9, [0], 1, seconds, most=8, draft_s=0.1) == 3


@pytest.mark.parametrize(
    ("chance", "draft_s", "expected"),
    [(0.9, 0.0, 8), (0.9, 10.0, 0), (0.02, 0.1, 0), (0.5, 1.0, 2)],
)
def test_models_draft_while_it_pays(chance: float, draft_s: float, expected: int) -> None:
    """Passes of 10 s, whatever they verify."""
    assert model_length(chance, [0, 1], 2, prices(10, 0, 2), most=8, draft_s=draft_s) == expected


def test_the_example() -> None:
    """10 ms with one token, 11 with two, 14 with three; chances 0.9 and 0.5."""
    seconds = {0: 0.010, 1: 0.011, 2: 0.014}
    assert lengths({0: [0.9, 0.5]}, 1, lambda added: seconds[sum(added.values())], 9) == {0: 1}
