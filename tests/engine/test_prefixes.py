"""Shared prefixes: the same tokens from the same logits, computed once; references, room and ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compared_runs import Job, Run, assert_same
from families import CONFIGS, save, tiny_model
from made_probes import KINDS, random_probe
from random_plans import random_plan, random_policy
from shoal import Dense, DepthPlan, Engine, Generation, Sampling
from shoal.depth.plan import ALWAYS
from shoal.depth.shape import ModelShape
from shoal.engine.ledger import Ledger
from shoal.engine.prefixes import Prefix
from shoal.errors import CacheBudgetExceeded, InvalidInput
from shoal.models.executor import Executor
from ways import WAYS, decoder_of, needs_kernel

Make = Callable[..., Engine]
PREFIX = [place % 251 for place in range(40)]
ONE = Sampling(max_new_tokens=1)
TEN = Sampling(max_new_tokens=10, ignore_eos=True)


def jobs_of(rng: random.Random, num_layers: int, *, count: int) -> tuple[list[Job], list[int]]:
    """Prompts with a few common beginnings, and how many tokens of each prompt others have, too."""
    beginnings = [[rng.randrange(256) for _ in range(rng.choice([1, 15, 16, 40, 70]))] for _ in range(3)]
    beginnings.append(beginnings[0] + beginnings[1])
    kept = tuple(sorted(rng.sample(range(num_layers), num_layers - 1)))
    jobs: list[Job] = []
    shared: list[int] = []
    for _ in range(count):
        beginning = rng.choice(beginnings)
        prompt = beginning + [rng.randrange(256) for _ in range(rng.choice([1, 2, 17, 30]))]
        sampling = Sampling(max_new_tokens=rng.choice([1, 2, 5, 9]), ignore_eos=True)
        plans = [
            Dense(),
            random_policy(rng, num_layers),
            random_plan(rng, num_layers, prompt_tokens=len(prompt), max_new_tokens=sampling.max_new_tokens),
            DepthPlan(tuple(ALWAYS if layer in kept else 0 for layer in range(num_layers)), prompt_layers=kept),
        ]
        jobs.append((prompt, sampling, rng.choice(plans)))
        shared.append(rng.choice([0, len(beginning), len(beginning)]))
    return jobs, shared


def run(engine: Engine, jobs: Sequence[Job], shared: Sequence[int], draft: Any = None) -> Run:
    """All jobs in one call, and the logits that tokens were chosen from."""
    seen: dict[tuple[int, ...], Tensor] = {}

    def recorder(job: int) -> Callable[[list[int], Tensor], Tensor]:
        def record(token_ids: list[int], logits: Tensor) -> Tensor:
            seen[job, *token_ids] = logits.float().clone()
            return logits

        return record

    prompts, samplings, plans = (list(column) for column in zip(*jobs, strict=True))
    recorded = [replace(sampling, processor=recorder(job)) for job, sampling in enumerate(samplings)]
    return Run(engine.generate(prompts, recorded, plans, draft=draft, shared_tokens=list(shared)), seen)


def alone(ledger: Ledger) -> Ledger:
    """The ledger of the same request if it had computed all of its prompt."""
    return replace(
        ledger,
        prompt_layer_tokens=ledger.prompt_layer_tokens + ledger.shared_layer_tokens,
        prompt_flops=ledger.prompt_flops + ledger.shared_flops,
        shared_prompt_tokens=0,
        shared_layer_tokens=0,
        shared_flops=0,
    )


def in_full(done: Run) -> Run:
    """A run with the ledgers of one that shared nothing."""
    return Run([replace(one, ledger=alone(one.ledger)) for one in done.generations], done.logits)


def spared(generations: Sequence[Generation]) -> list[int]:
    return [one.ledger.shared_prompt_tokens for one in generations]


def is_clean(engine: Engine) -> bool:
    """Nothing is left once the prefixes are dropped."""
    engine.drop_prefixes()
    runner = engine.runner
    return not engine.has_work and runner.cache.blocks_in_use == 0 and len(runner.prefixes) == 0


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """How the model is run."""
    assert isinstance(request.param, str)
    return request.param


@pytest.mark.parametrize("family", list(CONFIGS))
def test_same_as_without(family: str, way: str, tmp_path: Path) -> None:
    """Random jobs, in chunks and drafted: on the kernel to the last bit, elsewhere as close as chunks are."""
    decoder = decoder_of(way, save(tiny_model(family), tmp_path))
    rng = random.Random(f"{family} {way}")
    total = 0
    for max_pass_tokens, draft in ((2048, None), (24, None), (64, "ngram"), (200, "self")):
        jobs, shared = jobs_of(rng, decoder.config.shape.num_layers, count=16)
        options = {"max_batch": 5, "max_pass_tokens": max_pass_tokens, "cache_gib": 0.1}
        plain = run(Engine(decoder, **options), jobs, [0] * len(jobs))  # type: ignore[arg-type]
        engine = Engine(decoder, **options)  # type: ignore[arg-type]
        ours = run(engine, jobs, shared, draft)
        total += sum(spared(ours.generations))
        if draft is None:
            assert_same(in_full(ours), plain, bound=0.0 if way == "native" else 1e-5)
        else:  # logits are looked at for drafted tokens, too, and drafting has a ledger of its own
            assert [one.token_ids for one in ours.generations] == [one.token_ids for one in plain.generations]
        assert is_clean(engine)
    assert total > 100


@needs_kernel
@given(seed=st.integers(0, 2**32), max_batch=st.integers(1, 6), room=st.integers(0, 60), blocks=st.integers(40, 400))
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_any_jobs(native: Executor, seed: int, max_batch: int, room: int, blocks: int) -> None:
    """Any prompts, plans, chunks and budgets, twice in one engine: the same bits, the same sums."""
    rng = random.Random(seed)
    jobs, shared = jobs_of(rng, native.config.shape.num_layers, count=8)
    plain = run(Engine(native, max_batch=4, cache_gib=0.1), jobs, [0] * len(jobs))
    probe = Engine(native, max_batch=1, cache_gib=0.1)
    needed = max(int(probe.prepare(*job)[0].future_blocks[0]) for job in jobs)
    gib = (needed + blocks) * probe.runner.cache.bytes_per_block / 2**30
    engine = Engine(native, max_batch=max_batch, max_pass_tokens=max_batch + room, cache_gib=gib)
    for _ in range(2):
        ours = run(engine, jobs, shared)
        assert_same(in_full(ours), plain, bound=0.0)
        engine.runner.cache.check_integrity()
    assert is_clean(engine)


@pytest.fixture(scope="module")
def native(checkpoint: Path) -> Executor:
    return decoder_of("native", checkpoint)


def test_the_first_computes_it_and_the_others_wait(make_engine: Make) -> None:
    """A stranger passes by meanwhile. Three requests compute 40 tokens once; a later call none of them."""
    engine = make_engine(max_batch=4, max_pass_tokens=16)
    sharing = [engine.add([*PREFIX, number, 7], TEN, shared_tokens=40)[0] for number in range(3)]
    (stranger,) = engine.add([1], TEN)
    first = [chunk.request_id for chunk in engine.step()]
    assert first == [stranger]
    running = {engine.runner.slots[slot].request_id for slot in engine.runner.slots.running}
    assert running == {sharing[0], stranger}
    ledgers = {}
    while engine.has_work:
        ledgers |= {c.request_id: c.generation.ledger for c in engine.step() if c.generation}
    assert [ledgers[one].shared_prompt_tokens for one in sharing] == [0, 40, 40]
    assert [ledgers[one].prompt_layer_tokens for one in sharing] == [6 * 42, 6 * 2, 6 * 2]
    assert [ledgers[one].shared_layer_tokens for one in sharing] == [0, 240, 240]
    assert [ledgers[one].prompt_tokens for one in sharing] == [42] * 3
    position_bytes = 2 * 3 * 8 * 4
    assert engine.stats.copied_bytes == 3 * 40 * 6 * position_bytes * 2, "out of a slot once, into slots twice"
    (again,) = engine.generate([[*PREFIX, 9]], TEN, shared_tokens=40)
    assert again.ledger.prompt_layer_tokens == 6
    assert engine.runner.cache.blocks_in_use == 6 * 3
    assert is_clean(engine)


def test_samples_share_their_prompt(make_engine: Make) -> None:
    """`n` completions of one prompt."""
    engine, sampling = make_engine(), replace(TEN, n=4, temperature=1.0)
    plain = engine.generate([PREFIX], sampling)
    ours = engine.generate([PREFIX], sampling, shared_tokens=39)
    assert [one.token_ids for one in ours] == [one.token_ids for one in plain]
    assert spared(ours) == [0, 39, 39, 39]


@pytest.mark.parametrize(
    ("made", "wanted", "serves"),
    [
        ("1111", "1111", True), ("1111", "1100", True), ("1111", "1000", True), ("1101", "1101", True),
        ("1101", "1100", True), ("1101", "1110", False), ("1101", "1001", False), ("1101", "1111", False),
        ("1000", "1100", False), ("1111", "0111", False),
    ],
)  # fmt: skip
def test_which_plans_it_serves(made: str, wanted: str, serves: bool) -> None:
    """Those whose prompt runs the same layers, up to the deepest that it runs."""
    layers = [np.array([bit == "1" for bit in bits]) for bits in (made, wanted)]
    assert Prefix(((1, 2), None), layers[0]).serves(layers[1]) is serves


def test_plans_that_leave_layers_out(make_engine: Make) -> None:
    """What all layers made serves a prompt that ends early, and no prompt that skips one."""
    engine = make_engine()
    early = DepthPlan((ALWAYS, ALWAYS, 0, 0, 0, 0), prompt_layers=(0, 1))
    skipping = DepthPlan((ALWAYS, 0, ALWAYS, 0, 0, 0), prompt_layers=(0, 2))
    for plan, found in ((Dense(), 0), (early, 40), (skipping, 0), (skipping, 40), (Dense(), 40)):
        (plain,) = make_engine().generate([[*PREFIX, 3]], TEN, plan)
        (ours,) = engine.generate([[*PREFIX, 3]], TEN, plan, shared_tokens=40)
        assert (ours.ledger.shared_prompt_tokens, ours.token_ids) == (found, plain.token_ids), plan
        assert alone(ours.ledger) == plain.ledger
    assert len(engine.runner.prefixes) == 2
    assert engine.runner.cache.kept_blocks == 3 * (6 + 2)


def test_whoever_computes_it_goes_away(make_engine: Make) -> None:
    """The next in line goes on; one that runs fewer layers leaves those that want more to another."""
    engine = make_engine(max_batch=4, max_pass_tokens=16)
    early = DepthPlan((ALWAYS, ALWAYS, 0, 0, 0, 0), prompt_layers=(0, 1))
    first, second = (engine.add([*PREFIX, number], ONE, shared_tokens=40)[0] for number in range(2))
    third, fourth = (
        engine.add([*PREFIX, number], ONE, plan, shared_tokens=40)[0] for number, plan in ((2, early), (3, None))
    )
    engine.step()
    engine.cancel(first)
    engine.cancel(second)
    ended = {}
    while engine.has_work:
        ended |= {c.request_id: c.generation for c in engine.step() if c.generation}
    assert [ended[one].finish_reason for one in (first, second)] == ["cancelled"] * 2
    assert spared([ended[third], ended[fourth]]) == [0, 0]
    assert len(engine.runner.prefixes) == 2
    assert is_clean(engine)


def test_nobody_is_left_behind(make_engine: Make) -> None:
    """All who wait are cancelled, or out of time: nothing refers to anything."""
    engine = make_engine(max_batch=2, max_pass_tokens=16)
    ids = [
        engine.add([*PREFIX, number], ONE, shared_tokens=40, timeout_s=0 if number == 3 else None)[0]
        for number in range(4)
    ]
    engine.step()
    for one in ids:
        engine.cancel(one)
    engine.step()
    assert is_clean(engine)
    engine.generate([[*PREFIX, 1]], ONE, shared_tokens=40)
    assert engine.runner.prefixes.made()


BLOCK_GIB = 16 * 2 * 3 * 8 * 4 / 2**30
"""16 positions, keys and values, 3 heads of 8, float32."""


def test_room(make_engine: Make) -> None:
    """The longest unused goes first, and of it the deepest layers; what is used stays."""
    engine = make_engine(max_batch=2, cache_gib=60 * BLOCK_GIB)
    prompts = [[number, *PREFIX] for number in range(3)]
    for prompt in prompts[:2]:  # each 3 blocks in 6 layers
        engine.generate([prompt], ONE, shared_tokens=40)
    assert engine.runner.cache.kept_blocks == 36
    engine.generate([prompts[0]], ONE, shared_tokens=40)  # now 1 is the one unused for longest
    (big,) = engine.generate([[5] * 64], ONE)  # 24 blocks
    assert big.finish_reason in ("stop", "length")
    assert engine.runner.cache.kept_blocks == 36
    engine.generate([[5] * 80], ONE)  # 30 blocks
    kept = {one.key[0][0]: sorted(one.layers) for one in engine.runner.prefixes.made()}
    assert kept == {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3]}
    early = DepthPlan((ALWAYS, ALWAYS, 0, 0, 0, 0), prompt_layers=(0, 1))
    assert spared(engine.generate([prompts[1]], ONE, early, shared_tokens=40)) == [40], "its lower layers are there"
    assert spared(engine.generate([prompts[1]], ONE, shared_tokens=40)) == [0]
    assert is_clean(engine)


def test_no_room_at_all(make_engine: Make) -> None:
    """A budget for one request: prefixes give way, also those that somebody waits for, and everyone is served."""
    engine = make_engine(max_batch=2, cache_gib=24 * BLOCK_GIB)
    shared = [engine.generate([[*PREFIX, number]], ONE, shared_tokens=40)[0] for number in range(2)]
    assert spared(shared) == [0, 0]
    engine.add([5] * 60, ONE)
    for number in range(3):
        engine.add([*PREFIX[:20], number], ONE, shared_tokens=20)
        engine.add([5] * 60, ONE)
    ended = []
    while engine.has_work:
        ended += [chunk for chunk in engine.step() if chunk.generation]
        engine.runner.cache.check_integrity()
    assert len(ended) == 7
    assert is_clean(engine)


def test_slots_that_are_allocated_whole(make_engine: Make) -> None:
    """As on CUDA: prefixes take what the slots leave of the budget, and go when slots grow."""
    slots = 3 * 6 * 4  # 2 and one more, 6 layers, 64 positions
    for room, kept in ((17, 0), (18, 18), (40, 36)):
        engine = make_engine(max_batch=2, cache_gib=(slots + room) * BLOCK_GIB)
        engine.runner.cache.lazy = False
        for number in range(3):
            engine.generate([[number, *PREFIX]], ONE, shared_tokens=40)
        assert engine.runner.cache.kept_blocks == kept
        if room == 40:
            with pytest.raises(CacheBudgetExceeded, match="allocates whole"):
                engine.generate([[5] * 70], ONE)
        assert is_clean(engine)
    engine = make_engine(max_batch=2, cache_gib=(2 * slots + 20) * BLOCK_GIB)
    engine.runner.cache.lazy = False
    for number in range(2):
        engine.generate([[number, *PREFIX]], ONE, shared_tokens=40)
    assert engine.runner.cache.kept_blocks == 36
    engine.generate([[5] * 70], ONE)
    assert engine.runner.cache.kept_blocks <= 20
    assert is_clean(engine)


def test_as_many_as_slots(make_engine: Make) -> None:
    engine = make_engine(max_batch=2)
    for number in range(5):
        engine.generate([[number, *PREFIX]], ONE, shared_tokens=40)
    assert sorted(one.key[0][0] for one in engine.runner.prefixes.made()) == [3, 4]


def test_not_finite(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are not finite are nobody else's: who computed them fails, the others don't."""
    engine = make_engine(max_batch=4)
    decoder = engine.runner.decoder
    broken = [True]

    def poisoned(work: Any, cache: Any) -> Tensor:
        logits = decoder(work, cache)
        if broken.pop() if broken else False:
            cache.values[2][0, :, 3] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "decoder", poisoned)
    monkeypatch.setattr(poisoned, "device", decoder.device, raising=False)
    done = engine.generate([[*PREFIX, number] for number in range(3)], ONE, shared_tokens=40)
    assert [one.finish_reason for one in done] == ["error", "length", "length"]
    assert spared(done)[1:] != [40, 40], "the first that is not broken computes it"
    assert is_clean(engine)


