"""What proposers offer, against the slow and obvious way to find it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.draft import suffix
from shoal.draft.ngram import Copied, NGramProposer
from shoal.draft.suffix import LEAST, LONGEST, Matches, SuffixIndex, SuffixProposer
from shoal.draft.trigram import TrigramProposer

TEXT = st.lists(st.integers(0, 3), max_size=60)


def request(prompt: list[int], output: list[int]) -> Any:
    """As much of a request as a lookup reads. Hashable by identity, as requests are."""

    class Some(SimpleNamespace):
        __hash__ = object.__hash__

    return Some(prompt=tuple(prompt), output=output)


@given(TEXT, st.integers(1, 4))
def test_ngram_copies_from_the_first_place(text: list[int], n: int) -> None:
    copied = Copied(n)
    for token in text:
        copied.extend([token])
    places = (
        [end for end in range(n, len(text)) if text[end - n : end] == text[len(text) - n :]] if len(text) >= n else []
    )
    assert copied.continuation(10) == (text[places[0] :][:10] if places else [])


def follow(text: list[int]) -> tuple[Matches, SuffixIndex]:
    """A text and where its end stands in it."""
    matches, index = Matches(), SuffixIndex()
    for token in text:
        if index.tokens:
            matches.move(index, index.tokens[-1], token)
        index.append(token)
    return matches, index


@given(TEXT)
def test_suffix_follows_the_longest_match(text: list[int]) -> None:
    """The first token is the commonest after the longest end that has stood before, and its share is right."""
    matches, index = follow(text)
    tokens, length, shares = matches.draft(index, 8)
    longest, followers = 0, Counter[int]()
    for candidate in range(LEAST, len(text)):
        ends = [
            end for end in range(candidate, len(text)) if text[end - candidate : end] == text[len(text) - candidate :]
        ]
        if ends:
            longest, followers = candidate, Counter(text[end] for end in ends)
    assert bool(tokens) == bool(longest)
    if tokens:
        assert length == longest
        assert followers[tokens[0]] == max(followers.values())
        assert shares[0] == followers[tokens[0]] / followers.total()


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.lists(st.integers(0, 3), max_size=200))
def test_suffix_follows_places_that_are_far_back(text: list[int], between: list[int]) -> None:
    """A match that began at a place goes on there, however many later places its pairs have."""
    whole = [9, *text, 8, *between, 9, *text[:-1]]
    matches, index = follow(whole)
    tokens, length, _ = matches.draft(index, 4)
    assert length >= min(len(text), LONGEST)
    if length == len(text):
        assert tokens[0] == text[-1]


def test_the_example_of_suffix() -> None:
    """a b c x  a b c y  a b c x  z a b c."""
    a, b, c, x, y, z = range(6)
    matches, index = follow([a, b, c, x, a, b, c, y, a, b, c, x, z, a, b, c])
    assert matches.draft(index, 5) == ([x, a, b, c, y], 3, [2 / 3, 1 / 2, 1.0, 1.0, 1.0])
    # Without z, the longest end that stood before is a b c x a b c, once, and y came after it.
    matches, index = follow([a, b, c, x, a, b, c, y, a, b, c, x, a, b, c])
    assert matches.draft(index, 1) == ([y], 7, [1.0])


def test_finished_texts_are_shared_by_choice() -> None:
    """What one request was told helps the next only where a scope says so."""
    for shared in (False, True):
        proposer = SuffixProposer(shared=shared)
        first = request([1, 2], [3, 4, 5, 6, 7])
        proposer.look_up(first, 4)
        proposer.ended(first)
        proposal = proposer.look_up(request([9, 3, 4], [5]), 4)
        assert proposal.tokens == ((6, 7) if shared else ())


def test_old_texts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scope keeps the newest half, and a request that runs goes on with what is left."""
    monkeypatch.setattr(suffix, "MAX_SHARED_TOKENS", 40)
    proposer = SuffixProposer(shared=True)
    late = request([90, 91], [])
    assert not proposer.look_up(late, 4).tokens
    for number in range(12):
        one = request([number, number + 1], [number + 2, number + 3, number + 4, number + 5])
        proposer.look_up(one, 4)
        proposer.ended(one)
        assert proposer.finished is not None
        assert len(proposer.finished.tokens) <= 40
    late.output += [12, 13]
    assert proposer.look_up(late, 2).tokens[0] == 14
    assert proposer.look_up(request([1, 2], []), 4).tokens == ()


def test_trigrams_learn_from_what_came() -> None:
    proposer = TrigramProposer([[1, 2, 3, 1, 2, 3, 1, 2, 4]])
    one = request([8, 1], [2])
    assert proposer.look_up(one, 5).tokens == (3, 1, 2, 3, 1)
    one.output += [4, 1, 2, 4, 1, 2]
    assert proposer.look_up(one, 2).tokens == (4, 1)  # three times 4 by now, twice 3


def test_lookups_catch_up_once(tmp_path: Path) -> None:
    """A proposer asked only now and then knows all that came in between."""
    proposer = NGramProposer(2)
    one = request([1, 2, 3], [])
    assert not proposer.look_up(one, 4).tokens
    one.output += [4, 1, 2]
    assert proposer.look_up(one, 4).tokens == (3, 4, 1, 2)
    proposer.ended(one)
    assert not proposer._texts


@pytest.mark.parametrize("proposer", [NGramProposer(1), SuffixProposer(shared=False), TrigramProposer()])
@given(TEXT.filter(bool), st.integers(1, 40))
def test_evidence_has_priors(proposer: Any, text: list[int], most: int) -> None:
    proposal = proposer.look_up(request(text, []), most)
    assert len(proposal.tokens) == len(proposal.evidence) <= most
    assert all(0 <= evidence < len(proposer.priors) for evidence in proposal.evidence)
    assert all(0 < prior < 1 for prior in proposer.priors)
