"""The cache's memory: it grows while requests run, shrinks when none do, goes back to the system, and carries no poison over."""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from families import save, tiny_model
from shoal import Engine, Sampling
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.depth.shape import ModelShape
from shoal.engine.cache import KVCache
from shoal.engine.runner import container_free_bytes
from shoal.models.executor import Executor
from ways import WAYS, decoder_of

Make = Callable[..., Engine]
NAN_TOKEN = 255
"""Token whose embedding is not a number in the poisoned model."""


def run_all(engine: Engine, jobs: list[tuple[list[int], Sampling]]) -> list[tuple[int, ...]]:
    return [g.token_ids for g in engine.generate([p for p, _ in jobs], [s for _, s in jobs])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_growth_keeps_what_running_requests_cached(checkpoint: Path, way: str, dtype: str) -> None:
    """A long prompt arrives while shorter requests run at different clocks, some with retired layers."""
    decoder = decoder_of(way, checkpoint, dtype)
    alone = Engine(decoder, max_batch=1, cache_gib=0.25)
    engine = Engine(decoder, max_batch=4, cache_gib=0.25)
    rng = random.Random("growth")
    sampling = Sampling(max_new_tokens=24, ignore_eos=True)
    plans = [DepthPlan((ALWAYS,) * 6), DepthPlan((ALWAYS, 3, 0, 30, 5, ALWAYS)), DepthPlan((ALWAYS,) * 6)]
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (17, 3, 170)]
    expected = [
        alone.generate(prompt, sampling, plan)[0].token_ids for prompt, plan in zip(prompts, plans, strict=True)
    ]

    capacities, results = set(), {}
    for at in range(60):
        if at in (0, 4, 9):
            number = (0, 4, 9).index(at)
            engine.add(prompts[number], sampling, plans[number], index=number)
        results |= {chunk.index: chunk.generation.token_ids for chunk in engine.step() if chunk.generation}
        capacities.add(engine.runner.cache.max_positions)
    assert capacities == {64, 256}
    agreed = [results[number] == expected[number] for number in range(3)]
    # Rounding depends on how many rows share a product in bfloat16; whatever lost its cache would differ at once.
    firsts = [results[number][:10] == expected[number][:10] for number in range(3)]
    assert all(agreed) if dtype == "float32" else all(firsts)


def test_shrinks_when_idle_and_never_below_what_is_needed(engine: Engine) -> None:
    cache = engine.runner.cache
    assert cache.max_positions == 0
    sizes = []
    for prompt_tokens, max_new_tokens in ((200, 1), (150, 3), (100, 10), (65, 1), (64, 1), (64, 2), (1, 1)):
        engine.generate([1] * prompt_tokens, Sampling(max_new_tokens=max_new_tokens))
        sizes.append(cache.max_positions)
    # 256 positions are kept for 192 and 128 (not less than half), and let go for 64; the token emitted last is never cached.
    assert sizes == [256, 256, 256, 256, 64, 128, 128]


def test_no_growth_for_a_request_that_waits(make_engine: Make) -> None:
    """Capacity follows the requests that run: one that waits for a slot takes no memory."""
    engine = make_engine(max_batch=1)
    engine.add([1], Sampling(max_new_tokens=3, ignore_eos=True))
    engine.add([1] * 200, Sampling(max_new_tokens=1))
    sizes = []
    while engine.has_work:
        engine.step()
        sizes.append(engine.runner.cache.max_positions)
    assert sizes == [64, 64, 64, 256]


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc/self/statm; other systems may keep pages that are given back"
)
def test_memory_follows_the_blocks() -> None:
    """32 MiB per layer and slot: resident when written, given back when the layer retires or the slot is released."""
    shape = ModelShape(
        num_layers=4, hidden_size=64, num_heads=8, num_kv_heads=8, head_dim=128, intermediate_size=64, gated_mlp=False,
        vocab_size=8,
    )  # fmt: skip
    positions, mib = 4096, 2**20
    cache = KVCache(shape, dtype=torch.float32, device=torch.device("cpu"), num_slots=3, budget_bytes=2**40)
    cache.reserve(positions)
    before = resident_bytes()

    def grown_mib() -> float:
        return (resident_bytes() - before) / mib

    assert grown_mib() < 8, "a mapping that nobody wrote to takes no memory"
    slots = [cache.acquire(), cache.acquire()]
    rows = np.array(slots)
    cache.hold(rows, np.full((2, 4), positions))
    for tensor in cache.keys + cache.values:
        tensor[slots] = 1.0
    assert grown_mib() == pytest.approx(256, abs=30)

    cache.hold(rows[:1], np.array([[positions, 0, 0, positions]]))
    assert grown_mib() == pytest.approx(192, abs=30)
    assert cache.blocks_in_use == 6 * positions // 16
    for layer in range(4):
        kept = 1.0 if layer in (0, 3) else 0.0
        assert (cache.keys[layer][slots[0]] == kept).all()
        assert (cache.values[layer][slots[0]] == kept).all()
        assert (cache.keys[layer][slots[1]] == 1).all(), "the neighbour's cache is not ours to give back"

    cache.release(slots[0])
    assert grown_mib() == pytest.approx(128, abs=30)
    cache.release(slots[1], poisoned=True)
    assert grown_mib() < 30
    assert cache.blocks_in_use == 0
    assert not any(tensor.any() for tensor in cache.keys + cache.values)


