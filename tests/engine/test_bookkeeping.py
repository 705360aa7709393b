"""Slots, blocks and the queue under random sequences of requests that come, draft, finish, are cancelled, late, or fail.

Integers alone: in place of the decoder stands a function that writes tokens as their own keys and checks every one that it reads.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from random_plans import random_plan
from random_trees import random_tree
from shoal import DepthPlan, Engine, Generation, Sampling
from shoal.depth.cost import blocks
from shoal.depth.shape import ModelShape
from shoal.engine import engine as engine_module
from shoal.engine import runner as runner_module
from shoal.engine.cache import KVCache
from shoal.engine.drafting import MAX_DRAFT_TOKENS, Draft, DraftRow
from shoal.engine.request import Request
from shoal.engine.slots import future_blocks
from shoal.errors import CacheBudgetExceeded
from shoal.models.passes import LayerWork, Pass
from shoal.models.weights import DecoderConfig

NUM_LAYERS, VOCAB, EOS, POISON = 4, 8, 7, 6
SHAPE = ModelShape(
    num_layers=NUM_LAYERS, hidden_size=4, num_heads=1, num_kv_heads=1, head_dim=4, intermediate_size=4, gated_mlp=False,
    vocab_size=VOCAB,
)  # fmt: skip


class NoDecoder:
    """Emits tokens drawn at random, the end token at times, NaN for a row that was given `POISON`; keeps the books of the cache."""

    def __init__(self) -> None:
        self.config = DecoderConfig(
            family="none", shape=SHAPE, max_positions=4096, norm="layernorm", norm_eps=1e-5, activation="relu",
            eos_token_ids=(EOS,),
        )  # fmt: skip
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.rng = random.Random(0)
        self.engine: Engine | None = None
        self.written: dict[tuple[int, int], int] = {}
        self.num_tokens: list[int] = []

    def __call__(self, work: Pass, cache: KVCache) -> Tensor:
        cache.check_integrity()
        self.num_tokens.append(len(work.token_ids))
        for index, layer in enumerate(work.layers):
            for slot, position, token in zip(*self.tokens_of(layer, work.token_ids.tolist()), strict=True):
                place = (index, slot)
                # What it reads is there, and is the request's own: not of a request before it, not of a draft taken back.
                assert self.engine is not None
                written = max(self.written.get(place, 0), int(self.engine.runner.slots.shared_tokens[slot]))
                assert written >= position, f"{place} reads {position} positions of {written} written"
                cached = cache.keys[index][slot, 0, :, 0]
                request = self.engine.runner.slots[slot]
                known = [*request.prompt, *request.output]
                count = min(position, len(known))
                assert cached[:count].tolist() == known[:count], f"{place} reads tokens that are not its request's"
                cached[position] = token
                self.written[place] = position + 1
                assert blocks(position + 1) <= cache.num_blocks[slot, index], f"{place} holds too few blocks"
                assert position < cache.max_positions
        if (
            work.trees
        ):  # whatever is written where, a token sees as many positions as stand before it in its text, and its own
            seen = work.trees.below + [bin(bits).count("1") for bits in work.trees.among]
            assert (seen == work.positions + 1).all()
        logits = torch.zeros(len(work.logit_tokens), VOCAB)
        for row, token in enumerate(work.token_ids[work.logit_tokens].tolist()):
            likely = (token + 1) % POISON if self.rng.random() < 0.7 else self.rng.randrange(POISON)
            logits[row, EOS if self.rng.random() < 0.03 else likely] = 1
            if token == POISON:
                logits[row] = torch.nan
        return logits

    @staticmethod
    def tokens_of(layer: LayerWork | None, token_ids: list[int]) -> tuple[list[int], list[int], list[int]]:
        if layer is None:
            return [], [], []
        slots: list[int] = []
        positions: list[int] = []
        for first, count, slot, start in layer.spans.tolist():
            assert first == len(slots), "spans must cover the active tokens in order"
            slots += [slot] * count
            positions += range(start, start + count)
        assert len(slots) == layer.num_tokens
        chosen = range(layer.num_tokens) if layer.select is None else layer.select.tolist()
        return slots, positions, [token_ids[token] for token in chosen]


class RandomDrafter:
    """Drafts what is likely, errs at times, and does not always draft."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.running: set[int] = set()

    def resolve(self, draft: object, prompt_tokens: int, max_new_tokens: int) -> object:
        return draft

    def propose(self, rows: Sequence[DraftRow], tokens: Mapping[int, int], room: int) -> dict[int, Draft]:
        drafts = {}
        for row in rows:
            self.running.add(row.request.request_id)
            count = min(self.rng.choice([0, 1, 2, 5, 32]), row.most, room)
            room -= count
            if count:
                last = row.request.output[-1]
                drafted = [(last + 1 + step) % POISON for step in range(count)]
                drafted[self.rng.randrange(count)] = self.rng.randrange(POISON)
                drafts[row.slot] = Draft(tokens=tuple(drafted))
                if self.rng.random() < 0.4:
                    drafted, parents = random_tree(self.rng, drafted, range(POISON))
                    drafts[row.slot] = Draft(tokens=tuple(drafted), parents=tuple(parents))
        return drafts

    def why_not(self, request: Request) -> str | None:
        return None

    def committed(self, request: Request, draft: Draft | None, token_ids: Sequence[int]) -> None:
        pass

    def ended(self, request: Request) -> None:
        self.running.discard(request.request_id)


