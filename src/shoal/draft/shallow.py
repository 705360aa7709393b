"""Self-drafting: the same weights, fewer layers.

A draft plan says which layers draft; of those, the ones that the request's own plan runs at that clock read its exact cache and
append their keys and values, which the verifying pass writes over. The lowest layers that both run see the same states, so what
they computed stays: the verifying pass takes their outputs and begins above them. With the bottom layers alone (LayerSkip, arXiv
2404.16710) that is all of the draft's work; with a warm-up layer and the top (SkipDecode) it is the warm-up.

    plan at this clock      0 1 2 3 4 5     draft  0     4 5    layer 0 is shared: the pass begins with layer 1
                            0 1 2 3 4 5     draft  0 1          layers 0 and 1 are
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import DepthPlan, DepthPolicy
from shoal.draft.model_draft import CONFIDENCE_PRIORS, ModelDraft, extend
from shoal.draft.proposal import GoOn, Proposal
from shoal.engine.batch import Rows, build_pass, deepest_first
from shoal.engine.drafting import DraftRow
from shoal.engine.intake import resolve_plan
from shoal.engine.request import Request
from shoal.engine.runner import Runner
from shoal.engine.step_time import pass_work
from shoal.models.passes import Ints, StateSums

Bools = NDArray[np.bool_]


class ShallowProposer:
    """Drafts with some layers of the engine's own model. Evidence: the probability of the drafted token."""

    longest = 8
    priors = CONFIDENCE_PRIORS

    def __init__(
        self, runner: Runner, policy: DepthPlan | DepthPolicy, tuned: TunedDepth | None, *, coupled: bool
    ) -> None:
        """`policy`: makes the plan whose layers draft; `tuned` fills its open fields; `coupled`: see `ModelDraft`."""
        self.runner, self.policy, self.tuned, self.coupled = runner, policy, tuned, coupled
        self._cutoffs: dict[Request, Ints] = {}
        # Elsewhere running a few layers anew is cheaper than leaving the recorded graphs.
        self.keeps_states = runner.decoder.device.type == "cpu"

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int], go_on: GoOn) -> list[Proposal]:
        """As in `Proposer`."""
        drafts = [ShallowDraft(row, count, coupled=self.coupled) for row, count in zip(rows, most, strict=True)]
        going = [draft for draft in drafts if draft.most]
        if going:
            slots = np.array([draft.row.slot for draft in going])
            starts = np.array([draft.row.position for draft in going])
            ahead = np.array([draft.most for draft in going])
            served = self.runner.slots.served(slots, ahead)
            self.runner.cache.hold(slots, np.where(served > 0, starts[:, None] + served, 0))
        while going:
            going = [draft for draft in self._step(going) if len(draft.tokens) < draft.most and go_on(draft.evidence)]
        return [draft.proposal() for draft in drafts]

    def seconds(self, rows: Sequence[DraftRow]) -> float | None:
        """As in `Proposer`."""
        served = self._served(rows, 0)[1].astype(np.int64)
        starts = np.array([row.position for row in rows])
        ones = np.ones(len(rows), dtype=np.int64)
        return self.runner.tally.step_time.seconds(pass_work(served, starts, ones, len(rows)))

    def ended(self, request: Request) -> None:
        """As in `Proposer`."""
        self._cutoffs.pop(request, None)

    def _served(self, rows: Sequence[DraftRow], step: int | Ints) -> tuple[Bools, Bools]:
        """[R, L] each, of the tokens that stand `step` after the last committed ones: what the plan runs, and what drafts."""
        clocks = np.array([row.clock for row in rows]) + step
        plan: Bools = self.runner.slots.cutoffs[[row.slot for row in rows]] > clocks[:, None]
        draft: Bools = np.stack([self._draft_cutoffs(row.request) for row in rows]) > clocks[:, None]
        return plan, plan & draft

    def _draft_cutoffs(self, request: Request) -> Ints:
        """The draft plan's cutoffs for a request."""
        cutoffs = self._cutoffs.get(request)
        if cutoffs is None:
            num_layers = self.runner.shape.num_layers
            lengths = len(request.prompt), request.sampling.max_new_tokens
            plan = resolve_plan(self.policy, *lengths, num_layers, self.tuned)
            cutoffs = self._cutoffs[request] = np.array(plan.cutoffs)
        return cutoffs

    def _step(self, drafts: list[ShallowDraft]) -> list[ShallowDraft]:
        """One pass: every draft gets a token. Returns the drafts that got one."""
        began = time.perf_counter()
        runner, shape = self.runner, self.runner.shape
        step = np.array([len(draft.tokens) for draft in drafts])
        plan, served = self._served([draft.row for draft in drafts], step)
        running = np.atleast_1d(served.any(axis=1))
        drafts = [draft for draft, runs in zip(drafts, running, strict=True) if runs]
        if not drafts:
            return []
        plan, served = plan[running], served[running]
        # The first layer that the plan runs and the draft does not: below it both have the same states.
        missing = plan & ~served
        levels = np.where(missing.any(axis=1), missing.argmax(axis=1), shape.num_layers)
        by_slot = {draft.row.slot: (draft, int(level)) for draft, level in zip(drafts, levels, strict=True)}
        rows = deepest_first(
            Rows(
                slots=np.array(list(by_slot)),
                starts=np.array([draft.row.position + len(draft.tokens) for draft in drafts]),
                num_tokens=np.ones(len(drafts), dtype=np.int64),
                served=served.astype(np.int64),
            )
        )
        ordered = [by_slot[slot] for slot in rows.slots.tolist()]
        sums = None
        if self.keeps_states:
            sums = StateSums(
                np.arange(len(ordered)), torch.zeros(shape.num_layers + 1, len(ordered), shape.hidden_size)
            )
        token_ids = [draft.last_token for draft, _ in ordered]
        work = build_pass(rows, token_ids, rows.num_tokens, state_sums=sums)
        logits = runner.decoder(work, runner.cache)
        extend([draft for draft, _ in ordered], logits)
        if sums:
            for at, (draft, level) in enumerate(ordered):
                draft.keep(level, sums.sums[:, at])
        runner.slots.record_draft(rows)
        runner.tally.note_draft(rows, time.perf_counter() - began)
        return drafts


class ShallowDraft(ModelDraft):
    """A draft under way, with the states that its passes share with the plan."""

    def __init__(self, row: DraftRow, most: int, *, coupled: bool) -> None:
        super().__init__(row.request, coupled=coupled)
        self.row, self.most = row, most
        self.states: list[Tensor] = []
        self.levels: list[int] = []

    @property
    def last_token(self) -> int:
        """What the next pass consumes."""
        return self.tokens[-1] if self.tokens else self.request.output[-1]

    def keep(self, level: int, states: Tensor) -> None:
        """Keep the state before layer `level`, or lower, of the token that was consumed, from states [L + 1, d].

        Never above the tokens before it: a layer is done for leading tokens.
        """
        level = min([level, *self.levels[-1:]])
        self.levels.append(level)
        self.states.append(states[level])

    def proposal(self) -> Proposal:
        """What has been drafted."""
        whole = super().proposal()
        levels = np.array([level for level in self.levels if level])  # descending
        if not len(levels):
            return whole
        done: Ints = (levels[:, None] > np.arange(self.request.plan.num_layers)).sum(axis=0)
        return replace(whole, states=torch.stack(self.states[: len(levels)]), done=done)
