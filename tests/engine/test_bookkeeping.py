"""Slots, blocks and the queue under random sequences of requests that come, finish, are cancelled, late, or fail.

Integers alone: in place of the decoder stands a function that computes nothing and checks every read against every write.
"""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from random_plans import random_plan
from shoal import DepthPlan, Engine, Generation, Sampling
from shoal.depth.cost import blocks
from shoal.depth.shape import ModelShape
from shoal.engine import engine as engine_module
from shoal.engine import runner as runner_module
from shoal.engine.cache import KVCache
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
        self.written: Counter[tuple[int, int]] = Counter()
        self.num_tokens: list[int] = []

    def __call__(self, work: Pass, cache: KVCache) -> Tensor:
        cache.check_integrity()
        self.num_tokens.append(len(work.token_ids))
        for index, layer in enumerate(work.layers):
            for slot, position in zip(*self.tokens_of(layer), strict=True):
                place = (index, slot)
                # Position 0 begins a request. Each later position follows the one before, so that all it reads exists.
                assert position in (0, self.written[place]), (
                    f"{place} reads {position} of {self.written[place]} written"
                )
                self.written[place] = position + 1
                assert blocks(position + 1) <= cache.num_blocks[slot, index], f"{place} holds too few blocks"
                assert position < cache.max_positions
        logits = torch.zeros(len(work.logit_tokens), VOCAB)
        for row, token in enumerate(work.token_ids[work.logit_tokens].tolist()):
            logits[row, EOS if self.rng.random() < 0.03 else self.rng.randrange(POISON)] = 1
            if token == POISON:
                logits[row] = torch.nan
        return logits

    @staticmethod
    def tokens_of(layer: LayerWork | None) -> tuple[list[int], list[int]]:
        if layer is None:
            return [], []
        slots, positions = [], []
        for first, count, slot, start in layer.spans.tolist():
            assert first == len(slots), "spans must cover the active tokens in order"
            slots += [slot] * count
            positions += range(start, start + count)
        assert len(slots) == layer.num_tokens
        return slots, positions


class Bookkeeping(RuleBasedStateMachine):
    """Whatever happens: no block is lost, the budget holds, requests are admitted in order, and every one ends once."""

    @initialize(
        max_batch=st.integers(1, 4),
        room=st.integers(0, 12),
        budget_blocks=st.integers(3 * NUM_LAYERS, 40),
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
    )
    def submit(self, prompt_tokens: int, max_new_tokens: int, timeout_s: int | None, poisoned: bool) -> None:
        plan = random_plan(self.rng, NUM_LAYERS, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
        prompt = [0] * (prompt_tokens - 1) + [POISON if poisoned else 1]
        needed = plan.cost(SHAPE, prompt_tokens=prompt_tokens, new_tokens=max_new_tokens).peak_cache_blocks
        ask = Sampling(max_new_tokens=max_new_tokens)
        if needed > self.budget_blocks:
            with pytest.raises(
                CacheBudgetExceeded, match=f"need {needed} cache blocks .* budget is {self.budget_blocks}"
            ):
                self.engine.add(prompt, ask, plan)
            return
        (request_id,) = self.engine.add(prompt, ask, plan, timeout_s=timeout_s)
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
        """First come, first served: whoever has been admitted came before everyone who still waits."""
        waiting = [request.request_id for request in self.engine.runner.scheduler.waiting]
        assert waiting == sorted(waiting)
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
        assert slots.reserved_blocks() <= self.budget_blocks
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
        cache = self.engine.runner.cache
        assert cache.blocks_in_use == 0
        assert sorted(cache.free_slots) == list(range(cache.num_slots))


Bookkeeping.TestCase.settings = settings(
    max_examples=50, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
TestBookkeeping = Bookkeeping.TestCase
