"""Running requests pass by pass: the loop of the engine.

    schedule rows -> draft -> order them deepest first -> build the pass -> decoder -> sample -> commit -> hand memory back

There is no separate prefill or decode phase: each row brings the tokens that it knows and has not computed. Drafts are known tokens
that may be taken back (`drafting.py`).
"""

from __future__ import annotations

import bisect
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from shoal.engine.batch import Rows, build_pass, deepest_first
from shoal.engine.cache import KVCache
from shoal.engine.drafting import (
    MAX_DRAFT_TOKENS,
    Draft,
    Drafter,
    draft_row,
    given_states,
    stack_done,
)
from shoal.engine.ledger import Ledger
from shoal.engine.observing import observe
from shoal.engine.prefixes import Prefixes
from shoal.engine.prompt_scores import num_scored, score_prompts
from shoal.engine.request import Chunk, FinishReason, Generation, Request
from shoal.engine.routing import watch
from shoal.engine.sampler import Sampled, verify
from shoal.engine.scheduler import Scheduler
from shoal.engine.slots import SlotTable, future_blocks
from shoal.engine.tally import Tally
from shoal.engine.trees import TreeTokens
from shoal.errors import RequestFailed
from shoal.models.executor import Executor
from shoal.models.passes import Ints


class Runner:
    """Owns the cache, the slots and the queue. One thread at a time may call it.

    Between passes every slot is either free, holding no cache block, or belongs to one request.
    """

    def __init__(self, decoder: Executor, *, max_batch: int, max_pass_tokens: int, cache_bytes: int) -> None:
        """See `Engine` for the sizes."""
        self.decoder = decoder
        self.shape = decoder.config.shape
        self.tally = Tally(self.shape)
        self.cache = KVCache(
            self.shape, dtype=decoder.dtype, device=decoder.device, num_slots=max_batch, budget_bytes=cache_bytes
        )
        self.slots = SlotTable(max_batch, self.shape.num_layers)
        self.prefixes = Prefixes(self.cache, self.slots, self.tally)
        self.scheduler = Scheduler(
            self.slots, self.cache, self.prefixes, self.tally.step_time, max_pass_tokens=max_pass_tokens
        )
        self.drafter: Drafter | None = None
        """Who drafts for the requests that ask for it."""
        self.cancelled: set[int] = set()
        self._draft_s = 0.0
        self._next_deadline = math.inf

    def step(self) -> list[Chunk]:
        """Run one pass over every scheduled row; returns what each request gained, and the ends of cancelled ones."""
        began = time.perf_counter()
        chunks = self.end_early()
        tokens = self.scheduler.schedule()
        if not tokens:
            self.cache.check_integrity()
            return chunks
        drafts = self._draft(tokens) if self.drafter else {}

        rows = self._rows(tokens, drafts)
        slots = rows.slots.tolist()
        requests, drafted = [self.slots[slot] for slot in slots], [drafts.get(slot) for slot in slots]
        proposed = [draft.tokens if draft else () for draft in drafted]
        num_drafted = np.array(list(map(len, proposed)))
        spans = list(zip(requests, rows.starts.tolist(), (rows.num_tokens - num_drafted).tolist(), strict=True))
        emits = np.array([start + count == request.known for request, start, count in spans])
        num_logits = emits * (1 + num_drafted)
        scored = [num_scored(*span) for span in spans]
        kept = np.maximum(scored, num_logits) if any(scored) else num_logits
        token_ids: list[int] = []
        for (request, start, count), drafted_ids in zip(spans, proposed, strict=True):
            token_ids += request.tokens(start, count)
            token_ids += drafted_ids

        self._hold(rows)
        watched = watch(rows, [request.prompt_states for request in requests], self.decoder.device)
        sums = watched.sums if watched else None
        given = given_states(rows, drafted) if drafts else None
        observed = observe(rows, (request.reading for request in requests))
        seen_by = observed.states if observed else ()
        work = build_pass(rows, token_ids, kept, state_sums=sums, given=given, watched=seen_by)
        logits = self.decoder(work, self.cache)
        if kept is not num_logits:
            logits = score_prompts(logits, spans, kept.tolist())
        emitting = np.flatnonzero(emits).tolist()
        sampled = verify(logits, [requests[row] for row in emitting], [drafted[row] for row in emitting])

        decodes = self.slots.decodes(rows)
        committed = rows.num_tokens
        if drafts:
            committed = committed.copy()
            committed[emitting] -= num_logits[emitting] - [len(ones) for ones in sampled]
            if rows.trees:
                self._keep_paths(rows, emitting, drafted, sampled)
        # From here on the pass counts: whatever interrupts what is above, it can be run again.
        self.slots.record(rows, committed)
        if watched:
            watched.keep()
        if observed:
            observed.keep()
        self.prefixes.keep(slots)
        for row, ones in zip(emitting, sampled, strict=True):
            request = requests[row]
            if request.prompt_states and not request.output:
                ones = [self._route(request, *ones)]
            if request.draft is not None and decodes[row]:
                self._note_draft(request, drafted[row], ones)
            chunks.append(self._commit(request, ones))
        retired = (rows.served > 0) & (self.slots.cutoffs[rows.slots] <= self.slots.clock(rows.slots)[:, None])
        if drafts or retired.any():
            still = np.array([s for s in slots if self.slots.requests[s] is not None], dtype=np.int64)
            self.cache.hold(still, self.slots.held_positions(still))
        self.tally.note(rows, decodes, int(kept.sum()), time.perf_counter() - began - self._draft_s)
        return chunks

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        for request in requests:
            self.prefixes.refer(request)
            bisect.insort(self.scheduler.waiting, request, key=lambda waiting: waiting.priority)
        self._next_deadline = min([self._next_deadline, *(r.deadline for r in requests if r.deadline is not None)])

    def end_early(self) -> list[Chunk]:
        """Finish requests in `cancelled` and those that ran out of time, waiting or running."""
        now = time.monotonic()
        if not self.cancelled and now < self._next_deadline:
            return []
        ending: dict[Request, FinishReason] = {}
        for request in (*filter(None, self.slots.requests), *self.scheduler.waiting):
            if request.request_id in self.cancelled:
                ending[request] = "cancelled"
            elif request.deadline is not None and now >= request.deadline:
                ending[request] = "timeout"
        waiting = self.scheduler.waiting
        self.scheduler.waiting = deque(request for request in waiting if request not in ending)
        remaining = (*filter(None, self.slots.requests), *self.scheduler.waiting)
        self._next_deadline = min(
            (r.deadline for r in remaining if r.deadline is not None and r not in ending), default=math.inf
        )
        self.cancelled.clear()
        return [self._end(request, reason) for request, reason in ending.items()]

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.scheduler.waiting or self.slots.running)

    def _draft(self, tokens: dict[int, int]) -> dict[int, Draft]:
        """Drafts for rows of a pass that brings `tokens`, by slot."""
        assert self.drafter
        asking = [draft_row(self.slots[slot], slot, int(self.slots.num_computed[slot])) for slot in tokens]
        rows = [row for row in asking if row is not None]
        self._draft_s = 0.0
        if not rows:
            return {}
        began = time.perf_counter()
        room = self.scheduler.max_pass_tokens - sum(tokens.values())
        drafts = self.drafter.propose(rows, tokens, room)
        self._draft_s = time.perf_counter() - began
        self.tally.note_drafting(self._draft_s)
        return drafts

    def _rows(self, tokens: dict[int, int], drafts: dict[int, Draft]) -> Rows:
        """The rows of a pass that computes `tokens` per slot, and verifies `drafts`."""
        slots = np.fromiter(tokens.keys(), dtype=np.int64)
        num_tokens = np.fromiter(tokens.values(), dtype=np.int64)
        done: Ints | None = None
        trees: dict[int, TreeTokens] = {}
        if drafts:
            drafted = [drafts.get(slot) for slot in tokens]
            num_tokens += [len(draft.tokens) if draft else 0 for draft in drafted]
            done = stack_done(drafted, self.shape.num_layers)
            trees = {
                slot: TreeTokens.of(int(self.slots.num_computed[slot]), draft.parents)
                for slot, draft in drafts.items()
                if draft.parents
            }
        starts = self.slots.num_computed[slots]
        served = self.slots.served(slots, num_tokens)
        for row, slot in enumerate(slots.tolist() if trees else ()):
            if slot in trees:  # a layer serves the clocks that it serves, each with all of its tokens
                served[row] = trees[slot].leading(served[row])
        if done is not None:
            done = np.minimum(done, served)  # a layer that has retired by then is not done, it is skipped
        return deepest_first(
            Rows(slots=slots, starts=starts, num_tokens=num_tokens, served=served, done=done, trees=trees)
        )

    def _hold(self, rows: Rows) -> None:
        """Blocks for all that a pass over `rows` will write."""
        self.cache.hold(rows.slots, np.where(rows.served > 0, rows.starts[:, None] + rows.served, 0))
        self.tally.note_blocks(self.cache.bytes_in_use)

    def _keep_paths(
        self,
        rows: Rows,
        emitting: Sequence[int],
        drafted: Sequence[Draft | None],
        sampled: Sequence[Sequence[Sampled | RequestFailed]],
    ) -> None:
        """Bring the keys and values of accepted paths through trees to where a chain would have written them."""
        for row, ones in zip(emitting, sampled, strict=True):
            if (draft := drafted[row]) and draft.parents:
                path = draft.path([one.token for one in ones if isinstance(one, Sampled)])
                self.cache.move(int(rows.slots[row]), int(rows.starts[row]), path, rows.served[row])

    def _note_draft(self, request: Request, draft: Draft | None, sampled: Sequence[Sampled | RequestFailed]) -> None:
        """Count what became of a draft, or that there was none."""
        assert self.drafter
        off = None if draft else self.drafter.why_not(request)
        token_ids = [one.token for one in sampled if isinstance(one, Sampled)]
        for stats in (request.draft_stats, self.tally.drafting):
            stats.note(draft, token_ids, off)
        self.drafter.committed(request, draft, token_ids)

    def _route(self, request: Request, sampled: Sampled | RequestFailed) -> Sampled | RequestFailed:
        """The prompt has been read: take the router's plan from here on. Returns `sampled`, or why there is no plan."""
        assert request.prompt_states is not None
        try:
            request.plan = request.prompt_states.route(self.shape.num_layers)
        except RequestFailed as error:
            return error
        draft_tokens = 0 if request.draft is None else MAX_DRAFT_TOKENS
        request.future_blocks = future_blocks(
            request.plan, len(request.prompt), request.sampling.max_new_tokens, draft_tokens
        )
        self.slots.cutoffs[self.slots.requests.index(request)] = request.plan.cutoffs
        return sampled

    def _commit(self, request: Request, sampled: Sequence[Sampled | RequestFailed]) -> Chunk:
        """Add tokens to a request's output, and end the request if the last of them was its last."""
        token_ids: tuple[int, ...] = ()
        text = ""
        if request.reading and not request.output and isinstance(sampled[0], Sampled):
            if isinstance(request.reading.findings, RequestFailed):
                sampled = [request.reading.findings]
            elif request.findings and request.findings.blocked_by:
                return self._end(request, "blocked")
        for one in sampled:
            if isinstance(one, RequestFailed):
                return self._end(request, "error", token_ids=token_ids, text=text, error=str(one))
            request.output.append(one.token)
            if one.logprobs is not None:
                request.logprobs.append(one.logprobs)
            if one.uncertainty is not None:
                request.uncertainty.append(one.uncertainty)
            token_ids += (one.token,)
            text += request.text.push([one.token])
        reason = request.finish_reason()
        if reason is not None:
            return self._end(request, reason, token_ids=token_ids, text=text)
        return request.chunk(token_ids=token_ids, text=text)

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        error: str | None = None,
    ) -> Chunk:
        """Finish a request that is no longer waiting, and free its slot where it has one."""
        text += request.text.finish()
        if request.draft is not None and self.drafter:
            self.drafter.ended(request)
        self.prefixes.release(request)
        ledger, past_horizon = Ledger(), False
        if request in self.slots.requests:
            slot = self.slots.requests.index(request)
            ledger = self.slots.ledger(slot, self.shape)
            horizon = request.plan.horizon
            past_horizon = horizon is not None and ledger.decode_passes > horizon
            ledger.probe_flops = request.reading.flops if request.reading else 0
            self.slots.leave(slot)
            # Only logits tell that values are finite, and a prompt that is cancelled between its chunks has shown none.
            self.cache.release(slot, poisoned=reason not in ("stop", "length"))
        generation = Generation(
            index=request.index,
            sample=request.sample,
            text=request.text.text,
            token_ids=tuple(request.output),
            finish_reason=reason,
            logprobs=tuple(request.logprobs) if request.reports_logprobs else None,
            prompt_logprobs=None if request.sampling.prompt_logprobs is None else tuple(request.prompt_logprobs),
            ledger=ledger,
            past_horizon=past_horizon,
            plan=request.plan,
            trace=request.trace(),
            drafting=None if request.draft is None else request.draft_stats,
            error=error,
            labels=request.findings.labels if request.findings else None,
            blocked_by=request.findings.blocked_by if request.findings else None,
        )
        return request.chunk(token_ids=token_ids, text=text, generation=generation)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device` now, with what the system's file cache would give up."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # sysconf's free pages leave out the file cache, which reading a checkpoint fills
        sizes = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(sizes["MemAvailable"].split()[0]) * 1024
        return int(min(available, container_free_bytes(Path("/sys/fs/cgroup"))))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS knows the total only


def container_free_bytes(cgroup: Path) -> float:
    """Memory that the limit of a container (cgroup v2, mounted at `cgroup`) leaves now; infinite without a limit.

    Its file cache does not count as used: the system takes it back before the limit strikes.
    """
    limit, usage = cgroup / "memory.max", cgroup / "memory.stat"
    if not (limit.exists() and usage.exists()) or (most := limit.read_text().strip()) == "max":
        return math.inf
    used = dict(line.split() for line in usage.read_text().splitlines())
    return max(0, int(most) - int(used["anon"]))
