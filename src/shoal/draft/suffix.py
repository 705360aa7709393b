"""Suffix drafting: find the longest end of the text that has occurred before, and follow what most often came next.

SuffixDecoding (arXiv 2411.04975) keeps suffix trees whose nodes count occurrences. The same counts come from an index of the text
itself, at a few bytes a token instead of a node per token and depth: an end of `LEAST` tokens names the places where it stood, the
places whose longer pasts agree best are kept, and they vote token by token, each vote leaving those that said the same.

    text  a b c x  a b c y  a b c x  z a b c      a b c stood three times before, twice before x
    draft x (2 of 3 places), then a (1 of 2, the first of equals), b (1 of 1), c, y
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from shoal.draft.proposal import NOTHING, Lookup, Proposal
from shoal.engine.request import Request

LEAST = 2
"""Shortest end that is looked for."""
LONGEST = 64
"""Longest, as in the paper: beyond it places count as equals."""
MOST_PLACES = 64
"""Places that vote: the last ones."""
LENGTH_BINS = (2, 3, 4, 6, 9, 16, 32)
"""Match lengths from which on a match counts as longer evidence."""
SHARE_BINS = 4
"""Stretches that the share of a vote is sorted into."""
MAX_SHARED_TOKENS = 1_000_000
"""Most tokens that an index of finished texts keeps; the oldest texts go first."""


class SuffixIndex:
    """Texts, and where each run of `LEAST` tokens ended in them."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._texts: OrderedDict[int, list[int]] = OrderedDict()
        self._ends: dict[tuple[int, ...], deque[tuple[int, int]]] = {}
        self._next = 0

    def begin(self) -> int:
        """A new text, and its name."""
        name, self._next = self._next, self._next + 1
        self._texts[name] = []
        return name

    def extend(self, name: int, tokens: Sequence[int]) -> None:
        """A text goes on."""
        text = self._texts[name]
        for token in tokens:
            text.append(token)
            if len(text) >= LEAST:
                ends = self._ends.setdefault(tuple(text[-LEAST:]), deque(maxlen=MOST_PLACES))
                ends.append((name, len(text)))
        self.num_tokens += len(tokens)

    def text(self, name: int) -> list[int]:
        """A text so far."""
        return self._texts[name]

    def drop_oldest(self) -> None:
        """Forget the first text, and the runs that stood nowhere else."""
        name, text = self._texts.popitem(last=False)
        self.num_tokens -= len(text)
        for at in range(LEAST, len(text) + 1):
            run = tuple(text[at - LEAST : at])
            ends = self._ends.get(run)
            if ends is None:
                continue
            while ends and ends[0][0] == name:
                ends.popleft()
            if not ends:
                del self._ends[run]

    def draft(self, past: Sequence[int], most: int) -> tuple[list[int], int, list[float]]:
        """What most often followed the longest end of `past` that is in a text.

        Returns at most `most` tokens, the length of that end, and per token the share of the places that said it.
        """
        places = [place for place in self._ends.get(tuple(past[-LEAST:]), ()) if place[1] < len(self._texts[place[0]])]
        length = LEAST
        while len(places) > 1 and length < min(LONGEST, len(past)):
            longer = [
                (name, end)
                for name, end in places
                if end > length and self._texts[name][end - length - 1] == past[-length - 1]
            ]
            if not longer:
                break
            places, length = longer, length + 1
        if len(places) == 1:
            name, end = places[0]
            text = self._texts[name]
            while length < min(LONGEST, len(past), end) and text[end - length - 1] == past[-length - 1]:
                length += 1
        tokens: list[int] = []
        shares: list[float] = []
        while places and len(tokens) < most:
            votes = Counter(self._texts[name][end] for name, end in places)
            token, count = votes.most_common(1)[0]
            tokens.append(token)
            shares.append(count / len(places))
            places = [
                (name, end + 1)
                for name, end in places
                if self._texts[name][end] == token and end + 1 < len(self._texts[name])
            ]
        return tokens, length, shares


class SuffixProposer(Lookup):
    """The request's own text, and where shared the finished ones. Evidence: length of the match, and share of votes."""

    priors = tuple(
        min(0.95, 0.25 + 0.1 * length) * (share + 1) / SHARE_BINS
        for length in range(len(LENGTH_BINS))
        for share in range(SHARE_BINS)
    )

    def __init__(self, *, shared: bool) -> None:
        """`shared`: whether finished outputs help later requests. They show in what is drafted, so keep strangers apart."""
        self.finished = SuffixIndex() if shared else None
        self._own: dict[Request, SuffixIndex] = {}

    def look_up(self, request: Request, most: int) -> Proposal:
        """As in `Lookup`: from the text with the longer match, the request's own of equals."""
        own = self._own.get(request)
        if own is None:
            own = self._own[request] = SuffixIndex()
            own.begin()
            own.extend(0, request.prompt)
        past = own.text(0)
        own.extend(0, request.output[len(past) - len(request.prompt) :])
        tokens, length, shares = own.draft(past, most)
        if self.finished:
            others = self.finished.draft(past, most)
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
        self._own.pop(request, None)
        if self.finished and request.output:
            self.finished.extend(self.finished.begin(), (*request.prompt[-LONGEST:], *request.output))
            while self.finished.num_tokens > MAX_SHARED_TOKENS:
                self.finished.drop_oldest()
