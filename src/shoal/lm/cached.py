"""A model whose answers are kept: each question is paid for once, by whichever process asks it first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from shoal.engine.ledger import Ledger
from shoal.errors import InvalidInput
from shoal.lm.cache import AnswerCache, key_of
from shoal.lm.contract import (
    ChatJob,
    Cut,
    GenerateJob,
    LanguageModel,
    OnDone,
    Reply,
    ScoreJob,
    Scores,
    ToolCall,
    Usage,
)

J = TypeVar("J", GenerateJob, ChatJob, ScoreJob)
A = TypeVar("A", Reply, Scores)


class CachedModel:
    """A model with a cache before it. Sampled answers (temperature above 0) are kept as well: the seed is part of the key."""

    def __init__(self, model: LanguageModel, cache: AnswerCache) -> None:
        self.model, self.cache = model, cache

    @property
    def name(self) -> str:
        """Of the model."""
        return self.model.name

    @property
    def batch(self) -> int:
        """Of the model."""
        return self.model.batch

    def generate(self, jobs: Sequence[GenerateJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """As in `LanguageModel`."""
        return self._through("generate", jobs, self.model.generate, reply_of, on_done)

    def chat(self, jobs: Sequence[ChatJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """As in `LanguageModel`."""
        return self._through("chat", jobs, self.model.chat, reply_of, on_done)

    def score(self, jobs: Sequence[ScoreJob], *, on_done: OnDone[Scores] | None = None) -> list[Scores]:
        """As in `LanguageModel`."""
        return self._through("score", jobs, self.model.score, scores_of, on_done)

    def cut(self, text: str, max_tokens: int) -> Cut:
        """By the model."""
        return self.model.cut(text, max_tokens)

    def _through(
        self,
        kind: str,
        jobs: Sequence[J],
        ask: Callable[..., list[A]],
        parse: Callable[[dict[str, Any]], A],
        on_done: OnDone[A] | None,
    ) -> list[A]:
        """Answers from the cache, and of the model those that are not there; each is written as it comes."""
        keys = [key_of(kind=kind, model=self.name, job=asdict(job)) for job in jobs]
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        answers: dict[str, A] = {}
        with self.cache.claimed(keys):
            for key, kept in self.cache.read(list(first)).items():
                try:
                    answer = parse(kept)
                except (KeyError, TypeError) as error:
                    raise InvalidInput(
                        f"{self.cache.path} holds what is no answer ({error}): choose another file"
                    ) from None
                answers[key] = replace(answer, usage=replace(answer.usage, paid_calls=0))
            missing = [key for key in first if key not in answers]

            def note(place: int, answer: A) -> None:
                self.cache.write(missing[place], asdict(answer))
                answers[missing[place]] = answer
                if on_done is not None:
                    on_done(first[missing[place]], answer)

            if missing:
                for place, answer in enumerate(ask([jobs[first[key]] for key in missing], on_done=note)):
                    if missing[place] not in answers:  # a model that does not tell of them as they come
                        note(place, answer)
        told = {first[key] for key in missing}
        listed: list[A] = []
        for place, key in enumerate(keys):
            answer = answers[key]
            if place not in told:
                answer = replace(answer, usage=replace(answer.usage, paid_calls=0))
                if on_done is not None:
                    on_done(place, answer)
            listed.append(answer)
        return listed


def usage_of(kept: dict[str, Any]) -> Usage:
    """From JSON."""
    ledger = kept["ledger"]
    return Usage(**{**kept, "ledger": None if ledger is None else Ledger(**ledger)})


def reply_of(kept: dict[str, Any]) -> Reply:
    """From JSON."""
    calls = tuple(ToolCall(**call) for call in kept["tool_calls"])
    return Reply(**{**kept, "usage": usage_of(kept["usage"]), "tool_calls": calls})


def scores_of(kept: dict[str, Any]) -> Scores:
    """From JSON."""
    return Scores(**{**kept, "logprobs": tuple(kept["logprobs"]), "usage": usage_of(kept["usage"])})
