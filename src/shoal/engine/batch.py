"""From rows to a `Pass`: flat tokens, deepest row first, and the tokens that each layer serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.models.passes import Ints, LayerWork, Pass, StateSums


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
    if len(rows.slots) == 1:
        return rows
    depth = rows.served.sum(axis=1) / rows.num_tokens
    order = np.lexsort((rows.slots, -rows.num_tokens, -depth))
    return Rows(
        slots=rows.slots[order], starts=rows.starts[order], num_tokens=rows.num_tokens[order], served=rows.served[order]
    )


def build_pass(
    rows: Rows, token_ids: Sequence[int], emits: NDArray[np.bool_], state_sums: StateSums | None = None
) -> Pass:
    """The input of the decoder.

    Args: `token_ids`: the rows' tokens in the rows' order; `emits` [R]: whether the logits after its last token are wanted;
    `state_sums`: as in `Pass`.
    """
    ends = np.cumsum(rows.num_tokens)
    first_tokens = ends - rows.num_tokens
    works: dict[bytes, LayerWork | None] = {}
    layers = []
    for column in rows.served.T:
        key = column.tobytes()
        if key not in works:
            works[key] = _layer_work(rows, column, first_tokens) if column.any() else None
        layers.append(works[key])
    return Pass(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=np.repeat(rows.starts - first_tokens, rows.num_tokens) + np.arange(ends[-1]),
        layers=tuple(layers),
        logit_tokens=ends[emits] - 1,
        state_sums=state_sums,
    )


def _layer_work(rows: Rows, served: Ints, first_tokens: Ints) -> LayerWork:
    """The tokens that a layer serves when it takes the leading `served` [R] of each row."""
    if (served == rows.num_tokens).all():  # everything, as in every layer of a batch at one clock
        spans = np.stack((first_tokens, served, rows.slots, rows.starts), axis=1)
        return LayerWork(num_tokens=int(served.sum()), select=None, spans=spans)
    active = np.flatnonzero(served)
    counts = served[active]
    ends = np.cumsum(counts)
    total = int(ends[-1])
    leading = bool((served[: active[-1]] == rows.num_tokens[: active[-1]]).all())
    select = None
    if not leading:  # active token i of a row stands i after the row's first token in the pass
        select = np.repeat(first_tokens[active] - (ends - counts), counts) + np.arange(total)
    return LayerWork(
        num_tokens=total,
        select=select,
        spans=np.stack((ends - counts, counts, rows.slots[active], rows.starts[active]), axis=1),
    )
