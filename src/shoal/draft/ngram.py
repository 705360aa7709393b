"""N-gram copying: if the last few tokens have occurred before, what followed them then may follow now.

CopySpec (arXiv 2502.08923): an index from every run of n tokens to where it first stood. The index is by the tokens themselves, so
a hit is a hit. Example, n = 2: the text is a b c d a b, and a b stood at the beginning, so the draft is c d a b.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.draft.proposal import NOTHING, Proposal
from shoal.engine.request import Request

RUNS = 4
"""Tokens beyond n up to which a longer match counts as more evidence."""


class Copied:
    """One text: where its runs of n tokens ended first."""

    def __init__(self, match_tokens: int) -> None:
        self.match_tokens = match_tokens
        self.tokens: list[int] = []
        self._first_end: dict[tuple[int, ...], int] = {}
        self._earlier: int | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        n = self.match_tokens
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            if end >= n:
                first = self._first_end.setdefault(tuple(self.tokens[end - n :]), end)
                self._earlier = first if first < end else None

    def continuation(self, most: int) -> list[int]:
        """What followed the last n tokens where they first stood; none where they have not stood before."""
        return [] if self._earlier is None else self.tokens[self._earlier : self._earlier + most]

    def match_length(self) -> int:
        """How many tokens before the two places are the same, up to n + `RUNS`."""
        assert self._earlier is not None
        end, length = len(self.tokens), self.match_tokens
        while (
            length < self.match_tokens + RUNS
            and length < self._earlier
            and self.tokens[self._earlier - length - 1] == self.tokens[end - length - 1]
        ):
            length += 1
        return length


class NGramProposer:
    """Copies from the request's own prompt and output. Evidence: how much longer than n the match is, and how far on a token is."""

    longest = 10  # the paper's
    priors = tuple(0.4 + 0.1 * run + 0.05 * place for run in range(RUNS + 1) for place in range(3))

    def __init__(self, match_tokens: int) -> None:
        """`match_tokens`: n."""
        self.match_tokens = match_tokens
        self._texts: dict[Request, Copied] = {}

    def look_up(self, request: Request, most: int) -> Proposal:
        """As in `Lookup`."""
        text = self._texts.get(request)
        if text is None:
            text = self._texts[request] = Copied(self.match_tokens)
            text.extend(request.prompt)
        text.extend(request.output[len(text.tokens) - len(request.prompt) :])
        tokens = text.continuation(most)
        if not tokens:
            return NOTHING
        longer = text.match_length() - self.match_tokens
        return Proposal(
            tokens=tuple(tokens), evidence=tuple(3 * longer + min(place // 2, 2) for place in range(len(tokens)))
        )

    def ended(self, request: Request) -> None:
        """As in `Proposer`."""
        self._texts.pop(request, None)
