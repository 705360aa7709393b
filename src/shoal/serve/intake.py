"""From bodies to the engine's requests. Runs beside the event loop, one body at a time: long texts take a while to tokenise."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shoal.engine.engine import Engine
from shoal.engine.intake import Plan, encode
from shoal.engine.observing import Observer
from shoal.engine.request import Request
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidDraft, InvalidInput, InvalidPlan
from shoal.serve import schema
from shoal.serve.config import ServeConfig
from shoal.serve.errors import ApiError, invalid
from shoal.serve.grammar import Grammars
from shoal.serve.plans import asked, plan_of, policy_of
from shoal.signals.guard import Guard
from shoal.signals.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Job:
    """The requests of one body."""

    body: schema.Completion | schema.Chat
    """As it came."""
    prompts: tuple[tuple[int, ...], ...]
    """Token ids, by `Request.index`."""
    requests: tuple[Request, ...]
    """`n` per prompt, in order."""


class Intake:
    """Checks bodies against the model and the operator's limits. Every refusal is an `ApiError` that names a field."""

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self.engine, self.config = engine, config
        self.grammars = Grammars(engine)
        self.probes = {one.settings.name: one for one in map(probe_of, config.probes)}
        self._observers: dict[tuple[str, ...], Observer | None] = {}

    def completion(self, body: schema.Completion) -> Job:
        """The requests of `/v1/completions`."""
        self.check_model(body.model)
        if body.best_of not in (None, body.n):
            raise ApiError(400, "best_of: this server returns all n completions: leave it out", param="best_of")
        if body.echo and body.stream and body.logprobs is not None:
            raise ApiError(400, "echo: with logprobs it cannot be streamed", param="echo")
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and (not body.echo or body.stream):
            raise ApiError(400, "max_tokens: 0 is for echo without stream, to look at a prompt", param="max_tokens")
        given = listed(body.prompt)
        self.check_count(len(given) * body.n, "n" if body.n > 1 else "prompt")
        prompts = [self.encode(prompt) for prompt in given]  # before any is queued: one that is wrong refuses all
        scores = body.logprobs if body.echo else None
        return self._job(body, prompts, max(1, max_tokens), body.logprobs, prompt_logprobs=scores)

    def chat(self, body: schema.Chat) -> Job:
        """The requests of `/v1/chat/completions`."""
        self.check_model(body.model)
        self.check_count(body.n, "n")
        prompt = self.encode_chat(body.messages)
        wanted = body.max_completion_tokens or body.max_tokens
        if body.max_tokens == 0:
            raise ApiError(400, "max_tokens must be 1 or more for a chat", param="max_tokens")
        room = max(1, self.engine.config.max_positions - len(prompt))
        logprobs = body.top_logprobs if body.logprobs else None
        return self._job(body, [prompt], wanted or min(self.config.max_tokens, room), logprobs)

    def check_model(self, name: str) -> None:
        """Refuse another model's name."""
        if name != self.config.model:
            raise ApiError(
                404,
                f"model {name!r} is not served here, {self.config.model!r} is",
                param="model",
                code="model_not_found",
            )

    def check_count(self, count: int, param: str) -> None:
        """Refuse a body that makes more requests than will ever fit in, before any is made."""
        most = self.engine.runner.cache.num_slots + self.config.max_queue
        if count > most:
            raise ApiError(400, f"{param}: {count} completions in one request, this server takes {most}", param=param)

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt."""
        self.check_text(prompt, "prompt")
        try:
            return encode(prompt, self.engine.tokenizer)
        except InvalidInput as error:
            raise invalid(error, "prompt") from error

    def encode_chat(self, messages: Sequence[schema.Message]) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the assistant begins."""
        tokenizer = self.engine.tokenizer
        if not tokenizer.chat_template:
            raise ApiError(
                400,
                f"messages: {self.config.model!r} has no chat template, so it says nothing of how to write turns: "
                "use /v1/completions, or a checkpoint that was tuned for chat",
                param="messages",
            )
        try:
            text = tokenizer.apply_chat_template(
                [message_of(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs of the checkpoint's, and refuse turns in their own ways
            raise ApiError(400, f"messages: the chat template refuses them: {error}", param="messages") from error
        self.check_text(text, "messages")
        token_ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)  # the template has written them
        if not token_ids:
            raise ApiError(400, "messages: the chat template makes nothing of them", param="messages")
        return token_ids

    def check_text(self, text: str | Sequence[int], param: str) -> None:
        """Refuse what cannot fit by its length alone: tokenising it would keep other bodies waiting for seconds."""
        if isinstance(text, str) and len(text) > self.longest_text:
            positions = self.engine.config.max_positions
            raise ApiError(
                400, f"{param}: {len(text)} characters cannot fit the model's {positions} positions", param=param
            )

    @cached_property
    def longest_text(self) -> int:
        """Characters of a text of the longest tokens that there are, in every position."""
        longest = max(map(len, self.engine.tokenizer.get_vocab()))
        return int(longest * self.engine.config.max_positions)

    def tokens_of(self, body: schema.Tokenize) -> list[int]:
        """The answer of `/tokenize`."""
        if body.model is not None:
            self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt or messages: give one of them", param="prompt")
        if body.messages is not None:
            return list(self.encode_chat(body.messages))
        if body.prompt and body.add_special_tokens:
            return list(self.encode(body.prompt))
        self.check_text(body.prompt or "", "prompt")
        return list(self.engine.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens).input_ids)

    def text_of(self, body: schema.Detokenize) -> str:
        """The answer of `/detokenize`."""
        if body.model is not None:
            self.check_model(body.model)
        vocab_size = self.engine.shape.vocab_size
        if any(token >= vocab_size for token in body.tokens):
            raise ApiError(400, f"tokens: ids are 0 to {vocab_size - 1}", param="tokens")
        return str(self.engine.tokenizer.decode(body.tokens))

    def plan(self, body: schema.Depth) -> Plan:
        """What decides the layers of a request. Raises `ApiError`."""
        if body.depth is not None and body.plan is not None:
            raise ApiError(400, "depth and plan say the same: give one", param="plan")
        try:
            if body.depth is not None:
                return policy_of(self.engine.tuned, body.depth)
            return self.config.plan if body.plan is None else plan_of(body.plan)
        except InvalidInput as error:
            raise invalid(error, asked(body)) from error

    def observer(self, wanted: Sequence[str]) -> Observer | None:
        """Who reads prompts for probes of these names and for the guards; the same for requests that want the same."""
        unknown = [name for name in wanted if name not in self.probes]
        if unknown:
            loaded = f"loaded here: {', '.join(self.probes)}" if self.probes else "this server has loaded none"
            raise ApiError(400, f"probes: there is no {unknown[0]!r}; {loaded}", param="probes")
        chosen = [one for one in self.config.probes if isinstance(one, Guard) or one.settings.name in wanted]
        key = tuple(probe_of(one).settings.name for one in chosen)
        if key not in self._observers:
            self._observers[key] = self.engine.observer(chosen)
        return self._observers[key]

    def prepare(
        self, prompt: Sequence[int], sampling: Sampling, body: schema.Depth, *, index: int, draft: str | None,
        timeout_s: float | None, probes: Observer | None = None,
    ) -> list[Request]:  # fmt: skip
        """The engine's requests for one prompt, within the operator's limits. Raises `ApiError`."""
        if draft not in (None, *self.config.drafts):
            allowed = ", ".join(("off", *self.config.drafts))
            raise ApiError(400, f"draft must be one of {allowed}, got {draft!r}", param="draft")
        try:
            requests = self.engine.prepare(
                prompt,
                sampling,
                self.plan(body),
                draft=draft,
                probes=probes,
                index=index,
                timeout_s=min(self.config.timeout_s, math.inf if timeout_s is None else timeout_s),
            )
        except InvalidPlan as error:
            raise invalid(error, asked(body)) from error
        except InvalidDraft as error:
            raise invalid(error, "draft") from error
        except InvalidInput as error:
            param = blamed(str(error))
            raise invalid(error, limit_of(body) if param == "max_tokens" else param) from error
        depth = body.depth or requests[0].plan.mean_depth(sampling.max_new_tokens - 1)
        if asked(body) and depth < self.config.min_depth:
            least = f"{depth:.3g} of the layers is below this server's least, {self.config.min_depth:g}"
            raise ApiError(400, f"{asked(body)}: {least}", param=asked(body))
        return requests

    def _job(
        self, body: schema.Completion | schema.Chat, prompts: Sequence[tuple[int, ...]], max_new_tokens: int,
        logprobs: int | None, *, prompt_logprobs: int | None = None,
    ) -> Job:  # fmt: skip
        """Requests of all prompts."""
        if max_new_tokens > self.config.max_tokens:
            param = limit_of(body)
            raise ApiError(
                400, f"{param} can be at most {self.config.max_tokens} here, got {max_new_tokens}", param=param
            )
        seed = secrets.randbits(64) if body.seed is None else body.seed
        draft = self.config.draft if body.draft is None else None if body.draft == "off" else body.draft
        probes = self.observer(body.probes)
        requests: list[Request] = []
        for index, prompt in enumerate(prompts):
            processor = None
            if body.response_format is not None:
                processor = self.grammars.processor(body.response_format, len(prompt))
            try:
                sampling = Sampling(
                    max_new_tokens=max_new_tokens,
                    min_new_tokens=body.min_tokens,
                    temperature=body.temperature,
                    top_k=body.top_k,
                    top_p=body.top_p,
                    min_p=body.min_p,
                    repetition_penalty=body.repetition_penalty,
                    presence_penalty=body.presence_penalty,
                    frequency_penalty=body.frequency_penalty,
                    logit_bias=self._biases(body.logit_bias),
                    stop=body.stop if isinstance(body.stop, str) and body.stop else tuple(body.stop),
                    ignore_eos=body.ignore_eos,
                    seed=(seed + index) % 2**64,  # prompts that shared a seed would share their noise
                    n=body.n,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    entropy_top_k=20 if body.entropy else None,
                    processor=processor,
                )
            except InvalidInput as error:
                raise invalid(error, blamed(str(error))) from error
            requests += self.prepare(
                prompt, sampling, body, index=index, draft=draft, timeout_s=body.timeout_s, probes=probes
            )
        return Job(body=body, prompts=tuple(prompts), requests=tuple(requests))

    def _biases(self, given: Mapping[str, float]) -> dict[int, float]:
        """Biases by token id."""
        vocab_size = self.engine.shape.vocab_size
        for token in given:
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
                allowed = f"keys are token ids written as strings, 0 to {vocab_size - 1}"
                raise ApiError(400, f"logit_bias: {allowed}, got {token!r}", param="logit_bias")
        return {int(token): bias for token, bias in given.items()}


def probe_of(one: Probe | Guard) -> Probe:
    """A probe, or the one that a guard asks."""
    probe = one.probe if isinstance(one, Guard) else one
    assert isinstance(probe, Probe)  # guards load theirs
    return probe


def listed(prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> list[Any]:
    """One prompt or several, as a list."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def message_of(message: schema.Message) -> dict[str, str]:
    """A turn as chat templates take it."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return {"role": message.role, "content": text} | ({} if message.name is None else {"name": message.name})


def limit_of(body: schema.Depth) -> str:
    """The field by which a body says how much it wants."""
    newer = isinstance(body, schema.Chat) and body.max_completion_tokens is not None
    return "max_completion_tokens" if newer else "max_tokens"


def blamed(message: str) -> str | None:
    """The field of the body that the engine's message begins with or is about."""
    first = message.split(" ")[0]
    renamed = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "token": "prompt", "the": "prompt"}
    if "new tokens" in message:
        return "max_tokens"
    name = renamed.get(first, first)
    return name if name in schema.Completion.model_fields else None
