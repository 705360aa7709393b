"""What the operator of a server decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from shoal.depth.plan import Dense
from shoal.engine.intake import Plan
from shoal.errors import InvalidInput
from shoal.signals.guard import Guard
from shoal.signals.probe import Probe

PRIVATE_DRAFTS = ("self", "ngram", "suffix", "auto")
"""Ways to draft that tell no request anything of another's text; a tri-gram table is shared, so the operator has to allow it."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits and defaults of a server. Raises `InvalidInput` for values outside what is allowed."""

    model: str
    """The name that requests call the model by."""
    plan: Plan = field(default_factory=Dense)
    """Of requests that ask for no depth."""
    draft: str | None = None
    """Of requests that do not say how to draft."""
    min_depth: float = 0.1
    """Smallest mean share of the layers that a request may ask for."""
    drafts: tuple[str, ...] = PRIVATE_DRAFTS
    """Ways to draft that a request may ask for."""
    max_tokens: int = 1024
    """Most tokens that a request may emit; chats that say nothing get as many, or what the model's positions leave."""
    max_queue: int = 256
    """Most requests that wait for a cache slot; beyond them the answer is 429."""
    timeout_s: float = 600.0
    """Seconds that a request may take; it may ask for less."""
    max_body_bytes: int = 4 * 2**20
    """Longest body of an HTTP request."""
    body_timeout_s: float = 30.0
    """Seconds in which a body has to arrive."""
    max_documents: int = 200
    """Most documents of a ranking."""
    max_rank_calls: int = 200
    """Most model calls that a ranking may ask for; one that says nothing gets 100, or as many."""
    max_rankings: int = 8
    """Most rankings that run at once; beyond them the answer is 429."""
    probes: tuple[Probe | Guard, ...] = ()
    """What requests may ask for by name; guards read every prompt that is completed."""
    api_keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Key by the name of who holds it. Empty: nobody has to show one."""

    def __post_init__(self) -> None:
        rules = {
            "min_depth": (0 < self.min_depth <= 1, "above 0, at most 1"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "max_queue": (self.max_queue >= 0, "0 or more"),
            "max_documents": (self.max_documents >= 1, "1 or more"),
            "max_rank_calls": (self.max_rank_calls >= 1, "1 or more"),
            "max_rankings": (self.max_rankings >= 1, "1 or more"),
            "timeout_s": (0 < self.timeout_s < float("inf"), "above 0 and finite"),
            "max_body_bytes": (self.max_body_bytes >= 1, "1 or more"),
            "body_timeout_s": (0 < self.body_timeout_s < float("inf"), "above 0 and finite"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} must be {allowed}, got {getattr(self, name)!r}")
