"""What proposers offer, and the two kinds of them: those that look up, and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shoal.engine.drafting import DraftRow
from shoal.engine.request import Request
from shoal.models.passes import Ints

GoOn = Callable[[Sequence[int]], bool]
"""Whether a draft whose tokens have this evidence should have another: what stops a model that drafts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """Tokens that may come next."""

    tokens: tuple[int, ...] = ()
    """In order; none where there is nothing to offer."""
    evidence: tuple[int, ...] = ()
    """Per token a small whole number, how much speaks for it: an index into `Proposer.priors`. Nothing for trees, which are
    verified whole."""
    parents: tuple[int, ...] | None = None
    """As in `Draft`."""
    distributions: tuple[Tensor, ...] = ()
    """As in `Draft`."""
    states: Tensor | None = None
    """As in `Draft`, of the tokens that the proposer's passes consumed."""
    done: Ints | None = None
    """As in `Draft`."""


NOTHING = Proposal()


class Proposer(Protocol):
    """Guesses what requests emit next. One serves all requests of an engine that ask for it in the same way."""

    priors: tuple[float, ...]
    """Per evidence, the share of tokens that are accepted where those before them are, before anything has been seen."""
    longest: int
    """Most tokens to draft where the engine decides how many."""

    def ended(self, request: Request) -> None:
        """The request is over: forget it."""
        ...


class Lookup(Proposer, Protocol):
    """A proposer that runs no model."""

    def look_up(self, request: Request, most: int) -> Proposal:
        """At most `most` tokens, 1 or more, for one request."""
        ...


class ModelProposer(Proposer, Protocol):
    """A proposer whose tokens cost a pass each, for all rows together."""

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int], go_on: GoOn) -> list[Proposal]:
        """A proposal per row, of at most `most` tokens, 1 or more."""
        ...

    def seconds(self, rows: Sequence[DraftRow]) -> float | None:
        """Predicted seconds to draft one more token for each row; None while not measured."""
        ...
