"""At once or in waves: the choice, and that whatever it is everyone enters, in order, and in time."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_plans import random_plan
from shoal import Dense, DepthPlan, Engine, Sampling, SkipDecode
from shoal.depth.plan import ALWAYS
from shoal.engine.scheduler import entry_passes, fill_level
from shoal.engine.step_time import KINDS, Courses, StepTime, Work
from shoal.models.decoder import Decoder

Make = Callable[..., Engine]
DECAY = DepthPlan((ALWAYS, 3, 2, 1))


class Prices(StepTime):
    """A model that knows its prices; kinds that are not named cost nothing."""

    def __init__(self, **prices: float) -> None:
        super().__init__()
        self.known = np.array([prices.get(kind, 0.0) for kind in KINDS])

    def seconds(self, work: Work) -> float | None:
        return float(work @ self.known)


def courses(plan: DepthPlan, running: list[tuple[int, int]], waiting: list[int]) -> Courses:
    """`running`: (clock, passes left) of each row; `waiting`: passes of each request. Prompts are one token."""
    clocks, passes = [clock for clock, _ in running] + [-1] * len(waiting), [n for _, n in running] + waiting
    return Courses(
        prompt_tokens=np.ones(len(passes), dtype=np.int64),
        clocks=np.array(clocks),
        num_passes=np.array(passes),
        cutoffs=np.array([plan.cutoffs] * len(passes)),
        runs_prompt=np.array([plan.runs_prompt] * len(passes)),
    )


@pytest.mark.parametrize(("level", "entries"), [(2, [0, 2, 4, 5, 6]), (1, [2, 2, 6, 6, 6]), (0, [5, 5, 5, 9, 9])])
def test_entries_by_hand(level: int, entries: list[int]) -> None:
    """3 slots, rows with 2 and 5 passes left, five requests of 4 passes."""
    assert entry_passes([2, 5], [4] * 5, 3, level) == entries


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.lists(st.integers(1, 9), max_size=5), st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5), st.data())
def test_entries_are_in_order_and_fit(
    remaining: list[int], lengths: list[int], num_slots: int, data: st.DataObject
) -> None:
    """Never more rows than slots, nobody overtakes, and free slots are filled only at the level or below it."""
    remaining = remaining[:num_slots]
    level = data.draw(st.integers(0, num_slots - 1))
    entries = entry_passes(remaining, lengths, num_slots, level)
    assert len(entries) == len(lengths)
    assert entries == sorted(entries)
    ends = [entry + length for entry, length in zip(entries, lengths, strict=True)]
    for now in set(entries):
        before = sum(end > now for end in remaining) + sum(s < now < e for s, e in zip(entries, ends, strict=True))
        assert before <= level
        assert before + entries.count(now) <= num_slots
    # Nobody waits longer than it takes everyone before to run one after another.
    assert all(entry <= max(remaining, default=0) + sum(lengths[:i]) for i, entry in enumerate(entries))


def test_the_docstrings_example() -> None:
    """One row is about to end and two requests wait: where layers are all that costs, the wave; where passes do, at once."""
    two_wait = courses(DepthPlan((ALWAYS, 3, 2, 1)), [(2, 1)], [4, 4])
    assert fill_level(two_wait, 1, 2, Prices(layers=1.0)) == 0
    assert fill_level(two_wait, 1, 2, Prices(passes=1.0)) == 1
    long = courses(DECAY, [(-1, 4)], [4, 4, 4])
    assert fill_level(long, 1, 2, Prices(passes=1.0)) == 1


def test_nobody_waits_before_passes_are_measured() -> None:
    assert fill_level(courses(DECAY, [(2, 1)], [4, 4]), 1, 2, StepTime()) == 1


def test_a_request_alone_in_the_queue_does_not_wait() -> None:
    """Two rows together never take longer than one after the other."""
    for prices in (Prices(layers=1.0), Prices(passes=1.0), Prices(**{"few tokens": 1.0, "layers": 1.0})):
        for left in range(1, 4):
            assert fill_level(courses(DECAY, [(2 - left, left)], [4]), 1, 2, prices) == 1


def serve(engine: Engine, jobs: list[tuple[DepthPlan, int]], *, late: int = 0) -> list[list[int]]:
    """Requests per pass in order of entry, the last `late` of them queued after two passes."""
    sampling = [Sampling(max_new_tokens=length, ignore_eos=True) for _, length in jobs]
    plans = [plan for plan, _ in jobs]
    first = len(jobs) - late
    for number in range(first):
        engine.add([number % 200 + 1], sampling[number], plans[number])
    passes = []
    while engine.has_work:
        engine.step()
        slots = engine.runner.slots
        passes.append(sorted(slots[slot].request_id for slot in slots.running))
        if len(passes) == 2:
            for number in range(first, len(jobs)):
                engine.add([number % 200 + 1], sampling[number], plans[number])
    return passes


@settings(derandomize=True, deadline=None, max_examples=15, database=None)
@given(st.integers(0, 2**32))
def test_everyone_enters_in_order_whatever_it_predicts(decoder: Decoder, seed: int) -> None:
    """Random prices, plans, lengths and slots: first come, first served, all end, and no pass runs nothing while requests wait."""
    rng = random.Random(seed)
    engine = Engine(decoder, max_batch=rng.randint(1, 4), cache_gib=0.25)
    engine.runner.scheduler.step_time = Prices(**{kind: rng.choice([0.0, 0.0, 1.0]) for kind in KINDS})
    engine.runner.scheduler.waves = True
    jobs = []
    for _ in range(rng.randint(1, 10)):
        length = rng.randint(1, 8)
        jobs.append((random_plan(rng, 6, prompt_tokens=1, max_new_tokens=length), length))
    entered: list[int] = []
    for running in serve(engine, jobs, late=rng.randint(0, len(jobs) - 1)):
        new = [request for request in running if request not in entered]
        assert not entered or not new or min(new) > max(entered)
        entered += new
    # Requests of one token come and go within a pass.
    assert {number for number, (_, length) in enumerate(jobs) if length > 1} <= set(entered)
    assert not engine.has_work


def test_a_wait_ends_with_the_wave(make_engine: Make) -> None:
    """Where only layers cost, a request waits for the rows that run, and for nobody that came later."""
    engine = make_engine(max_batch=2)
    engine.runner.scheduler.step_time, engine.runner.scheduler.waves = Prices(layers=1.0), True
    plan = DepthPlan((ALWAYS, 3, 2, 1, 1, 1))
    jobs = [(plan, 6), (plan, 4), *[(plan, 5)] * 4]
    assert serve(engine, jobs) == [[0, 1]] * 3 + [[0]] * 2 + [[]] + [[2, 3]] * 4 + [[]] + [[4, 5]] * 4 + [[]]


def test_under_dense_plans_all_is_as_without_a_model(make_engine: Make) -> None:
    """And beside a dense row nobody waits, whatever the other plans are."""
    shallow, dense = SkipDecode(min_layers=2, max_layers=6, horizon=6).plan(6), Dense().plan(6)
    for plans in ([dense] * 6, [dense, shallow] * 3):
        jobs = list(zip(plans, (6, 4, 5, 3, 5, 2), strict=True))
        ways = []
        for waves in (True, False):
            engine = make_engine(max_batch=2)
            engine.runner.scheduler.step_time, engine.runner.scheduler.waves = Prices(layers=1.0), waves
            ways.append(serve(engine, jobs))
        assert ways[0] == ways[1]
