"""The running requests as arrays, one entry per cache slot: how far each is, and which layers its next tokens run.

A request has tokens that it knows (prompt and output) and tokens that it has computed; each pass lets computed catch up with known.
Prefill, decode and chunks of a long prompt are the same arithmetic. Letters: R rows of a pass, L layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.depth.cost import cache_blocks_by_pass
from shoal.depth.plan import DepthPlan
from shoal.depth.shape import ModelShape
from shoal.engine.batch import Rows
from shoal.engine.ledger import Ledger
from shoal.engine.request import Request
from shoal.models.passes import Ints


class SlotTable:
    """Progress of every running request. Free slots have `requests[slot] is None`."""

    def __init__(self, num_slots: int, num_layers: int) -> None:
        self.requests: list[Request | None] = [None] * num_slots
        self.prompt_tokens = np.zeros(num_slots, dtype=np.int64)
        self.num_computed = np.zeros(num_slots, dtype=np.int64)
        self.shared_tokens = np.zeros(num_slots, dtype=np.int64)  # of the computed ones, those that were copied instead
        self.cutoffs = np.zeros((num_slots, num_layers), dtype=np.int64)
        self.runs_prompt = np.zeros((num_slots, num_layers), dtype=bool)
        # Of layers that ran, [slot, 0] for the prompt, [slot, 1] for generated tokens, [slot, 2] for drafting, beyond those:
        self.layer_tokens = np.zeros((num_slots, 3), dtype=np.int64)
        self.layer_pairs = np.zeros((num_slots, 3), dtype=np.int64)  # (query, key) pairs of their attention
        self.draft_heads = np.zeros(num_slots, dtype=np.int64)  # logits of drafting
        self.small_model_flops = np.zeros(num_slots, dtype=np.int64)  # of another model that drafted

    @property
    def running(self) -> list[int]:
        """Slots in use, ascending."""
        return [slot for slot, request in enumerate(self.requests) if request is not None]

    def __getitem__(self, slot: int) -> Request:
        """The request in a slot that is in use."""
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is free"
        return request

    def enter(self, slot: int, request: Request) -> None:
        """Put a request into a free slot."""
        self.requests[slot] = request
        self.prompt_tokens[slot] = len(request.prompt)
        self.num_computed[slot] = self.shared_tokens[slot] = 0
        self.cutoffs[slot] = request.plan.cutoffs
        self.runs_prompt[slot] = request.plan.runs_prompt
        self.layer_tokens[slot] = self.layer_pairs[slot] = 0
        self.draft_heads[slot] = self.small_model_flops[slot] = 0

    def share(self, slot: int, num_tokens: int) -> None:
        """The first tokens of the prompt in a slot need no computing: others have done it."""
        self.num_computed[slot] = self.shared_tokens[slot] = num_tokens

    def leave(self, slot: int) -> None:
        """Empty a slot."""
        self.requests[slot] = None

    def clock(self, slots: Ints) -> Ints:
        """[R] decode passes done: generated tokens consumed."""
        clock: Ints = np.maximum(0, self.num_computed[slots] - self.prompt_tokens[slots])
        return clock

    def reserved_blocks(self) -> int:
        """Most cache blocks that the running requests can hold together from now on, whatever their order."""
        total = 0
        for slot in self.running:
            done = int(self.num_computed[slot] - self.prompt_tokens[slot])  # below 0 while the prompt is being read
            future = self[slot].future_blocks
            total += int(future[min(max(done + 1, 0), len(future) - 1)])
        return total

    def served(self, slots: Ints, num_tokens: Ints) -> Ints:
        """[R, L]: how many of each row's next `num_tokens` [R] each layer serves. They are leading ones: clocks only rise."""
        cutoffs, clock = self.cutoffs[slots], self.num_computed[slots] - self.prompt_tokens[slots]
        if (clock >= 0).all():
            served: Ints = np.minimum(np.maximum(cutoffs - clock[:, None], 0), num_tokens[:, None])
            return served
        num_prompt = np.minimum(np.maximum(-clock, 0), num_tokens)
        decode = np.minimum(np.maximum(cutoffs - np.maximum(clock, 0)[:, None], 0), (num_tokens - num_prompt)[:, None])
        served = np.where(self.runs_prompt[slots], num_prompt[:, None], 0) + decode
        return served

    def record(self, rows: Rows, committed: Ints) -> None:
        """Note that a pass ran these rows, and that `committed` [R] tokens of each stay, the first ones or a path: the others are
        taken back."""
        decode = self.decodes(rows).astype(np.int64)
        whole = committed is rows.num_tokens  # as in every pass without drafts
        kept = rows.served if whole else self.served(rows.slots, committed)
        layer_tokens, layer_pairs = kept.sum(axis=1), pairs(rows.starts, kept)
        self.layer_tokens[rows.slots, decode] += layer_tokens
        self.layer_pairs[rows.slots, decode] += layer_pairs
        self.num_computed[rows.slots] += committed
        if whole:
            return
        # What a draft's own pass has done already was noted there: this takes away what of it belongs to the plan.
        self.layer_tokens[rows.slots, 2] += rows.ran.sum(axis=1) - layer_tokens
        done_pairs = 0 if rows.done is None else pairs(rows.starts, rows.done)
        self.layer_pairs[rows.slots, 2] += served_pairs(rows) - done_pairs - layer_pairs
        self.draft_heads[rows.slots] += rows.num_tokens - committed

    def record_draft(self, rows: Rows) -> None:
        """Note that a pass ran these rows to draft for them, with the logits of every token; nothing is committed."""
        self.layer_tokens[rows.slots, 2] += rows.served.sum(axis=1)
        self.layer_pairs[rows.slots, 2] += served_pairs(rows)
        self.draft_heads[rows.slots] += rows.num_tokens

    def decodes(self, rows: Rows) -> NDArray[np.bool_]:
        """[R]: whether a row consumes generated tokens rather than its prompt; asked before the pass is recorded."""
        consumes: NDArray[np.bool_] = rows.starts >= self.prompt_tokens[rows.slots]
        return consumes

    def held_positions(self, slots: Ints) -> Ints:
        """[R, L]: positions that each layer must keep: all computed ones, none once the layer has retired."""
        reading = self.num_computed[slots] < self.prompt_tokens[slots]
        alive = self.runs_prompt[slots] & (reading[:, None] | (self.cutoffs[slots] > self.clock(slots)[:, None]))
        held: Ints = np.where(alive, self.num_computed[slots][:, None], 0)
        return held

    def ledger(self, slot: int, shape: ModelShape) -> Ledger:
        """What the request in `slot` has spent."""
        prompt_layer_tokens, decode_layer_tokens, draft_layer_tokens = self.layer_tokens[slot].tolist()
        prompt_layer_pairs, decode_layer_pairs, draft_layer_pairs = self.layer_pairs[slot].tolist()
        return Ledger.of(
            shape,
            prompt_tokens=int(min(self.num_computed[slot], self.prompt_tokens[slot])),
            shared_prompt_tokens=int(self.shared_tokens[slot]),
            prompt_layers=int(self.runs_prompt[slot].sum()),
            prompt_heads=int(self.num_computed[slot] >= self.prompt_tokens[slot]),
            new_tokens=len(self[slot].output),
            decode_passes=int(max(0, self.num_computed[slot] - self.prompt_tokens[slot])),
            prompt_layer_tokens=prompt_layer_tokens,
            prompt_layer_pairs=prompt_layer_pairs,
            decode_layer_tokens=decode_layer_tokens,
            decode_layer_pairs=decode_layer_pairs,
            draft_layer_tokens=draft_layer_tokens,
            draft_layer_pairs=draft_layer_pairs,
            draft_heads=int(self.draft_heads[slot]),
            small_model_flops=int(self.small_model_flops[slot]),
        )


