"""What a proposer offers, and what it has to be."""

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
    """Tokens that may come next, most likely before any are verified."""

    tokens: tuple[int, ...] = ()
    """In order; none where there is nothing to offer."""
    evidence: tuple[int, ...] = ()
    """Per token a small whole number, how much speaks for it: an index into `Proposer.priors`."""
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
    runs_model: bool
    """Whether a token that it drafts costs a pass; others look theirs up."""

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int], go_on: GoOn) -> list[Proposal]:
        """A proposal per row, of at most `most` tokens."""
        ...

    def seconds(self, rows: Sequence[DraftRow]) -> float | None:
        """Predicted seconds to draft one more token for each row; None while not measured, 0 where it is nothing to speak of."""
        ...

    def ended(self, request: Request) -> None:
        """The request is over: forget it."""
        ...


class Lookup:
    """What proposers that run no model share."""

    runs_model = False

    def seconds(self, rows: Sequence[DraftRow]) -> float | None:
        """Looking up is not timed."""
        return 0.0

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int], go_on: GoOn) -> list[Proposal]:
        """As in `Proposer`."""
        return [self.look_up(row.request, count) if count else NOTHING for row, count in zip(rows, most, strict=True)]

    def look_up(self, request: Request, most: int) -> Proposal:
        """At most `most` tokens for one request."""
        raise NotImplementedError
