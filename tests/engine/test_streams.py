"""Many callers of one engine: streams that share passes, tasks and threads; cancelling, running out of time, going on.

No test depends on how fast anything is: processors stop a pass where a test wants it stopped, and clocks are set by hand.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shoal import Engine, Generation, Sampling, SkipDecode
from shoal.engine.request import Chunk
from shoal.errors import InvalidInput, ShoalError
from shoal.models.decoder import Decoder

PROMPTS = [[5, 9, 30], [7] * 20, [61]]
LONG = Sampling(max_new_tokens=150, ignore_eos=True)
SHORT = Sampling(max_new_tokens=8, ignore_eos=True)
Make = Callable[..., Engine]


def assert_idle(engine: Engine) -> None:
    """Nothing runs, nothing is held, nobody is waited for."""
    assert not engine.has_work
    assert engine.runner.cache.blocks_in_use == 0
    assert len(engine.runner.cache.free_slots) == engine.runner.cache.num_slots
    assert not engine._mailboxes
    engine.runner.cache.check_integrity()


class Gate:
    """A processor that changes nothing and stops in the pass after `num_tokens` tokens until it is opened."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        if len(token_ids) == self.num_tokens:
            self.reached.set()
            assert self.open.wait(60), "nobody opened the gate"
        return logits

    async def wait(self) -> None:
        """Until a pass stands before it."""
        assert await asyncio.to_thread(self.reached.wait, 60), "nobody came"


def expected_of(engine: Engine, sampling: Sampling = SHORT) -> list[Generation]:
    return engine.generate(PROMPTS, sampling, SkipDecode(depth=0.5))


def test_chunks_add_up(make_engine: Make) -> None:
    """A request's chunks: its tokens and texts in order, the result in the last one alone."""
    engine, expected = make_engine(), expected_of(make_engine())
    chunks: list[list[Chunk]] = [[] for _ in PROMPTS]
    for chunk in engine.stream(PROMPTS, SHORT, SkipDecode(depth=0.5)):
        chunks[chunk.index].append(chunk)
    for mine, generation in zip(chunks, expected, strict=True):
        assert [c.generation for c in mine] == [None] * (len(mine) - 1) + [generation]
        assert tuple(token for c in mine for token in c.token_ids) == generation.token_ids
        assert "".join(c.text for c in mine) == generation.text
        assert len({c.request_id for c in mine}) == 1
    assert_idle(engine)


def test_two_streams_share_passes(make_engine: Make) -> None:
    """Taking turns, each advances the other: together they make about as many passes as the longer one alone."""
    engine = make_engine()
    first, second = engine.stream(PROMPTS[0], SHORT), engine.stream(PROMPTS[1], SHORT)
    tokens: list[tuple[int, ...]] = [(), ()]
    for a, b in zip(first, second, strict=True):
        tokens[0] += a.token_ids
        tokens[1] += b.token_ids
    assert engine.stats.prompt_passes + engine.stats.decode_passes == 8
    assert tokens == [make_engine().generate(prompt, SHORT)[0].token_ids for prompt in PROMPTS[:2]]
    assert_idle(engine)


