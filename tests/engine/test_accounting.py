"""What ran is what was planned: layer-tokens, FLOPs, bytes and cache blocks, pass by pass."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from families import save, tiny_model
from random_plans import random_plan, random_policy
from shoal import Dense, DepthPlan, Engine, Ledger, Sampling, SkipDecode
from shoal.depth.cost import BLOCK_TOKENS, PlanCost
from shoal.depth.plan import ALWAYS
from shoal.engine.cache import KVCache
from shoal.engine.ledger import EngineStats
from shoal.models.decoder import Decoder
from shoal.models.executor import Executor
from shoal.models.linear import Linear
from shoal.models.passes import Pass

NUM_LAYERS = 6
Make = Callable[..., Engine]


class BlockWatch:
    """The decoder, noting the cache's books inside every pass, when `hold` has recorded what the pass writes."""

    def __init__(self, decoder: Executor) -> None:
        self.decoder = decoder
        self.config, self.dtype, self.device = decoder.config, decoder.dtype, decoder.device
        self.blocks: list[int] = []

    def __call__(self, work: Pass, cache: KVCache) -> Tensor:
        cache.check_integrity()
        self.blocks.append(cache.blocks_in_use)
        return self.decoder(work, cache)


@pytest.fixture
def product_tokens(monkeypatch: pytest.MonkeyPatch) -> Counter[Linear]:
    """Rows that every matrix product has multiplied, counted around the products themselves."""
    counted: Counter[Linear] = Counter()
    original = Linear.__call__

    def count(self: Linear, x: Tensor) -> Tensor:
        counted[self] += x.shape[0]
        return original(self, x)

    monkeypatch.setattr(Linear, "__call__", count)
    return counted


def ran(decoder: Executor) -> int:
    """Layer-tokens since the decoder was made, by the layers' own count."""
    return sum(layer.num_tokens_run for layer in decoder.layers)


def cost_of(plan: DepthPlan, engine: Engine, prompt_tokens: int, new_tokens: int, batch: int = 1) -> PlanCost:
    return plan.cost(engine.shape, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)


