"""Who runs next: admission by free slots and cache budget, at once or in waves, then decode rows before prompt chunks."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np

from shoal.depth.plan import ALWAYS
from shoal.engine.cache import KVCache
from shoal.engine.prefixes import Prefixes
from shoal.engine.prompt_scores import MAX_CHUNK_TOKENS, scores_much
from shoal.engine.request import Request
from shoal.engine.slots import SlotTable
from shoal.engine.step_time import Courses, StepTime

LEAST_GAIN = 1.05
"""How many times faster waiting must be predicted to be: prices are estimates, and lengths are the most that may be emitted."""


class Scheduler:
    """Lowest priority number first, then first come, first served. Admission reserves the most blocks a request can ever hold, so a
    running one is never put back."""

    def __init__(
        self, slots: SlotTable, cache: KVCache, prefixes: Prefixes, step_time: StepTime, *, max_pass_tokens: int
    ) -> None:
        """`step_time`: what decides between admitting at once and in waves; `max_pass_tokens`: most tokens in one pass, at least
        one per slot; longer prompts are read in chunks beside the decode rows."""
        self.slots, self.cache, self.prefixes, self.step_time = slots, cache, prefixes, step_time
        self.max_pass_tokens = max_pass_tokens
        self.waiting: deque[Request] = deque()
        self.waves = True
        """Whether requests may wait for a wave; benchmarks turn it off to compare."""
        self._fill_at = 0
        self._decided_for = (0, 0)

    def admit(self) -> None:
        """Move waiting requests into free slots while the cache budget holds, unless it is better to wait for more free slots.
        Whoever waits for a prefix that another request is making lets those behind it pass."""
        if self._wait():
            return
        admitted = self._next_in_line()
        if admitted:  # grow first: where that fails, nobody has left the queue
            self.cache.reserve(max(most_positions(request) for request in admitted))
        for request in admitted:
            self.waiting.remove(request)
        # Equal plans get neighbouring slots, deepest first: attention reads the cache of neighbours in one call.
        for request in sorted(admitted, key=lambda request: request.plan.cutoffs, reverse=True):
            slot = self.cache.acquire()
            self.slots.enter(slot, request)
            self.prefixes.enter(slot)

    def _next_in_line(self) -> list[Request]:
        """Who may enter now."""
        reserved, positions = self.slots.reserved_blocks(), self.cache.max_positions
        entering: list[Request] = []
        for request in self.waiting:
            if len(entering) == len(self.cache.free_slots):
                break
            if self.prefixes.must_wait(request):
                continue
            reserved += int(request.future_blocks[0])
            positions = max(positions, most_positions(request))
            committed = self.cache.committed_blocks(reserved, positions)
            if not self.prefixes.make_room(committed):
                if entering or self.slots.running:
                    break
                self.prefixes.drop(referred=True)  # nobody else will make room
            self.prefixes.claim(request)
            entering.append(request)
        return entering

    def schedule(self) -> dict[int, int]:
        """Tokens to compute in the next pass, by slot. Prompts are read in the order in which they came."""
        self.admit()
        oldest_first = sorted(self.slots.running, key=lambda slot: self.slots[slot].request_id)
        behind = {slot: self.slots[slot].known - int(self.slots.num_computed[slot]) for slot in oldest_first}
        tokens = {slot: 1 for slot, count in behind.items() if count == 1}
        room = self.max_pass_tokens - len(tokens)
        for slot, count in behind.items():
            if count > 1 and room > 0:
                most = MAX_CHUNK_TOKENS if scores_much(self.slots[slot]) else room
                tokens[slot] = min(count, room, most, self.prefixes.tokens_to_make(slot) or room)
                room -= tokens[slot]
        return tokens

    def _wait(self) -> bool:
        """Whether free slots stay free in this pass, so that more requests start together later. Asked anew when a request comes
        or ends. Nobody enters meanwhile, so a wait is over when the last row that runs now has ended, if not before."""
        running, num_waiting = self.slots.running, len(self.waiting)
        if not (self.waves and running and num_waiting and self.cache.free_slots):
            return False
        if self._decided_for != (now := (len(running), num_waiting)):
            self._decided_for = now
            self._fill_at = self._best_level(running)
        return len(running) > self._fill_at

    def _best_level(self, running: list[int]) -> int:
        """`fill_level` for the rows in slots `running` and the next in line."""
        slots, num_slots = self.slots, self.cache.num_slots
        current = [slots[slot] for slot in running]
        rows = [*current, *itertools.islice(self.waiting, 2 * num_slots)]
        cutoffs = np.array([request.plan.cutoffs for request in rows])
        if (cutoffs == ALWAYS).all(axis=1).any():
            return num_slots - 1  # a dense row runs every layer anyway: beside it, or for it, nobody waits
        return fill_level(
            Courses(
                prompt_tokens=np.array([len(request.prompt) for request in rows]),
                clocks=np.array([len(request.output) - 1 for request in rows]),
                num_passes=np.array([request.sampling.max_new_tokens - len(request.output) for request in rows]),
                cutoffs=cutoffs,
                runs_prompt=np.array([request.plan.runs_prompt for request in rows]),
            ),
            len(running),
            num_slots,
            self.step_time,
        )


def most_positions(request: Request) -> int:
    """Positions that a request's keys and values can take."""
    return len(request.prompt) + request.sampling.max_new_tokens - 1


