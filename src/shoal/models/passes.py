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

from collections.abc import Sequence
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
class GivenStates:
    """Tokens that bring a state along instead of an embedding: their bottom layers ran in an earlier pass."""

    tokens: Ints
    """[n], indices of the tokens."""
    states: Tensor
    """float32 [n, d] on the decoder's device."""


@dataclass(frozen=True, eq=False)
class Pass:
    """Input of one forward pass."""

    token_ids: Ints
    """[N]."""
    positions: Ints
    """[N]."""
    layers: tuple[LayerWork | None, ...]
    """One per decoder layer; None where no token runs it."""
    logit_tokens: Ints
    """Indices of the tokens whose logits are wanted: the last of each row that emits, and with a draft all of its row."""
    state_sums: StateSums | None = None
    """Whose states to add up, if anybody's."""
    given: GivenStates | None = None
    """Who does not begin at the bottom, if anybody."""
