"""Drafting, as the engine sees it: something cheap proposes tokens, the request's own plan verifies them in one pass.

    drafted     tokens that a pass verified
    accepted    the leading ones of them that are the plan's own tokens
    recovered   the plan's token in the place of the first that is not
    bonus       the plan's token after a draft that was accepted whole
    taken back  drafted and not accepted: the cache forgets their positions

Example: the last token is a, the draft is b c d. One pass consumes a b c d, and the plan's tokens after them are b c x y. So b and
c are accepted, x is recovered, d is taken back, and y, which follows a wrong token, means nothing: b c x come out of one pass.

A draft may branch (`trees.py`): then a path of it is accepted, and what is off the path is taken back.

A token is accepted because it *is* what the request's sampling takes from the logits there, with the noise of its position, so that
tokens are the same whatever is drafted. Only a draft that brings the distributions that it was drawn from is accepted otherwise, by
their ratio to the plan's (Leviathan et al. 2023; siblings in a tree one after the other, Jeon et al. 2024): then outputs are the
same in distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.engine.batch import Rows
from shoal.models.passes import GivenStates, Ints

if TYPE_CHECKING:
    from shoal.engine.request import Request

Drafting = object | None
"""What users give as `draft=`: a name, a path or one of the classes in `shoal.draft`; None for no drafting."""

DrawnTokens = tuple[Sequence[int], Tensor]
"""Different tokens in the order in which they were drawn, and the distribution, float32 [V], that they were drawn from."""

MAX_DRAFT_TOKENS = 32
"""Most tokens that a pass verifies for one request: it reserves cache for so many more positions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """What a request's next pass verifies."""

    tokens: tuple[int, ...]
    """1 to `MAX_DRAFT_TOKENS`."""
    parents: tuple[int, ...] | None = None
    """Where the draft branches: which token of the pass each one follows, 0 for the last committed one, i + 1 for drafted token i,
    breadth first (`trees.py`); siblings are different tokens. None for a chain, which is 0, 1, 2, ..."""
    distributions: tuple[Tensor, ...] = ()
    """Where tokens were drawn and are to be accepted with probability min(1, p/q): q after each leading token of the pass that one
    follows, float32 [V] and normalised; siblings were drawn from it without replacement, in their order. Outputs then depend on the
    draft, though not their distribution."""
    states: Tensor | None = None
    """float32 [n, d]: states of the first n tokens of the pass (the last committed one, then drafted ones) after the layers in
    `done`, which need not run them again; None where there are none."""
    done: Ints | None = None
    """[L] how many leading tokens of the pass are past each layer: it ran for them with the states that the plan gives them, or the
    plan skips it there."""

    def children(self, token: int) -> Sequence[int]:
        """Which tokens of the pass follow its token number `token`."""
        if self.parents is None:
            return range(token + 1, min(token + 2, len(self.tokens) + 1))
        return [child for child, parent in enumerate(self.parents, start=1) if parent == token]

    def child(self, token: int, token_id: int) -> int | None:
        """Which of them is this token id, if any."""
        return next((child for child in self.children(token) if self.tokens[child - 1] == token_id), None)

    def proposal(self, token: int) -> DrawnTokens | None:
        """What was drawn to follow token number `token` of the pass; None where nothing was."""
        children = self.children(token)
        if not children or token >= len(self.distributions):
            return None
        return [self.tokens[child - 1] for child in children], self.distributions[token]

    def path(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens of the pass that were accepted if it emitted `token_ids`: b c d and b c x make 1 2."""
        path: list[int] = []
        for token_id in token_ids:
            child = self.child(path[-1] if path else 0, token_id)
            if child is None:
                break
            path.append(child)
        return path


@dataclass(kw_only=True)
class DraftStats:
    """What drafting did for one request, or for all of an engine. Adds up."""

    drafted: int = 0
    """Tokens that passes verified, all of a tree's."""
    accepted: int = 0
    """Those that were the plan's own."""
    recovered: int = 0
    """Passes in which one was not: the plan's token took its place."""
    bonus: int = 0
    """Passes in which all were, in a tree up to a leaf: the plan's token followed."""
    passes: int = 0
    """Decode passes with a draft."""
    passes_without: int = 0
    """Decode passes of requests that asked for drafting and had none."""
    off: dict[str, int] = field(default_factory=dict)
    """Why, and how often."""

    @property
    def steps(self) -> int:
        """Decode passes: as many as consumed tokens, or fewer where drafts were accepted."""
        return self.passes + self.passes_without

    @property
    def taken_back(self) -> int:
        """Tokens drafted in vain."""
        return self.drafted - self.accepted

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were accepted; None where none were drafted."""
        return self.accepted / self.drafted if self.drafted else None

    def note(self, draft: Draft | None, token_ids: Sequence[int], off: str | None) -> None:
        """Add one decode pass that had a draft and emitted `token_ids`; `off` says why it had none."""
        if draft:
            path = draft.path(token_ids)
            self.drafted += len(draft.tokens)
            self.accepted += len(path)
            self.passes += 1
            if len(path) < len(token_ids):  # otherwise the request ended within the draft
                whole = not draft.children(path[-1] if path else 0)
                self.bonus += whole
                self.recovered += not whole
            return
        self.passes_without += 1
        if off is not None:
            self.off[off] = self.off.get(off, 0) + 1

    def __add__(self, other: DraftStats) -> DraftStats:
        reasons = {reason: self.off.get(reason, 0) + other.off.get(reason, 0) for reason in {**self.off, **other.off}}
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "off"}
        return DraftStats(**counts, off=reasons)


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftRow:
    """A request that is about to decode and may have a draft."""

    request: Request
    """Its prompt, output and `draft`; not to be changed."""
    slot: int
    """Its cache slot."""
    position: int
    """Of its last committed token, which the pass will consume."""
    most: int
    """Most tokens to draft, 0 or more: what it may still emit, less the one that the pass emits anyway."""

    @property
    def clock(self) -> int:
        """Of the pass that consumes the last committed token."""
        return self.position - len(self.request.prompt)


class Drafter(Protocol):
    """Who proposes, for all requests of an engine. But for `resolve`, called between passes, by one thread at a time."""

    def resolve(self, draft: object, prompt_tokens: int, max_new_tokens: int) -> object:
        """What becomes of the `draft=` of a request of these lengths: its `Request.draft`. Raises `InvalidDraft` where it cannot be
        honoured. Called by any thread, also while a pass runs."""
        ...

    def propose(self, rows: Sequence[DraftRow], tokens: Mapping[int, int], room: int) -> dict[int, Draft]:
        """Drafts by slot, for some of `rows`.

        Args: `tokens`: by slot, what the pass brings without drafts; `room`: most tokens that all drafts may add to it.
        """
        ...

    def why_not(self, request: Request) -> str | None:
        """Why the request has no draft in this pass, in a few words."""
        ...

    def committed(self, request: Request, draft: Draft | None, token_ids: Sequence[int]) -> None:
        """The pass has emitted `token_ids` for a request that asked for drafting; they are not yet in its output."""
        ...

    def ended(self, request: Request) -> None:
        """The request is over."""
        ...


def draft_row(request: Request, slot: int, num_computed: int) -> DraftRow | None:
    """The request as a row to draft for; None where it asks for no drafting or is still reading its prompt."""
    if request.draft is None or num_computed < len(request.prompt):
        return None
    remaining = request.sampling.max_new_tokens - len(request.output)
    return DraftRow(request=request, slot=slot, position=num_computed, most=min(MAX_DRAFT_TOKENS, remaining - 1))


def stack_done(drafts: Sequence[Draft | None], num_layers: int) -> Ints | None:
    """`Rows.done` of rows with these drafts; None where nothing is done."""
    if all(draft is None or draft.done is None for draft in drafts):
        return None
    nothing = np.zeros(num_layers, dtype=np.int64)
    return np.stack([nothing if draft is None or draft.done is None else draft.done for draft in drafts])


def given_states(rows: Rows, drafts: Sequence[Draft | None]) -> GivenStates | None:
    """The states that drafts bring into a pass over `rows`; None where none does."""
    first_tokens = (np.cumsum(rows.num_tokens) - rows.num_tokens).tolist()
    brought = [
        (first_token, draft.states)
        for first_token, draft in zip(first_tokens, drafts, strict=True)
        if draft is not None and draft.states is not None
    ]
    if not brought:
        return None
    return GivenStates(
        tokens=np.concatenate([np.arange(first_token, first_token + len(states)) for first_token, states in brought]),
        states=torch.cat([states for _, states in brought]),
    )


def num_matching(draft: Sequence[int], token_ids: Sequence[int]) -> int:
    """How many leading tokens of `draft` are those of `token_ids`: b c d and b c x make 2."""
    count = 0
    for drafted, token in zip(draft, token_ids, strict=False):
        if drafted != token:
            break
        count += 1
    return count
