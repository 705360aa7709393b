"""Who drafts what, and how much: proposers by request, calibrated chances, lengths by goodput.

    resolve     draft= becomes proposers, shared by requests that ask alike
    propose     lookups first, models where they pay; then how many tokens of each draft the pass verifies
    committed   what came is held against what was proposed, verified or not

A lookup costs next to nothing, so it goes on while drafting is off, and what it would have drafted is compared with what came: the
engine sees when to begin again. A model that does not pay is tried again after 16 passes, then 32, up to 256.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shoal.draft.acceptance import Acceptance
from shoal.draft.choices import Auto, Choice, SelfDraft, Suffix, choice_of
from shoal.draft.control import STOP_AT, TRIAL_TOKENS, lengths, model_length
from shoal.draft.proposal import NOTHING, Proposal, Proposer
from shoal.draft.resolve import key_of, make_proposer
from shoal.engine.drafting import Draft, DraftRow
from shoal.engine.request import Request

if TYPE_CHECKING:
    from shoal.engine.engine import Engine

LONGEST_MODEL_DRAFT = 8
"""Most tokens that a model drafts for one pass where the engine decides."""
FIRST_RETRY, LAST_RETRY = 8, 256
"""Passes before a model that did not pay is tried again: half of the first time, and at most."""
HOPEFUL = 0.4
"""Share of accepted tokens above which a model is tried at once where its passes have not been measured."""
SLOW = 1 / 16
"""Weight of one token in the share of accepted ones."""
LOOKUP_WORTH = 0.5
"""Chance of its first token from which on a lookup is taken without asking a model."""
LEAST_CHANCE = 0.05
"""Chance below which a drafted token is not worth a thought."""
MAX_SOURCES = 64
"""Proposers kept, the last ones that were asked for."""


@dataclass(eq=False)
class Source:
    """A proposer with what has been learnt of it."""

    proposer: Proposer
    acceptance: Acceptance = field(init=False)
    mean_chance: float = 0.7
    """Of a model's tokens: the share that was accepted, of late."""
    retry_after: int = FIRST_RETRY
    passes_off: int = 0

    def __post_init__(self) -> None:
        self.acceptance = Acceptance(self.proposer.priors)

    def go_on(self, evidence: Sequence[int]) -> bool:
        """Whether a model's draft should have another token: while it may well be right as a whole."""
        return self.acceptance.chances(evidence)[-1] > STOP_AT


@dataclass(eq=False)
class Way:
    """How one request is drafted for: its `Request.draft`."""

    sources: tuple[Source, ...]
    """Lookups before models."""
    tokens: int | None
    """As in `Choice`."""
    proposed: Proposal = NOTHING
    source: Source | None = None
    """Of what is proposed."""
    verify_all: bool = False
    """Whether the pass verifies all of it, whatever it is worth."""
    why_not: str | None = None


