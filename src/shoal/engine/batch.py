"""From rows to a `Pass`: flat tokens, deepest row first, and the tokens that each layer serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.engine.trees import TreeTokens
from shoal.models.passes import GivenStates, Ints, LayerWork, Pass, StateSums, TreeMask, WatchedStates


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one pass, deepest first."""

    slots: Ints
    """[R] cache slot of each row."""
    starts: Ints
    """[R] position where each row's first token is written."""
    num_tokens: Ints
    """[R] tokens that each row brings."""
    served: Ints
    """[R, L] how many of them (leading ones) each layer serves."""
    done: Ints | None = None
    """[R, L] how many of those have run the layer in an earlier pass, whose states they bring along; None for none at all."""
    trees: Mapping[int, TreeTokens] = field(default_factory=dict)
    """By slot, the rows whose tokens branch."""

    @property
    def ran(self) -> Ints:
        """[R, L] tokens that each layer computes in this pass."""
        return self.served if self.done is None else self.served - self.done


def deepest_first(rows: Rows) -> Rows:
    """Order rows so that plans which form a chain make every layer's tokens a leading slice; neighbours in the cache stay so."""
    if len(rows.slots) == 1:
        return rows
    depth = rows.served.sum(axis=1) / rows.num_tokens
    order = np.lexsort((rows.slots, -rows.num_tokens, -depth))
    return Rows(
        slots=rows.slots[order],
        starts=rows.starts[order],
        num_tokens=rows.num_tokens[order],
        served=rows.served[order],
        done=None if rows.done is None else rows.done[order],
        trees=rows.trees,
    )


def build_pass(
    rows: Rows,
    token_ids: Sequence[int],
    num_logits: Ints,
    *,
    state_sums: StateSums | None = None,
    given: GivenStates | None = None,
    watched: tuple[WatchedStates, ...] = (),
) -> Pass:
    """The input of the decoder.

    Args: `token_ids`: the rows' tokens in the rows' order; `num_logits` [R]: how many of its last tokens each row wants logits
    after; `state_sums`, `given`, `watched`: as in `Pass`.
    """
    ends = np.cumsum(rows.num_tokens)
    first_tokens = ends - rows.num_tokens
    works: dict[bytes, LayerWork | None] = {}
    layers = []
    nothing = np.zeros(len(rows.slots), dtype=np.int64)
    for layer, served in enumerate(rows.served.T):
        done = nothing if rows.done is None else rows.done[:, layer]
        key = served.tobytes() + done.tobytes()
        if key not in works:
            works[key] = _layer_work(rows, served, done, first_tokens) if (served > done).any() else None
        layers.append(works[key])
    positions = np.repeat(rows.starts - first_tokens, rows.num_tokens) + np.arange(ends[-1])
    mask = None
    if rows.trees:
        below, among = positions + 1, np.zeros_like(positions)
        for row, slot in enumerate(rows.slots.tolist()):
            if tree := rows.trees.get(slot):
                here = slice(first_tokens[row], ends[row])
                positions[here], below[here], among[here] = tree.root + tree.depths, tree.root + 1, tree.lineages
        mask = TreeMask(below=below, among=among)
    return Pass(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=positions,
        layers=tuple(layers),
        logit_tokens=last_of_each(ends, num_logits),
        state_sums=state_sums,
        given=given,
        trees=mask,
        watched=watched,
    )


def last_of_each(ends: Ints, counts: Ints) -> Ints:
    """Indices of the last `counts[r]` tokens of each row, where row r ends before `ends[r]`: (3, 5) and (2, 1) make 1 2 4."""
    if (counts <= 1).all():
        return ends[counts > 0] - 1
    return np.repeat(ends - np.cumsum(counts), counts) + np.arange(counts.sum())


def _layer_work(rows: Rows, served: Ints, done: Ints, first_tokens: Ints) -> LayerWork:
    """The tokens that a layer runs when it takes the leading `served` [R] of each row but for the first `done` [R] of them."""
    ran = served - done
    if (ran == rows.num_tokens).all():  # everything, as in every layer of a batch at one clock
        spans = np.stack((first_tokens, served, rows.slots, rows.starts), axis=1)
        return LayerWork(num_tokens=int(served.sum()), select=None, spans=spans)
    active = np.flatnonzero(ran)
    last = active[-1]
    counts, skipped = ran[active], done[active]
    ends = np.cumsum(counts)
    total = int(ends[-1])
    leading = not done[last] and bool((ran[:last] == rows.num_tokens[:last]).all())
    select = None
    if not leading:  # active token i of a row stands i after the first of its tokens in the pass that is not done
        select = np.repeat(first_tokens[active] + skipped - (ends - counts), counts) + np.arange(total)
    return LayerWork(
        num_tokens=total,
        select=select,
        spans=np.stack((ends - counts, counts, rows.slots[active], rows.starts[active] + skipped), axis=1),
    )
