"""What one forward pass computes: tokens, and for each layer the tokens that it serves.

Tokens of all rows stand in one flat list, row after row, deepest row first. Letters: N tokens in the pass, A of them active in a
layer, R rows. Example with three rows at different clocks, one token each, and a fourth that brings 3 prompt tokens:

    row      3        0   1   2         prompt row first (it runs every layer), then deepest first
    token    p p p    a   b   c
    layer 3  x x x    x   x   x         A = 6: everything
    layer 2  x x x    x   x   .         A = 5: a leading slice
    layer 1  x x x    .   x   .         A = 4: not leading (two plan families met), picked by index

Everything here is host memory: a decoder takes to its device what it needs there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class LayerCaches(Protocol):
    """Where a decoder finds each layer's keys and values. The last slot belongs to no request."""

    @property
    def keys(self) -> Sequence[Tensor]:
        """Per layer [slots, H_kv, S, D]."""
        ...

    @property
    def values(self) -> Sequence[Tensor]:
        """Per layer [slots, H_kv, S, D]."""
        ...


@dataclass(frozen=True, eq=False)
class LayerWork:
    """The tokens that one layer serves in a pass. Layers that serve the same tokens share one object."""

    num_tokens: int
    """A."""
    select: Ints | None
    """[A], indices of the active tokens; None where they are the leading A."""
    spans: Ints
    """[active rows, 4], C-contiguous: index of the row's first token among the active ones, its number of active tokens, its cache
    slot, the position of its first token. In the order of the tokens."""


@dataclass(frozen=True, eq=False)
class StateSums:
    """Where a pass adds up the states of groups of its tokens: what a probe or a router reads, without keeping every state."""

    groups: Ints
    """[N], the group of each token; -1 for tokens of none."""
    sums: Tensor
    """float32 [L + 1, groups, d] on the decoder's device, added to token by token: at l the inputs of layer l, at L the outputs of
    the last. A layer that does not serve a token leaves its state as it is."""

    def add(self, level: int, states: Tensor) -> None:
        """Add states [N, d] to `sums[level]`."""
        groups = torch.from_numpy(self.groups).to(states.device)
        chosen = groups >= 0
        self.sums[level].index_add_(0, groups[chosen], states[chosen].float())


@dataclass(frozen=True, eq=False)
class WatchedStates:
    """Tokens whose states somebody sees as they pass; nothing of them is kept."""

    tokens: Ints
    """[n], indices of the tokens, ascending."""
    see: Callable[[int, Tensor], None]
    """Called with each level in turn, 0 .. L, and the states [n, d] of those tokens there, on the decoder's device: at l the inputs
    of layer l, at L the outputs of the last, before the final norm. The states are lent for the call."""

    def show(self, level: int, states: Tensor) -> None:
        """Let the watcher see its part of the states [N, d] of the whole pass."""
        everybody = len(self.tokens) == len(states)  # as in every pass of prompts alone: no copy
        self.see(level, states if everybody else states[torch.from_numpy(self.tokens).to(states.device)])


@dataclass(frozen=True, eq=False)
class GivenStates:
    """Tokens that bring a state along instead of an embedding: their bottom layers ran in an earlier pass."""

    tokens: Ints
    """[n], indices of the tokens."""
    states: Tensor
    """float32 [n, d] on the decoder's device."""


@dataclass(frozen=True, eq=False)
class TreeMask:
    """What tokens see in a pass whose rows bring trees: siblings are written behind each other, and do not see each other.

    Example: positions 0 to 4 are cached, the row brings tokens for 5, 6 and 7, and the last of them follows the first, not the
    second. It stands at position 6, is written to 7, and sees all below 5, then 5 and 7: below 5, among 0b101.
    """

    below: Ints
    """[N], each token sees every position of its slot below this one."""
    among: Ints
    """[N], and from there on those whose bit is set: bit b is position `below + b`. 0 for tokens of no tree."""

    def hidden(self, tokens: Ints, num_keys: int) -> NDArray[np.bool_]:
        """[..., num_keys], which positions the tokens with indices [...] do not see."""
        ahead = np.arange(num_keys) - self.below[tokens][..., None]
        bits = self.among[tokens][..., None] >> np.clip(ahead, 0, 63)  # bit 63, the sign, is never set
        hidden: NDArray[np.bool_] = (ahead >= 0) & (bits & 1 == 0)
        return hidden


@dataclass(frozen=True, eq=False)
class Pass:
    """Input of one forward pass."""

    token_ids: Ints
    """[N]."""
    positions: Ints
    """[N], of each token in its text. Where it is written says its span; the two differ in trees only."""
    layers: tuple[LayerWork | None, ...]
    """One per decoder layer; None where no token runs it."""
    logit_tokens: Ints
    """Indices of the tokens whose logits are wanted: the last of each row that emits, and with a draft all of its row."""
    state_sums: StateSums | None = None
    """Whose states to add up, if anybody's."""
    given: GivenStates | None = None
    """Who does not begin at the bottom, if anybody."""
    trees: TreeMask | None = None
    """What tokens see, where a row brings a tree; without one a token sees all positions up to its own."""
    watched: tuple[WatchedStates, ...] = ()
    """Who sees whose states."""
