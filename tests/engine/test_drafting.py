"""Verification by the engine: whatever is drafted, tokens, texts and the plan's costs are those of a run without drafts.

The drafter here knows what comes, and errs as told: every number of accepted tokens occurs, which no real one guarantees.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from random_plans import random_plan, random_policy
from random_trees import random_tree
from shoal import Dense, Engine, Generation, Sampling
from shoal.engine.batch import last_of_each
from shoal.engine.drafting import MAX_DRAFT_TOKENS, Draft, DraftRow, DraftStats, num_matching
from shoal.engine.intake import Plan
from shoal.engine.request import Request
from shoal.models.executor import Executor
from ways import WAYS, decoder_of

NUM_REQUESTS = 40


class Knowing:
    """Drafts what will come, with an error at random."""

    def __init__(
        self,
        engine: Engine,
        expected: Mapping[tuple[int, int], Sequence[int]],
        *,
        seed: str,
        longest: int,
        trees: bool = False,
    ) -> None:
        """`expected`: tokens by index and sample; `trees`: half of the drafts branch."""
        self.engine, self.expected, self.rng, self.longest = engine, expected, random.Random(seed), longest
        self.trees = trees
        self.ends: list[int] = []
        self.emitted: dict[int, list[int]] = {}

    def resolve(self, draft: object, prompt_tokens: int, max_new_tokens: int) -> object:
        return draft

    def propose(self, rows: Sequence[DraftRow], tokens: Mapping[int, int], room: int) -> dict[int, Draft]:
        drafts = {}
        for row in rows:
            assert tokens[row.slot] == 1
            assert 0 <= row.most <= MAX_DRAFT_TOKENS
            assert self.engine.runner.slots[row.slot] is row.request
            done = len(row.request.output)
            assert row.clock == done - 1
            coming = list(self.expected[row.request.index, row.request.sample][done:])
            coming += self.rng.choices(range(256), k=self.longest)  # beyond the end, anything
            count = min(self.rng.randint(0, self.longest), row.most, room)
            room -= count
            if not count:
                continue
            drafted = coming[:count]
            if self.rng.random() < 0.6:
                drafted[self.rng.randrange(count)] = self.rng.randrange(256)
            drafts[row.slot] = Draft(tokens=tuple(drafted))
            if self.trees and self.rng.random() < 0.5:
                drafted, parents = random_tree(self.rng, drafted, range(256))
                drafts[row.slot] = Draft(tokens=tuple(drafted), parents=tuple(parents))
        return drafts

    def why_not(self, request: Request) -> str | None:
        return "not this time"

    def committed(self, request: Request, draft: Draft | None, token_ids: Sequence[int]) -> None:
        self.emitted.setdefault(request.request_id, list(request.output))
        assert self.emitted[request.request_id] == request.output
        self.emitted[request.request_id] += token_ids

    def ended(self, request: Request) -> None:
        self.ends.append(request.request_id)


Jobs = tuple[list[list[int]], list[Sampling], list[Plan]]


def random_jobs(seed: str, num_layers: int, *, stop: Sequence[str] = ()) -> Jobs:
    """Prompts, samplings and plans of every kind."""
    rng = random.Random(seed)
    prompts, samplings, plans = [], [], []
    for number in range(NUM_REQUESTS):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 5, 15, 16, 17, 40]))]
        sampling = Sampling(
            max_new_tokens=rng.randint(1, 40),
            ignore_eos=rng.random() < 0.5,
            seed=rng.randrange(2**63),
            temperature=rng.choice([0.0, 0.0, 0.5, 1.2]),
            top_p=rng.choice([None, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logprobs=rng.choice([None, 2]),
            stop=tuple(stop) if rng.random() < 0.5 else (),
            n=rng.choice([1, 1, 2]),
        )
        plan: Plan = rng.choice([Dense(), random_policy(rng, num_layers)])
        if number % 3 == 0:
            plan = random_plan(rng, num_layers, prompt_tokens=len(prompt), max_new_tokens=sampling.max_new_tokens)
        prompts.append(prompt)
        samplings.append(sampling)
        plans.append(plan)
    return prompts, samplings, plans


def knowing(engine: Engine, expected: Sequence[Generation], *, seed: str, longest: int, trees: bool = False) -> Knowing:
    """Install a drafter that knows `expected`."""
    tokens = {(g.index, g.sample): g.token_ids for g in expected}
    drafter = Knowing(engine, tokens, seed=seed, longest=longest, trees=trees)
    engine.runner.drafter = drafter
    return drafter


def without_drafting(generation: Generation) -> Generation:
    """All but what drafting is meant to change."""
    ledger = replace(generation.ledger, draft_layer_tokens=0, draft_flops=0)
    return replace(generation, ledger=ledger, drafting=None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("longest", "trees"), [(1, False), (4, False), (32, False), (8, True), (32, True)])
def test_whatever_is_drafted(
    way: str, longest: int, trees: bool, checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tokens, texts, log-probabilities, finish reasons and the plan's part of the ledger; greedy and sampled, stop strings too."""
    decoder = decoder_of(way, checkpoint)
    num_layers = decoder.config.shape.num_layers
    stop = tokenizer.decode([65, 66]), tokenizer.decode([200])
    jobs = random_jobs("drafted", num_layers, stop=stop)
    expected = Engine(decoder, tokenizer, max_batch=8, cache_gib=0.25).generate(*jobs)
    engine = Engine(decoder, tokenizer, max_batch=8, max_pass_tokens=100, cache_gib=0.25)
    drafter = knowing(engine, expected, seed=way, longest=longest, trees=trees)
    got = engine.generate(*jobs, draft="known")

    close = way != "native"  # the kernel's sums do not depend on how many tokens a row brings
    for ours, plain in zip(got, expected, strict=True):
        assert ours.token_ids == plain.token_ids
        if close and ours.logprobs is not None and plain.logprobs is not None:
            for one, other in zip(ours.logprobs, plain.logprobs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            ours, plain = replace(ours, logprobs=None), replace(plain, logprobs=None)
        assert without_drafting(ours) == without_drafting(plain)
        stats = ours.drafting
        assert stats is not None
        assert stats.steps + stats.accepted in (
            plain.ledger.decode_passes,
            plain.ledger.decode_passes + 1,
        )  # may end in a draft
        assert stats.passes - 1 <= stats.recovered + stats.bonus <= stats.passes  # the last may end within a draft
        assert stats.off == ({"not this time": stats.passes_without} if stats.passes_without else {})
    total = sum((g.drafting for g in got if g.drafting is not None), DraftStats())
    assert total == engine.drafting
    assert 0 < total.accepted < total.drafted
    assert total.taken_back == total.drafted - total.accepted
    assert sorted(drafter.ends) == list(range(sum(sampling.n for sampling in jobs[1])))
    engine.runner.cache.check_integrity()
    assert not engine.runner.cache.blocks_in_use


def test_taken_back_layers_are_counted(make_engine: Callable[..., Engine]) -> None:
    """A draft of 3 of which 1 is right: 2 tokens of every layer were in vain, and their heads."""
    engine = make_engine(max_batch=1)
    sampling = Sampling(max_new_tokens=6, ignore_eos=True)
    (plain,) = engine.generate([1, 2, 3], sampling)
    wrong = (plain.token_ids[2] + 1) % 256

    class Once(Knowing):
        def propose(self, rows: Sequence[DraftRow], tokens: Mapping[int, int], room: int) -> dict[int, Draft]:
            (row,) = rows
            if len(row.request.output) > 1:
                return {}
            return {row.slot: Draft(tokens=(plain.token_ids[1], wrong, plain.token_ids[3]))}

    engine.runner.drafter = Once(engine, {}, seed="", longest=3)
    before = sum(layer.num_tokens_run for layer in engine.runner.decoder.layers)
    (got,) = engine.generate([1, 2, 3], sampling, draft="once")
    ran = sum(layer.num_tokens_run for layer in engine.runner.decoder.layers) - before
    num_layers, shape = engine.shape.num_layers, engine.shape
    assert got.token_ids == plain.token_ids
    assert got.drafting == DraftStats(
        drafted=3, accepted=1, recovered=1, passes=1, passes_without=3, off={"not this time": 3}
    )
    assert got.drafting.steps == 4  # 2 tokens from the first, then 3 times one
    assert got.ledger.draft_layer_tokens == 2 * num_layers
    assert got.ledger.layer_tokens + got.ledger.draft_layer_tokens == ran
    # Positions 5 and 6, which see 6 and 7 keys.
    attention = 4 * shape.num_heads * shape.head_dim * num_layers * (6 + 7)
    assert got.ledger.draft_flops == 2 * (2 * shape.layer_weights * num_layers + 2 * shape.head_weights) + attention


def test_chunks_of_a_stream(make_engine: Callable[..., Engine]) -> None:
    """Only committed tokens come, several at a time, and texts add up."""
    engine = make_engine(max_batch=2)
    sampling = Sampling(max_new_tokens=30, ignore_eos=True)
    expected = engine.generate("ab", sampling)
    knowing(engine, expected, seed="chunks", longest=6)
    chunks = list(engine.stream("ab", sampling, draft="known"))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected[0].token_ids
    assert "".join(chunk.text for chunk in chunks) == expected[0].text
    assert max(len(chunk.token_ids) for chunk in chunks) > 1
    assert chunks[-1].generation is not None


def test_processors_see_what_they_would_see(make_engine: Callable[..., Engine]) -> None:
    """A logits processor is called once per emitted token, in order, with accepted tokens before it."""
    engine = make_engine(max_batch=2)
    seen: list[list[int]] = []

    def processor(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append(list(token_ids))
        return logits

    sampling = Sampling(max_new_tokens=25, ignore_eos=True, processor=processor)
    expected = engine.generate([5, 6], sampling)
    plainly, seen[:] = list(seen), []
    knowing(engine, expected, seed="processors", longest=5)
    assert engine.generate([5, 6], sampling, draft="known")[0].token_ids == expected[0].token_ids
    assert seen == plainly


def test_a_failure_inside_a_draft(make_engine: Callable[..., Engine]) -> None:
    """A processor that raises after two accepted tokens: those stay, the request ends, others go on."""
    engine = make_engine(max_batch=2)
    sampling = Sampling(max_new_tokens=20, ignore_eos=True)
    expected = engine.generate([[5, 6], [7]], sampling)

    def fails(token_ids: list[int], logits: Tensor) -> Tensor:
        if len(token_ids) == 2 + 9:
            raise ValueError("no")
        return logits

    knowing(engine, expected, seed="failure", longest=8)
    failed, fine = engine.generate([[5, 6], [7]], [replace(sampling, processor=fails), sampling], draft="known")
    assert failed.finish_reason == "error"
    assert failed.token_ids == expected[0].token_ids[:9]
    assert fine.token_ids == expected[1].token_ids


def test_a_tight_budget(decoder: Executor) -> None:
    """The most that a request may hold with a draft is reserved: nothing exceeds the budget, and what cannot fit is refused."""
    num_layers = decoder.config.shape.num_layers
    prompts, samplings, plans = random_jobs("budget", num_layers)
    samplings = [replace(sampling, n=1) for sampling in samplings]
    expected = Engine(decoder, max_batch=8, cache_gib=0.25).generate(prompts, samplings, plans)
    block = 16 * decoder.config.shape.cache_values_per_token * 4
    engine = Engine(decoder, max_batch=8, cache_gib=6 * num_layers * block / 2**30)
    knowing(engine, expected, seed="budget", longest=32)
    check = engine.runner.cache.check_integrity
    requests = zip(prompts, samplings, plans, strict=True)
    for index, (prompt, sampling, plan) in enumerate(requests):
        engine.add(prompt, sampling, plan, draft="known", index=index)
    done = {}
    while engine.has_work:
        done |= {chunk.index: chunk.generation for chunk in engine.step() if chunk.generation}
        check()
        assert engine.stats.peak_cache_bytes <= engine.runner.cache.budget_blocks * block
    assert [done[index].token_ids for index in range(NUM_REQUESTS)] == [g.token_ids for g in expected]


def test_last_of_each() -> None:
    """Ends 3, 5, 9; the last 2, 0 and 3 tokens."""
    import numpy as np

    assert last_of_each(np.array([3, 5, 9]), np.array([2, 0, 3])).tolist() == [1, 2, 6, 7, 8]
    assert last_of_each(np.array([3, 5, 9]), np.array([1, 0, 1])).tolist() == [2, 8]


def test_path() -> None:
    """The tree of `engine/trees.py` with tokens a to e: b, then e, then something else; nothing; all of a chain."""
    tree = Draft(tokens=(10, 11, 12, 13, 14), parents=(0, 0, 1, 1, 2))
    assert tree.path([11, 14, 99]) == [2, 5]
    assert tree.path([14]) == []
    assert Draft(tokens=(10, 11)).path([10, 11, 12]) == [1, 2]
    assert [list(tree.children(token)) for token in range(6)] == [[1, 2], [3, 4], [5], [], [], []]


def test_num_matching() -> None:
    assert num_matching([1, 2, 3], [1, 2, 9]) == 2
    assert num_matching([1], [1, 2]) == 1
    assert num_matching([], [1]) == 0
