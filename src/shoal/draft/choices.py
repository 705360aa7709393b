"""What `draft=` may be: how a request is drafted for. No output changes, but by `coupled` drafts and trees, which keep its
distribution."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

from shoal.depth.plan import DepthPlan, DepthPolicy
from shoal.engine.drafting import MAX_DRAFT_TOKENS
from shoal.errors import InvalidDraft


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to draft."""

    tokens: int | None = None
    """Draft up to so many tokens in every pass; None lets the engine decide, down to none at all."""

    def __post_init__(self) -> None:
        if self.tokens is not None and not (isinstance(self.tokens, int) and 1 <= self.tokens <= MAX_DRAFT_TOKENS):
            raise InvalidDraft(
                f"tokens must be 1 to {MAX_DRAFT_TOKENS}, or None to let the engine decide, got {self.tokens!r}"
            )

    @property
    def num_tokens(self) -> int | None:
        """Tokens drafted in every pass; None where the engine decides."""
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class NGram(Choice):
    """Copy what followed the last tokens where they first stood in the request's own text (CopySpec)."""

    match_tokens: int = 3
    """How many tokens have to be the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.match_tokens, int) and self.match_tokens >= 1):
            raise InvalidDraft(f"match_tokens must be 1 or more, got {self.match_tokens!r}")


@dataclass(frozen=True, kw_only=True)
class Suffix(Choice):
    """Follow what most often came after the longest end of the text that has occurred before (SuffixDecoding)."""

    scope: str | None = None
    """Requests of one scope also draft from each other's finished outputs: whoever shares a scope can guess at what others were
    told, from speed alone. None keeps to the request's own text."""


@dataclass(frozen=True, kw_only=True)
class Trigram(Choice):
    """Follow a table of which token follows which two, learnt from a corpus and from what the engine emits (ADED)."""

    corpus: str | None = None
    """A text file to begin with, one text per line."""
    scope: str | None = None
    """Requests of one corpus and scope share a table, and draft from what the others were told."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice(Choice):
    """A way to draft with a model."""

    coupled: bool = False
    """At a temperature, draw the draft and accept a token with probability min(1, p/q): more often than it is the very token that
    the request would draw. Outputs keep their distribution, but a seed no longer gives the same ones whatever is drafted or shares
    the batch."""
    branches: tuple[int, ...] | None = None
    """How many different tokens to draft after each one of a depth: (3, 2, 1) drafts a tree of 3 + 6 + 6 tokens in every pass, all
    verified at once, and accepts a path of it. At a temperature they are drawn without replacement and accepted by recursive
    rejection: always `coupled`, of which the same holds. Greedy requests take the most probable ones and stay exactly the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        branches = self.branches
        if branches is None:
            return
        if not (isinstance(branches, tuple) and branches and all(isinstance(n, int) and n >= 1 for n in branches)):
            raise InvalidDraft(f"branches must be numbers of 1 or more, one per depth, as (3, 2, 1), got {branches!r}")
        if (count := tree_tokens(branches)) > MAX_DRAFT_TOKENS:
            raise InvalidDraft(f"branches {branches} make a tree of {count} tokens, at most {MAX_DRAFT_TOKENS} can be")
        if self.tokens is not None:
            raise InvalidDraft("branches already say how many tokens are drafted: give either tokens or branches")
        if self.coupled:
            raise InvalidDraft("branches are coupled anyway: leave coupled out, or draft without branches")

    @property
    def num_tokens(self) -> int | None:
        """Tokens drafted in every pass; None where the engine decides."""
        return self.tokens if self.branches is None else tree_tokens(self.branches)


@dataclass(frozen=True, kw_only=True)
class SelfDraft(ModelChoice):
    """Draft with some layers of the same model."""

    plan: DepthPlan | DepthPolicy | None = None
    """Which ones; None is the policy that the checkpoint was tuned with, at the smallest depth (1/4 or more) that it was tuned for,
    or a quarter of the layers from the bottom where it was not."""


@dataclass(frozen=True, kw_only=True)
class SmallModel(ModelChoice):
    """Draft with a smaller model."""

    path: str
    """A checkpoint directory or hub id with the same tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Auto(Choice):
    """Suffix drafting where the text repeats itself, otherwise self-drafting where the checkpoint was tuned for depth; per row and
    pass, whichever promises more."""


def tree_tokens(branches: Sequence[int]) -> int:
    """How many tokens a tree has: 3 + 6 + 6 for (3, 2, 1)."""
    return sum(accumulate(branches, mul))


NAMES: Mapping[str, Choice] = {
    "auto": Auto(),
    "self": SelfDraft(),
    "ngram": NGram(),
    "suffix": Suffix(),
    "trigram": Trigram(),
}


def choice_of(draft: object) -> Choice:
    """What `draft=` means. Raises `InvalidDraft` with what is allowed."""
    if isinstance(draft, Choice):
        return draft
    if isinstance(draft, str | os.PathLike):
        name = os.fspath(draft)
        if name in NAMES:
            return NAMES[name]
        if isinstance(draft, os.PathLike) or "/" in name or Path(name).is_dir():
            return SmallModel(path=name)
    raise InvalidDraft(
        f"draft must be one of {', '.join(NAMES)}, the path of a smaller checkpoint, a class of shoal.draft or None, got {draft!r}"
    )
