"""Drafts that branch, as a pass sees them: one pass verifies all paths of a tree (Miao et al. 2023, arXiv 2305.09781).

The tokens that a row brings are numbered: 0 is the last committed one, i + 1 is the drafted token i. They stand breadth first, so
that clocks never fall along a row and a layer still serves leading tokens. Token t is written t positions after the last committed
one, and stands in the text as many after it as it is deep. Example of a tree with branches (2, 2), less one token:

    0 ─┬─ 1 ─┬─ 3     parents      0  0  1  1  2
       │     └─ 4     depths    0  1  1  2  2  2
       └─ 2 ─── 5     lineages  0  1 10 101 1001 10010 (bits: token 5 sees tokens 2 and 5)

If 2 and 5 are accepted, their keys and values move from 2 and 5 positions after the last committed one to 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.models.passes import Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeTokens:
    """The tokens of a tree that a row brings: all of it to verify, one level at a time to draft."""

    root: int
    """Position of the last committed token."""
    depths: Ints
    """[T], how many tokens after it each stands in the text; never falling."""
    lineages: Ints
    """[T], bit b is set where the token itself or one before it is written `b + 1` positions after the last committed one."""

    @classmethod
    def of(cls, root: int, parents: Sequence[int], first: int = 0) -> TreeTokens:
        """The tokens from number `first` on, of a tree with these parents."""
        depths, lineages = [0], [0]
        for token, parent in enumerate(parents):
            depths.append(depths[parent] + 1)
            lineages.append(lineages[parent] | 1 << token)
        return cls(root=root, depths=np.array(depths[first:]), lineages=np.array(lineages[first:]))

    def leading(self, steps: Ints) -> Ints:
        """How many tokens stand fewer than `steps` after the last committed one: 1, 3, 6 for 1, 2, 3 in the example above."""
        return np.searchsorted(self.depths, steps)

    def pairs(self, num_tokens: Ints) -> int:
        """(query, key) pairs of the leading `num_tokens` [L], summed: each sees the text up to itself."""
        return int(np.append(0, np.cumsum(self.root + 1 + self.depths))[num_tokens].sum())
