"""Drafting with a smaller model that has the same tokenizer (Leviathan et al. 2023; Chen et al. 2023).

It keeps a cache of its own, one slot per slot of the engine. Each time it first catches up with what the request has emitted since,
in one ragged pass over all rows; positions of drafts that were taken back are written over.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from torch import Tensor

from shoal.depth.cost import blocks, flops
from shoal.draft.model_draft import CONFIDENCE_PRIORS, ModelDraft, extend
from shoal.draft.proposal import GoOn, Proposal
from shoal.engine.batch import Rows, build_pass, deepest_first
from shoal.engine.cache import KVCache
from shoal.engine.drafting import DraftRow, num_matching
from shoal.engine.request import Request
from shoal.engine.runner import Runner, free_bytes
from shoal.engine.slots import served_pairs
from shoal.engine.step_time import StepTime, pass_work
from shoal.engine.trees import TreeTokens
from shoal.models.executor import Executor
from shoal.models.passes import Ints


@dataclass(eq=False)
class Follower:
    """How far the small model is with one request."""

    slot: int
    """In the small model's cache."""
    engine_slot: int
    """In the engine's, where costs are noted."""
    sure: int = 0
    """Leading tokens of `seen` that the request has emitted or was given."""
    seen: list[int] = field(default_factory=list)
    """Tokens that its cache holds, drafts among them."""
    behind: list[int] = field(default_factory=list)
    """What its next pass brings: tokens of the request, or its own last."""


