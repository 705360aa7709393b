"""Beginnings that prompts share: computed once, kept, and copied into the cache slots of the requests that begin with them.

    wanted      nobody has computed it: the first of its requests that enters does, the others wait in the queue meanwhile
    made        its keys and values stand beside the slots, layer by layer, within the same budget
    given up    there was no room for it: its requests compute their prompts whole

What a layer makes of a token depends on the layers that ran below it. So a prefix serves a plan whose prompt runs the same layers
up to the deepest that it runs at all. Example, 4 layers, the prefix was made by layers 0 1 3: it serves a prompt on 0 1 3 or on
0 1; not on 0 1 2, since layer 2 never ran, nor on 0 3, since its layer 3 saw what layer 1 had done.

A request refers to every layer that it will copy, from when it is queued until it has its copy. Layers that nobody refers to go
when the budget wants room: of the prefix used longest ago first, and of that from the top. Of prefixes that nobody refers to at
all, as many are kept as there are slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shoal.depth.cost import blocks
from shoal.engine.cache import KVCache
from shoal.engine.observing import SharedReading
from shoal.engine.slots import SlotTable
from shoal.engine.tally import Tally

if TYPE_CHECKING:
    from shoal.engine.request import Request

Key = tuple[tuple[int, ...], str | None]
"""Tokens, and the version of the probes whose running state stands with them."""


class Prefix:
    """The first tokens of some prompts."""

    def __init__(self, key: Key, runs_prompt: NDArray[np.bool_]) -> None:
        self.key = key
        self.runs_prompt = runs_prompt  # [L] the layers that make it
        self.references = np.zeros(len(runs_prompt), dtype=np.int64)  # [L] requests that will copy each layer
        self.state: Literal["wanted", "made", "given up"] = "wanted"
        self.maker: Request | None = None
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, each [H_kv, tokens, D]
        self.reading: Any = None  # what probes have read of it
        self.last_used = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return len(self.key[0])

    @property
    def blocks_per_layer(self) -> int:
        """Cache blocks that a layer of it counts for."""
        return blocks(self.num_tokens)

    def serves(self, runs_prompt: NDArray[np.bool_]) -> bool:
        """Whether a prompt that runs these layers [L] finds in it what it would compute."""
        (wanted,) = np.nonzero(runs_prompt)
        up_to = slice(wanted[-1] + 1)
        same = bool((self.runs_prompt[up_to] == runs_prompt[up_to]).all())
        return same and (self.state == "wanted" or all(layer in self.layers for layer in wanted.tolist()))


class Prefixes:
    """All prefixes of an engine. Between passes, every waiting request with `shared_tokens` refers to one."""

    def __init__(self, cache: KVCache, slots: SlotTable, tally: Tally) -> None:
        self.cache, self.slots, self.tally = cache, slots, tally
        self._known: dict[Key, list[Prefix]] = {}
        self._uses = itertools.count(1)

    def __len__(self) -> int:
        """How many there are, made or wanted."""
        return sum(map(len, self._known.values()))

    def refer(self, request: Request) -> None:
        """A request is queued: it refers to a prefix that serves it, or to one that has to be made."""
        if not can_share(request):
            return
        version = request.reading.observer.shares if request.reading else None
        key = (request.prompt[: request.shared_tokens], version)
        wanted = runs_prompt(request)
        known = self._known.setdefault(key, [])
        prefix = next((one for one in known if one.serves(wanted)), None)
        if prefix is None:
            prefix = Prefix(key, wanted)
            known.append(prefix)
        request.prefix = prefix
        prefix.references += wanted

    def release(self, request: Request) -> None:
        """A request does not need its prefix any more: it has its copy, makes it, or is over."""
        prefix, request.prefix = request.prefix, None
        if prefix is None:
            return
        if prefix.maker is request:
            prefix.maker = None
        else:
            prefix.references -= runs_prompt(request)
        if prefix.state == "wanted" and prefix.maker is None and not prefix.references.any():
            self._forget(prefix)

    def must_wait(self, request: Request) -> bool:
        """Whether another request is just making the prefix of this one, which waits in the queue."""
        prefix = request.prefix
        if prefix is None or prefix.state == "given up":
            return False
        if not prefix.serves(runs_prompt(request)):  # its maker runs fewer layers
            self.release(request)
            self.refer(request)
            assert request.prefix
            prefix = request.prefix
        return prefix.state == "wanted" and prefix.maker not in (None, request)

    def claim(self, request: Request) -> None:
        """A request will enter in this pass: if nobody has made its prefix, it does."""
        prefix = request.prefix
        if prefix and prefix.state == "wanted" and prefix.maker is None:
            prefix.maker = request
            prefix.runs_prompt = runs_prompt(request)
            prefix.references -= prefix.runs_prompt

    def enter(self, slot: int) -> None:
        """A request has entered a slot: copy what has been made of its prompt."""
        request = self.slots[slot]
        prefix = request.prefix
        if prefix is None or prefix.maker is request:
            return
        if prefix.state == "made":
            wanted = runs_prompt(request)
            for layer in np.flatnonzero(wanted).tolist():
                keys, values = prefix.layers[layer]
                self.cache.keys[layer][slot, :, : prefix.num_tokens] = keys
                self.cache.values[layer][slot, :, : prefix.num_tokens] = values
            self.cache.hold(np.array([slot]), np.where(wanted, prefix.num_tokens, 0)[None])
            self.slots.share(slot, prefix.num_tokens)
            self.tally.note_copy(prefix.num_tokens * int(wanted.sum()))
            if request.reading:
                cast(SharedReading, request.reading).go_on(prefix.reading)
            prefix.last_used = next(self._uses)
        self.release(request)

    def tokens_to_make(self, slot: int) -> int | None:
        """Tokens that the request in a slot has still to compute of a prefix that it makes: its chunk ends there, so that others
        may go on from it. None where it makes none."""
        prefix = self.slots[slot].prefix
        return prefix.num_tokens - int(self.slots.num_computed[slot]) if prefix else None

    def keep(self, slots: Sequence[int]) -> None:
        """A pass has run the requests in `slots`: keep the prefixes that are whole now."""
        for slot in slots:
            request = self.slots[slot]
            prefix = request.prefix
            if prefix and self.slots.num_computed[slot] >= prefix.num_tokens:
                self._keep(prefix, slot)
                self.release(request)

    def make_room(self, num_blocks: int) -> bool:
        """Whether `num_blocks` of the budget are left to requests, once layers have gone to which nobody refers."""
        excess = num_blocks + self.cache.kept_blocks - self.cache.budget_blocks
        if excess <= 0:
            return True
        idle = [
            (prefix, layer)
            for prefix in sorted(self.made(), key=lambda one: one.last_used)
            for layer in sorted(prefix.layers, reverse=True)
            if not prefix.references[layer]
        ]
        if excess > sum(prefix.blocks_per_layer for prefix, _ in idle):
            return False
        for prefix, layer in idle:
            if excess <= 0:
                break
            self._drop(prefix, [layer])
            excess -= prefix.blocks_per_layer
        return True

    def drop(self, *, referred: bool = False) -> None:
        """Let go of what has been made and nobody refers to; with `referred` of all, and whoever waits for it computes it anew."""
        for prefix in self.made():
            self._drop(prefix, [layer for layer in prefix.layers if referred or not prefix.references[layer]])

    def made(self) -> list[Prefix]:
        """Those that are kept."""
        return [one for known in self._known.values() for one in known if one.state == "made"]

    def _keep(self, prefix: Prefix, slot: int) -> None:
        """Copy a prefix out of the slot that has computed it; give it up where there is no room, or where it is not finite."""
        layers = np.flatnonzero(prefix.runs_prompt).tolist()
        committed = self.cache.committed_blocks(self.slots.reserved_blocks(), self.cache.max_positions)
        if self.make_room(committed + prefix.blocks_per_layer * len(layers)):
            here = slice(prefix.num_tokens)
            made = {
                layer: (self.cache.keys[layer][slot, :, here].clone(), self.cache.values[layer][slot, :, here].clone())
                for layer in layers
            }
            if all(bool(tensor.isfinite().all()) for pair in made.values() for tensor in pair):
                prefix.layers, prefix.state = made, "made"
                self.cache.kept_blocks += prefix.blocks_per_layer * len(layers)
                self.tally.note_copy(prefix.num_tokens * len(layers))
                reading = self.slots[slot].reading
                prefix.reading = cast(SharedReading, reading).prefix() if reading else None
                prefix.last_used = next(self._uses)
                self._bound()
                return
        self._forget(prefix)

    def _bound(self) -> None:
        """No more prefixes that nobody refers to than there are slots."""
        idle = [prefix for prefix in self.made() if not prefix.references.any()]
        for prefix in sorted(idle, key=lambda one: one.last_used)[: -self.cache.num_slots]:
            self._drop(prefix, list(prefix.layers))

    def _drop(self, prefix: Prefix, layers: Sequence[int]) -> None:
        """Let go of some layers."""
        for layer in layers:
            del prefix.layers[layer]
            self.cache.kept_blocks -= prefix.blocks_per_layer
        if not prefix.layers:
            self._forget(prefix)

    def _forget(self, prefix: Prefix) -> None:
        """Nobody finds it any more; those that refer to it go without."""
        prefix.state = "given up"
        known = self._known[prefix.key]
        known.remove(prefix)
        if not known:
            del self._known[prefix.key]


def can_share(request: Request) -> bool:
    """Whether a request may do without computing its first tokens: not where a router, attention probes or scores need the states
    of all of them."""
    if not request.shared_tokens or request.prompt_states or not any(request.plan.runs_prompt):
        return False
    if request.reading and request.reading.observer.shares is None:
        return False
    return request.first_scored is None or request.first_scored >= request.shared_tokens


def runs_prompt(request: Request) -> NDArray[np.bool_]:
    """[L]: the layers that a request's prompt runs."""
    return np.array(request.plan.runs_prompt)
