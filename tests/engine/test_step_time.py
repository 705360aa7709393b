"""The step-time model: what work is, that it adds up, and that prices are found, followed and not made up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_plans import random_plan
from shoal import Dense, DepthPlan, Engine, Sampling
from shoal.depth.plan import ALWAYS
from shoal.engine.step_time import KINDS, Courses, StepTime, Work, nonnegative_least_squares, pass_work
from shoal.errors import InvalidInput

PRICES = np.array((1e-3, 2e-4, 3e-5, 1e-5, 8e-6, 2e-8, 1e-8, 2e-5))
NUM_LAYERS = 12


def decode_pass(rng: np.random.Generator, *, prompts: int = 0) -> Work:
    """A pass of up to 16 rows at any depth and position, some of which read a prompt of 64 tokens."""
    rows = int(rng.integers(1, 17))
    served = (np.arange(NUM_LAYERS) < rng.integers(2, NUM_LAYERS + 1, rows)[:, None]).astype(np.int64)
    starts, num_tokens = rng.integers(1, 300, rows), np.ones(rows, dtype=np.int64)
    served[:prompts], starts[:prompts], num_tokens[:prompts] = 64, 0, 64
    return pass_work(served, starts, num_tokens, rows)


def trained(
    rng: np.random.Generator, *, outliers: float = 0.0, scale: float = 1.0, model: StepTime | None = None
) -> StepTime:
    """A model that has seen 2000 passes with 5% noise, of which a share `outliers` took 2 to 20 times too long."""
    model = model or StepTime()
    for number in range(2000):
        work = decode_pass(rng, prompts=0 if number % 10 else number // 10 % 5)
        seconds = scale * float(work @ PRICES) * np.exp(rng.normal(0, 0.05))
        model.observe(work, seconds * (rng.uniform(2, 20) if rng.random() < outliers else 1))
    return model


def test_work_of_the_example() -> None:
    served, starts = np.array([[1, 1], [1, 0]]), np.array([9, 4])
    work = pass_work(served, starts, np.array([1, 1]), 2)
    assert dict(zip(KINDS, work.tolist(), strict=True)) == {
        **dict.fromkeys(KINDS, 0),
        **{"passes": 1, "layers": 2, "few tokens": 3, "keys": 25, "logits": 2},
    }
    # A prompt of 100 tokens beside a row at position 3; the second layer reads 70 of them.
    work = pass_work(np.array([[100, 70], [1, 0]]), np.array([0, 3]), np.array([100, 1]), 2)
    pairs = 100 * 99 // 2 + 70 * 69 // 2
    assert work.tolist() == [1, 2, 8 + 8, 56 + 56, 37 + 6, 100 + 70 + 4, pairs, 2]


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_a_schedule_is_the_sum_of_its_passes(seed: int, num_rows: int) -> None:
    """Row by row and pass by pass, whatever the plans, entries and clocks."""
    rng = random.Random(seed)
    plans, starts, clocks, prompts, passes = [], [], [], [], []
    for _ in range(num_rows):
        prompt, new_tokens = rng.choice([1, 2, 9, 70]), rng.randint(1, 12)
        plans.append(random_plan(rng, 5, prompt_tokens=prompt, max_new_tokens=new_tokens))
        clocks.append(rng.randint(-1, new_tokens - 2))
        starts.append(0 if clocks[-1] >= 0 else rng.randint(0, 5))
        prompts.append(prompt)
        passes.append(new_tokens - 1 - clocks[-1])
    total = np.zeros(len(KINDS))
    for now in range(max(s + n for s, n in zip(starts, passes, strict=True))):
        rows = [r for r in range(num_rows) if starts[r] <= now < starts[r] + passes[r]]
        if not rows:
            continue
        served, first, counts = [], [], []
        for r in rows:
            clock = clocks[r] + now - starts[r]
            counts.append(prompts[r] if clock < 0 else 1)
            first.append(0 if clock < 0 else prompts[r] + clock)
            runs = plans[r].runs_prompt if clock < 0 else [clock < cutoff for cutoff in plans[r].cutoffs]
            served.append([counts[-1] * run for run in runs])
        total += pass_work(np.array(served), np.array(first), np.array(counts), len(rows))
    courses = Courses(
        prompt_tokens=np.array(prompts),
        clocks=np.array(clocks),
        num_passes=np.array(passes),
        cutoffs=np.array([plan.cutoffs for plan in plans]),
        runs_prompt=np.array([plan.runs_prompt for plan in plans]),
    )
    assert courses.work(starts).tolist() == total.tolist()


def test_an_engines_passes_are_its_forecasts_work(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine tells the model adds up to what a forecast of the same requests asks it about."""
    engine = make_engine()
    seen, asked = [], []
    monkeypatch.setattr(engine.step_time, "observe", lambda work, seconds: seen.append(work))
    plan = DepthPlan((ALWAYS, 3, 0, 5, 9, ALWAYS))
    engine.generate([[7] * 20] * 3, Sampling(max_new_tokens=8, ignore_eos=True), plan)
    monkeypatch.setattr(engine.step_time, "seconds", asked.append)
    engine.step_time.forecast(plan, prompt_tokens=20, new_tokens=8, batch=3)
    assert sum(seen).tolist() == asked[0].tolist()


