"""Any OpenAI-compatible server, through OpenAI's own client, which retries with growing waits and obeys `Retry-After`.

Scores come from what such servers tell: the most probable first tokens. Three ways, by what a server has:

    labels on /v1/completions         the top log-probabilities of one new token
    labels on /v1/chat/completions    the same of the assistant's first token
    longer continuations              /v1/completions with `echo`: the prompt's own log-probabilities, continuation included, a
                                      call for each; not where the job must take one call

A server that leaves log-probabilities out raises `NoLogprobs`: a comparison without them would be a guess.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

from shoal.errors import InvalidInput, LanguageModelError, MissingExtra, NoLogprobs
from shoal.lm.contract import (
    ChatJob,
    Cut,
    Decoding,
    GenerateJob,
    OnDone,
    Reply,
    ScoreJob,
    Scores,
    ToolCall,
    Usage,
    message_dict,
    tool_dict,
)

try:
    import openai
except ModuleNotFoundError as error:
    raise MissingExtra("asking a server needs its client: pip install 'shoal[rank]'") from error

J = TypeVar("J", GenerateJob, ChatJob, ScoreJob)
A = TypeVar("A", Reply, Scores)
MAX_TOP = 20
"""Most probable tokens that OpenAI's API tells."""
MALFORMED = (AttributeError, LookupError, TypeError, ValueError)
"""What reading an answer raises whose fields are missing or of another type."""


