"""Fairness across API keys: who has been served least goes first.

Start-time fair queueing (Goyal et al. 1996), in layer-tokens: a request that may run 12 layers costs twice one that may run 6.
Each request gets a tag, the place where its key's own line of work begins, and the queue runs in the order of tags. A key that
comes back after a pause starts where the queue stands: it has no claim on what it did not use.

Example, all requests of cost 10: a sends three (tags 0, 10, 20), then b sends two (tags 0, 10): a b a b a.
"""

from __future__ import annotations

from collections import defaultdict

from shoal.engine.request import Request


class FairShares:
    """Tags for requests."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: defaultdict[str, float] = defaultdict(float)

    def tag(self, key: str, request: Request) -> float:
        """Where `request` stands in line, among those of all keys."""
        begin = max(self._now, self._ends[key])
        self._ends[key] = begin + most_layer_tokens(request)
        return begin

    def served(self, request: Request) -> None:
        """A request has got a slot: the queue stands at its tag, or further."""
        self._now = max(self._now, request.priority)


def most_layer_tokens(request: Request) -> int:
    """Layer-tokens that a request takes if it emits all that it may."""
    passes = request.sampling.max_new_tokens - 1
    prompt = sum(request.plan.runs_prompt) * len(request.prompt)
    return prompt + sum(min(cutoff, passes) for cutoff in request.plan.cutoffs)