def test_prices_are_found_with_noise_and_outliers() -> None:
    for outliers in (0.0, 0.03):
        rng = np.random.default_rng(0)
        model = trained(rng, outliers=outliers)
        for _ in range(50):
            work = decode_pass(rng)
            assert model.seconds(work) == pytest.approx(float(work @ PRICES), rel=0.15)
        assert model.relative_error is not None
        assert model.relative_error < 0.1
        assert (np.array(list(model.prices.values())) >= 0).all()
    assert model.prices["layers"] == pytest.approx(2e-4, rel=0.1)


def test_r2_of_predictions_that_were_made_before() -> None:
    model = trained(np.random.default_rng(0))
    assert model.r2 is not None
    assert model.r2 > 0.97


def test_it_follows_a_machine_that_slows_down() -> None:
    rng = np.random.default_rng(0)
    model = trained(rng, scale=3, model=trained(rng))
    work = decode_pass(rng)
    assert model.seconds(work) == pytest.approx(3 * float(work @ PRICES), rel=0.2)


def test_other_kinds_are_remembered_for_a_while_and_then_not_made_up() -> None:
    """After some alike passes a prompt is still predicted; after very many it is not measured, rather than wrong."""
    rng = np.random.default_rng(0)
    model = trained(rng)
    alike = pass_work(np.ones((1, NUM_LAYERS), dtype=np.int64), np.array([50]), np.array([1]), 1)
    prompt = decode_pass(rng, prompts=1)
    for number in range(20000):
        model.observe(alike, float(alike @ PRICES))
        if number == 64:
            assert model.seconds(prompt) == pytest.approx(float(prompt @ PRICES), rel=0.15)
    assert model.seconds(prompt) is None
    assert model.seconds(alike) == pytest.approx(float(alike @ PRICES), rel=0.01)


def test_what_was_not_measured_is_not_predicted() -> None:
    """Dense decoding says nothing about half the layers, nor a prompt, nor does a first pass about anything."""
    model = StepTime()
    sizes = {"rows": 2, "layers": NUM_LAYERS, "context": 64}
    assert model.predict(**sizes) is model.relative_error is model.r2 is None
    counts = np.ones(2, dtype=np.int64)
    for number in range(100):
        work = pass_work(np.ones((2, NUM_LAYERS), dtype=np.int64), counts * (50 + number % 20), counts, 2)
        assert number > 3 or model.predict(**sizes) is None
        model.observe(work, float(work @ PRICES))
    assert model.predict(**sizes) == pytest.approx(1e-3 + 12 * 2e-4 + 24 * 3e-5 + 24 * 64 * 2e-8 + 2 * 2e-5, rel=0.05)
    assert model.predict(**{**sizes, "layers": 6}) is None
    assert model.predict(**{**sizes, "rows": 32}) is None
    assert model.predict(**sizes, tokens=64) is None
    assert model.forecast(Dense().plan(NUM_LAYERS), prompt_tokens=64, new_tokens=8) is None


def test_a_pass_too_short_for_the_clock_teaches_nothing() -> None:
    model = StepTime()
    model.observe(decode_pass(np.random.default_rng(0)), 0.0)
    assert model.num_passes == 0


@pytest.mark.parametrize("changed", [{"rows": 0}, {"layers": 0}, {"tokens": 0}, {"context": 3, "tokens": 4}])
def test_sizes_that_no_pass_has(changed: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="a pass has 1 or more rows, layers and tokens"):
        StepTime().predict(**{"rows": 1, "layers": 1, "context": 8, **changed})
    with pytest.raises(InvalidInput, match="must be 1 or more, got 4, 0, 1"):
        StepTime().forecast(Dense().plan(2), prompt_tokens=4, new_tokens=0)


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_nonnegative_least_squares_meets_its_conditions(seed: int, n: int) -> None:
    """Karush, Kuhn and Tucker: no price below 0, none that is above 0 could be better, none at 0 would gain by rising."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(30, n)), rng.normal(size=30)
    squares, products = x.T @ x / 30, x.T @ y / 30
    best = nonnegative_least_squares(squares, products)
    gain = products - squares @ best
    assert (best >= 0).all()
    assert abs(gain[best > 0]).max(initial=0) < 1e-6
    assert gain.max() < 1e-6


def test_observing_is_cheap() -> None:
    """Far below a pass: the bound is loose, since other processes share the machine."""
    rng = np.random.default_rng(0)
    model, work = trained(rng), decode_pass(rng)
    fastest = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(64):
            model.observe(work, 1e-3)
        fastest = min(fastest, (time.perf_counter() - began) / 64)
    assert fastest < 2e-4
