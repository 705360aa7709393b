"""A proposer with what has been learnt of it: how often it is right, and whether it is worth its time.

Lookups go on while nothing of theirs is verified, and what they would have drafted is compared with what came: the engine sees when
to begin again. One that takes more of a step than it brings rests for 16 passes, then 32, up to 256.

What either promises is a prediction, so predictions are held against the steps that follow: a source whose steps take longer than
was predicted, more so than steps without drafts, has its promises cut by as much. Trying a model out takes passes, and these are
saved up for, a hundredth of a pass in each, whatever else is thought of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.draft.acceptance import Acceptance
from shoal.draft.control import STOP_AT, TRIAL_TOKENS, PassSeconds, model_length
from shoal.draft.proposal import Lookup, ModelProposer, Proposal
from shoal.engine.drafting import DraftRow

WEIGHT = 1 / 16
"""Of one token in the share of tokens that are accepted, and of one step in what a lookup takes."""
FIRST_RETRY, LAST_RETRY = 8, 256
"""Passes before a lookup that did not pay is tried again: half of the first time, and at most."""
LOOKUP_SHARE = 0.01
"""Share of a step's seconds that a lookup may take whatever it brings."""
FORGIVEN_AFTER = 512
"""Passes in which something was found but not verified, until the slowness of a lookup's steps counts 1/e."""
HOPEFUL, TRIALS = 0.4, 6
"""Share of accepted tokens above which a model is tried where its passes have not been measured, and how often in a row."""
SAVED_PER_PASS, MOST_SAVED = 0.01, 2.0
"""Passes that each pass saves up for trials of a model, and the most that is saved. A trial of k tokens takes k + 1."""
RECHECK, LAST_RECHECK = 8, 256
"""Passes until a model that would not pay is thought of again: at first, and at most."""
MOST_SLOWNESS = 3.0
"""Times its predicted seconds that a step counts for: more is another process's doing."""


@dataclass(eq=False)
class Source:
    """What both kinds have."""

    proposer: Lookup | ModelProposer
    acceptance: Acceptance = field(init=False)
    slowness: float = 1.0
    """Seconds of the steps with its drafts over what was predicted, of late."""

    def __post_init__(self) -> None:
        self.acceptance = Acceptance(self.proposer.priors)

    def expected(self, proposal: Proposal) -> float:
        """Tokens of a proposal that will be accepted."""
        return sum(self.acceptance.chances(proposal.evidence))

    def learn(self, proposal: Proposal, token_ids: Sequence[int]) -> None:
        """Hold what was proposed against what came, up to the first difference."""
        for token, evidence, came in zip(proposal.tokens, proposal.evidence, token_ids, strict=False):
            self.compared(evidence, token == came)
            if token != came:
                break

    def compared(self, evidence: int, accepted: bool) -> None:
        """A token with this evidence was held against what came."""
        self.acceptance.learn(evidence, accepted)


@dataclass(eq=False)
class LookupSource(Source):
    """A proposer that runs no model."""

    proposer: Lookup
    retry_after: int = FIRST_RETRY
    passes_on: int = 0
    passes_off: int = 0
    share: float = 0.0
    """Of a step's seconds, what it took of late."""
    gain: float = 0.0
    """Tokens that were accepted per row and pass, of late."""

    def rests(self) -> bool:
        """Whether it is left out of this pass, because it takes more of a step than it brings: where steps are short, and texts do
        not repeat themselves."""
        if self.passes_off:
            self.passes_off += 1
            if self.passes_off <= self.retry_after:
                return True
            self.passes_off = self.passes_on = 0
            return False
        self.passes_on += 1
        if self.gain > self.share:
            self.retry_after = FIRST_RETRY
        elif self.passes_on > FIRST_RETRY and self.share > LOOKUP_SHARE:
            self.passes_off, self.retry_after = 1, min(2 * self.retry_after, LAST_RETRY)
            return True
        return False

    def left_out(self) -> None:
        """Nothing of what it found was worth verifying: believe in it a little more, so that it is tried again some day."""
        self.slowness += (1 - self.slowness) / FORGIVEN_AFTER

    def took(self, share: float) -> None:
        """It took this share of a step."""
        self.share += WEIGHT * (min(1.0, share) - self.share)

    def brought(self, num_accepted: int) -> None:
        """So many of its tokens were accepted in a row of a pass."""
        self.gain += WEIGHT / 4 * (num_accepted - self.gain)


@dataclass(eq=False)
class ModelSource(Source):
    """A proposer whose tokens cost passes."""

    proposer: ModelProposer
    mean_chance: float = 0.7
    """Share of its tokens that were accepted, of late: what a draft not yet made may count on."""
    saved: float = SAVED_PER_PASS
    """Passes that may go into trials; below 0 where a row of trials took more."""
    trials: int = 0
    """In a row, while its passes have not been measured."""
    passes_on: int = 0
    """In a row that it promised to pay."""
    wait: int = 0
    """Passes until it is thought of again."""
    patience: int = RECHECK
    """What `wait` begins at: longer each time that it promised to pay and did not for long."""

    def compared(self, evidence: int, accepted: bool) -> None:
        """As in `Source`."""
        super().compared(evidence, accepted)
        self.mean_chance += WEIGHT * (accepted - self.mean_chance)

    def go_on(self, evidence: Sequence[int]) -> bool:
        """Whether a draft should have another token: while it may well be right as a whole."""
        return self.acceptance.chances(evidence)[-1] > STOP_AT

    def waits(self) -> bool:
        """A pass has come: whether it did not pay lately, so that nobody asks."""
        self.wait -= 1
        self.saved = min(MOST_SAVED, self.saved + SAVED_PER_PASS)
        return self.wait > 0

    def length(
        self, rows: Sequence[DraftRow], num_rows: int, seconds: PassSeconds, plain_slowness: float
    ) -> tuple[int, bool]:
        """How many tokens it should draft for `rows`, 0 for none; and whether that is a trial, to learn what it takes and brings.

        `num_rows`, `seconds`: see `control.lengths`; `plain_slowness`: the slowness of steps without a draft.
        """
        count = model_length(
            self.mean_chance, [row.slot for row in rows], num_rows, seconds,
            most=self.proposer.longest, draft_s=self.proposer.seconds(rows), slowness=max(1, self.slowness / plain_slowness),
        )  # fmt: skip
        if count:
            self.passes_on += 1
            return count, False
        unknown = count is None and self.mean_chance > HOPEFUL
        if self.saved >= MOST_SAVED or (unknown and (self.saved > 0 or 0 < self.trials < TRIALS)):
            tokens = TRIAL_TOKENS if unknown else 1
            self.saved -= tokens + 1
            self.trials += 1
            return tokens, True
        if self.passes_on:
            self.patience = min(2 * self.patience, LAST_RECHECK) if self.passes_on < 2 * RECHECK else RECHECK
        self.wait, self.passes_on, self.trials = self.patience, 0, 0
        return 0, False


def slower(slowness: float, step_s: float, predicted_s: float) -> float:
    """What `slowness` becomes after a step."""
    return slowness + 2 / RECHECK * (min(step_s / predicted_s, MOST_SLOWNESS) - slowness)
