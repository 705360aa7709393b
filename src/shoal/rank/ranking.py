"""Documents ranked by a model under a budget of calls: from texts to texts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from shoal.engine.intake import is_text
from shoal.errors import InvalidInput, LanguageModelError
from shoal.lm.cache import AnswerCache
from shoal.lm.cached import CachedModel
from shoal.lm.contract import LanguageModel
from shoal.lm.resolve import load_model
from shoal.rank.executor import Cost, run
from shoal.rank.oracle import Direction, Oracle
from shoal.rank.prompted import Mode, Prompted
from shoal.rank.questions import Ranker, Task
from shoal.rank.rankers import KINDS, ranker_named
from shoal.rank.templates import Template, load_template


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """How to rank. Raises `InvalidInput` for values outside what is allowed."""

    k: int = 10
    """Places that matter; the documents after them keep what order the ranker knows, then the first stage's."""
    budget: int | None = 100
    """Most model calls per query; None for as many as the ranker takes."""
    ranker: str = "auto"
    """A name of `shoal.rank.rankers.RANKERS`; `auto` is `adaptive`."""
    direction: Direction = "random"
    """In which order documents are shown: one, both or random; see `shoal.rank.oracle`."""
    soft: bool = False
    """Whether answers count by the model's margin; with mode `score` only."""
    mode: Mode = "score"
    """Whether answers are scored or written."""
    chat: bool = False
    """Whether prompts are a user's turn of a chat."""
    template: str | os.PathLike[str] | None = None
    """A name, or a .toml file; None is the one that the ranker needs."""
    max_query_tokens: int = 64
    """Tokens of the query that are shown."""
    max_passage_tokens: int = 128
    """Tokens of each document that are shown."""
    seed: int = 0
    """Of directions, and of what rankers draw."""

    def __post_init__(self) -> None:
        for name in ("k", "budget", "max_query_tokens", "max_passage_tokens", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (name == "budget" and value is None):
                raise InvalidInput(f"{name} must be a whole number, got {value!r}")
        rules = {
            "k": (self.k >= 1, "1 or more"),
            "budget": (
                self.budget is None or self.budget >= 1 + (self.direction == "both"),
                "1 or more, 2 where pairs are asked in both directions: without a call there is nothing to rank by",
            ),
            "max_query_tokens": (self.max_query_tokens >= 1, "1 or more"),
            "max_passage_tokens": (self.max_passage_tokens >= 1, "1 or more"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} must be {allowed}, got {getattr(self, name)}")
        if self.soft and self.mode != "score":
            raise InvalidInput("soft needs mode='score': an answer in text has no margin")

    def make(self) -> tuple[Ranker, Template]:
        """The ranker, and the template that fits it."""
        ranker, kind = ranker_named(self.ranker), KINDS.get(self.ranker, "pair")
        usual = "pair-label" if kind == "pair" and self.chat and self.mode == "score" else kind
        template = load_template(os.fspath(self.template or usual))
        if template.kind != kind:
            raise InvalidInput(
                f"ranker {self.ranker!r} needs a template of kind {kind}, {template.name!r} is of {template.kind}"
            )
        if kind == "pair" and len(template.labels) != 2:
            raise InvalidInput(f"template {template.name!r} needs two labels, it has {len(template.labels)}")
        return ranker, template


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One document of the result."""

    place: int
    """From 1 on."""
    index: int
    """Among the documents given."""
    text: str
    """As given, not as cut."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A query's documents in order, and what that took."""

    documents: tuple[Ranked, ...]
    """All of them, the best first."""
    cost: Cost
    """Calls, rounds, tokens."""
    finished: bool
    """Whether the ranker came to its end with calls to spare."""
    cut_documents: int
    """Documents of which only the first `max_passage_tokens` tokens were shown."""
    cut_query: bool
    """Whether of the query, too."""

    @property
    def order(self) -> list[int]:
        """Indices, the best first."""
        return [document.index for document in self.documents]


def rank(
    query: str,
    docs: Sequence[str],
    *,
    model: str | LanguageModel,
    k: int = 10,
    budget: int | None = 100,
    cache: str | AnswerCache | None = None,
    scores: Sequence[float] | None = None,
    on_progress: Callable[[Cost], None] | None = None,
    **settings: Any,
) -> Ranking:
    """Rank documents with at most `budget` model calls. Raises `LanguageModelError` where no answer can be read.

    >>> from shoal.lm import ScriptedModel
    >>> longest = ScriptedModel(score=lambda job: [float(len(part)) for part in job.prompt.split("Passage ")[1:3]])
    >>> rank("long ones", ["a", "bbb", "cc"], model=longest, k=1, budget=3).documents[0].text
    'bbb'

    Args:
        docs: in the first stage's order, the best first.
        model: a checkpoint, `http://host/v1#name`, or a `LanguageModel`.
        k: places that matter; cut to the number of documents.
        cache: a file of answers that survives, and is shared with other processes.
        scores: the first stage's, one per document, none above the one before.
        on_progress: told the cost after each round.
        settings: further fields of `RankConfig`.
    """
    config = RankConfig(k=k, budget=budget, **settings)
    asked = load_model(model) if isinstance(model, str) else model
    if cache is not None:
        asked = CachedModel(asked, cache if isinstance(cache, AnswerCache) else AnswerCache(cache))
    ranking = rank_with(asked, config, query, docs, scores=scores, on_progress=on_progress)
    check_read([ranking], asked.name, config)
    return ranking


def rank_with(
    model: LanguageModel,
    config: RankConfig,
    query: str,
    docs: Sequence[str],
    *,
    scores: Sequence[float] | None = None,
    on_progress: Callable[[Cost], None] | None = None,
    on_answer: Callable[[], None] | None = None,
) -> Ranking:
    """`rank` with its settings checked and its model loaded. `on_answer` hears of every answer, within rounds, too."""
    check_documents(query, docs)
    check_scores(scores)
    ranker, template = config.make()
    shown_query = model.cut(query, config.max_query_tokens)
    passages = [model.cut(text, config.max_passage_tokens) for text in docs]
    comparator = Prompted(
        model=model,
        template=template,
        query=shown_query.text,
        passages=[passage.text for passage in passages],
        mode=config.mode,
        chat=config.chat,
        on_answer=on_answer,
    )
    oracle = Oracle(comparator=comparator, direction=config.direction, soft=config.soft, seed=config.seed)
    task = Task(
        n=len(docs),
        k=min(config.k, len(docs)),
        budget=config.budget,
        batch=model.batch,
        calls_per_question=oracle.calls_per_question,
        scores=scores,
        seed=config.seed,
    )
    done = run(ranker, oracle, task, on_progress=on_progress)
    return Ranking(
        documents=tuple(Ranked(place=at, index=one, text=docs[one]) for at, one in enumerate(done.order, start=1)),
        cost=done.cost,
        finished=done.finished,
        cut_documents=sum(passage.was_cut for passage in passages),
        cut_query=shown_query.was_cut,
    )


def check_documents(query: str, docs: Sequence[str]) -> None:
    """Raises `InvalidInput` for what cannot be ranked."""
    if isinstance(docs, str) or not isinstance(docs, Sequence):
        raise InvalidInput(f"docs must be a list of texts, got {type(docs).__name__}")
    if not isinstance(query, str) or not query.strip():
        raise InvalidInput("the query is empty")
    if not is_text(query):
        raise InvalidInput("the query holds half of a surrogate pair, which is not text")
    if not docs:
        raise InvalidInput("there are no documents to rank")
    first: dict[str, int] = {}
    for place, text in enumerate(docs):
        if not isinstance(text, str) or not text.strip():
            raise InvalidInput(f"document {place} is empty: leave it out")
        if not is_text(text):
            raise InvalidInput(f"document {place} holds half of a surrogate pair, which is not text")
        if text in first:
            raise InvalidInput(f"documents {first[text]} and {place} are the same text: give it once")
        first[text] = place


def check_read(rankings: Sequence[Ranking], name: str, config: RankConfig) -> None:
    """Raises `LanguageModelError` where none of the answers behind some rankings could be read."""
    calls, unparsed = (sum(getattr(one.cost, what) for one in rankings) for what in ("calls", "unparsed"))
    if 0 < unparsed == calls:
        advice = "'score'" if config.mode == "generate" else "'generate', or a template whose labels it says first"
        raise LanguageModelError(f"none of {calls} answers of {name} could be read as a label: try mode {advice}")


def check_scores(scores: Sequence[float] | None) -> None:
    """Raises `InvalidInput` where they rise: the best document stands first."""
    for place, (before, score) in enumerate(itertools.pairwise(scores or ()), start=1):
        if score > before:
            raise InvalidInput(
                f"document {place} has a higher score than the one before: give documents and scores best first"
            )
