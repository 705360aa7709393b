"""Who runs next: waiting in line, room for prompts beside decode rows, the budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shoal import Engine, Sampling
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.errors import CacheBudgetExceeded, InvalidInput

Make = Callable[..., Engine]
BLOCK_BYTES = 16 * 2 * 3 * 8 * 4
"""16 positions, keys and values, 3 heads of 8, float32."""


def passes_until_end(engine: Engine) -> dict[int, int]:
    """Step until nothing is left; the pass in which each request ended, from 1."""
    ended, number = {}, 0
    while engine.has_work:
        number += 1
        ended |= {chunk.request_id: number for chunk in engine.step() if chunk.generation}
    return ended


def test_a_long_prompt_is_not_overtaken_for_ever(make_engine: Make) -> None:
    """8 tokens a pass: the long prompt takes 5 passes, though shorter prompts keep coming into a lower slot."""
    engine = make_engine(max_batch=2, max_pass_tokens=8)
    one = Sampling(max_new_tokens=1)
    engine.add([1], one)
    (long,) = engine.add([1] * 40, one)
    shorts = [engine.add([2] * 12, one)[0] for _ in range(10)]
    ended = passes_until_end(engine)
    assert ended[long] <= 7
    assert [ended[short] for short in shorts] == sorted(ended[short] for short in shorts)


def test_decode_rows_do_not_wait_for_a_prompt(make_engine: Make) -> None:
    """While a prompt of 40 tokens is read in chunks, the other request gains a token in every pass."""
    engine = make_engine(max_batch=2, max_pass_tokens=8)
    (first,) = engine.add([1], Sampling(max_new_tokens=20, ignore_eos=True))
    engine.step()
    (long,) = engine.add([1] * 40, Sampling(max_new_tokens=5, ignore_eos=True))
    gained = [sorted(chunk.request_id for chunk in engine.step()) for _ in range(6)]
    assert gained == [[first]] * 5 + [[first, long]], "7 tokens of the prompt a pass: 5 passes and 5 left"


def test_one_row_at_least_is_free_for_prompts(make_engine: Make) -> None:
    """max_pass_tokens equal to max_batch: a prompt is read a token at a time beside a full batch, and ends."""
    engine = make_engine(max_batch=3, max_pass_tokens=3)
    running = [engine.add([1], Sampling(max_new_tokens=60, ignore_eos=True))[0] for _ in range(2)]
    (late,) = engine.add([1] * 20, Sampling(max_new_tokens=1))
    ended = passes_until_end(engine)
    assert ended[late] == 20
    assert {ended[one] for one in running} == {60}


def test_first_come_first_served_under_the_budget(make_engine: Make) -> None:
    """A small request behind a large one waits with it: overtaking could keep the large one out for ever."""
    blocks = 12
    engine = make_engine(max_batch=4, cache_gib=blocks * BLOCK_BYTES / 2**30)
    assert engine.runner.cache.budget_blocks == blocks
    sampling = Sampling(max_new_tokens=4, ignore_eos=True)
    (first,) = engine.add([1], sampling)  # 6 layers, 1 block each
    (large,) = engine.add([1] * 20, sampling)  # 12 blocks: waits for the first to end
    (small,) = engine.add([1], sampling)
    assert passes_until_end(engine) == {first: 4, large: 8, small: 12}
    assert engine.stats.peak_cache_bytes == blocks * engine.runner.cache.bytes_per_block


def test_retired_layers_make_room(make_engine: Make) -> None:
    """Five of six layers retire after a pass: three such requests run where dense ones would wait for each other."""
    engine = make_engine(max_batch=4, cache_gib=12 * BLOCK_BYTES / 2**30)
    sampling = Sampling(max_new_tokens=6, ignore_eos=True)
    shallow = DepthPlan((ALWAYS, 0, 0, 0, 0, 0))
    first = [engine.add([1], sampling, shallow)[0] for _ in range(2)]  # 12 blocks in the first pass, then 2
    (dense,) = engine.add([1], sampling)  # 6 blocks
    ended = passes_until_end(engine)
    assert {ended[one] for one in first} == {6}
    assert ended[dense] == 7


def test_a_request_beyond_the_budget_is_told_what_fits(make_engine: Make) -> None:
    engine = make_engine(cache_gib=12 * BLOCK_BYTES / 2**30)
    message = r"10 prompt tokens \+ 40 new tokens need 24 cache blocks .*budget is 12 .*: max_new_tokens=23 would fit"
    with pytest.raises(CacheBudgetExceeded, match=message):
        engine.generate([1] * 10, Sampling(max_new_tokens=40))
    with pytest.raises(CacheBudgetExceeded, match=r"prompt 1: .* the prompt alone does not fit, or raise cache_gib"):
        engine.generate([[1], [1] * 40], Sampling(max_new_tokens=1))
    assert engine.generate([1] * 10, Sampling(max_new_tokens=23))[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch must be 1 or more, got 0"),
        ({"max_pass_tokens": 0}, "max_pass_tokens must be 1 or more, got 0"),
        ({"max_batch": 9, "max_pass_tokens": 8}, "max_batch 9 is above max_pass_tokens 8"),
        ({"cache_gib": 0}, "cache_gib must be above 0 and finite, got 0"),
        ({"cache_gib": float("nan")}, "cache_gib must be above 0 and finite, got nan"),
        ({"cache_gib": float("inf")}, "cache_gib must be above 0 and finite, got inf"),
    ],
)
def test_sizes_that_make_no_engine(make_engine: Make, options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make_engine(**options)
