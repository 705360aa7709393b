"""How PyTorch's operations get at a layer's active tokens: index tensors, and attention calls over neighbouring cache slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.models.passes import Ints, LayerWork, TreeMask


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
class Layout:
    """One layer's active tokens, on the device."""

    num_tokens: int
    """A."""
    select: Tensor | None
    """int64 [A], indices of the active tokens; None where they are the leading A."""
    slots: Tensor
    """int64 [A], cache slot of each active token."""
    positions: Tensor
    """int64 [A], where each active token is written in its slot."""
    slot_order: Tensor | None
    """int64 [A], the active tokens in the order of their slots, so that runs are as long as can be; None where they stand so."""
    runs: tuple[Run, ...]
    """Attention calls, covering the active tokens in slot order."""


def lay_out(work: LayerWork, keys: Tensor, trees: TreeMask | None = None) -> Layout:
    """The layout of `work` over a layer's cache `keys` [slots, H_kv, S, D]; `trees` as in `Pass`."""
    device = keys.device
    firsts, counts, slots, starts = work.spans.T
    offsets = np.arange(work.num_tokens) - np.repeat(firsts, counts)
    by_slot = np.argsort(slots)
    slot_order = None
    if (np.diff(by_slot) < 0).any():
        slot_order = np.concatenate([np.arange(firsts[row], firsts[row] + counts[row]) for row in by_slot])
    tokens = np.arange(work.num_tokens) if work.select is None else work.select
    if slot_order is not None:
        tokens = tokens[slot_order]
    return Layout(
        num_tokens=work.num_tokens,
        select=None if work.select is None else on(device, work.select),
        slots=on(device, np.repeat(slots, counts)),
        positions=on(device, np.repeat(starts, counts) + offsets),
        slot_order=None if slot_order is None else on(device, slot_order),
        runs=tuple(_runs(work.spans[by_slot], keys, trees, tokens)),
    )


def num_keys_to_read(num_keys: int, keys: Tensor) -> int:
    """How many positions of a slot attention should read to see the first `num_keys`; the rest is masked.

    oneDNN copies operands whose batches do not lie densely behind each other, which costs more than reading a slot to its
    end (`docs/log.md`), unless that is more than twice as long. Float32 products are done without oneDNN and without a copy.
    """
    capacity = keys.shape[2]
    whole = keys.device.type == "cpu" and keys.dtype != torch.float32 and capacity <= 2 * num_keys
    return capacity if whole else num_keys


def on(device: torch.device, array: Ints) -> Tensor:
    """A tensor of the array's values; it shares the array's memory on CPUs."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _runs(spans: Ints, keys: Tensor, trees: TreeMask | None, tokens: Ints) -> list[Run]:
    """Group rows, given in slot order, that are neighbours in the cache and bring equally many tokens.

    Args: `tokens` [A]: indices of the rows' tokens in the pass.
    """
    runs = []
    token = 0
    _, counts, slots, starts = spans.T
    breaks = np.flatnonzero((np.diff(slots) != 1) | (np.diff(counts) != 0)) + 1
    for group in np.split(np.arange(len(spans)), breaks):
        tokens_per_row = int(counts[group[0]])
        num_keys = int(starts[group].max()) + tokens_per_row
        causal = tokens_per_row > 1 and not starts[group].any()
        if tokens_per_row == 1:
            num_keys = num_keys_to_read(num_keys, keys)
        last = token + len(group) * tokens_per_row
        if trees is None:
            hidden = _hidden(starts[group], tokens_per_row, num_keys)
        else:
            hidden = trees.hidden(tokens[token:last].reshape(len(group), 1, tokens_per_row), num_keys)
        runs.append(
            Run(
                first_token=token,
                num_rows=len(group),
                tokens_per_row=tokens_per_row,
                first_slot=int(slots[group[0]]),
                num_keys=num_keys,
                bias=None if causal or not hidden.any() else _bias(hidden, keys),
                causal=causal,
            )
        )
        token = last
    return runs


def _hidden(starts: Ints, tokens_per_row: int, num_keys: int) -> NDArray[np.bool_]:
    """[n, 1, T, S]: whether a key comes after the token; row r's token t stands at position `starts[r] + t`."""
    position = starts[:, None, None, None] + np.arange(tokens_per_row)[:, None]
    hidden: NDArray[np.bool_] = np.arange(num_keys) > position
    return hidden


def _bias(hidden: NDArray[np.bool_], keys: Tensor) -> Tensor:
    """0 where a key may be seen, -inf where it is hidden."""
    bias = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
    return bias.masked_fill_(torch.from_numpy(hidden).to(keys.device), -torch.inf)