@pytest.mark.parametrize("kind", [*KINDS, "mean and gate"])
def test_probes(kind: str, decoder: Executor) -> None:
    """Pooling and gates go on from what was read of the prefix; attention has to see all of it, and computes it anew."""
    engine = Engine(decoder, max_batch=3, cache_gib=0.1)
    names = kind.split(" and ") if " and " in kind else [kind]
    probes = engine.observer([random_probe(engine, name) for name in names])
    others = engine.observer([random_probe(engine, "gate", seed=9)])
    prompts = [[*PREFIX, *range(number + 1)] for number in range(4)]
    plain = engine.generate(prompts, ONE, probes=probes)
    engine.generate(prompts[:1], ONE, shared_tokens=40)
    engine.generate(prompts[:1], ONE, shared_tokens=40, probes=others)
    ours = engine.generate(prompts, ONE, probes=probes, shared_tokens=40)
    assert spared(ours) == ([0] * 4 if "attention" in kind else [0, 40, 40, 40]), "other probes' state is no use"
    for got, expected in zip(ours, plain, strict=True):
        assert got.token_ids == expected.token_ids
        assert got.labels is not None
        assert expected.labels is not None
        for name, label in expected.labels.items():
            assert got.labels[name].probabilities == pytest.approx(dict(label.probabilities), abs=1e-5)
        less = bool(got.ledger.shared_prompt_tokens) and kind != "max"  # whose comparisons are no operations
        assert (got.ledger.probe_flops < expected.ledger.probe_flops) == less
    assert is_clean(engine)