class SmallModelProposer:
    """Drafts with another model. Evidence: the probability that it gives the drafted token."""

    longest = 8
    priors = CONFIDENCE_PRIORS

    def __init__(self, runner: Runner, decoder: Executor, *, coupled: bool) -> None:
        """`runner`: of the model that verifies; `decoder`: the small one; `coupled`: see `ModelDraft`."""
        self.runner, self.decoder, self.coupled = runner, decoder, coupled
        self.shape = decoder.config.shape
        self.cache = KVCache(
            self.shape,
            dtype=decoder.dtype,
            device=decoder.device,
            num_slots=runner.cache.num_slots,
            budget_bytes=free_bytes(decoder.device) // 2,
        )
        self.step_time = StepTime()
        self._followers: dict[Request, Follower] = {}

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int], go_on: GoOn) -> list[Proposal]:
        """As in `Proposer`."""
        drafts = [ModelDraft(row.request, coupled=self.coupled) for row in rows]
        limits = [min(count, self._room(row)) for row, count in zip(rows, most, strict=True)]
        asked = zip(drafts, (self._follow(row) for row in rows), limits, strict=True)
        going = [(draft, follower, limit) for draft, follower, limit in asked if follower and limit]
        self._catch_up([follower for _, follower, _ in going])
        while going:
            self._pass([(draft, follower) for draft, follower, _ in going])
            going = [one for one in going if len(one[0].tokens) < one[2] and go_on(one[0].evidence)]
            for draft, follower, _ in going:
                follower.behind = draft.tokens[-1:]
        return [draft.proposal() for draft in drafts]

    def seconds(self, rows: Sequence[DraftRow]) -> float | None:
        """As in `Proposer`; of a pass with one token per row."""
        ones = np.ones(len(rows), dtype=np.int64)
        starts = np.array([row.position for row in rows])
        return self.step_time.seconds(pass_work(self._served(ones), starts, ones, len(rows)))

    def ended(self, request: Request) -> None:
        """As in `Proposer`."""
        follower = self._followers.pop(request, None)
        if follower is not None:
            self.cache.release(follower.slot)

    def _room(self, row: DraftRow) -> int:
        """Tokens that the small model's positions leave, none where it has too few."""
        return max(0, self.decoder.config.max_positions - row.position - 1)

    def _follow(self, row: DraftRow) -> Follower | None:
        """Where the small model is, with what it has not seen of the request: at least the last token. None where its cache has no
        room."""
        request = row.request
        one = self._followers.get(request)
        if one is None:
            most = len(request.prompt) + request.sampling.max_new_tokens
            needed = blocks(most) * self.shape.num_layers
            if self.cache.blocks_in_use + needed > self.cache.budget_blocks or not self.cache.fits_slots(most):
                return None
            self.cache.reserve(most)
            one = self._followers[request] = Follower(self.cache.acquire(), row.slot)
        since = request.tokens(one.sure, request.known - one.sure)
        kept = one.sure + min(num_matching(one.seen[one.sure :], since), len(since) - 1)
        del one.seen[kept:]
        one.behind = since[kept - one.sure :]
        one.sure = kept
        return one

    def _catch_up(self, followers: Sequence[Follower]) -> None:
        """Read what is too long for one pass, a row's chunk at a time, up to the last token."""
        most = self.runner.scheduler.max_pass_tokens
        if sum(len(one.behind) for one in followers) <= most:
            return
        for one in followers:
            while len(one.behind) > 1:
                chunk = np.array([min(most, len(one.behind) - 1)])
                start = np.array([len(one.seen)])
                rows = Rows(slots=np.array([one.slot]), starts=start, num_tokens=chunk, served=self._served(chunk))
                self.cache.hold(rows.slots, start[:, None] + rows.served)
                part = one.behind[: int(chunk[0])]
                self.decoder(build_pass(rows, self._known(part), np.zeros(1, dtype=np.int64)), self.cache)
                self._note([one], rows, np.zeros(1, dtype=np.int64))
                one.seen += part
                del one.behind[: len(part)]

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        """Tokens as the small model takes them: its vocabulary may be the smaller one where both are filled up."""
        last = self.shape.vocab_size - 1
        return [min(token, last) for token in token_ids]

    def _note(self, followers: Sequence[Follower], rows: Rows, num_logits: Ints) -> None:
        """Count what a pass took for the requests that it served."""
        work = zip(followers, rows.num_tokens.tolist(), served_pairs(rows).tolist(), num_logits.tolist(), strict=True)
        for one, count, num_pairs, heads in work:
            self.runner.slots.small_model_flops[one.engine_slot] += flops(
                self.shape, layer_tokens=self.shape.num_layers * count, layer_pairs=num_pairs, heads=heads
            )

    def _pass(self, going: Sequence[tuple[ModelDraft, Follower]]) -> None:
        """One pass of the small model: everyone catches up and gets a token."""
        by_slot = {follower.slot: draft for draft, follower in going}
        slots, logits = self._forward([follower for _, follower in going])
        extend([by_slot[slot] for slot in slots], logits)

    def _forward(
        self, followers: Sequence[Follower], trees: Mapping[int, TreeTokens] = MappingProxyType({})
    ) -> tuple[list[int], Tensor]:
        """A pass that brings what everyone is behind. Returns their slots, and in this order logits after the last token of each,
        or after all of them where they are of `trees`."""
        began = time.perf_counter()
        by_slot = {one.slot: one for one in followers}
        counts = np.array([len(one.behind) for one in followers])
        starts = np.array([len(one.seen) for one in followers])
        served = self._served(counts)
        rows = deepest_first(
            Rows(slots=np.array(list(by_slot)), starts=starts, num_tokens=counts, served=served, trees=trees)
        )
        self.cache.hold(rows.slots, rows.starts[:, None] + rows.served)
        ordered = [by_slot[slot] for slot in rows.slots.tolist()]
        token_ids = self._known([token for one in ordered for token in one.behind])
        num_logits = rows.num_tokens if trees else np.ones(len(ordered), dtype=np.int64)
        logits = self.decoder(build_pass(rows, token_ids, num_logits), self.cache)
        for one in ordered:
            one.seen += one.behind
        self._note(ordered, rows, num_logits)
        work = pass_work(rows.served, rows.starts, rows.num_tokens, len(logits))
        self.step_time.observe(work, time.perf_counter() - began)
        return rows.slots.tolist(), logits

    def _served(self, counts: Ints) -> Ints:
        """[R, L]: every layer serves every token."""
        return np.repeat(counts[:, None], self.shape.num_layers, axis=1)
