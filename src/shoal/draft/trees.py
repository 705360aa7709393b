"""Drafting trees with a model: several different tokens at each depth, verified in one pass.

The branches of a node are drawn without replacement from what the drafting model thinks comes next, at the request's temperature
(RSD-C, Jeon et al. 2024, arXiv 2402.14160), and accepted by recursive rejection (`sampler.couple`); greedy requests take the most
probable ones. Each level is one pass of the drafting model, with all its tokens:

    branches (3, 2)    pass 1 brings the last committed token, and gets tokens 1 2 3 after it
                       pass 2 brings 1 2 3, and gets two tokens after each: 9 tokens to verify
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import DepthPlan, DepthPolicy
from shoal.draft.choices import tree_tokens
from shoal.draft.model_draft import DRAWN, soften
from shoal.draft.proposal import GoOn, Proposal
from shoal.draft.shallow import ShallowProposer
from shoal.draft.small import Follower, SmallModelProposer
from shoal.engine.batch import Rows, build_pass, deepest_first
from shoal.engine.drafting import DraftRow
from shoal.engine.runner import Runner
from shoal.engine.sampler import draw, sibling_draw, without
from shoal.engine.sampling import uniform_noise
from shoal.engine.trees import TreeTokens
from shoal.models.executor import Executor

Branches = tuple[int, ...]
"""Tokens drafted after each one of a depth, from the last committed one on."""


def thinned(branches: Branches, most: int) -> Branches:
    """Branches of a tree of at most `most` tokens: it is no deeper than that, and its widest depth, the last of equal ones, loses
    one until it fits.

    A request that has 7 tokens to go makes (2, 1, 1) of (3, 2, 1): no path is longer, and all is written where tokens will be.
    """
    fitting = list(branches[:most])
    while tree_tokens(fitting) > most:
        widest = max(range(len(fitting)), key=lambda depth: (fitting[depth], depth))
        fitting[widest] -= 1
    return tuple(fitting)


class TreeDraft:
    """A tree under way."""

    def __init__(self, row: DraftRow, branches: Branches) -> None:
        self.row, self.branches = row, branches
        self.coupled = row.request.sampling.temperature > 0
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.distributions: list[Tensor] = []
        self.depth, self.first = 0, 0  # of the deepest tokens, and the number of the first of them

    @property
    def whole(self) -> bool:
        """Whether it is as deep as it shall be."""
        return self.depth == len(self.branches)

    @property
    def deepest(self) -> list[int]:
        """What the next pass brings."""
        return self.tokens[self.first - 1 :] if self.depth else self.row.request.output[-1:]

    def mask(self) -> TreeTokens:
        """What those tokens see."""
        return TreeTokens.of(self.row.position, self.parents, self.first)

    def grow(self, logits: Tensor) -> None:
        """Another depth, from the drafting model's logits [deepest, V]."""
        parents = range(self.first, len(self.tokens) + 1)
        for parent, after in zip(parents, logits.float(), strict=True):
            token_ids = self._different(after)
            self.tokens += token_ids
            self.parents += [parent] * len(token_ids)
        self.depth, self.first = self.depth + 1, parents.stop

    def proposal(self) -> Proposal:
        """What has been drafted."""
        return Proposal(tokens=tuple(self.tokens), parents=tuple(self.parents), distributions=tuple(self.distributions))

    def _different(self, logits: Tensor) -> list[int]:
        """Tokens to follow one, from float32 logits [V]."""
        count = min(self.branches[self.depth], len(logits))
        if not self.coupled:
            return list(logits.topk(count).indices.tolist())
        sampling, sample = self.row.request.sampling, self.row.request.sample
        position = len(self.row.request.output) + self.depth
        q = soften(logits, sampling.temperature)
        self.distributions.append(q)
        # Cousins share their noise: only the children of one of them are ever looked at.
        noises = [uniform_noise(sampling.seed ^ DRAWN, sample, sibling_draw(position, one)) for one in range(count)]
        return draw_different(q, noises)


def draw_different(q: Tensor, noises: Sequence[float]) -> list[int]:
    """Tokens drawn from `q` [V] without replacement, one per number in [0, 1), or as many as there are that can be drawn."""
    drawn: list[int] = []
    for noise in noises[: int(q.count_nonzero())]:
        drawn.append(draw(q, noise))
        q = without(q, drawn[-1])
    return drawn