class Drafter:
    """Drafts for all requests of an engine; see `engine/drafting.py` for when it is called."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.runner = engine, engine.runner
        self._sources: OrderedDict[Hashable, Source] = OrderedDict()

    def resolve(self, draft: object) -> object:
        """As in the engine's `Drafter`."""
        choice = choice_of(draft)
        kinds: tuple[Choice, ...] = (choice,)
        if isinstance(choice, Auto):
            kinds = (Suffix(), SelfDraft()) if self.engine.tuned else (Suffix(),)
        return Way(sources=tuple(map(self._source, kinds)), tokens=choice.tokens)

    def propose(self, rows: Sequence[DraftRow], tokens: Mapping[int, int], room: int) -> dict[int, Draft]:
        """As in the engine's `Drafter`."""
        ways = {row.slot: way_of(row.request) for row in rows}
        for_models: dict[tuple[Source, int | None], list[DraftRow]] = {}
        for row in rows:
            way = ways[row.slot]
            way.proposed, way.source, way.verify_all, way.why_not = NOTHING, None, False, "nothing to copy"
            if not row.most:
                way.why_not = "only one token left"
                continue
            for source in way.sources:
                if source.proposer.runs_model:
                    for_models.setdefault((source, way.tokens), []).append(row)
                    break
                (way.proposed,) = source.proposer.propose([row], [min(row.most, way.tokens or row.most)], source.go_on)
                way.source, way.verify_all = source, way.tokens is not None
                if way.proposed.tokens and source.acceptance.chance(way.proposed.evidence[0]) >= LOOKUP_WORTH:
                    break
        for (source, fixed), asking in for_models.items():
            self._ask_model(source, fixed, asking, tokens)
        return self._lengths(ways, tokens, room)

    def why_not(self, request: Request) -> str | None:
        """As in the engine's `Drafter`."""
        return way_of(request).why_not

    def committed(self, request: Request, draft: Draft | None, token_ids: Sequence[int]) -> None:
        """As in the engine's `Drafter`."""
        way = way_of(request)
        source = way.source
        if source is None:
            return
        for token, evidence, came in zip(way.proposed.tokens, way.proposed.evidence, token_ids, strict=False):
            source.acceptance.learn(evidence, token == came)
            source.mean_chance += SLOW * ((token == came) - source.mean_chance)
            if token != came:
                break

    def ended(self, request: Request) -> None:
        """As in the engine's `Drafter`."""
        for source in way_of(request).sources:
            source.proposer.ended(request)

    def _source(self, choice: Choice) -> Source:
        """The source of a choice: one for all requests that choose alike."""
        key = key_of(choice)
        if key not in self._sources:
            self._sources[key] = Source(make_proposer(choice, self.engine))
            if len(self._sources) > MAX_SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(key)
        return self._sources[key]

    def _ask_model(
        self, source: Source, fixed: int | None, rows: Sequence[DraftRow], tokens: Mapping[int, int]
    ) -> None:
        """Have a model draft for `rows`, `fixed` tokens each or as many as pay, and take what it proposes."""
        count, trial = (fixed, False) if fixed else self._model_length(source, rows, tokens)
        if not count:
            for row in rows:
                if not way_of(row.request).proposed.tokens:
                    way_of(row.request).why_not = "drafting would not be faster"
            return
        go_on = (lambda evidence: True) if fixed else source.go_on
        proposals = source.proposer.propose(rows, [min(count, row.most) for row in rows], go_on)
        for row, proposal in zip(rows, proposals, strict=True):
            way = way_of(row.request)
            if proposal.tokens:
                way.proposed, way.source, way.verify_all = proposal, source, bool(fixed) or trial

    def _model_length(self, source: Source, rows: Sequence[DraftRow], tokens: Mapping[int, int]) -> tuple[int, bool]:
        """How many tokens a model should draft, 0 for none; and whether that is a trial, to learn what it takes and brings."""
        if source.passes_off:
            source.passes_off += 1
            if source.passes_off <= source.retry_after:
                return 0, False
            source.passes_off = 0
            return TRIAL_TOKENS, True
        slots, step_time = [row.slot for row in rows], self.runner.tally.step_time
        draft_s = source.proposer.seconds(rows)
        count = model_length(
            source.mean_chance, slots, LONGEST_MODEL_DRAFT, draft_s, tokens, self.runner.slots, step_time
        )
        if count:
            source.retry_after = FIRST_RETRY
            return count, False
        if count is None and source.mean_chance > HOPEFUL:
            return TRIAL_TOKENS, True
        source.passes_off, source.retry_after = 1, min(2 * source.retry_after, LAST_RETRY)
        return 0, False

    def _lengths(self, ways: Mapping[int, Way], tokens: Mapping[int, int], room: int) -> dict[int, Draft]:
        """Of each proposal what the pass verifies."""
        counts: dict[int, int] = {}
        chances: dict[int, list[float]] = {}
        for slot, way in ways.items():
            if way.source is None or not way.proposed.tokens:
                continue
            if way.verify_all:
                counts[slot] = min(len(way.proposed.tokens), room)
                room -= counts[slot]
                continue
            likely = [
                chance for chance in way.source.acceptance.chances(way.proposed.evidence) if chance > LEAST_CHANCE
            ]
            way.why_not = "verifying a draft would not be faster"
            if likely:
                chances[slot] = likely
        if chances:
            counts |= lengths(chances, tokens, self.runner.slots, self.runner.tally.step_time, room)
        return {slot: cut(ways[slot].proposed, count) for slot, count in counts.items() if count}


def way_of(request: Request) -> Way:
    """How the request is drafted for."""
    assert isinstance(request.draft, Way)
    return request.draft


def cut(proposal: Proposal, count: int) -> Draft:
    """The first `count` tokens of a proposal, with the states of the pass's first `count + 1` tokens at most."""
    tokens, distributions = proposal.tokens[:count], proposal.distributions[:count]
    if proposal.states is None or proposal.done is None:
        return Draft(tokens=tokens, distributions=distributions)
    states = proposal.states[: count + 1]
    done = np.minimum(proposal.done, len(states))
    return Draft(tokens=tokens, distributions=distributions, states=states, done=done)
