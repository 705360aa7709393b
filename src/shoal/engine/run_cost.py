"""What a list of prompts cost: the ledgers of its requests added up, and what they shared."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.engine.drafting import DraftStats
from shoal.engine.ledger import EngineStats, Ledger
from shoal.engine.request import Generation


@dataclass(kw_only=True)
class RunCost:
    """What a list of prompts cost under one policy."""

    ledger: Ledger = field(default_factory=Ledger)
    """The sum over the requests."""
    stats: EngineStats = field(default_factory=EngineStats)
    """What they shared."""
    num_requests: int = 0
    """Completions that ended, however they ended."""
    num_failed: int = 0
    """Those that ended with an error."""
    num_past_horizon: int = 0
    """Those that ran on past the horizon of their plan."""
    drafting: DraftStats = field(default_factory=DraftStats)
    """What drafting did for them."""

    @property
    def decode_s(self) -> float:
        """Seconds for generated tokens, drafting them included."""
        return self.stats.decode_s + self.stats.draft_s

    @property
    def decode_s_per_token(self) -> float:
        """Seconds for generated tokens, per emitted token."""
        return self.decode_s / max(1, self.ledger.new_tokens)

    @property
    def total_s_per_token(self) -> float:
        """Seconds of everything, per emitted token."""
        return (self.stats.prompt_s + self.decode_s) / max(1, self.ledger.new_tokens)

    def add(self, done: Generation) -> None:
        """Count one completion."""
        self.ledger += done.ledger
        self.num_requests += 1
        self.num_failed += done.finish_reason == "error"
        self.num_past_horizon += done.past_horizon
        if done.drafting is not None:
            self.drafting += done.drafting
