"""Who drafts what, and how much: proposers by request, calibrated chances, lengths by goodput.

    resolve     draft= becomes proposers, shared by requests that ask alike
    propose     lookups, and models where they pay; the better of each row; how many of its tokens the pass verifies
    committed   what came is held against all that was proposed, verified or not

Lookups go on while drafting is off, unless they take more of a step than they bring, and what they would have drafted is compared
with what came: the engine sees when to begin again. What does not pay is tried again after 16 passes, then 32, up to 256, and a
model anew when half of the rows have gone.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shoal.draft.acceptance import Acceptance
from shoal.draft.choices import Auto, Choice, SelfDraft, Suffix, choice_of
from shoal.draft.control import STOP_AT, TRIAL_TOKENS, PassSeconds, lengths, model_length, pass_seconds
from shoal.draft.proposal import Lookup, ModelProposer, Proposal
from shoal.draft.resolve import check_choice, key_of, make_proposer
from shoal.engine.drafting import Draft, DraftRow
from shoal.engine.request import Request

if TYPE_CHECKING:
    from shoal.engine.engine import Engine

FIRST_RETRY, LAST_RETRY = 8, 256
"""Passes before a model that did not pay is tried again, by one token: half of the first time, and at most."""
HOPEFUL, FIRST_TRIALS = 0.4, 6
"""Share of accepted tokens above which a model is tried at once where its passes have not been measured, and how often in a row."""
WEIGHT = 1 / 16
"""Of one token in the share of a model's that are accepted."""
LOOKUP_WORTH = 0.5
"""Chance of its first token from which on a lookup is taken without asking a model."""
LOOKUP_SHARE = 0.01
"""Share of a step's seconds that a lookup may take whatever it brings."""
LEAST_CHANCE = 0.05
"""Chance below which a drafted token is not worth a thought."""
MAX_PASS_DRAFT = 192
"""Most drafted tokens in a pass: each wants logits."""
MAX_SOURCES = 64
"""Proposers kept, the last ones that were asked for."""


@dataclass(eq=False)
class Source:
    """A proposer with what has been learnt of it."""

    proposer: Lookup | ModelProposer
    acceptance: Acceptance = field(init=False)
    mean_chance: float = 0.7
    """Share of its tokens that were accepted, of late."""
    retry_after: int = FIRST_RETRY
    passes_off: int = 0
    rows_off: int = 0
    """Rows for which a model was found not to pay."""
    trials: int = 0
    """In a row, of a model whose passes have not been measured."""
    passes_on: int = 0
    share: float = 0.0
    """Of a lookup: recent share of a step's seconds that it took."""
    gain: float = 0.0
    """Of a lookup: tokens that were accepted per row and pass, of late."""

    def __post_init__(self) -> None:
        self.acceptance = Acceptance(self.proposer.priors)

    def go_on(self, evidence: Sequence[int]) -> bool:
        """Whether a model's draft should have another token: while it may well be right as a whole."""
        return self.acceptance.chances(evidence)[-1] > STOP_AT

    def expected(self, proposal: Proposal) -> float:
        """Tokens of a proposal that will be accepted."""
        return sum(self.acceptance.chances(proposal.evidence))

    def rests(self) -> bool:
        """Whether a lookup is left out of this pass, because it takes more of a step than it brings: where steps are short, and
        texts do not repeat themselves."""
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

    def learn(self, proposal: Proposal, token_ids: Sequence[int]) -> None:
        """Hold what was proposed against what came, up to the first difference."""
        for token, evidence, came in zip(proposal.tokens, proposal.evidence, token_ids, strict=False):
            self.acceptance.learn(evidence, token == came)
            self.mean_chance += WEIGHT * ((token == came) - self.mean_chance)
            if token != came:
                break


@dataclass(eq=False)
class Way:
    """How one request is drafted for: its `Request.draft`."""

    sources: tuple[Source, ...]
    """Lookups before models."""
    tokens: int | None
    """`Choice.num_tokens`."""
    proposed: dict[Source, Proposal] = field(default_factory=dict)
    """For the pass at hand."""
    verify_all: bool = False
    """Whether the pass verifies all of what is best, whatever it is worth."""
    why_not: str = ""

    def begin(self) -> None:
        """A new pass."""
        self.proposed, self.verify_all, self.why_not = {}, False, "nothing to copy"

    def best(self) -> tuple[Source, Proposal] | None:
        """The proposal that most of is expected to be accepted."""
        return max(self.proposed.items(), key=lambda one: one[0].expected(one[1]), default=None)

    def most(self, row: DraftRow, source: Source) -> int:
        """Most tokens that a source should draft for the row."""
        return min(row.most, self.tokens or source.proposer.longest)


