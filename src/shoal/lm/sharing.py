"""Which tokens the prompts of a model's calls begin with, so that the engine need compute them once.

The rounds of a ranking begin alike: instructions, query, perhaps a passage. What has been kept already is taken where it is at
least half of what could be shared; otherwise the longer beginning is kept, too. Example, a letter per token and a prompt per call:

    call     prompt     in common with the last   kept before   shared
    1        abcdX      nothing                   nothing       nothing
    2        abcdY      abcd                      nothing       abcd, computed in this call
    3        abcdYZ     abcdY                     abcd          abcd
"""

from __future__ import annotations

from collections.abc import Sequence

Tokens = tuple[int, ...]
LEAST_TOKENS = 16
"""Shorter beginnings are computed with the rest."""


class Beginning:
    """What the calls so far began with."""

    def __init__(self) -> None:
        self._kept: Tokens = ()
        self._last: Tokens = ()

    def num_shared(self, prompts: Sequence[Tokens], most: int) -> int:
        """How many leading tokens of a call's prompts to share, at most `most`."""
        possible = common(prompts if len(prompts) > 1 else [*prompts, self._last])
        kept = common([*prompts, self._kept])
        chosen = min(most, kept if 2 * kept >= possible else possible)
        self._last = prompts[-1]
        if chosen < LEAST_TOKENS:
            return 0
        self._kept = prompts[0][:chosen]
        return chosen


def common(sequences: Sequence[Tokens]) -> int:
    """Length of what all begin with.

    >>> common([(1, 2, 3), (1, 2), (1, 2, 4)])
    2
    """
    first, last = min(sequences), max(sequences)
    return next(
        (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