class ShallowTrees(ShallowProposer):
    """Trees by some layers of the engine's own model. No states are kept: the verifying pass runs all of its layers."""

    def __init__(
        self, runner: Runner, policy: DepthPlan | DepthPolicy, tuned: TunedDepth | None, branches: Branches
    ) -> None:
        super().__init__(runner, policy, tuned, coupled=True)
        self.branches = branches

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int], go_on: GoOn) -> list[Proposal]:
        """As in `Proposer`, of trees that are whole."""
        drafts = [TreeDraft(row, thinned(self.branches, row.most)) for row in rows]
        slots = np.array([row.slot for row in rows])
        ends = np.array([draft.row.position + 1 + tree_tokens(draft.branches) for draft in drafts])
        alive = self.runner.slots.served(slots, np.ones_like(slots)) > 0
        self.runner.cache.hold(slots, np.where(alive, ends[:, None], 0))
        going = drafts
        while going:
            going = [draft for draft in self._grow(going) if not draft.whole]
        return [draft.proposal() for draft in drafts]

    @torch.inference_mode()
    def _grow(self, drafts: Sequence[TreeDraft]) -> list[TreeDraft]:
        """One pass: trees grow by a depth. Returns those that did."""
        began = time.perf_counter()
        runner, depth = self.runner, drafts[0].depth
        _, serves = self._served([draft.row for draft in drafts], depth)
        running = np.atleast_1d(serves.any(axis=1))
        by_slot = {draft.row.slot: draft for draft, runs in zip(drafts, running, strict=True) if runs}
        if not by_slot:
            return []
        counts = np.array([len(draft.deepest) for draft in by_slot.values()])
        rows = deepest_first(
            Rows(
                slots=np.array(list(by_slot)),
                starts=np.array([draft.row.position + draft.first for draft in by_slot.values()]),
                num_tokens=counts,
                served=serves[running] * counts[:, None],
                trees={slot: draft.mask() for slot, draft in by_slot.items()} if depth else {},
            )
        )
        ordered = [by_slot[slot] for slot in rows.slots.tolist()]
        token_ids = [token for draft in ordered for token in draft.deepest]
        logits = runner.decoder(build_pass(rows, token_ids, rows.num_tokens), runner.cache)
        for draft, after in zip(ordered, torch.split(logits, rows.num_tokens.tolist()), strict=True):
            draft.grow(after)
        runner.slots.record_draft(rows)
        runner.tally.note_draft(rows, time.perf_counter() - began)
        return ordered


class SmallModelTrees(SmallModelProposer):
    """Trees by another model, which forgets them once they are drafted."""

    def __init__(self, runner: Runner, decoder: Executor, branches: Branches) -> None:
        super().__init__(runner, decoder, coupled=True)
        self.branches = branches

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int], go_on: GoOn) -> list[Proposal]:
        """As in `Proposer`, of trees that are whole."""
        drafts = [TreeDraft(row, thinned(self.branches, min(row.most, self._room(row)))) for row in rows]
        followed = zip(drafts, (self._follow(row) for row in rows), strict=True)
        asked = [(draft, follower) for draft, follower in followed if follower and not draft.whole]
        self._catch_up([follower for _, follower in asked])
        going = asked
        while going:
            self._grow(going)
            going = [one for one in going if not one[0].whole]
            for draft, follower in going:
                follower.behind = draft.deepest
        for draft, follower in asked:
            del follower.seen[draft.row.position + 1 :]
        return [draft.proposal() for draft in drafts]

    @torch.inference_mode()
    def _grow(self, going: Sequence[tuple[TreeDraft, Follower]]) -> None:
        """One pass of the small model: trees grow by a depth."""
        by_slot = {follower.slot: draft for draft, follower in going}
        deep = going[0][0].depth > 0
        masks = {slot: draft.mask() for slot, draft in by_slot.items()} if deep else {}
        slots, logits = self._forward([follower for _, follower in going], masks)
        ordered = [by_slot[slot] for slot in slots]
        for draft, after in zip(ordered, torch.split(logits, [len(draft.deepest) for draft in ordered]), strict=True):
            draft.grow(after)
