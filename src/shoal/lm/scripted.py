"""A model that says what it is told to: for tests of whatever is built on `LanguageModel`, without weights or network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from shoal.errors import InvalidInput, LanguageModelError
from shoal.lm.contract import ChatJob, Cut, GenerateJob, OnDone, Reply, ScoreJob, Scores, Usage

T = TypeVar("T")
J = TypeVar("J", GenerateJob, ChatJob, ScoreJob)
A = TypeVar("A", Reply, Scores)


class ScriptedModel:
    """Answers by functions of the job. A token is a word.

    >>> model = ScriptedModel(score=lambda job: [float("cats" in job.prompt), 0.0])
    >>> model.score([ScoreJob(prompt="about cats", continuations=(" yes", " no"))])[0].logprobs
    (1.0, 0.0)
    """

    def __init__(
        self,
        *,
        generate: Callable[[GenerateJob], str] | None = None,
        score: Callable[[ScoreJob], Sequence[float | None]] | None = None,
        chat: Callable[[ChatJob], Reply | str] | None = None,
        name: str = "scripted",
        batch: int = 8,
        fail_after: int | None = None,
    ) -> None:
        """
        Args:
            generate, score, chat: what to say; a question without its function raises `InvalidInput`.
            fail_after: calls after which the next raises `LanguageModelError`, as a server that goes away.
        """
        self._generate, self._score, self._chat = generate, score, chat
        self.name, self.batch = name, batch
        self.fail_after = fail_after
        self.asked: list[GenerateJob | ScoreJob | ChatJob] = []
        """Every job that was answered, in order."""

    def generate(self, jobs: Sequence[GenerateJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """As in `LanguageModel`."""

        def answer(job: GenerateJob) -> Reply:
            return self._reply(self._scripted(self._generate, "generate")(job), job.prompt)

        return self._each(jobs, answer, on_done)

    def chat(self, jobs: Sequence[ChatJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """As in `LanguageModel`."""

        def answer(job: ChatJob) -> Reply:
            said = self._scripted(self._chat, "chat")(job)
            return said if isinstance(said, Reply) else self._reply(said, text_of(job.messages))

        return self._each(jobs, answer, on_done)

    def score(self, jobs: Sequence[ScoreJob], *, on_done: OnDone[Scores] | None = None) -> list[Scores]:
        """As in `LanguageModel`."""

        def answer(job: ScoreJob) -> Scores:
            logprobs = tuple(self._scripted(self._score, "score")(job))
            if len(logprobs) != len(job.continuations):
                raise InvalidInput(f"the script gave {len(logprobs)} scores for {len(job.continuations)} continuations")
            return Scores(logprobs=logprobs, usage=usage(text_of(job.prompt), ""))

        return self._each(jobs, answer, on_done)

    def cut(self, text: str, max_tokens: int) -> Cut:
        """The first words."""
        words = text.split()
        return Cut(
            text=text if len(words) <= max_tokens else " ".join(words[:max_tokens]), was_cut=len(words) > max_tokens
        )

    def _each(self, jobs: Sequence[J], answer: Callable[[J], A], on_done: OnDone[A] | None) -> list[A]:
        answers = []
        for place, job in enumerate(jobs):
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise LanguageModelError(f"{self.name} has gone away after {len(self.asked)} calls")
            answers.append(answer(job))
            self.asked.append(job)
            if on_done is not None:
                on_done(place, answers[-1])
        return answers

    def _reply(self, text: str, prompt: str) -> Reply:
        return Reply(text=text, finish_reason="stop", usage=usage(prompt, text))

    def _scripted(self, function: Callable[[J], T] | None, what: str) -> Callable[[J], T]:
        if function is None:
            raise InvalidInput(f"{self.name} has no script for {what}")
        return function


def text_of(prompt: str | Sequence[object]) -> str:
    """A prompt as one text."""
    return prompt if isinstance(prompt, str) else "\n".join(str(getattr(turn, "content", turn)) for turn in prompt)


def usage(prompt: str, text: str) -> Usage:
    """A call, in words."""
    return Usage(calls=1, paid_calls=1, prompt_tokens=len(prompt.split()), new_tokens=len(text.split()))
