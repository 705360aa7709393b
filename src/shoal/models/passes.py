"""What one forward pass computes: tokens, and for each layer the tokens that it serves.

Tokens of all rows stand in one flat list, row after row, deepest row first. Letters: N tokens in the pass, A of them active in a
layer, R rows. Example with three rows at different clocks, one token each, and a fourth that brings 3 prompt tokens:

    row      3        0   1   2         prompt row first (it runs every layer), then deepest first
    token    p p p    a   b   c
    layer 3  x x x    x   x   x         A = 6: everything
    layer 2  x x x    x   x   .         A = 5: a leading slice
    layer 1  x x x    .   x   .         A = 4: not leading (two plan families met), picked by index
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Rows whose cache slots are neighbours and that bring equally many tokens: one attention call reads their cache in place."""

    first_token: int
    """Index of the run's first token among the layer's active tokens in slot order."""
    num_rows: int
    """Rows in the run."""
    tokens_per_row: int
    """Tokens that each row brings."""
    first_slot: int
    """Cache slot of the first row; the others follow."""
    num_keys: int
    """Cached positions that the longest row reads, its own tokens included."""
    bias: Tensor | None
    """[num_rows, 1, tokens_per_row, num_keys] in the model's dtype, 0 where a token may look and -inf elsewhere; None where every
    token sees every key, or where `causal` says it all."""
    causal: bool
    """Every row starts at position 0: plain causal attention."""


@dataclass(frozen=True)
class LayerWork:
    """The tokens that one layer serves in a pass. Layers that serve the same tokens share one object."""

    num_tokens: int
    """A."""
    select: Tensor | None
    """int64 [A], indices of the active tokens; None where they are the leading A."""
    slots: Tensor
    """int64 [A], cache slot of each active token."""
    positions: Tensor
    """int64 [A], position of each active token in its sequence."""
    slot_order: Tensor | None
    """int64 [A], the active tokens in the order of their slots, so that runs are as long as can be; None where they stand so."""
    runs: tuple[Run, ...]
    """Attention calls, covering the active tokens in slot order."""


@dataclass(frozen=True)
class Pass:
    """Input of one forward pass."""

    token_ids: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]."""
    layers: tuple[LayerWork | None, ...]
    """One per decoder layer; None where no token runs it."""
    logit_tokens: Tensor
    """int64, indices of the tokens whose logits are wanted (the last of each row that emits)."""
