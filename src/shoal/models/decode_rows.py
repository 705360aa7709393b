"""A decode pass by cache slot: its rows, one token each, and the windows of slots that layers run on. Letters: R rows, L layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.models.passes import Ints, Pass

Window = tuple[int, int]
"""First slot, and the slot after the last."""


@dataclass(frozen=True, kw_only=True)
class DecodeRows:
    """The rows of a decode pass: one token each, which some layers serve."""

    token_ids: Ints
    """[R]."""
    slots: Ints
    """[R], cache slot of each row."""
    positions: Ints
    """[R], position of each row's token in its sequence."""
    layers: tuple[Ints | None, ...]
    """Per layer the slots of the rows that it serves; None where there is none. Layers that serve the same may share the array."""
    emitting: Ints
    """Slots of the rows whose logits are wanted, in the order in which they are."""

    @property
    def share_layers(self) -> bool:
        """Whether every row runs the same layers."""
        return all(served is None or len(served) == len(self.slots) for served in self.layers)


def decode_rows(work: Pass) -> DecodeRows | None:
    """A pass as decode rows; None where a row brings several tokens."""
    slots = np.full(len(work.token_ids), -1)
    served: dict[int, Ints] = {}
    for layer in work.layers:
        if layer is None or id(layer) in served:
            continue
        if len(layer.spans) < layer.num_tokens:
            return None
        served[id(layer)] = layer.spans[:, 2]
        slots[slice(layer.num_tokens) if layer.select is None else layer.select] = layer.spans[:, 2]
    if (slots < 0).any():  # a row's second token, which no layer serves
        return None
    return DecodeRows(
        token_ids=work.token_ids,
        slots=slots,
        positions=work.positions,
        layers=tuple(None if layer is None else served[id(layer)] for layer in work.layers),
        emitting=slots[work.logit_tokens],
    )


def window_around(slots: Ints, num_slots: int) -> Window:
    """The smallest block of 1, 2, 4, 8, ... slots that begins at a multiple of its size and holds `slots`, cut at `num_slots`.

    Slots 4 and 5 of 7 make (4, 6), slots 3 and 4 make (0, 7).
    """
    first, last = int(slots.min()), int(slots.max())
    size = power_of_two((first ^ last) + 1)
    start = first // size * size
    return start, min(start + size, num_slots)


def power_of_two(count: int) -> int:
    """The least power of two that is `count` or more: 1, 2, 4, 4, 8 for 1, 2, 3, 4, 5."""
    return 1 << (count - 1).bit_length()