@pytest.fixture(scope="module", params=itertools.product(WAYS, ["float32", "bfloat16"]), ids="-".join)
def poisoned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Executor:
    """A model for which a token is not a number, and so is whatever attends to it.

    Its slots of 64 positions take 1.5 pages of memory (3/4 in bfloat16), so that giving whole pages back does not wipe them;
    requests have to stay within 64 positions for that.
    """
    way, dtype = request.param
    model: PreTrainedModel = tiny_model("mistral", num_hidden_layers=4, num_key_value_heads=3, head_dim=8)
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_TOKEN] = torch.nan
    return decoder_of(way, save(model, tmp_path_factory.mktemp("poisoned"), dtype=getattr(torch, dtype)))


GREEDY = Sampling(max_new_tokens=20, ignore_eos=True)
PROMPTS = [[5, 9, 30], [7] * 40, [61, 62, 63, 64]]


def finite(engine: Engine) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in engine.runner.cache.keys + engine.runner.cache.values)


def test_a_failed_request_is_named_and_alone(poisoned: Executor) -> None:
    """Between two others in the same attention calls, a request that is not a number ends by itself."""
    engine = Engine(poisoned, max_batch=4, cache_gib=0.25)
    clean = run_all(engine, [(prompt, GREEDY) for prompt in PROMPTS])
    ill = [1, 2, NAN_TOKEN]
    generations = engine.generate([PROMPTS[0], ill, PROMPTS[1], PROMPTS[2]], GREEDY)
    assert [g.finish_reason for g in generations] == ["length", "error", "length", "length"]
    assert "logits are not finite (prompt 1, after 0 new tokens)" in str(generations[1].error)
    assert generations[1].token_ids == ()
    assert generations[1].ledger.prompt_tokens == 3
    assert [g.token_ids for g in generations if g.error is None] == clean
    assert finite(engine)


def test_the_next_user_of_a_slot_is_not_poisoned(poisoned: Executor) -> None:
    """A masked key weighs 0, and 0 x NaN is NaN: a shorter request reads its slot as far as a longer neighbour's."""
    engine = Engine(poisoned, max_batch=3, cache_gib=0.25)
    clean = run_all(engine, [(prompt, GREEDY) for prompt in PROMPTS])
    for ill in ([NAN_TOKEN] * 44, [1, NAN_TOKEN], [1] * 30 + [NAN_TOKEN] + [2] * 12):
        failed = engine.generate([ill] * 3, GREEDY)
        assert [g.finish_reason for g in failed] == ["error"] * 3
        assert run_all(engine, [(prompt, GREEDY) for prompt in PROMPTS]) == clean


@pytest.mark.parametrize("end", ["cancelled", "timeout", "closed"])
def test_nor_by_a_prompt_that_ended_between_its_chunks(poisoned: Executor, end: str) -> None:
    """Most of a prompt has been read and nothing has shown yet that it is not a number."""
    engine = Engine(poisoned, max_batch=3, max_pass_tokens=36, cache_gib=0.25)
    clean = run_all(engine, [(prompt, GREEDY) for prompt in PROMPTS])
    stream = engine.stream([1] * 8 + [NAN_TOKEN] * 32, GREEDY)
    engine.step()
    assert not finite(engine), "the test needs a chunk that has been read"
    (request,) = filter(None, engine.runner.slots.requests)
    if end == "closed":
        stream.close()
    elif end == "cancelled":
        engine.cancel(request.request_id)
        assert [chunk.generation.finish_reason for chunk in stream if chunk.generation] == ["cancelled"]
    else:
        request.deadline = engine.runner._next_deadline = 0.0
        assert [chunk.generation.finish_reason for chunk in stream if chunk.generation] == ["timeout"]
    assert finite(engine)
    assert run_all(engine, [(prompt, GREEDY) for prompt in PROMPTS]) == clean


def test_a_failing_batch_leaves_the_books_straight(poisoned: Executor) -> None:
    engine = Engine(poisoned, max_batch=2, cache_gib=0.25)
    rng = random.Random("failing")
    prompts = [[rng.choice([1, 2, 3, NAN_TOKEN]) for _ in range(rng.randint(1, 6))] for _ in range(20)]
    for generation, prompt in zip(
        engine.generate(prompts, Sampling(max_new_tokens=3, ignore_eos=True)), prompts, strict=True
    ):
        assert generation.finish_reason == ("error" if NAN_TOKEN in prompt else "length")
    assert engine.runner.cache.blocks_in_use == 0
    engine.runner.cache.check_integrity()
    assert finite(engine)


def test_a_container_with_a_limit_leaves_what_is_not_anonymous_memory(tmp_path: Path) -> None:
    """The file cache, which reading a checkpoint fills, is no reason for a budget of nothing."""
    assert container_free_bytes(tmp_path) == math.inf
    (tmp_path / "memory.stat").write_text("anon 300\nfile 690\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_free_bytes(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_free_bytes(tmp_path) == 700
    (tmp_path / "memory.max").write_text("200\n")
    assert container_free_bytes(tmp_path) == 0
