"""From rows to a `Pass`: flat tokens, deepest row first, and the tokens that each layer serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.models.passes import LayerWork, Pass, Run

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one pass, deepest first."""

    slots: Ints
    """[R] cache slot of each row."""
    starts: Ints
    """[R] position of each row's first token."""
    num_tokens: Ints
    """[R] tokens that each row brings."""
    served: Ints
    """[R, L] how many of them (leading ones) each layer serves."""


def deepest_first(rows: Rows) -> Rows:
    """Order rows so that plans which form a chain make every layer's tokens a leading slice; neighbours in the cache stay so."""
    depth = rows.served.sum(axis=1) / rows.num_tokens
    order = np.lexsort((rows.slots, -rows.num_tokens, -depth))
    return Rows(
        slots=rows.slots[order], starts=rows.starts[order], num_tokens=rows.num_tokens[order], served=rows.served[order]
    )


def build_pass(rows: Rows, token_ids: Sequence[int], emits: NDArray[np.bool_], cache: KVCache) -> Pass:
    """The input of the decoder.

    Args: `token_ids`: the rows' tokens in the rows' order; `emits` [R]: whether the logits after its last token are wanted;
    `cache`: where the rows' keys are, for the layout of attention calls.
    """
    device = cache.device
    ends = np.cumsum(rows.num_tokens)
    positions = np.concatenate(
        [np.arange(start, start + n) for start, n in zip(rows.starts, rows.num_tokens, strict=True)]
    )
    slots = np.repeat(rows.slots, rows.num_tokens)
    works: dict[bytes, LayerWork | None] = {}
    layers = []
    for column in rows.served.T:
        key = column.tobytes()
        if key not in works:
            works[key] = _layer_work(rows, column, slots, positions, cache) if column.any() else None
        layers.append(works[key])
    return Pass(
        token_ids=torch.tensor(token_ids, device=device),
        positions=_tensor(positions, device),
        layers=tuple(layers),
        logit_tokens=_tensor(ends[emits] - 1, device),
    )


def _layer_work(rows: Rows, served: Ints, slots: Ints, positions: Ints, cache: KVCache) -> LayerWork:
    """The tokens that a layer serves when it takes the leading `served` [R] of each row."""
    device = cache.device
    last = int(np.flatnonzero(served)[-1])
    total = int(served.sum())
    leading = bool((served[:last] == rows.num_tokens[:last]).all())
    select = None
    if leading:
        slots, positions = slots[:total], positions[:total]
    else:
        firsts = np.cumsum(rows.num_tokens) - rows.num_tokens
        select = np.concatenate([np.arange(first, first + n) for first, n in zip(firsts, served, strict=True)])
        slots, positions = slots[select], positions[select]
    active = np.flatnonzero(served)
    by_slot = active[np.argsort(rows.slots[active])]
    slot_order = None
    if (np.diff(by_slot) < 0).any():
        first_tokens = np.cumsum(served) - served
        slot_order = np.concatenate([np.arange(first_tokens[r], first_tokens[r] + served[r]) for r in by_slot])
    return LayerWork(
        num_tokens=total,
        select=None if select is None else _tensor(select, device),
        slots=_tensor(slots, device),
        positions=_tensor(positions, device),
        slot_order=None if slot_order is None else _tensor(slot_order, device),
        runs=tuple(_runs(rows, by_slot, served, cache)),
    )


def _runs(rows: Rows, by_slot: Ints, served: Ints, cache: KVCache) -> list[Run]:
    """Group active rows, given in slot order, that are neighbours in the cache and bring equally many tokens."""
    runs = []
    token = 0
    breaks = np.flatnonzero((np.diff(rows.slots[by_slot]) != 1) | (np.diff(served[by_slot]) != 0)) + 1
    for group in np.split(by_slot, breaks):
        starts, tokens_per_row = rows.starts[group], int(served[group[0]])
        num_keys = int(starts.max()) + tokens_per_row
        causal = tokens_per_row > 1 and not starts.any()
        if tokens_per_row == 1:
            num_keys = cache.num_keys_to_read(num_keys)
        hidden = _hidden(starts, tokens_per_row, num_keys)
        runs.append(
            Run(
                first_token=token,
                num_rows=len(group),
                tokens_per_row=tokens_per_row,
                first_slot=int(rows.slots[group[0]]),
                num_keys=num_keys,
                bias=None if causal or not hidden.any() else _bias(hidden, cache),
                causal=causal,
            )
        )
        token += len(group) * tokens_per_row
    return runs


def _hidden(starts: Ints, tokens_per_row: int, num_keys: int) -> NDArray[np.bool_]:
    """[n, 1, T, S]: whether a key comes after the token; row r's token t stands at position `starts[r] + t`."""
    position = starts[:, None, None, None] + np.arange(tokens_per_row)[:, None]
    hidden: NDArray[np.bool_] = np.arange(num_keys) > position
    return hidden


def _bias(hidden: NDArray[np.bool_], cache: KVCache) -> Tensor:
    """0 where a key may be seen, -inf where it is hidden."""
    bias = torch.zeros(hidden.shape, dtype=cache.dtype, device=cache.device)
    return bias.masked_fill_(torch.from_numpy(hidden).to(cache.device), -torch.inf)


def _tensor(array: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
