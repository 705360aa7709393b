"""A comparator that asks a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.errors import InvalidInput
from shoal.lm.contract import ChatJob, Decoding, GenerateJob, LanguageModel, Message, Prompt, Reply, ScoreJob, Scores
from shoal.rank.oracle import Reading
from shoal.rank.questions import Question
from shoal.rank.templates import Template

Mode = Literal["score", "generate"]
LABEL_TOKENS = 6
"""New tokens that a label may take."""


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A model asked about one query's passages.

    `score` reads the log-probabilities of the labels behind what all answers begin with: one pass. A server tells those of its most
    probable tokens only, so that an answer with no label among them cannot be read. `generate` lets the model write and reads its
    text; an answer that is not a label, or is more than one, is not guessed at.
    """

    model: LanguageModel
    """Who."""
    template: Template
    """How."""
    query: str
    """The query."""
    passages: Sequence[str]
    """By document, already cut."""
    mode: Mode = "score"
    """See above."""
    chat: bool = False
    """Whether the prompt is a user's turn of a chat, as models tuned to follow instructions expect."""
    on_answer: Callable[[], None] | None = None
    """Called once per answer, as it comes: a round may be thousands."""

    def __post_init__(self) -> None:
        if self.mode not in ("score", "generate"):
            raise InvalidInput(f"mode must be score or generate, got {self.mode!r}")

    def read(self, presentations: Sequence[Question]) -> list[Reading]:
        """As in `Comparator`."""
        return self._score(presentations) if self.mode == "score" else self._generate(presentations)

    def _prompt(self, shown: Question) -> str:
        return self.template.prompt(self.query, [self.passages[document] for document in shown])

    def _score(self, presentations: Sequence[Question]) -> list[Reading]:
        jobs = []
        for shown in presentations:
            lead, labels = self.template.parted(len(shown))
            prompt: Prompt = self._prompt(shown) + lead
            if self.chat:  # a turn cannot be begun for the model: it has to say the label at once
                prompt = (Message(role="user", content=self._prompt(shown)),)
                labels = self.template.labels[: len(shown)]
            jobs.append(ScoreJob(prompt=prompt, continuations=labels, template=self.template.key, one_call=True))
        return [Reading(preferences(scores), scores.usage) for scores in self.model.score(jobs, on_done=self._hear)]

    def _generate(self, presentations: Sequence[Question]) -> list[Reading]:
        prompts = [self._prompt(shown) for shown in presentations]
        decodings = [Decoding(max_new_tokens=LABEL_TOKENS * self._labels_written(shown)) for shown in presentations]
        if self.chat:
            replies = self.model.chat(
                [
                    ChatJob(
                        messages=(Message(role="user", content=prompt),), decoding=decoding, template=self.template.key
                    )
                    for prompt, decoding in zip(prompts, decodings, strict=True)
                ],
                on_done=self._hear,
            )
        else:
            replies = self.model.generate(
                [
                    GenerateJob(prompt=prompt, decoding=decoding, template=self.template.key)
                    for prompt, decoding in zip(prompts, decodings, strict=True)
                ],
                on_done=self._hear,
            )
        return [
            Reading(self.template.parse(reply.text, len(shown)), reply.usage)
            for shown, reply in zip(presentations, replies, strict=True)
        ]

    def _hear(self, place: int, answer: Reply | Scores) -> None:
        if self.on_answer is not None:
            self.on_answer()

    def _labels_written(self, shown: Question) -> int:
        return len(shown) if self.template.kind == "list" else 1


def preferences(scores: Scores) -> tuple[float, ...] | None:
    """Log-probabilities of all labels; of those that a server does not tell, its floor: (-0.1, None) above a floor of -4 are
    (-0.1, -4). None where it tells none, or what is no number."""
    if all(one is None for one in scores.logprobs):
        return None
    told = tuple(scores.floor if one is None else one for one in scores.logprobs)
    numbers = tuple(one for one in told if one is not None and math.isfinite(one))
    return numbers if len(numbers) == len(told) else None
