"""From results to bodies of answers, as OpenAI's API has them, with the ledger under `usage.shoal`."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any

from shoal.depth.plan import DepthPlan
from shoal.engine.drafting import DraftStats
from shoal.engine.ledger import Ledger
from shoal.engine.observing import Label
from shoal.engine.request import Chunk, Generation, TokenLogprobs
from shoal.serve import schema
from shoal.serve.errors import ApiError
from shoal.serve.intake import Job


@dataclass(kw_only=True)
class Reply:
    """Answers one body. Layers, tokens and text are the model's; nothing here decides anything."""

    job: Job
    tokenizer: Any
    num_layers: int
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    num_sent: Counter[int] = field(default_factory=Counter)
    """Tokens of each completion that events have told of."""

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat's."""
        return isinstance(self.job.body, schema.Chat)

    def whole(self, done: Sequence[Generation]) -> dict[str, Any]:
        """The answer in one piece. Raises `ApiError` where a completion failed or ran out of time."""
        for generation in done:
            if (error := self._failure(generation)) is not None:
                raise error
        return {
            **self._head(streamed=False),
            "choices": [self._choice(place, generation) for place, generation in enumerate(done)],
            "usage": self.usage(done),
        }

    def first_events(self) -> Iterable[dict[str, Any]]:
        """What a stream begins with: who speaks, or the prompts that come back."""
        for place, request in enumerate(self.job.requests):
            if self.is_chat:
                yield self._event(
                    {"index": place, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                )
            elif isinstance(self.job.body, schema.Completion) and self.job.body.echo:
                yield self._event(self._piece(place, self._text(request.prompt), None, None))

    def event(self, chunk: Chunk) -> dict[str, Any] | None:
        """What a stream says of a pass; None where nothing became certain. Raises `ApiError` where the completion failed."""
        place = chunk.index * self.job.body.n + chunk.sample
        done = chunk.generation
        if done is not None and (error := self._failure(done)) is not None:
            raise error
        with_layers = self.job.body.stream_options.include_layers
        if not (chunk.text or chunk.logprobs or done is not None or with_layers):
            return None
        event = self._event(self._piece(place, chunk.text, chunk, None if done is None else reason_of(done)))
        if with_layers:
            first, count = self.num_sent[place], len(chunk.token_ids)
            self.num_sent[place] += count
            layers = layers_of(self.job.requests[place].plan, first, count)
            event["shoal"] = {"token_ids": list(chunk.token_ids), "layers": layers}
        return event

    def labels_event(self, chunk: Chunk, labels: Mapping[str, Label]) -> dict[str, Any]:
        """What probes say of a prompt, before its first token."""
        place = chunk.index * self.job.body.n + chunk.sample
        return self._event(self._piece(place, "", None, None) | labels_of(labels))

    def last_event(self, done: Sequence[Generation]) -> dict[str, Any]:
        """The event with `usage`."""
        return {**self._head(streamed=True), "choices": [], "usage": self.usage(done)}

    def usage(self, done: Sequence[Generation]) -> dict[str, Any]:
        """Tokens, and what they cost."""
        prompt_tokens, new_tokens = sum(map(len, self.job.prompts)), sum(len(one.token_ids) for one in done)
        ledger = reduce(add, (one.ledger for one in done), Ledger())
        drafted = [one.drafting for one in done if one.drafting is not None]
        traces = [one.trace.to_dict() for one in done if one.trace is not None]
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
            "shoal": spent(ledger, self.num_layers, sum(drafted, DraftStats()) if drafted else None)
            | {
                "past_horizon": any(one.past_horizon for one in done),
                "seconds": round(time.monotonic() - self.began, 4),
            }
            | ({"traces": traces} if traces else {}),
        }

    def _failure(self, done: Generation) -> ApiError | None:
        """Why a completion failed. A form that no token goes on, or that takes too long to follow, is the body's fault."""
        if done.finish_reason == "error" and self.job.body.response_format and "processor" in (done.error or ""):
            return ApiError(400, f"response_format: {done.error}", param="response_format")
        return failure(done)

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.is_chat else "chat.completion.chunk" if streamed else "chat.completion"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _event(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(streamed=True), "choices": [choice]}

    def _choice(self, place: int, done: Generation) -> dict[str, Any]:
        """One completion of an answer in one piece."""
        if self.is_chat:
            message = {"role": "assistant", "content": done.text, "refusal": None}
            logprobs = (
                None if done.logprobs is None else {"content": self._chat_logprobs(done.token_ids, done.logprobs)}
            )
            choice = {"index": place, "message": message, "finish_reason": reason_of(done), "logprobs": logprobs}
            return choice | labels_of(done.labels)
        body = self.job.body
        assert isinstance(body, schema.Completion)
        text, tokens, scores = done.text, done.token_ids, done.logprobs or ()
        if body.max_tokens == 0:
            text, tokens, scores = "", (), ()
        prompt: tuple[int, ...] = ()
        if body.echo:
            prompt = self.job.prompts[done.index]
            text = self._text(prompt) + text
        logprobs = None
        if body.logprobs is not None:
            read = (None, *(done.prompt_logprobs or ())) if body.echo else ()
            logprobs = self._logprobs((*prompt, *tokens), (*read, *scores))
        reason = "length" if body.max_tokens == 0 and not done.blocked_by else reason_of(done)
        choice = {"index": place, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return choice | labels_of(done.labels)

    def _piece(self, place: int, text: str, chunk: Chunk | None, reason: str | None) -> dict[str, Any]:
        """One completion's part of an event."""
        scores = None if chunk is None else chunk.logprobs
        tokens = () if chunk is None else chunk.token_ids
        if self.is_chat:
            logprobs = None if scores is None else {"content": self._chat_logprobs(tokens, scores)}
            return {"index": place, "delta": {"content": text}, "finish_reason": reason, "logprobs": logprobs}
        old = None if scores is None else self._logprobs(tokens, scores)
        return {"index": place, "text": text, "finish_reason": reason, "logprobs": old}

    def _logprobs(self, tokens: Sequence[int], scores: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """As completions have them. The first token of a text has none."""
        names = list(map(self._token, tokens))
        offsets = [0, *accumulate(map(len, names))][: len(names)]
        return {
            "tokens": names,
            "token_logprobs": [None if one is None else one.logprob for one in scores],
            "top_logprobs": [None if one is None else self._top(one) for one in scores],
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens by their names; of two with one name, the more probable."""
        named: dict[str, float] = {}
        for token, logprob in one.top.items():
            named.setdefault(self._token(token), logprob)
        return named

    def _chat_logprobs(self, tokens: Sequence[int], scores: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """As chats have them."""

        def named(token: int, logprob: float) -> dict[str, Any]:
            text = self._text((token,))
            return {
                "token": self._token(token),
                "logprob": logprob,
                "bytes": None if "\ufffd" in text else list(text.encode()),
            }

        return [
            named(token, one.logprob) | {"top_logprobs": [named(*pair) for pair in one.top.items()]}
            for token, one in zip(tokens, scores, strict=True)
        ]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _token(self, token: int) -> str:
        """A token's own text; the vocabulary's name of one that is no whole character, or none at all."""
        text = str(self.tokenizer.decode([token], skip_special_tokens=False))
        return text if text and "\ufffd" not in text else str(self.tokenizer.convert_ids_to_tokens(token))


def reason_of(done: Generation) -> str:
    """Why a completion ended, by OpenAI's names."""
    return "content_filter" if done.finish_reason == "blocked" else done.finish_reason


def labels_of(labels: Mapping[str, Label] | None) -> dict[str, Any]:
    """Labels as a field of a choice; no field where no probe was asked."""
    if not labels:
        return {}
    return {
        "labels": {
            name: {
                "label": one.label,
                "probabilities": {of: round(share, 6) for of, share in one.probabilities.items()},
                "out_of_distribution": round(one.out_of_distribution, 4),
                "probe": one.probe,
            }
            for name, one in labels.items()
        }
    }


def failure(done: Generation) -> ApiError | None:
    """Why a request has no completion, where it has none."""
    if done.finish_reason == "error":
        return ApiError(500, done.error or "the request failed")
    if done.finish_reason == "timeout":
        return ApiError(
            504, f"out of time after {len(done.token_ids)} tokens: give it more, or ask for fewer", code="timeout"
        )
    if done.finish_reason == "cancelled":
        return ApiError(503, "the server stopped before this request was done")
    return None


def layers_of(plan: DepthPlan, first: int, count: int) -> list[int]:
    """How many layers computed each of tokens `first .. first + count`: the first comes from the prompt's pass, token i from the
    pass at clock i - 1."""
    return [sum(plan.runs_prompt) if place == 0 else plan.depth(place - 1) for place in range(first, first + count)]


def spent(ledger: Ledger, num_layers: int, drafting: DraftStats | None) -> dict[str, Any]:
    """A ledger in short."""
    flops = ledger.prompt_flops + ledger.decode_flops + ledger.draft_flops
    draft = None
    if drafting is not None:
        draft = {"drafted": drafting.drafted, "accepted": drafting.accepted, "steps": drafting.steps}
    return {
        "layers": num_layers,
        "mean_layers": round(ledger.mean_layers, 3),
        "layer_tokens": ledger.layer_tokens,
        "layer_tokens_saved": ledger.layer_tokens_saved,
        "flops": flops,
        "flops_saved": ledger.dense_prompt_flops + ledger.dense_decode_flops - flops,
        "draft": draft,
        **({"probe_flops": ledger.probe_flops} if ledger.probe_flops else {}),
    }