def fill_level(courses: Courses, num_running: int, num_slots: int, step_time: StepTime) -> int:
    """At how many running rows, or fewer, free slots are best filled: `num_slots - 1` (at once), half the slots, or 0 (waves).

    Rows at one clock share what their layers cost once; a row that enters alone runs its deep layers, and its prompt all layers,
    for itself. But while it waits, its slot idles, and passes with few rows cost nearly as much as full ones. So the seconds of all
    known passes are predicted for each way, and waiting has to win by `LEAST_GAIN`.

    Example: 2 slots; every request makes 4 passes, of 4, 3, 2, 1 layers (prompts left aside). One row runs, with its last pass
    to go, and two requests wait. At once, they start in passes 0 and 1, and the passes run 4, 4, 3, 2, 1 layers, 14 together. In a
    wave both start in pass 1: 1, 4, 3, 2, 1, 3 layers fewer in as many passes. Had the first row two passes to go and did three
    requests wait, at once would be 8 passes and 24 layers (4, 3, 4, 3, 4, 3, 2, 1), and waves 10 passes and 23 layers (2, 1, then
    4, 3, 2, 1 twice): then it depends on what a pass costs, and what a layer.

    Args: `courses`: the running rows, then the waiting ones in their order.
    """
    levels = sorted({num_slots - 1, num_slots // 2, 0}, reverse=True)
    remaining, lengths = courses.num_passes[:num_running].tolist(), courses.num_passes[num_running:].tolist()
    predicted = {}
    for level in levels:
        starts = [0] * num_running + entry_passes(remaining, lengths, num_slots, level)
        seconds = step_time.seconds(courses.work(starts))
        if seconds is None:
            return num_slots - 1
        predicted[level] = seconds
    best = min(levels, key=lambda level: predicted[level])
    return best if predicted[num_slots - 1] >= LEAST_GAIN * predicted[best] else num_slots - 1


def entry_passes(remaining: Sequence[int], lengths: Sequence[int], num_slots: int, level: int) -> list[int]:
    """The pass in which each waiting request enters, in order, if free slots are filled when `level` rows or fewer run.

    Args: `remaining`: passes that each running row still has; `lengths`: those of each waiting request, 1 or more.

    >>> entry_passes([1, 3], [4, 4, 4], num_slots=2, level=1)
    [1, 3, 5]
    >>> entry_passes([1, 3], [4, 4, 4], num_slots=2, level=0)
    [3, 3, 7]
    """
    ends = sorted(remaining)
    entries: list[int] = []
    now = 0
    while len(entries) < len(lengths):
        while ends and (len(ends) > level or ends[0] <= now):
            now = max(now, heapq.heappop(ends))
        for length in lengths[len(entries) : len(entries) + num_slots - len(ends)]:
            entries.append(now)
            heapq.heappush(ends, now + length)
    return entries
