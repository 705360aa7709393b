"""Suffix drafting: find the longest end of the text that has occurred before, and follow what most often came next.

SuffixDecoding (arXiv 2411.04975) keeps suffix trees whose nodes count occurrences. The same counts come from the text itself: a
chain through the places where each pair of tokens stood, and the places that match the end of the text so far, which move on with
it and drop out where they differ. Those with the longest match vote token by token, each vote leaving the places that said the
same.

    text  a b c x  a b c y  a b c x  z a b c      a b c stood three times before, twice before x
    draft x (2 of 3 places), then a (1 of 2, the first of equals), b (1 of 1), c, y
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.draft.proposal import NOTHING, Proposal
from shoal.engine.request import Request

LEAST = 2
"""Shortest end that is looked for: the pair of tokens that chains go by."""
LONGEST = 64
"""Longest, as in the paper: beyond it places count as equals."""
MOST_PLACES = 64
"""Places that are followed: the last ones of a pair, then those that match longest."""
LENGTH_BINS = (2, 3, 4, 6, 9, 16, 32)
"""Match lengths from which on a match counts as more evidence."""
SHARE_BINS = 4
"""Stretches that the share of a vote is sorted into."""
LEAST_SHARE = 0.05
"""A draft ends where fewer of the places would have said all of it."""
MAX_SHARED_TOKENS = 200_000
"""Most tokens of finished texts that a scope keeps; half of them, the oldest, go together."""
BORDER = -1
"""Stands between two texts."""


class SuffixIndex:
    """Texts behind each other, and for each place the one before where the same pair of tokens ended."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._before: list[int] = []  # per token: where its pair ended last, 0 for nowhere
        self._last: dict[tuple[int, int], int] = {}

    def append(self, token: int) -> None:
        """The text goes on."""
        self._before.append(0)
        if self.tokens and BORDER not in (pair := (self.tokens[-1], token)):
            self._before[-1] = self._last.get(pair, 0)
            self._last[pair] = len(self.tokens) + 1
        self.tokens.append(token)

    def places(self, pair: tuple[int, int]) -> list[int]:
        """Where `pair` ended, the last places first: indices of the tokens that followed."""
        found: list[int] = []
        place = self._last.get(pair, 0)
        while place and len(found) < MOST_PLACES:
            found.append(place)
            place = self._before[place - 1]
        return found

    def follows(self, place: int) -> int:
        """The token at a place; `BORDER` at the end."""
        return self.tokens[place] if place < len(self.tokens) else BORDER


@dataclass
class Matches:
    """Where the end of one request's text stands in an index, by place: how many tokens match, kept up as the text grows."""

    lengths: dict[int, int] = field(default_factory=dict)

    def move(self, index: SuffixIndex, previous: int, token: int) -> None:
        """The text goes on with `token` after `previous`; called before an index of the same text hears of it."""
        moved = {
            place + 1: min(length + 1, LONGEST)
            for place, length in self.lengths.items()
            if index.follows(place) == token
        }
        self.lengths = dict.fromkeys(index.places((previous, token)), LEAST) | moved
        if len(self.lengths) > MOST_PLACES:
            longest = heapq.nlargest(MOST_PLACES, self.lengths.items(), key=lambda one: one[::-1])
            self.lengths = dict(longest)

    def draft(self, index: SuffixIndex, most: int) -> tuple[list[int], int, list[float]]:
        """What most often followed the longest match: at most `most` tokens, the match's length, and per token the share of the
        places left that said it."""
        places = [place for place in self.lengths if index.follows(place) != BORDER]
        if not places:
            return [], 0, []
        length = max(self.lengths[place] for place in places)
        places = sorted(place for place in places if self.lengths[place] == length)
        tokens: list[int] = []
        shares: list[float] = []
        of_all = 1.0
        while places and len(tokens) < most:
            token, count = Counter(map(index.follows, places)).most_common(1)[0]
            share = count / len(places)
            of_all *= share
            if token == BORDER or of_all < LEAST_SHARE:
                break
            tokens.append(token)
            shares.append(share)
            places = [place + 1 for place in places if index.follows(place) == token]
        return tokens, length, shares


@dataclass(eq=False)
class Followed:
    """One request's text, and where its end stands in itself and in finished texts."""

    own: SuffixIndex = field(default_factory=SuffixIndex)
    within: Matches = field(default_factory=Matches)
    among: Matches = field(default_factory=Matches)
    generation: int = 0
    """Of the finished texts that `among` has places in."""


class SuffixProposer:
    """The request's own text, and where shared the finished ones. Evidence: length of the match, and share of votes."""

    longest = 32
    priors = tuple(
        min(0.95, 0.25 + 0.1 * length) * (share + 1) / SHARE_BINS
        for length in range(len(LENGTH_BINS))
        for share in range(SHARE_BINS)
    )

    def __init__(self, *, shared: bool) -> None:
        """`shared`: whether finished texts help later requests. They show in what is drafted, so keep strangers apart."""
        self.finished = SuffixIndex() if shared else None
        self._generation = 0
        self._followed: dict[Request, Followed] = {}

    def look_up(self, request: Request, most: int) -> Proposal:
        """As in `Lookup`: from the text with the longer match, the request's own of equals."""
        one = self._follow(request)
        tokens, length, shares = one.within.draft(one.own, most)
        if self.finished:
            others = one.among.draft(self.finished, most)
            if others[0] and (not tokens or others[1] > length):
                tokens, length, shares = others
        if not tokens:
            return NOTHING
        long = SHARE_BINS * (sum(length >= least for least in LENGTH_BINS) - 1)
        return Proposal(
            tokens=tuple(tokens),
            evidence=tuple(long + min(int(SHARE_BINS * share), SHARE_BINS - 1) for share in shares),
        )

    def ended(self, request: Request) -> None:
        """As in `Proposer`."""
        self._followed.pop(request, None)
        if self.finished is None or not request.output:
            return
        for token in (BORDER, *request.prompt[-LONGEST:], *request.output):
            self.finished.append(token)
        if len(self.finished.tokens) > MAX_SHARED_TOKENS:
            kept = self.finished.tokens[-MAX_SHARED_TOKENS // 2 :]
            self.finished, self._generation = SuffixIndex(), self._generation + 1
            for token in kept:
                self.finished.append(token)

    def _follow(self, request: Request) -> Followed:
        """The request's text, with what it has emitted since."""
        one = self._followed.get(request)
        if one is None:
            one = self._followed[request] = Followed(generation=self._generation)
        if one.generation != self._generation:
            one.among, one.generation = Matches(), self._generation
        new = new_tokens(request, len(one.own.tokens))
        for left, token in zip(range(len(new), 0, -1), new, strict=True):
            if one.own.tokens and left <= LONGEST:  # no match is longer, so it need not begin earlier
                one.within.move(one.own, one.own.tokens[-1], token)
                if self.finished:
                    one.among.move(self.finished, one.own.tokens[-1], token)
            one.own.append(token)
        return one


def new_tokens(request: Request, known: int) -> Sequence[int]:
    """Tokens of prompt and output beyond the first `known`."""
    return request.output[known - len(request.prompt) :] if known else (*request.prompt, *request.output)
