"""When a model is asked for a draft: trials are paid for, broken promises are remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from shoal import Engine, Sampling
from shoal.draft.control import TRIAL_TOKENS, PassSeconds
from shoal.draft.drafter import Drafter, slowed
from shoal.draft.sources import (
    FORGIVEN_AFTER,
    LAST_RECHECK,
    MOST_SAVED,
    RECHECK,
    SAVED_PER_PASS,
    TRIALS,
    LookupSource,
    ModelSource,
    slower,
)

ROWS: Any = [SimpleNamespace(slot=0), SimpleNamespace(slot=1)]


class Priced:
    """A model that takes given seconds per drafted token of all rows; None: not measured."""

    priors = (0.8,)
    longest = 8

    def __init__(self, draft_s: float | None) -> None:
        self.draft_s = draft_s

    def propose(self, rows: Sequence[Any], most: Sequence[int], go_on: object) -> list[Any]:
        raise AssertionError("nobody asks for a draft here")

    def seconds(self, rows: Sequence[Any]) -> float | None:
        return self.draft_s

    def ended(self, request: object) -> None:
        raise AssertionError("no request ends here")


def ten_seconds(added: Mapping[int, int]) -> float | None:
    """A pass takes as long whatever it verifies."""
    return 10.0


def lengths_of(
    source: ModelSource, num_passes: int, seconds: PassSeconds = ten_seconds, plain: float = 1.0
) -> list[tuple[int, bool]]:
    """What each pass asks for."""
    return [(0, False) if source.waits() else source.length(ROWS, 2, seconds, plain) for _ in range(num_passes)]


def test_a_model_that_pays_drafts_in_every_pass() -> None:
    asked = lengths_of(ModelSource(Priced(0.1)), 50)
    assert len(set(asked)) == 1
    assert asked[0][0] > 1
    assert not asked[0][1]


@pytest.mark.parametrize("draft_s", [None, 100.0])
def test_trials_take_a_hundredth_of_the_passes(draft_s: float | None) -> None:
    """Beside a row of them at the beginning where nothing is known, of a model that never pays."""
    asked = lengths_of(ModelSource(Priced(draft_s)), 20_000)
    assert all(trial for count, trial in asked if count)
    cost = sum(count + 1 for count, trial in asked if trial)
    in_a_row = TRIALS * (TRIAL_TOKENS + 1)
    assert 100 < cost <= SAVED_PER_PASS * 20_000 + in_a_row + MOST_SAVED
    if draft_s is None:
        assert asked[:TRIALS] == [(TRIAL_TOKENS, True)] * TRIALS
        assert not any(count for count, _ in asked[TRIALS : 90 * in_a_row])


def test_a_model_that_is_mostly_wrong_is_tried_by_one_token() -> None:
    source = ModelSource(Priced(None), mean_chance=0.1)
    assert {count for count, _ in lengths_of(source, 1000)} == {0, 1}


def test_steps_that_take_longer_than_predicted() -> None:
    """A draft that promises a third more is not believed once its steps take twice the predicted time, where steps without take
    as long as predicted; it is where those take twice as long as well."""
    source = ModelSource(Priced(5.0))
    count, _ = source.length(ROWS, 2, ten_seconds, 1.0)
    assert count
    for _ in range(30):
        source.slowness = slower(source.slowness, step_s=20, predicted_s=10)
    assert source.slowness == pytest.approx(2, abs=0.01)
    assert source.length(ROWS, 2, ten_seconds, 1.0) == (0, False)
    assert source.length(ROWS, 2, ten_seconds, 2.0) == (count, False)
    assert source.length(ROWS, 2, ten_seconds, 9.0) == (count, False)  # and no more than was predicted


def test_broken_promises_make_it_wait_longer() -> None:
    """It promises to pay, drafts once, its step takes long, and it is left alone: for 16 passes, then 32, up to 256. A promise
    that was kept for long enough makes it 8 again."""
    source = ModelSource(Priced(5.0), saved=-1e9)
    waits = []
    for _ in range(7):
        source.slowness = 1.0
        assert lengths_of(source, 1)[0][0]
        source.slowness = 3.0
        assert lengths_of(source, 1) == [(0, False)]
        waits.append(source.wait)
        lengths_of(source, source.wait - 1)
    assert waits == [16, 32, 64, 128, 256, 256, 256]
    assert waits[-1] == LAST_RECHECK
    source.slowness = 1.0
    assert all(count for count, _ in lengths_of(source, 2 * RECHECK))
    source.slowness = 3.0
    lengths_of(source, 1)
    assert source.wait == RECHECK


def test_passes_that_verify_are_slowed() -> None:
    """Only those: 10 s without a draft, 15 with one that is verified, and unknown stays unknown."""
    seconds = slowed(ten_seconds, 1.5)
    assert (seconds({}), seconds({0: 0}), seconds({0: 2})) == (10, 10, 15)
    assert slowed(lambda added: None, 1.5)({0: 2}) is None


def test_lookups_whose_steps_take_long_are_left_out_and_forgiven(make_engine: Callable[..., Engine]) -> None:
    """A text in circles is drafted well. Once such steps are held to take 50 times what was predicted, nothing of it is verified,
    and the engine believes in it a little more each time."""
    engine = make_engine(max_batch=1)
    sampling = Sampling(max_new_tokens=120, ignore_eos=True, logit_bias={5: 100.0})

    def drafted() -> int:
        (got,) = engine.generate([5, 5, 5, 5], sampling, draft="ngram")
        assert got.drafting is not None
        return got.drafting.drafted

    assert drafted() > 50  # what passes cost is learnt here, with drafts and without
    engine.generate([5, 5, 5, 5], sampling)
    drafter = engine.runner.drafter
    assert isinstance(drafter, Drafter)
    (source,) = drafter._sources.values()
    assert isinstance(source, LookupSource)
    source.slowness = 50 * drafter._slowness
    assert drafted() == 0
    assert 1 < source.slowness < 50 * drafter._slowness
    before = source.slowness
    source.left_out()
    assert source.slowness == pytest.approx(before - (before - 1) / FORGIVEN_AFTER)