@dataclass(frozen=True, kw_only=True)
class RemoteLimits:
    """How hard a server is asked."""

    concurrency: int = 8
    """Requests at once."""
    max_requests_per_s: float = math.inf
    """Requests begun per second."""
    timeout_s: float = 120.0
    """Of one request."""
    max_retries: int = 5
    """Of one request, after connection errors and the answers 408, 409, 429 and 5xx; waits double, from half a second to 8."""

    def __post_init__(self) -> None:
        rules = {
            "concurrency": (self.concurrency >= 1, "1 or more"),
            "max_requests_per_s": (self.max_requests_per_s > 0, "above 0"),
            "timeout_s": (0 < self.timeout_s < math.inf, "above 0 and finite"),
            "max_retries": (self.max_retries >= 0, "0 or more"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} must be {allowed}, got {getattr(self, name)}")


class RemoteModel:
    """A model on a server."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        api: Literal["completions", "chat"] = "completions",
        limits: RemoteLimits | None = None,
        tokenizer: Any = None,
    ) -> None:
        """
        Args:
            base_url: of the API, ending in `/v1`.
            model: the server's name of it.
            api_key: None takes the variable OPENAI_API_KEY, or none where it is not set.
            api: how plain prompts are asked: `chat` sends them as a user's turn, for servers without completions.
            tokenizer: transformers' tokenizer that cuts texts; None cuts by words.
        """
        self.limits = limits or RemoteLimits()
        self.model, self.api, self.tokenizer = model, api, tokenizer
        self.base_url = base_url.rstrip("/")
        self.name = f"{self.base_url}#{model}" + (" by chat" if api == "chat" else "")
        if not is_address(base_url):
            raise InvalidInput(f"{base_url!r} is no address of a server: give one such as http://localhost:8000/v1")
        self._client = openai.OpenAI(
            base_url=self.base_url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.limits.timeout_s,
            max_retries=self.limits.max_retries,
        )
        self._pace = threading.Lock()
        self._next_start_s = 0.0

    @property
    def batch(self) -> int:
        """Requests at once."""
        return self.limits.concurrency

    def generate(self, jobs: Sequence[GenerateJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """As in `LanguageModel`."""
        return self._each(jobs, self._completed, on_done)

    def chat(self, jobs: Sequence[ChatJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """As in `LanguageModel`."""
        return self._each(jobs, self._chatted, on_done)

    def score(self, jobs: Sequence[ScoreJob], *, on_done: OnDone[Scores] | None = None) -> list[Scores]:
        """As in `LanguageModel`. Raises `NoLogprobs`."""
        return self._each(jobs, self._scored, on_done)

    def cut(self, text: str, max_tokens: int) -> Cut:
        """The first tokens by the tokenizer given, or the first words."""
        if self.tokenizer is None:
            words = text.split()
            kept = text if len(words) <= max_tokens else " ".join(words[:max_tokens])
            return Cut(text=kept, was_cut=len(words) > max_tokens)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        was_cut = len(offsets) > max_tokens
        return Cut(text=text[: offsets[max_tokens][0]].rstrip() if was_cut else text, was_cut=was_cut)

    def _each(self, jobs: Sequence[J], ask: Callable[[J], A], on_done: OnDone[A] | None) -> list[A]:
        """Ask for all, several at once. Where one fails, those under way are still waited for and told of."""
        answers: dict[int, A] = {}
        failed: Exception | None = None

        def paced(job: J) -> A:
            self._wait_for_turn()
            return ask(job)

        with ThreadPoolExecutor(self.limits.concurrency, thread_name_prefix="shoal-remote") as pool:
            places = {pool.submit(paced, job): place for place, job in enumerate(jobs)}
            for future in as_completed(places):
                if future.cancelled():
                    continue
                try:
                    answer = future.result()
                except (openai.OpenAIError, LanguageModelError, *MALFORMED) as error:
                    if failed is None:
                        failed = error
                        for other in places:
                            other.cancel()
                    continue
                answers[places[future]] = answer
                if on_done is not None:
                    on_done(places[future], answer)
        if isinstance(failed, openai.OpenAIError):
            raise self._explained(failed) from failed
        if isinstance(failed, MALFORMED):
            raise LanguageModelError(
                f"{self.name} answered what is no answer of OpenAI's API ({failed}): is this the address of such a server's `/v1`?"
            ) from failed
        if failed is not None:
            raise failed
        return [answers[place] for place in range(len(jobs))]

    def _wait_for_turn(self) -> None:
        """Begin no sooner than the rate allows."""
        with self._pace:
            now = time.monotonic()
            start = max(now, self._next_start_s)
            self._next_start_s = start + 1 / self.limits.max_requests_per_s
        time.sleep(start - now)

    def _explained(self, error: openai.OpenAIError) -> Exception:
        """What the server or the way to it said, and what to do."""
        if isinstance(error, openai.APIStatusError):
            return LanguageModelError(f"{self.name} answered {error.status_code}: {error.message}")
        if isinstance(error, openai.APITimeoutError):
            return LanguageModelError(f"{self.name} did not answer within {self.limits.timeout_s} s, {self._tried()}")
        if isinstance(error, openai.APIConnectionError):
            return LanguageModelError(f"{self.name} cannot be reached, {self._tried()}: is the server running?")
        return LanguageModelError(f"{self.name}: {error}")

    def _tried(self) -> str:
        return f"tried {self.limits.max_retries + 1} times"

    def _completed(self, job: GenerateJob) -> Reply:
        if self.api == "chat":
            return self._answer([{"role": "user", "content": job.prompt}], job.decoding, [])
        answer = self._client.completions.create(model=self.model, prompt=job.prompt, **wire(job.decoding))
        choice = self._choice(answer)
        return Reply(text=choice.text or "", finish_reason=choice.finish_reason or "stop", usage=used(answer))

    def _chatted(self, job: ChatJob) -> Reply:
        turns = [message_dict(message) for message in job.messages]
        return self._answer(turns, job.decoding, [tool_dict(tool) for tool in job.tools])

    def _answer(self, turns: list[dict[str, Any]], decoding: Decoding, tools: list[dict[str, Any]]) -> Reply:
        more: dict[str, Any] = {"tools": tools} if tools else {}
        answer = self._client.chat.completions.create(
            model=self.model, messages=cast(Any, turns), **wire(decoding), **more
        )
        choice = self._choice(answer)
        calls = []
        for call in choice.message.tool_calls or ():
            try:
                arguments = json.loads(call.function.arguments or "{}")
            except ValueError:
                raise LanguageModelError(
                    f"{self.name} called {call.function.name!r} with arguments that are no JSON: {call.function.arguments!r}"
                ) from None
            calls.append(ToolCall(name=call.function.name, arguments=arguments, id=call.id))
        return Reply(
            text=choice.message.content or "",
            finish_reason=choice.finish_reason or "stop",
            usage=used(answer),
            tool_calls=tuple(calls),
        )

    def _scored(self, job: ScoreJob) -> Scores:
        if not isinstance(job.prompt, str) or self.api == "chat":
            top, usage = self._top_of_chat(job)
        else:
            top, usage = self._top_of_completion(job)
        found = tuple(logprob_of(continuation, top) for continuation in job.continuations)
        can_echo = isinstance(job.prompt, str) and self.api == "completions" and not job.one_call
        if can_echo and any(one is None for one in found):
            return self._echoed(job, usage)
        return Scores(logprobs=found, usage=usage, floor=min(top.values(), default=None))

    def _top_of_completion(self, job: ScoreJob) -> tuple[dict[str, float], Usage]:
        answer = self._client.completions.create(
            model=self.model, prompt=str(job.prompt), max_tokens=1, temperature=0, logprobs=MAX_TOP
        )
        told = self._choice(answer).logprobs
        if told is None or not told.top_logprobs or told.top_logprobs[0] is None:
            raise self._without_logprobs()
        return dict(told.top_logprobs[0]), used(answer)

    def _top_of_chat(self, job: ScoreJob) -> tuple[dict[str, float], Usage]:
        turns: list[Any] = (
            [{"role": "user", "content": job.prompt}]
            if isinstance(job.prompt, str)
            else [message_dict(message) for message in job.prompt]
        )
        answer = self._client.chat.completions.create(
            model=self.model, messages=turns, max_tokens=1, temperature=0, logprobs=True, top_logprobs=MAX_TOP
        )
        told = self._choice(answer).logprobs
        if told is None or not told.content or not told.content[0].top_logprobs:
            raise self._without_logprobs()
        return {one.token: one.logprob for one in reversed(told.content[0].top_logprobs)}, used(answer)

    def _echoed(self, job: ScoreJob, usage: Usage) -> Scores:
        """Each continuation read behind the prompt: for those of several tokens, and those that are not among the top ones.

        Each costs a call more, and is counted as one.
        """
        logprobs: list[float | None] = []
        for continuation in job.continuations:
            text = str(job.prompt) + continuation
            answer = self._client.completions.create(
                model=self.model, prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=1
            )
            told = self._choice(answer).logprobs
            if told is None or not told.token_logprobs or not told.text_offset:
                raise self._without_logprobs()
            border = len(str(job.prompt))
            inside = [
                logprob
                for logprob, offset in zip(told.token_logprobs, told.text_offset, strict=True)
                if border <= offset < len(text)
            ]
            if not inside or any(one is None for one in inside):
                logprobs.append(None)  # a token spans the border: the server says nothing of the continuation alone
            else:
                logprobs.append(sum(one for one in inside if one is not None))
            usage = usage + used(answer)
        return Scores(logprobs=tuple(logprobs), usage=usage)

    def _choice(self, answer: Any) -> Any:
        if not answer.choices:
            raise LanguageModelError(f"{self.name} answered without a choice")
        return answer.choices[0]

    def _without_logprobs(self) -> NoLogprobs:
        return NoLogprobs(
            f"{self.name} answered without the log-probabilities that it was asked for: "
            "use its generation instead (mode='generate'), or a server that tells them"
        )


def is_address(url: str) -> bool:
    """Whether a URL has a host, and no port that is none."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def wire(decoding: Decoding) -> dict[str, Any]:
    """As OpenAI's API has it."""
    made: dict[str, Any] = {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed,
    }
    if decoding.top_p is not None:
        made["top_p"] = decoding.top_p
    if decoding.stop:
        made["stop"] = list(decoding.stop)
    return made


def used(answer: Any) -> Usage:
    """A call, in the server's own counts."""
    usage = answer.usage
    prompt, new = (0, 0) if usage is None else (usage.prompt_tokens, usage.completion_tokens or 0)
    return Usage(calls=1, paid_calls=1, prompt_tokens=prompt, new_tokens=new)


def logprob_of(continuation: str, top: dict[str, float]) -> float | None:
    """Of a label among the most probable tokens: as written, or else all that differ from it in spaces around it.

    >>> round(logprob_of("A", {"A ": -2.0, " A": -1.0, "B": -0.5}), 3), logprob_of(" C", {"A": -1.0})
    (-0.687, None)
    """
    if continuation in top:
        return top[continuation]
    alike = [logprob for token, logprob in top.items() if token.strip() == continuation.strip()]
    return math.log(sum(map(math.exp, alike))) if alike else None