class Bookkeeping(RuleBasedStateMachine):
    """Whatever happens: no block is lost, the budget holds, requests are admitted in order, and every one ends once."""

    @initialize(
        max_batch=st.integers(1, 4),
        room=st.integers(0, 12),
        budget_blocks=st.integers(3 * NUM_LAYERS, 60),
        seed=st.integers(0, 2**32),
    )
    def start(self, max_batch: int, room: int, budget_blocks: int, seed: int) -> None:
        self.decoder = NoDecoder()
        self.decoder.rng.seed(seed)
        self.rng = random.Random(seed)
        self.budget_blocks = budget_blocks
        self.max_pass_tokens = max_batch + room
        # 16 positions x 2 x 1 head x 4 values x 4 bytes.
        gib = budget_blocks * 16 * 2 * 4 * 4 / 2**30
        self.engine = Engine(self.decoder, max_batch=max_batch, max_pass_tokens=self.max_pass_tokens, cache_gib=gib)  # type: ignore[arg-type]
        assert self.engine.runner.cache.budget_blocks == budget_blocks
        self.decoder.engine = self.engine
        self.engine.runner.drafter = self.drafter = RandomDrafter(self.rng)
        self.now = 0.0
        self.patch = pytest.MonkeyPatch()
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        self.patch.setattr(runner_module, "time", clock)
        self.patch.setattr(engine_module, "time", clock)
        self.plans: dict[int, tuple[DepthPlan, int]] = {}
        self.admitted: list[int] = []
        self.ended: dict[int, Generation] = {}
        self.may_be: dict[int, set[str]] = {}
        self.deadlines: dict[int, float] = {}

    @rule(
        prompt_tokens=st.integers(1, 40),
        max_new_tokens=st.integers(1, 40),
        timeout_s=st.none() | st.integers(1, 30),
        poisoned=st.sampled_from([False] * 7 + [True]),
        draft=st.sampled_from([None, "random"]),
        shared_tokens=st.sampled_from([0, 0, 1, 16, 33, 33]),
    )
    def submit(
        self, prompt_tokens: int, max_new_tokens: int, timeout_s: int | None, poisoned: bool, draft: str | None,
        shared_tokens: int,
    ) -> None:  # fmt: skip
        plan = random_plan(self.rng, NUM_LAYERS, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
        prompt = [self.rng.randrange(POISON) for _ in range(prompt_tokens - 1)] + [POISON if poisoned else 1]
        shared_tokens = min(shared_tokens, prompt_tokens - 1)
        if shared_tokens and self.rng.random() < 0.75:  # so that some have the same prefix
            plan = DepthPlan(plan.cutoffs)
        prompt[:shared_tokens] = [place % POISON for place in range(shared_tokens)]
        needed = plan.cost(SHAPE, prompt_tokens=prompt_tokens, new_tokens=max_new_tokens).peak_cache_blocks
        if draft:
            ahead = future_blocks(plan, prompt_tokens, max_new_tokens, MAX_DRAFT_TOKENS)
            assert ahead[0] >= needed
            needed = int(ahead[0])
        ask = Sampling(max_new_tokens=max_new_tokens)
        if needed > self.budget_blocks:
            with pytest.raises(
                CacheBudgetExceeded, match=f"need {needed} cache blocks .* budget is {self.budget_blocks}"
            ):
                self.engine.add(prompt, ask, plan, draft=draft)
            return
        (request_id,) = self.engine.add(
            prompt, ask, plan, draft=draft, timeout_s=timeout_s, shared_tokens=shared_tokens
        )
        self.plans[request_id] = (plan, prompt_tokens)
        self.may_be[request_id] = {"error"} if poisoned else {"stop", "length"}
        if timeout_s is not None:
            self.deadlines[request_id] = self.now + timeout_s

    @rule(which=st.integers(0, 30))
    def cancel(self, which: int) -> None:
        """Of any request: waiting, running or ended."""
        if which not in self.plans:
            return
        self.engine.cancel(which)
        if which not in self.ended:
            self.may_be[which] = {"cancelled"}

    @rule(seconds=st.integers(1, 20))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.one_step()

    def one_step(self) -> None:
        passes = len(self.decoder.num_tokens)
        for chunk in self.engine.step():
            if chunk.generation is not None:
                assert chunk.request_id not in self.ended, "ended twice"
                self.ended[chunk.request_id] = chunk.generation
        self.watch_admission()
        self.books_add_up()
        if self.engine.runner.slots.running:
            assert len(self.decoder.num_tokens) == passes + 1, "requests run, but no pass did"
        if len(self.decoder.num_tokens) > passes:
            assert self.decoder.num_tokens[-1] <= self.max_pass_tokens

    def watch_admission(self) -> None:
        """First come, first served: whoever has been admitted came before everyone who still waits, unless it is for a prefix."""
        line = self.engine.runner.scheduler.waiting
        assert [request.request_id for request in line] == sorted(request.request_id for request in line)
        waiting = [request.request_id for request in line if not request.shared_tokens]
        running = [self.engine.runner.slots[slot].request_id for slot in self.engine.runner.slots.running]
        if waiting and running:
            assert max(running) < min(waiting)

    @invariant()
    def books_add_up(self) -> None:
        if not hasattr(self, "engine"):
            return
        runner = self.engine.runner
        cache, slots = runner.cache, runner.slots
        cache.check_integrity()
        assert set(cache.free_slots).isdisjoint(slots.running)
        assert len(cache.free_slots) + len(slots.running) == cache.num_slots
        assert slots.reserved_blocks() + cache.kept_blocks <= self.budget_blocks
        made = runner.prefixes.made()
        assert cache.kept_blocks == sum(len(one.layers) * blocks(one.num_tokens) for one in made)
        for slot in slots.running:
            request = slots[slot]
            plan, prompt_tokens = self.plans[request.request_id]
            computed = int(slots.num_computed[slot])
            clock = computed - prompt_tokens
            for layer in range(NUM_LAYERS):
                kept = plan.runs_prompt[layer] and (clock < 0 or plan.cutoffs[layer] > clock)
                assert cache.num_blocks[slot, layer] == (blocks(computed) if kept else 0)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self.serve_everyone()
        finally:
            self.patch.undo()

    def serve_everyone(self) -> None:
        """Everyone ends within as many passes as there are tokens, and nothing is left behind."""
        most = sum(40 + 40 for _ in self.plans) + 1
        for _ in range(most):
            if not self.engine.has_work:
                break
            self.one_step()
        assert not self.engine.has_work
        assert self.ended.keys() == self.plans.keys()
        for request_id, generation in self.ended.items():
            allowed = self.may_be[request_id] | ({"timeout"} if request_id in self.deadlines else set())
            # A request that is cancelled or late in its last pass may have ended before anyone looked.
            assert generation.finish_reason in allowed, (request_id, generation)
        assert not self.drafter.running
        cache = self.engine.runner.cache
        assert cache.blocks_in_use == cache.kept_blocks
        for prefix in self.engine.runner.prefixes.made():
            assert not prefix.references.any()
        self.engine.drop_prefixes()
        assert cache.blocks_in_use == 0
        assert len(self.engine.runner.prefixes) == 0
        assert sorted(cache.free_slots) == list(range(cache.num_slots))


Bookkeeping.TestCase.settings = settings(
    max_examples=50, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
TestBookkeeping = Bookkeeping.TestCase
