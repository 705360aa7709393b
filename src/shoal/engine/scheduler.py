"""Who runs next: admission by free slots and cache budget, then decode rows before prompt chunks."""

from __future__ import annotations

import itertools
from collections import deque

from shoal.engine.cache import KVCache
from shoal.engine.request import Request
from shoal.engine.slots import SlotTable


class Scheduler:
    """First come, first served. Admission reserves the most blocks a request can ever hold, so a running one is never put back."""

    def __init__(self, slots: SlotTable, cache: KVCache, *, max_pass_tokens: int) -> None:
        """`max_pass_tokens`: most tokens in one pass, at least one per slot; longer prompts are read in chunks beside the
        decode rows."""
        self.slots, self.cache = slots, cache
        self.max_pass_tokens = max_pass_tokens
        self.waiting: deque[Request] = deque()

    def admit(self) -> None:
        """Move waiting requests into free slots while the cache budget holds."""
        reserved = self.slots.reserved_blocks()
        admitted: list[Request] = []
        for request in itertools.islice(self.waiting, len(self.cache.free_slots)):
            reserved += int(request.future_blocks[0])
            if reserved > self.cache.budget_blocks:
                break
            admitted.append(request)
        if admitted:  # grow first: where that fails, nobody has left the queue
            self.cache.reserve(max(len(r.prompt) + r.sampling.max_new_tokens - 1 for r in admitted))
        for _ in admitted:
            self.waiting.popleft()
        # Equal plans get neighbouring slots, deepest first: attention reads the cache of neighbours in one call.
        for request in sorted(admitted, key=lambda request: request.plan.cutoffs, reverse=True):
            self.slots.enter(self.cache.acquire(), request)

    def schedule(self) -> dict[int, int]:
        """Tokens to compute in the next pass, by slot. Prompts are read in the order in which they came."""
        self.admit()
        oldest_first = sorted(self.slots.running, key=lambda slot: self.slots[slot].request_id)
        behind = {slot: self.slots[slot].known - int(self.slots.num_computed[slot]) for slot in oldest_first}
        tokens = {slot: 1 for slot, count in behind.items() if count == 1}
        room = self.max_pass_tokens - len(tokens)
        for slot, count in behind.items():
            if count > 1 and room > 0:
                tokens[slot] = min(count, room)
                room -= tokens[slot]
        return tokens