def test_a_stream_is_checked_and_queued_at_the_call(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        engine.stream("")
    stream = engine.stream(PROMPTS, SHORT)
    assert engine.has_work
    engine.generate([1], SHORT)
    assert engine.stats.prompt_passes == 1, "the waiting stream's prompts were read in the same pass"
    assert len([chunk for chunk in stream if chunk.generation]) == 3


@pytest.mark.parametrize("how", ["close", "break", "drop", "before the first chunk"])
def test_leaving_a_stream_cancels_it(engine: Engine, how: str) -> None:
    """And only it: another stream goes on with the same tokens."""
    other = engine.stream(PROMPTS[2], SHORT)
    stream = engine.stream([*PROMPTS, [1]], LONG)
    if how == "close":
        next(stream)
        stream.close()
    elif how == "break":
        for _ in stream:
            break
        stream.close()
    elif how == "drop":
        next(stream)
        del stream
        gc.collect()
    else:
        stream.close()
    assert len(engine.runner.slots.running) + len(engine.runner.scheduler.waiting) == 1
    rest = [chunk for chunk in other if chunk.generation]
    assert rest[0].generation is not None
    assert rest[0].generation.token_ids == engine.generate(PROMPTS[2], SHORT)[0].token_ids
    assert_idle(engine)


def test_cancel_waiting_and_running(make_engine: Make) -> None:
    engine = make_engine(max_batch=1)
    (running,) = engine.add(PROMPTS[0], LONG)
    (waiting,) = engine.add(PROMPTS[1], LONG)
    (last,) = engine.add(PROMPTS[2], SHORT)
    for _ in range(5):
        engine.step()
    engine.cancel(waiting)
    engine.cancel(running)
    engine.cancel(running)
    ended = {c.request_id: c.generation for c in engine.step() if c.generation}
    assert {request: g.finish_reason for request, g in ended.items()} == {running: "cancelled", waiting: "cancelled"}
    assert ended[running].token_ids == make_engine().generate(PROMPTS[0], LONG)[0].token_ids[:5]
    assert ended[running].text == engine.tokenizer.decode(ended[running].token_ids, skip_special_tokens=True)
    assert (ended[running].ledger.decode_passes, ended[waiting].ledger.prompt_tokens) == (4, 0)
    engine.cancel(waiting)  # it has ended: nothing happens
    results = []
    while engine.has_work:
        results += [c.generation for c in engine.step() if c.generation]
    assert [g.finish_reason for g in results] == ["length"]
    assert results[0].token_ids == make_engine().generate(PROMPTS[2], SHORT)[0].token_ids
    engine.cancel(last)
    assert engine.step() == []
    assert_idle(engine)


def test_timeout(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been made by then comes back; a request that never ran comes back empty; others are not touched."""
    engine, plain = make_engine(max_batch=1), make_engine()
    now = 100.0

    def a_second_later(token_ids: list[int], logits: Tensor) -> Tensor:
        nonlocal now
        now += 1
        return logits

    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr("shoal.engine.engine.time", clock)
    monkeypatch.setattr("shoal.engine.runner.time", clock)
    sampling = Sampling(max_new_tokens=200, ignore_eos=True, processor=a_second_later)
    running, waiting = engine.generate([PROMPTS[0], PROMPTS[1]], sampling, timeout_s=9.5)
    assert running.finish_reason == waiting.finish_reason == "timeout"
    assert running.token_ids == plain.generate(PROMPTS[0], LONG)[0].token_ids[:10]
    assert (running.ledger.new_tokens, running.ledger.decode_passes) == (10, 9)
    assert (waiting.token_ids, waiting.ledger.prompt_tokens) == ((), 0)
    (at_once,) = engine.generate(PROMPTS[0], LONG, timeout_s=0)
    assert (at_once.finish_reason, at_once.token_ids) == ("timeout", ())
    in_time = Sampling(max_new_tokens=8, ignore_eos=True, processor=a_second_later)
    assert engine.generate(PROMPTS[0], in_time, timeout_s=8)[0].finish_reason == "length"
    assert_idle(engine)
    for wrong in (-1, float("nan"), "soon"):
        with pytest.raises(InvalidInput, match="timeout_s must be 0 or more seconds"):
            engine.generate(PROMPTS[0], SHORT, timeout_s=wrong)  # type: ignore[arg-type]


def test_added_requests_lose_nothing_to_other_callers(engine: Engine) -> None:
    """Passes that `generate` runs serve added requests, too; `step` returns what they gained then."""
    (request_id,) = engine.add(PROMPTS[0], SHORT)
    engine.generate(PROMPTS[1], SHORT)
    assert engine.has_work, "chunks are waiting for `step`"
    chunks = []
    while engine.has_work:
        chunks += [chunk for chunk in engine.step() if chunk.request_id == request_id]
    assert chunks[-1].generation is not None
    tokens = chunks[-1].generation.token_ids
    assert tuple(t for c in chunks for t in c.token_ids) == tokens == engine.generate(PROMPTS[0], SHORT)[0].token_ids
    assert_idle(engine)


def test_one_that_ends_as_another_stream_closes_is_reported(engine: Engine) -> None:
    (request_id,) = engine.add(PROMPTS[0], LONG)
    stream = engine.stream(PROMPTS[1], LONG)
    next(stream)
    engine.cancel(request_id)
    stream.close()
    reported = []
    while engine.has_work:
        reported += [c.generation.finish_reason for c in engine.step() if c.generation]
    assert reported == ["cancelled"]
    assert_idle(engine)


def test_no_pass_within_a_pass(engine: Engine) -> None:
    """A processor that calls the engine fails by itself; one that adds a request is served."""
    added: list[int] = []

    def recursive(token_ids: list[int], logits: Tensor) -> Tensor:
        engine.step()
        return logits

    def adding(token_ids: list[int], logits: Tensor) -> Tensor:
        if not added:
            added.extend(engine.add([1], SHORT))
        return logits

    ill, well = engine.generate([PROMPTS[0], PROMPTS[2]], [Sampling(processor=recursive), SHORT])
    assert ill.finish_reason == "error"
    assert "middle of a pass" in str(ill.error)
    assert well.finish_reason == "length"
    engine.generate(PROMPTS[0], Sampling(max_new_tokens=3, processor=adding))
    results = []
    while engine.has_work:
        results += [c.generation for c in engine.step() if c.generation and c.request_id in added]
    assert [g.finish_reason for g in results] == ["length"]
    assert_idle(engine)


class Interrupt(BaseException):
    """What Ctrl-C raises, without the signal."""


def test_interrupted_in_the_middle_of_a_pass(make_engine: Make) -> None:
    """Ctrl-C while a pass runs ends the call it hits; other requests go on as if nothing had happened."""
    engine, expected = make_engine(), expected_of(make_engine())
    other = engine.stream(PROMPTS, SHORT, SkipDecode(depth=0.5))
    next(other)

    def interrupt(token_ids: list[int], logits: Tensor) -> Tensor:
        if len(token_ids) == 5:
            raise Interrupt
        return logits

    with pytest.raises(Interrupt):
        engine.generate([1, 2], Sampling(max_new_tokens=9, processor=interrupt, ignore_eos=True))
    assert len(engine.runner.slots.running) == 3
    ended = [chunk.generation for chunk in other if chunk.generation]
    assert sorted(ended, key=lambda g: g.index) == expected
    assert_idle(engine)


def test_an_error_of_the_decoder_leaves_the_engine_usable(
    plain_decoder: Decoder, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out in the middle of a pass: the call fails, its requests are gone, the next call works."""
    engine = Engine(plain_decoder, tokenizer, cache_gib=0.25)
    expected = expected_of(engine)

    def fail(*args: object) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(plain_decoder.layers[2], "mlp", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate(PROMPTS, SHORT)
    assert_idle(engine)
    assert expected_of(engine) == expected


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_threads_share_the_engine(make_engine: Make) -> None:
    """Eight threads, each with calls of its own: everyone gets what it would get alone, in fewer passes."""
    engine = make_engine(max_batch=6)
    alone = make_engine(max_batch=1)
    jobs = [
        ([number + 1] * (1 + number % 5), Sampling(max_new_tokens=4 + number % 9, ignore_eos=True))
        for number in range(24)
    ]
    expected = [alone.generate(prompt, sampling)[0] for prompt, sampling in jobs]
    start = threading.Barrier(8)

    def work(worker: int) -> list[Generation]:
        start.wait()
        mine = []
        for number in range(worker, 24, 8):
            prompt, sampling = jobs[number]
            if number % 2:
                mine.append(engine.generate(prompt, sampling)[0])
            else:
                mine += [chunk.generation for chunk in engine.stream(prompt, sampling) if chunk.generation]
        return mine

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for worker, mine in enumerate(results):
        assert mine == expected[worker::8]
    total = alone.stats.prompt_passes + alone.stats.decode_passes
    assert engine.stats.prompt_passes + engine.stats.decode_passes < total
    assert_idle(engine)


def test_cancel_from_another_thread(engine: Engine) -> None:
    """Asked for in the middle of a pass, it happens between two."""
    gate = Gate(num_tokens=6)
    (added,) = engine.add([1], LONG)
    sampling = Sampling(max_new_tokens=200, ignore_eos=True, processor=gate)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(engine.generate, PROMPTS[0], sampling)
        assert gate.reached.wait(60)
        cancelling = [pool.submit(engine.cancel, request) for request in (added, added + 1)]
        gate.open.set()
        (generation,) = running.result(timeout=60)
        for call in cancelling:
            call.result(timeout=60)
    assert generation.finish_reason == "cancelled"
    assert 3 < len(generation.token_ids) < 200
    while engine.has_work:
        engine.step()
    assert_idle(engine)


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def collect(chunks: AsyncIterator[Chunk]) -> list[Generation]:
    done = [chunk.generation async for chunk in chunks if chunk.generation]
    return sorted(done, key=lambda generation: generation.index)


async def test_concurrent_async_streams_share_passes(make_engine: Make) -> None:
    engine = make_engine()
    expected = expected_of(make_engine())
    plan = SkipDecode(depth=0.5)
    results = await asyncio.gather(*(collect(engine.astream(prompt, SHORT, plan)) for prompt in PROMPTS * 5))
    assert [g.token_ids for (g,) in results] == [g.token_ids for g in expected] * 5
    assert engine.stats.prompt_passes + engine.stats.decode_passes < 15 * 8 / 2
    together = await collect(engine.astream(PROMPTS, SHORT, plan))
    assert together == expected
    assert_idle(engine)


async def test_the_event_loop_stays_free(engine: Engine) -> None:
    """While a pass stands still, other tasks get their turn: those that ask for more, and the one that lets it go on."""
    gate = Gate(num_tokens=5)
    sampling = Sampling(max_new_tokens=5, ignore_eos=True, processor=gate)
    task = asyncio.create_task(collect(engine.astream(PROMPTS[0], sampling)))
    await gate.wait()
    newcomer = asyncio.create_task(collect(engine.astream(PROMPTS[1], SHORT)))
    left = asyncio.create_task(collect(engine.astream(PROMPTS[2], SHORT)))
    await asyncio.sleep(0.05)  # they have begun to queue their requests
    assert not any(one.done() for one in (task, newcomer, left))
    left.cancel()
    await asyncio.sleep(0.01)
    gate.open.set()
    assert [len(g.token_ids) for g in await task] == [5]
    assert [len(g.token_ids) for g in await newcomer] == [8]
    with pytest.raises(asyncio.CancelledError):
        await left
    assert_idle(engine)


async def test_async_errors_are_raised_at_the_first_chunk(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        await anext(engine.astream(""))
    assert await collect(engine.astream([])) == []


async def test_leaving_an_async_stream_cancels_it(engine: Engine) -> None:
    stream = engine.astream(PROMPTS, LONG)
    await anext(stream)
    assert engine.has_work
    await stream.aclose()  # type: ignore[attr-defined]
    assert_idle(engine)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_task_leaves_nothing_behind(engine: Engine, times: int) -> None:
    """Cancelled while its pass runs in the worker thread, as when a client disconnects; and again while it cleans up."""
    expected = expected_of(engine)
    gate = Gate(num_tokens=6)
    other = asyncio.create_task(collect(engine.astream(PROMPTS, SHORT, SkipDecode(depth=0.5))))
    held = Sampling(max_new_tokens=100, ignore_eos=True, processor=gate)
    task = asyncio.create_task(collect(engine.astream([1, 2], held)))
    await gate.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    assert task.done() == (times == 2), "it waits for its pass, unless it is told again"
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await other == expected
    while engine.has_work:  # a second cancellation does not wait for the pass that is being closed
        await asyncio.sleep(0.01)
    assert_idle(engine)


async def test_async_timeout_of_the_caller(engine: Engine) -> None:
    gate = Gate(num_tokens=6)
    held = Sampling(max_new_tokens=100, ignore_eos=True, processor=gate)
    asyncio.get_running_loop().call_later(0.3, gate.open.set)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collect(engine.astream([1, 2], held)), timeout=0.1)
    assert_idle(engine)
    assert len((await collect(engine.astream(PROMPTS, SHORT)))[0].token_ids) == 8


def test_errors_have_one_root() -> None:
    assert issubclass(InvalidInput, ShoalError)
    assert issubclass(InvalidInput, ValueError)
