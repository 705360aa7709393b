"""Who drafts what, and how much: proposers by request, calibrated chances, lengths by goodput.

resolve     draft= becomes proposers, shared by requests that ask alike
propose     lookups, and models where they pay; the better of each row; how many of its tokens the pass verifies
committed   what came is held against all that was proposed, verified or not
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shoal.draft.choices import Auto, Choice, SelfDraft, Suffix, choice_of
from shoal.draft.control import PassSeconds, lengths, pass_seconds
from shoal.draft.proposal import Proposal
from shoal.draft.resolve import check_choice, key_of, make_source
from shoal.draft.sources import LookupSource, ModelSource, Source, slower
from shoal.engine.drafting import Draft, DraftRow
from shoal.engine.request import Request

if TYPE_CHECKING:
    from shoal.engine.engine import Engine

LOOKUP_WORTH = 0.5
"""Chance of its first token from which on a lookup is taken without asking a model."""
LEAST_CHANCE = 0.05
"""Chance below which a drafted token is not worth a thought."""
MAX_PASS_DRAFT = 192
"""Most drafted tokens in a pass: each wants logits."""
MAX_SOURCES = 64
"""Proposers kept, the last ones that were asked for."""


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
        self._slowness = 1.0
        """Seconds of steps without drafts over what was predicted, of late."""
        self._foretold: tuple[float, Source | None, Sequence[DraftRow]] | None = None
        """Of the last step: predicted seconds, whose drafts it verified, the rows."""

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
        self._hear(step_s, rows)
        found_by = {source for row in asking for source in ways[row.slot].sources if isinstance(source, LookupSource)}
        took_s = {source: 0.0 for source in found_by if not source.rests()}
        for_models: dict[tuple[ModelSource, int | None], list[DraftRow]] = {}
        for row in asking:
            way = ways[row.slot]
            for source in way.sources:
                if isinstance(source, ModelSource):
                    for_models.setdefault((source, way.tokens), []).append(row)
                    break
                assert isinstance(source, LookupSource)
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
            source.took(seconds / step_s)
        predicted_s = pass_seconds(tokens, self.runner.slots, self.runner.tally)
        weighed = [
            source
            for (source, fixed), its_rows in for_models.items()
            if self._ask_model(source, fixed, its_rows, len(tokens), predicted_s)
        ]
        best = {row.slot: offer for row in asking if (offer := ways[row.slot].best()) is not None}
        drafts = self._lengths(best, ways, len(tokens), predicted_s, min(room, MAX_PASS_DRAFT))
        if best or weighed:
            verified = {best[slot][0] for slot in drafts}
            asked = [source for source in weighed if any(source in way.proposed for way in ways.values())]
            self._foretell({*verified, *asked}, rows, drafts, predicted_s)
        return drafts

    def why_not(self, request: Request) -> str | None:
        """As in the engine's `Drafter`."""
        return way_of(request).why_not

    def committed(self, request: Request, draft: Draft | None, token_ids: Sequence[int]) -> None:
        """As in the engine's `Drafter`."""
        way = way_of(request)
        for source, proposal in way.proposed.items():
            source.learn(proposal, token_ids)
        for source in way.sources:
            if isinstance(source, LookupSource):
                source.brought(len(draft.path(token_ids)) if draft and source in way.proposed else 0)

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
                self._sources[key] = make_source(choice, self.engine)
                if len(self._sources) > MAX_SOURCES:
                    self._sources.popitem(last=False)
            self._sources.move_to_end(key)
            return self._sources[key]

    def _ask_model(
        self, source: ModelSource, fixed: int | None, rows: Sequence[DraftRow], num_rows: int, seconds: PassSeconds
    ) -> bool:
        """Have a model draft for `rows`, `fixed` tokens each or as many as pay. Returns whether it was weighed if that pays."""
        weighed = not fixed and not source.waits()
        count, trial = fixed or 0, False
        if weighed:
            count, trial = source.length(rows, num_rows, seconds, self._slowness)
        if not count:
            for row in rows:
                way_of(row.request).why_not = "drafting would not be faster"
            return weighed
        go_on = (lambda evidence: True) if fixed else source.go_on
        proposals = source.proposer.propose(rows, [min(count, row.most) for row in rows], go_on)
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
        return weighed

    def _foretell(
        self, sources: set[Source], rows: Sequence[DraftRow], drafts: Mapping[int, Draft], seconds: PassSeconds
    ) -> None:
        """Note what the step at hand should take: verifying `drafts` (by slot), and drafting them where a model did."""
        if len(sources) > 1:
            return  # nobody could tell whose doing it was
        source = next(iter(sources), None)
        predicted_s = seconds({slot: len(draft.tokens) for slot, draft in drafts.items()})
        if predicted_s is not None and isinstance(source, ModelSource):
            num_steps = max(len(one.tokens) for row in rows if (one := way_of(row.request).proposed.get(source)))
            draft_s = source.proposer.seconds(rows)
            predicted_s = None if draft_s is None else predicted_s + num_steps * draft_s
        if predicted_s is not None:
            self._foretold = predicted_s, source, rows

    def _hear(self, step_s: float, rows: Sequence[DraftRow]) -> None:
        """The last step took `step_s`, if what follows are its own rows: otherwise nobody was at work in between."""
        foretold, self._foretold = self._foretold, None
        if foretold is None or not rows:
            return
        predicted_s, source, before = foretold
        if not {row.request for row in rows} <= {row.request for row in before}:
            return
        if source is None:
            self._slowness = slower(self._slowness, step_s, predicted_s)
        else:
            source.slowness = slower(source.slowness, step_s, predicted_s)

    def _lengths(
        self, best: Mapping[int, tuple[Source, Proposal]], ways: Mapping[int, Way], num_rows: int, seconds: PassSeconds,
        room: int,
    ) -> dict[int, Draft]:  # fmt: skip
        """Of the best proposal of each slot what the pass verifies."""
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
            found_by = {source for slot in chances if isinstance(source := best[slot][0], LookupSource)}
            slowness = max([1.0, *(source.slowness / self._slowness for source in found_by)])
            found = lengths(chances, num_rows, slowed(seconds, slowness), room)
            if not found:
                for source in found_by:
                    source.left_out()
            counts |= found
        return {slot: cut(best[slot][1], count) for slot, count in counts.items() if count}


def slowed(seconds: PassSeconds, slowness: float) -> PassSeconds:
    """`seconds` where passes that verify drafts take `slowness` times as long as predicted."""

    def slower_seconds(added: Mapping[int, int]) -> float | None:
        took = seconds(added)
        return took * slowness if took is not None and any(added.values()) else took

    return slower_seconds


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