class Listening:
    """A router that takes half of the layers and keeps what it was given."""

    num_windows = 2

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 64) -> DepthPlan:
        return DepthPlan((ALWAYS,) * num_layers)

    def check(self, shape: ModelShape) -> None:
        pass

    def route(self, states: Any) -> DepthPlan:
        self.heard.append(states.copy())
        return DepthPlan((ALWAYS, 0) * ((len(states) - 1) // 2))


def test_routers_read_all_of_it(make_engine: Make) -> None:
    """And so compute all of it, but what they would do is left to the others."""
    engine, router = make_engine(), Listening()
    prompts = [[*PREFIX, number] for number in range(3)]
    done = engine.generate(prompts, TEN, [router, Dense(), Dense()], shared_tokens=40)
    assert spared(done) == [0, 0, 40]
    (plain,) = make_engine().generate(prompts[:1], TEN, router)
    assert done[0].token_ids == plain.token_ids
    np.testing.assert_allclose(*router.heard, atol=1e-4)


def test_prompt_scores(make_engine: Make) -> None:
    """Scores of all tokens want all logits. Those of the last ones do not: they are the same, and the prefix is shared."""
    engine = make_engine(max_pass_tokens=32)
    prompts = [[*PREFIX, 50, 60, number] for number in range(3)]
    whole = engine.generate(prompts, replace(ONE, prompt_logprobs=2), shared_tokens=40)
    assert spared(whole) == [0, 0, 0]
    for last, found in ((1, 40), (2, 40), (3, 0), (40, 0), (99, 0)):
        ours = engine.generate(prompts, replace(ONE, prompt_logprobs=2, prompt_logprobs_last=last), shared_tokens=40)
        assert spared(ours)[1:] == [found] * 2, last
        for one, all_of_it in zip(ours, whole, strict=True):
            assert one.token_ids == all_of_it.token_ids
            assert one.prompt_logprobs is not None
            assert all_of_it.prompt_logprobs is not None
            assert len(one.prompt_logprobs) == min(last, 42)
            for got, expected in zip(one.prompt_logprobs, all_of_it.prompt_logprobs[-last:], strict=True):
                assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
                assert list(got.top) == list(expected.top)


def test_bad_input(engine: Engine) -> None:
    for shared in (-1, 3, 4):
        with pytest.raises(InvalidInput, match="shared_tokens must be 0 to 2"):
            engine.generate([[1, 2, 3]], ONE, shared_tokens=shared)
    with pytest.raises(InvalidInput, match="2 values of shared_tokens for 1 prompts"):
        engine.generate([[1, 2, 3]], ONE, shared_tokens=[1, 1])
    with pytest.raises(InvalidInput, match="prompt_logprobs_last must be"):
        Sampling(prompt_logprobs_last=3)
    with pytest.raises(InvalidInput, match="prompt_logprobs_last must be"):
        Sampling(prompt_logprobs=0, prompt_logprobs_last=0)


def test_a_failure_to_grow_leaves_the_queue_as_it_was(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was to compute the prefix still is."""
    engine = make_engine()
    cache = engine.runner.cache
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_allocate", lambda capacity: (_ for _ in ()).throw(OSError("no memory")))
        for number in range(2):
            engine.add([*PREFIX, number], ONE, shared_tokens=40)
        for _ in range(2):
            with pytest.raises(CacheBudgetExceeded, match="no memory"):
                engine.step()
    done = []
    while engine.has_work:
        done += [chunk.generation for chunk in engine.step() if chunk.generation]
    assert spared(done) == [0, 40]
    assert is_clean(engine)