def pairs(starts: Ints, num_tokens: Ints) -> Ints:
    """[R] (query, key) pairs, summed over layers, of the leading `num_tokens` [R, L] of rows that begin at `starts` [R]."""
    among_new = num_tokens * (num_tokens + 1) // 2  # token t of the new ones sees t of them
    total: Ints = (num_tokens * starts[:, None] + among_new).sum(axis=1)
    return total


def served_pairs(rows: Rows) -> Ints:
    """[R] (query, key) pairs of all that the layers serve."""
    total = pairs(rows.starts, rows.served)
    for row, slot in enumerate(rows.slots.tolist() if rows.trees else ()):
        if tree := rows.trees.get(slot):
            total[row] = tree.pairs(rows.served[row])
    return total


def future_blocks(plan: DepthPlan, prompt_tokens: int, max_new_tokens: int, draft_tokens: int = 0) -> Ints:
    """[max_new_tokens]: most blocks that a request can hold from pass k on, the prompt's being pass 0.

    Args: `draft_tokens`: most tokens that are drafted for one pass.
    """
    held = cache_blocks_by_pass(plan.cutoffs, plan.runs_prompt, prompt_tokens, max_new_tokens - 1, draft_tokens)
    future: Ints = np.maximum.accumulate(held[::-1])[::-1]
    return future
