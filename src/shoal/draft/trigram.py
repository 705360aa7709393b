"""Tri-gram drafting: a table of which token followed each pair of tokens, from a corpus and from what the model itself emits.

ADED (arXiv 2407.12021) lets such a table stand in for the model and searches it for a tree of drafts; here the likeliest path is
drafted, as one pass verifies one path per row. Example: after (the, cat) came sat 3 times and ran once: sat, with a share of 3/4.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from shoal.draft.proposal import NOTHING, Proposal
from shoal.engine.request import Request

MOST_FOLLOWERS = 12
"""Followers kept per pair, the commonest, as in the paper's code."""
MAX_PAIRS = 500_000
"""Pairs kept; those that were learnt longest ago go first."""
SHARE_BINS = 10
"""Stretches that a follower's share is sorted into."""


class TrigramProposer:
    """One table for all requests of an engine that ask for it. Evidence: the share of a pair's followers that said the token."""

    longest = 8
    priors = tuple((bin_ + 0.5) / SHARE_BINS for bin_ in range(SHARE_BINS))

    def __init__(self, corpus: Sequence[Sequence[int]] = ()) -> None:
        """`corpus`: token ids of texts."""
        self._followers: OrderedDict[tuple[int, int], Counter[int]] = OrderedDict()
        self._learnt: dict[Request, int] = {}
        for text in corpus:
            self.learn(text)

    def learn(self, tokens: Sequence[int]) -> None:
        """Count a text's triples."""
        for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
            followers = self._followers.setdefault((first, second), Counter())
            self._followers.move_to_end((first, second))
            followers[third] += 1
            if len(followers) > 2 * MOST_FOLLOWERS:
                self._followers[first, second] = Counter(dict(followers.most_common(MOST_FOLLOWERS)))
        while len(self._followers) > MAX_PAIRS:
            self._followers.popitem(last=False)

    def look_up(self, request: Request, most: int) -> Proposal:
        """As in `Lookup`."""
        learnt = self._learnt.get(request, 0)  # tokens of the output
        before = request.prompt[learnt - 2 :] if learnt < 2 else ()
        past = [*before, *request.output[max(0, learnt - 2) :]]
        self.learn(past)
        self._learnt[request] = len(request.output)
        if len(past) < 2:
            return NOTHING
        pair = (past[-2], past[-1])
        tokens: list[int] = []
        evidence: list[int] = []
        while len(tokens) < most and (followers := self._followers.get(pair)):
            token, count = followers.most_common(1)[0]
            tokens.append(token)
            evidence.append(min(SHARE_BINS * count // followers.total(), SHARE_BINS - 1))
            pair = (pair[1], token)
        return Proposal(tokens=tuple(tokens), evidence=tuple(evidence))

    def ended(self, request: Request) -> None:
        """As in `Proposer`."""
        self._learnt.pop(request, None)
