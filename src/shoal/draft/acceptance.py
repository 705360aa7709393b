"""How often drafted tokens are accepted, given what spoke for them: calibration by counting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

PRIOR_TOKENS = 4.0
"""Tokens that a prior is worth."""
MEMORY = 512
"""Tokens after which an older one counts for 1/e."""


class Acceptance:
    """Per evidence the share of tokens that were accepted where those before them were: SpecDec++'s acceptance head (arXiv
    2405.19715) as a table. Learns from verified drafts and, where nothing was verified, from what was emitted anyway."""

    def __init__(self, priors: Sequence[float]) -> None:
        self._tried = [PRIOR_TOKENS] * len(priors)
        self._accepted = [PRIOR_TOKENS * prior for prior in priors]

    def learn(self, evidence: int, accepted: bool) -> None:
        """A token with this evidence was or was not what came."""
        fade = 1 - 1 / MEMORY
        self._tried[evidence] = fade * self._tried[evidence] + 1
        self._accepted[evidence] = fade * self._accepted[evidence] + accepted

    def chance(self, evidence: int) -> float:
        """Of one token, given that those before it are accepted."""
        return self._accepted[evidence] / self._tried[evidence]

    def chances(self, evidence: Sequence[int]) -> list[float]:
        """Of each token of a draft to be reached and accepted: the product of all up to it."""
        return list(accumulate(map(self.chance, evidence), mul))
