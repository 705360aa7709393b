"""A request's tokens do not depend on who shares its batch; by the kernel its logits neither, to the last bit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from near_ties import assert_same_tokens_up_to_near_ties
from random_plans import random_plan, random_policy
from shoal import Dense, Engine, Sampling, SkipDecode
from shoal.engine.cache import KVCache
from shoal.engine.intake import Plan
from shoal.models.executor import Executor
from shoal.models.layout import lay_out
from shoal.models.native.decoder import NativeDecoder
from shoal.models.passes import Pass
from ways import WAYS, decoder_of

NUM_BATCHES, NUM_STRANGERS = 200, 80


@dataclass(frozen=True, kw_only=True)
class Stranger:
    """A request and what it gives alone."""

    prompt: list[int]
    sampling: Sampling
    plan: Plan
    tokens: tuple[int, ...]
    logits: Tensor
    """[generated, V]."""


class PathCounter:
    """The decoder, and how its layers came to their tokens."""

    def __init__(self, decoder: Executor) -> None:
        self.decoder = decoder
        self.config, self.dtype, self.device = decoder.config, decoder.dtype, decoder.device
        self.paths: Counter[str] = Counter()

    def __call__(self, work: Pass, cache: KVCache) -> Tensor:
        for layer in work.layers:
            if layer is None:
                self.paths["no token"] += 1
            elif layer.num_tokens == len(work.token_ids):
                assert layer.select is None
                self.paths["all tokens"] += 1
            else:
                self.paths["by index" if layer.select is not None else "leading slice"] += 1
        if not isinstance(self.decoder, NativeDecoder):
            self._count_attention_calls(work, cache)
        return self.decoder(work, cache)

    def _count_attention_calls(self, work: Pass, cache: KVCache) -> None:
        """Those that PyTorch makes."""
        layouts = {id(layer): lay_out(layer, cache.keys[0]) for layer in work.layers if layer is not None}
        for layer in filter(None, work.layers):
            layout = layouts[id(layer)]
            self.paths["out of slot order"] += layout.slot_order is not None
            for run in layout.runs:
                kind = "chunk" if run.tokens_per_row > 1 else "decode"
                self.paths[f"{kind}, {'masked' if run.bias is not None else 'unmasked'}"] += 1


def record(engine: Engine, prompts: list[list[int]], samplings: list[Sampling], plans: list[Plan]) -> list[Tensor]:
    """[generated, V] of each request, from a run in which nothing else is different."""
    rows: list[list[Tensor]] = [[] for _ in prompts]

    def recorder(number: int) -> Callable[[list[int], Tensor], Tensor]:
        def keep(token_ids: list[int], logits: Tensor) -> Tensor:
            rows[number].append(logits.clone())
            return logits

        return keep

    engine.generate(prompts, [replace(s, processor=recorder(i)) for i, s in enumerate(samplings)], plans)
    return [torch.stack(kept) for kept in rows]


@pytest.fixture(scope="module", params=WAYS)
def decoder(request: pytest.FixtureRequest, checkpoint: Path) -> Executor:
    """The model in float32, each way."""
    return decoder_of(request.param, checkpoint)


@pytest.fixture(scope="module")
def strangers(decoder: Executor) -> list[Stranger]:
    """Requests of every kind, each run alone."""
    rng = random.Random("strangers")
    alone = Engine(decoder, max_batch=1, cache_gib=0.25)
    num_layers = decoder.config.shape.num_layers
    made = []
    for number in range(NUM_STRANGERS):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 3, 7, 16, 17, 30, 50]))]
        max_new_tokens = rng.choice([1, 2, 5, 8, 12])
        plans: list[Plan] = [
            Dense(),
            SkipDecode(depth=rng.choice([1 / 3, 1 / 2, 2 / 3]), horizon=rng.choice([4, 12])),
            random_policy(rng, num_layers),
            random_plan(rng, num_layers, prompt_tokens=len(prompt), max_new_tokens=max_new_tokens),
        ]
        sampling = Sampling(max_new_tokens=max_new_tokens, ignore_eos=True)
        if number % 3 == 0:
            top_p = rng.choice([None, 0.9])
            sampling = replace(sampling, temperature=rng.choice([0.7, 1.5]), top_p=top_p, seed=rng.randrange(2**63))
        plan = plans[number % 4]
        tokens = alone.generate(prompt, sampling, plan)[0].token_ids
        logits = record(alone, [prompt], [sampling], [plan])[0]
        made.append(Stranger(prompt=prompt, sampling=sampling, plan=plan, tokens=tokens, logits=logits))
    return made


def run(engine: Engine, company: Sequence[Stranger]) -> list[tuple[int, ...]]:
    """Tokens of each, all submitted together."""
    generations = engine.generate(
        [one.prompt for one in company], [one.sampling for one in company], [one.plan for one in company]
    )
    return [generation.token_ids for generation in generations]


def test_alone_and_among_strangers(decoder: Executor, strangers: list[Stranger]) -> None:
    """200 random batches: other plans, lengths and samplings beside it, other slots, chunked prompts, a waiting queue."""
    counter = PathCounter(decoder)
    rng = random.Random("batches")
    got: list[tuple[int, ...]] = []
    expected: list[Stranger] = []
    largest = 0.0
    for number in range(NUM_BATCHES):
        max_batch = rng.randint(1, 8)
        max_pass_tokens = max_batch + rng.choice([0, 1, 5, 40, 2000])
        engine = Engine(counter, max_batch=max_batch, max_pass_tokens=max_pass_tokens, cache_gib=0.25)  # type: ignore[arg-type]
        company = rng.sample(strangers, rng.randint(2, 7))
        got += run(engine, company)
        expected += company
        if number % 10 == 0:
            rows = record(engine, *map(list, zip(*((c.prompt, c.sampling, c.plan) for c in company), strict=True)))  # type: ignore[arg-type]
            for one, logits in zip(company, rows, strict=True):
                largest = max(largest, float((logits - one.logits).abs().max()))
        assert engine.runner.cache.blocks_in_use == 0
        assert not engine.has_work
    native = isinstance(decoder, NativeDecoder)
    assert largest <= (0 if native else 1e-4), "logits in company differ by more than rounding, or at all by the kernel"
    drawn = [i for i, one in enumerate(expected) if one.sampling.temperature > 0]
    assert [got[i] for i in drawn] == [expected[i].tokens for i in drawn]
    greedy = [i for i, one in enumerate(expected) if one.sampling.temperature == 0]
    assert_same_tokens_up_to_near_ties(
        [got[i] for i in greedy],
        [expected[i].tokens for i in greedy],
        [expected[i].logits for i in greedy],
        largest_difference=largest,
    )
    print(counter.paths)
    for path in ("no token", "all tokens", "leading slice", "by index"):
        assert counter.paths[path] > 300, f"too few layers ran on {path}: {counter.paths}"
    calls = ("out of slot order", "chunk, masked", "chunk, unmasked", "decode, masked", "decode, unmasked")
    for path in () if native else calls:
        assert counter.paths[path] > 300, f"too few attention calls were {path}: {counter.paths}"


def test_a_chain_of_plans_needs_no_index(decoder: Executor) -> None:
    """Plans of one family with one warm-up, at different clocks and depths: each layer's rows are a leading slice."""
    counter = PathCounter(decoder)
    engine = Engine(counter, max_batch=8, cache_gib=0.25)  # type: ignore[arg-type]
    rng = random.Random("chain")
    depths = [1, 1 / 2, 1 / 3, 2 / 3]
    for number in range(12):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 4, 20]))]
        plan = SkipDecode(depth=rng.choice(depths), horizon=rng.choice([5, 10]))
        engine.add(prompt, Sampling(max_new_tokens=rng.randint(2, 15)), plan)
        if number % 3 == 2:
            engine.step()
    while engine.has_work:
        engine.step()
    assert counter.paths["by index"] == 0
    assert counter.paths["leading slice"] > 50


def test_order_of_submission_does_not_matter(decoder: Executor, strangers: list[Stranger]) -> None:
    company = strangers[:12]
    forwards = run(Engine(decoder, max_batch=4, cache_gib=0.25), company)
    backwards = run(Engine(decoder, max_batch=4, cache_gib=0.25), company[::-1])
    assert forwards == backwards[::-1] == [one.tokens for one in company]