@st.composite
def any_plan(draw: st.DrawFn) -> tuple[DepthPlan, int, int]:
    """(plan, prompt tokens, new tokens), lengths on both sides of a block's end."""
    prompt_tokens = draw(st.sampled_from([1, 2, 14, 15, 16, 17, 31]))
    new_tokens = draw(st.sampled_from([1, 2, 3, 8, 19]))
    rng = random.Random(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return random_policy(rng, NUM_LAYERS).plan(NUM_LAYERS, prompt_tokens=prompt_tokens), prompt_tokens, new_tokens
    plan = random_plan(rng, NUM_LAYERS, prompt_tokens=prompt_tokens, max_new_tokens=new_tokens)
    return plan, prompt_tokens, new_tokens


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@given(any_plan(), st.integers(1, 3))
def test_one_clock_pass_by_pass(decoder: Executor, job: tuple[DepthPlan, int, int], batch: int) -> None:
    """Equal requests at one clock: after every pass, everything counted so far is the cost of that many tokens."""
    plan, prompt_tokens, new_tokens = job
    watch = BlockWatch(decoder)
    engine = Engine(watch, max_batch=3, cache_gib=0.25)  # type: ignore[arg-type]
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    for _ in range(batch):
        engine.add([7] * prompt_tokens, sampling, plan)
    start = ran(decoder)
    generations = []
    for clock in range(new_tokens):
        generations += [chunk.generation for chunk in engine.step() if chunk.generation]
        so_far = cost_of(plan, engine, prompt_tokens, clock + 1, batch)
        assert ran(decoder) - start == so_far.layer_tokens
        assert engine.stats.prompt_bytes == so_far.prompt_bytes
        assert engine.stats.decode_bytes == so_far.decode_bytes
        assert (engine.stats.prompt_passes, engine.stats.decode_passes) == (1, clock)
    cost = cost_of(plan, engine, prompt_tokens, new_tokens, batch)
    dense = cost_of(Dense().plan(NUM_LAYERS), engine, prompt_tokens, new_tokens, batch)
    assert tuple(watch.blocks) == cost.cache_blocks
    assert engine.stats.peak_cache_bytes == cost.peak_cache_blocks * engine.runner.cache.bytes_per_block
    assert (engine.stats.dense_prompt_bytes, engine.stats.dense_decode_bytes) == (
        dense.prompt_bytes,
        dense.decode_bytes,
    )
    assert engine.runner.cache.blocks_in_use == 0
    assert not engine.has_work
    assert len(generations) == batch
    assert sum((g.ledger for g in generations), Ledger()) == expected_ledger(
        cost, dense, prompt_tokens, new_tokens, batch
    )
    if new_tokens > 1:
        assert generations[0].ledger.mean_layers == pytest.approx(cost.mean_layers)
    assert {g.past_horizon for g in generations} == {plan.horizon is not None and new_tokens - 1 > plan.horizon}


def expected_ledger(cost: PlanCost, dense: PlanCost, prompt_tokens: int, new_tokens: int, batch: int = 1) -> Ledger:
    """What `batch` requests should have spent."""
    return Ledger(
        prompt_tokens=batch * prompt_tokens,
        new_tokens=batch * new_tokens,
        decode_passes=batch * (new_tokens - 1),
        prompt_layer_tokens=cost.prompt_layer_tokens,
        decode_layer_tokens=cost.decode_layer_tokens,
        dense_prompt_layer_tokens=dense.prompt_layer_tokens,
        dense_decode_layer_tokens=dense.decode_layer_tokens,
        prompt_flops=cost.prompt_flops,
        decode_flops=cost.decode_flops,
        dense_prompt_flops=dense.prompt_flops,
        dense_decode_flops=dense.decode_flops,
    )


def test_staggered_requests_add_up(decoder: Executor) -> None:
    """Requests that come at different passes: the blocks in use in every pass are the sum of what each plan says."""
    rng = random.Random("staggered")
    watch = BlockWatch(decoder)
    engine = Engine(watch, max_batch=40, cache_gib=0.25)  # type: ignore[arg-type]
    expected: Counter[int] = Counter()
    ledgers: dict[int, Ledger] = {}
    results: dict[int, Ledger] = {}
    step = 0
    while step < 25 or engine.has_work:
        for _ in range(rng.randint(0, 2) if step < 25 else 0):
            prompt_tokens, new_tokens = rng.choice([1, 5, 16, 17, 33]), rng.randint(1, 20)
            plan = random_plan(rng, NUM_LAYERS, prompt_tokens=prompt_tokens, max_new_tokens=new_tokens)
            sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
            (request_id,) = engine.add([rng.randrange(256) for _ in range(prompt_tokens)], sampling, plan)
            cost = cost_of(plan, engine, prompt_tokens, new_tokens)
            dense = cost_of(Dense().plan(NUM_LAYERS), engine, prompt_tokens, new_tokens)
            ledgers[request_id] = expected_ledger(cost, dense, prompt_tokens, new_tokens)
            for later, held in enumerate(cost.cache_blocks):
                expected[len(watch.blocks) + later] += held
        for chunk in engine.step():
            if chunk.generation:
                results[chunk.request_id] = chunk.generation.ledger
        step += 1
    assert watch.blocks == [expected[at] for at in range(len(watch.blocks))]
    assert len(watch.blocks) >= 25
    assert results == ledgers


@pytest.mark.parametrize("max_pass_tokens", [4, 9, 2048])
def test_counted_in_the_products(plain_decoder: Decoder, product_tokens: Counter[Linear], max_pass_tokens: int) -> None:
    """Mixed plans, chunked prompts: rows of every product add up to the plans' costs and to the ledgers, layer by layer."""
    rng = random.Random(f"products {max_pass_tokens}")
    engine = Engine(plain_decoder, max_batch=4, max_pass_tokens=max_pass_tokens, cache_gib=0.25)
    jobs = []
    for _ in range(14):
        prompt_tokens, new_tokens = rng.choice([1, 3, 16, 29]), rng.randint(1, 12)
        jobs.append(
            (
                random_plan(rng, NUM_LAYERS, prompt_tokens=prompt_tokens, max_new_tokens=new_tokens),
                prompt_tokens,
                new_tokens,
            )
        )
    before = [layer.num_tokens_run for layer in plain_decoder.layers]
    generations = engine.generate(
        [[rng.randrange(256) for _ in range(p)] for _, p, _ in jobs],
        [Sampling(max_new_tokens=n, ignore_eos=True) for *_, n in jobs],
        [plan for plan, *_ in jobs],
    )  # fmt: skip
    for index, layer in enumerate(plain_decoder.layers):
        expected = sum(
            plan.runs_prompt[index] * prompt_tokens + min(plan.cutoffs[index], new_tokens - 1)
            for plan, prompt_tokens, new_tokens in jobs
        )
        assert layer.num_tokens_run - before[index] == expected
        assert [product_tokens[product] for product in (layer.qkv, layer.out, layer.up, layer.down)] == [expected] * 4
    assert product_tokens[plain_decoder.head] == sum(new_tokens for *_, new_tokens in jobs)
    for generation, (plan, prompt_tokens, new_tokens) in zip(generations, jobs, strict=True):
        cost = cost_of(plan, engine, prompt_tokens, new_tokens)
        dense = cost_of(Dense().plan(NUM_LAYERS), engine, prompt_tokens, new_tokens)
        assert generation.ledger == expected_ledger(cost, dense, prompt_tokens, new_tokens)
        assert generation.ledger.layer_tokens == cost.layer_tokens
        assert generation.ledger.layer_tokens_saved == dense.layer_tokens - cost.layer_tokens


def test_a_request_that_stops_early_pays_for_what_it_ran(engine: Engine) -> None:
    """Ended by the end token after n tokens, it has made n - 1 decode passes, whatever it was allowed."""
    prompt, plan = [3, 1, 4], DepthPlan((ALWAYS, 4, 0, 2, ALWAYS, 6))
    free = engine.generate(prompt, Sampling(max_new_tokens=30, ignore_eos=True), plan)[0].token_ids
    at = next(i for i, token in enumerate(free) if i > 3 and token not in free[:i])
    engine.config = engine.config.__class__(**{**vars(engine.config), "eos_token_ids": (free[at],)})
    stopped = engine.generate(prompt, Sampling(max_new_tokens=30), plan)[0]
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", free[: at + 1])
    cost = cost_of(plan, engine, 3, at + 1)
    assert (stopped.ledger.layer_tokens, stopped.ledger.decode_flops) == (cost.layer_tokens, cost.decode_flops)


@pytest.mark.parametrize(("num_layers", "horizon"), [(12, 48), (24, 96)])
def test_realised_depth(num_layers: int, horizon: int, tmp_path: Path) -> None:
    """Completions of horizon length run within 5% of depth x L layers on average, all depths in one batch.

    Not for every model: (M + m) / 2 is a multiple of half a layer, which is more than 5% below 5 layers (16 layers at
    depth 1/5 run 3 and not 3.2), and the last token, which would run the fewest, is never consumed: 24 layers at depth 1/5
    are 5.05% deep with horizon 48, which is why theirs is 96 here.
    """
    options = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    model = tiny_model("opt", num_hidden_layers=num_layers, **options)
    engine = Engine.from_pretrained(save(model, tmp_path), cache_gib=0.25)
    depths = [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    generations = engine.generate(
        [[5, 6, 7]] * len(depths),
        Sampling(max_new_tokens=horizon, ignore_eos=True),
        [SkipDecode(depth=depth, horizon=horizon) for depth in depths],
    )
    for depth, generation in zip(depths, generations, strict=True):
        assert generation.ledger.mean_layers == pytest.approx(depth * num_layers, rel=0.05)
        assert not generation.past_horizon


def test_ledgers_add_field_by_field() -> None:
    names = [field.name for field in fields(Ledger)]
    a = Ledger(**{name: 10**at for at, name in enumerate(names)})
    b = Ledger(**{name: 3 * at for at, name in enumerate(names)})
    assert {name: getattr(a + b, name) for name in names} == {name: 10**at + 3 * at for at, name in enumerate(names)}
    assert a + Ledger() == a
    assert Ledger().mean_layers == 0.0


def test_stats_are_shared_and_reset(engine: Engine) -> None:
    """Two equal requests in one pass read the weights once; `reset` starts anew."""
    sampling = Sampling(max_new_tokens=5, ignore_eos=True)
    engine.generate([[1, 2, 3]] * 2, sampling)
    cost = cost_of(Dense().plan(NUM_LAYERS), engine, 3, 5, batch=2)
    stats = engine.stats
    assert (stats.prompt_passes, stats.decode_passes) == (1, 4)
    assert (stats.prompt_bytes, stats.decode_bytes) == (cost.prompt_bytes, cost.decode_bytes)
    assert (stats.dense_prompt_bytes, stats.dense_decode_bytes) == (cost.prompt_bytes, cost.decode_bytes)
    assert stats.peak_cache_bytes == cost.peak_cache_blocks * BLOCK_TOKENS * engine.shape.cache_values_per_token * 4
    assert stats.prompt_s > 0
    assert stats.decode_s > 0
    assert json.loads(json.dumps(asdict(stats))) == asdict(stats)
    assert {type(value) for value in asdict(stats).values()} == {int, float}
    stats.reset()
    assert stats == EngineStats()


def test_peak_of_a_second_run_is_its_own(engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=2)
    engine.generate([[1] * 60] * 3, sampling)
    engine.stats.reset()
    engine.generate([1], sampling)
    assert engine.stats.peak_cache_bytes == NUM_LAYERS * engine.runner.cache.bytes_per_block