class Drafter:
    """Drafts for all requests of an engine; see `engine/drafting.py` for when it is called."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.runner = engine, engine.runner
        self.measured = engine.runner.decoder.device.type == "cpu"
        """Whether predicted seconds hold: elsewhere passes with drafts leave the recorded graphs, which no price tells."""
        self._sources: OrderedDict[Hashable, Source] = OrderedDict()
        self._making = threading.Lock()
        self._last_step = 0.0

    def resolve(self, draft: object, prompt_tokens: int, max_new_tokens: int) -> object:
        """As in the engine's `Drafter`."""
        choice = choice_of(draft)
        kinds: tuple[Choice, ...] = (choice,)
        if isinstance(choice, Auto):
            kinds = (Suffix(), SelfDraft()) if self.engine.tuned else (Suffix(),)
        for kind in kinds:
            check_choice(kind, self.engine, prompt_tokens, max_new_tokens)
        return Way(sources=tuple(map(self._source, kinds)), tokens=choice.num_tokens)

    def propose(self, rows: Sequence[DraftRow], tokens: Mapping[int, int], room: int) -> dict[int, Draft]:
        """As in the engine's `Drafter`."""
        ways = {row.slot: way_of(row.request) for row in rows}
        asking = [row for row in rows if self._may_draft(row, room)]
        began = time.perf_counter()
        step_s, self._last_step = began - self._last_step, began
        lookups = {source for row in asking for source in ways[row.slot].sources if hasattr(source.proposer, "look_up")}
        took_s = {source: 0.0 for source in lookups if not source.rests()}
        for_models: dict[tuple[Source, int | None], list[DraftRow]] = {}
        for row in asking:
            way = ways[row.slot]
            for source in way.sources:
                if not hasattr(source.proposer, "look_up"):
                    for_models.setdefault((source, way.tokens), []).append(row)
                    break
                if way.tokens is None and source not in took_s:
                    way.why_not = "looking up takes more than it brings"
                    continue
                began = time.perf_counter()
                found = source.proposer.look_up(row.request, way.most(row, source))
                took_s[source] = took_s.get(source, 0.0) + time.perf_counter() - began
                if found.tokens:
                    way.proposed[source], way.verify_all = found, way.tokens is not None
                    if source.acceptance.chance(found.evidence[0]) >= LOOKUP_WORTH:
                        break
        for source, seconds in took_s.items():
            source.share += WEIGHT * (min(1.0, seconds / step_s) - source.share)
        predicted_s = pass_seconds(tokens, self.runner.slots, self.runner.tally.step_time)
        for (source, fixed), its_rows in for_models.items():
            self._ask_model(source, fixed, its_rows, len(tokens), predicted_s)
        return self._lengths(
            {row.slot: ways[row.slot] for row in asking}, len(tokens), predicted_s, min(room, MAX_PASS_DRAFT)
        )

    def why_not(self, request: Request) -> str | None:
        """As in the engine's `Drafter`."""
        return way_of(request).why_not

    def committed(self, request: Request, draft: Draft | None, token_ids: Sequence[int]) -> None:
        """As in the engine's `Drafter`."""
        way = way_of(request)
        for source, proposal in way.proposed.items():
            source.learn(proposal, token_ids)
        for source in way.sources:
            accepted = len(draft.path(token_ids)) if draft and source in way.proposed else 0
            source.gain += WEIGHT / 4 * (accepted - source.gain)

    def ended(self, request: Request) -> None:
        """As in the engine's `Drafter`."""
        for source in way_of(request).sources:
            source.proposer.ended(request)

    def _may_draft(self, row: DraftRow, room: int) -> bool:
        """Whether there is any use in a draft; says why not."""
        way = way_of(row.request)
        way.begin()
        if not row.most:
            way.why_not = "only one token left"
        elif not room:
            way.why_not = "no room in the pass"
        elif way.tokens is None and not self.measured:
            way.why_not = "give the number of tokens: what drafting takes is not measured on this device"
        else:
            return True
        return False

    def _source(self, choice: Choice) -> Source:
        """The source of a choice: one for all requests that choose alike, whichever thread asks."""
        key = key_of(choice)
        with self._making:
            if key not in self._sources:
                self._sources[key] = Source(make_proposer(choice, self.engine))
                if len(self._sources) > MAX_SOURCES:
                    self._sources.popitem(last=False)
            self._sources.move_to_end(key)
            return self._sources[key]

    def _ask_model(
        self, source: Source, fixed: int | None, rows: Sequence[DraftRow], num_rows: int, seconds: PassSeconds
    ) -> None:
        """Have a model draft for `rows`, `fixed` tokens each or as many as pay."""
        model = source.proposer
        assert not hasattr(model, "look_up")
        count, trial = (fixed, False) if fixed else self._model_length(source, model, rows, num_rows, seconds)
        if not count:
            for row in rows:
                way_of(row.request).why_not = "drafting would not be faster"
            return
        go_on = (lambda evidence: True) if fixed else source.go_on
        proposals = model.propose(rows, [min(count, row.most) for row in rows], go_on)
        for row, proposal in zip(rows, proposals, strict=True):
            way = way_of(row.request)
            if not proposal.tokens:
                way.why_not = "nothing was drafted"
                continue
            if proposal.distributions or trial:
                way.proposed.clear()
            way.proposed[source] = proposal
            # A drawn token is verified whatever it is: to choose by it would change what comes out.
            way.verify_all = bool(fixed) or trial or bool(proposal.distributions)

    def _model_length(
        self, source: Source, model: ModelProposer, rows: Sequence[DraftRow], num_rows: int, seconds: PassSeconds
    ) -> tuple[int, bool]:
        """How many tokens a model should draft, 0 for none; and whether that is a trial, to learn what it takes and brings."""
        if source.passes_off and 2 * len(rows) > source.rows_off:
            source.passes_off += 1
            if source.passes_off <= source.retry_after:
                return 0, False
            source.passes_off = source.trials = 0
            return 1, True
        slots = [row.slot for row in rows]
        draft_s = model.seconds(rows)
        count = model_length(source.mean_chance, slots, num_rows, seconds, most=model.longest, draft_s=draft_s)
        if count:
            source.retry_after, source.passes_off = FIRST_RETRY, 0
            return count, False
        if count is None and source.mean_chance > HOPEFUL and source.trials < FIRST_TRIALS:
            source.trials += 1
            return TRIAL_TOKENS, True
        source.passes_off, source.rows_off = 1, len(rows)
        source.retry_after = min(2 * source.retry_after, LAST_RETRY)
        return 0, False

    def _lengths(self, ways: Mapping[int, Way], num_rows: int, seconds: PassSeconds, room: int) -> dict[int, Draft]:
        """Of the best proposal of each slot what the pass verifies."""
        best = {slot: found for slot, way in ways.items() if (found := way.best()) is not None}
        counts: dict[int, int] = {}
        chances: dict[int, list[float]] = {}
        for slot, (source, proposal) in best.items():
            way = ways[slot]
            if way.verify_all:
                counts[slot] = min(len(proposal.tokens), room)
                room -= counts[slot]
                continue
            way.why_not = "verifying a draft would not be faster"
            likely = [one for one in source.acceptance.chances(proposal.evidence) if one > LEAST_CHANCE]
            if likely:
                chances[slot] = likely
        if chances:
            counts |= lengths(chances, num_rows, seconds, room)
        return {slot: cut(best[slot][1], count) for slot, count in counts.items() if count}


def way_of(request: Request) -> Way:
    """How the request is drafted for."""
    assert isinstance(request.draft, Way)
    return request.draft


def cut(proposal: Proposal, count: int) -> Draft:
    """The first `count` tokens of a proposal, with the states of the pass's first `count + 1` tokens at most."""
    tokens, distributions = proposal.tokens[:count], proposal.distributions[:count]
    if proposal.parents is not None:
        return Draft(tokens=tokens, parents=proposal.parents[:count], distributions=distributions)
    if proposal.states is None or proposal.done is None:
        return Draft(tokens=tokens, distributions=distributions)
    states = proposal.states[: count + 1]
    done = np.minimum(proposal.done, len(states))
    return Draft(tokens=tokens, distributions=distributions, states=states, done=done)
