"""Running requests pass by pass: the loop of the engine.

    schedule rows -> order them deepest first -> build the pass -> decoder -> sample -> commit -> hand memory back

There is no separate prefill or decode phase: each row brings the tokens that it knows and has not computed.
"""

from __future__ import annotations

import itertools
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
from shoal.engine.ledger import Ledger
from shoal.engine.request import Chunk, FinishReason, Generation, Request
from shoal.engine.routing import watch
from shoal.engine.sampler import Sampled, sample
from shoal.engine.scheduler import Scheduler
from shoal.engine.slots import SlotTable, future_blocks
from shoal.engine.tally import Tally
from shoal.errors import RequestFailed
from shoal.models.executor import Executor


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
        self.scheduler = Scheduler(self.slots, self.cache, self.tally.step_time, max_pass_tokens=max_pass_tokens)
        self.cancelled: set[int] = set()
        self._next_deadline = math.inf

    def step(self) -> list[Chunk]:
        """Run one pass over every scheduled row; returns what each request gained, and the ends of cancelled ones."""
        began = time.perf_counter()
        chunks = self.end_early()
        tokens = self.scheduler.schedule()
        if not tokens:
            self.cache.check_integrity()
            return chunks

        rows = self._rows(tokens)
        requests = [self.slots[slot] for slot in rows.slots.tolist()]
        spans = list(zip(requests, rows.starts.tolist(), rows.num_tokens.tolist(), strict=True))
        emits = np.array([start + count == request.known for request, start, count in spans])
        token_ids = itertools.chain.from_iterable(request.tokens(start, count) for request, start, count in spans)

        self.cache.hold(rows.slots, np.where(rows.served > 0, rows.starts[:, None] + rows.served, 0))
        self.tally.note_blocks(self.cache.bytes_in_use)
        watched = watch(rows, [request.prompt_states for request in requests], self.decoder.device)
        sums = watched.sums if watched else None
        logits = self.decoder(build_pass(rows, list(token_ids), emits, sums), self.cache)
        emitting = [request for request, emit in zip(requests, emits, strict=True) if emit]
        sampled = sample(logits, emitting)

        decodes = self.slots.decodes(rows)
        self.slots.record(rows)  # from here on the pass counts: whatever interrupts what is above, it can be run again
        if watched:
            watched.keep()
        for request, one in zip(emitting, sampled, strict=True):
            if request.prompt_states and not request.output:
                one = self._route(request, one)
            chunks.append(self._commit(request, one))
        retired = (rows.served > 0) & (self.slots.cutoffs[rows.slots] <= self.slots.clock(rows.slots)[:, None])
        if retired.any():
            still = np.array([s for s in rows.slots.tolist() if self.slots.requests[s] is not None], dtype=np.int64)
            self.cache.hold(still, self.slots.held_positions(still))
        self.tally.note(rows, decodes, emits, time.perf_counter() - began)
        return chunks

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        self.scheduler.waiting.extend(requests)
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

    def _rows(self, tokens: dict[int, int]) -> Rows:
        """The rows of a pass that computes `tokens` per slot."""
        slots = np.fromiter(tokens.keys(), dtype=np.int64)
        num_tokens = np.fromiter(tokens.values(), dtype=np.int64)
        starts = self.slots.num_computed[slots]
        served = self.slots.served(slots, num_tokens)
        return deepest_first(Rows(slots=slots, starts=starts, num_tokens=num_tokens, served=served))

    def _route(self, request: Request, sampled: Sampled | RequestFailed) -> Sampled | RequestFailed:
        """The prompt has been read: take the router's plan from here on. Returns `sampled`, or why there is no plan."""
        assert request.prompt_states is not None
        try:
            request.plan = request.prompt_states.route(self.shape.num_layers)
        except RequestFailed as error:
            return error
        request.future_blocks = future_blocks(request.plan, len(request.prompt), request.sampling.max_new_tokens)
        self.slots.cutoffs[self.slots.requests.index(request)] = request.plan.cutoffs
        return sampled

    def _commit(self, request: Request, sampled: Sampled | RequestFailed) -> Chunk:
        """Add a token to a request's output, and end the request if that was its last."""
        if isinstance(sampled, RequestFailed):
            return self._end(request, "error", error=str(sampled))
        token = sampled.token
        request.output.append(token)
        if sampled.logprobs is not None:
            request.logprobs.append(sampled.logprobs)
        text = request.text.push([token])
        reason = request.finish_reason()
        if reason is not None:
            return self._end(request, reason, token_ids=(token,), text=text)
        return request.chunk(token_ids=(token,), text=text)

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
        ledger, past_horizon = Ledger(), False
        if request in self.slots.requests:
            slot = self.slots.requests.index(request)
            ledger = self.slots.ledger(slot, self.shape)
            horizon = request.plan.horizon
            past_horizon = horizon is not None and ledger.decode_passes > horizon
            self.slots.leave(slot)
            # Only logits tell that values are finite, and a prompt that is cancelled between its chunks has shown none.
            self.cache.release(slot, poisoned=reason not in ("stop", "length"))
        generation = Generation(
            index=request.index,
            sample=request.sample,
            text=request.text.text,
            token_ids=tuple(request.output),
            finish_reason=reason,
            logprobs=tuple(request.logprobs) if request.sampling.logprobs is not None else None,
            ledger=ledger,
            past_horizon=past_horizon,
            plan=request.plan,
            error=error,
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
