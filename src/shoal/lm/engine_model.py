"""Questions as requests of the engine, and its results as answers, wherever the engine runs.

Labels come from one pass. Two continuations that differ in their last token only, such as " Passage A" and " Passage B", share all
tokens before it; the engine reads prompt and shared tokens once, and the logits after them hold both labels:

    prompt ... Passage │ A  -0.4
                       │ B  -1.1

Continuations that differ earlier are read one by one.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shoal.engine.engine import Engine
from shoal.engine.intake import encode
from shoal.engine.request import Generation
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput
from shoal.lm.contract import (
    ChatJob,
    Cut,
    Decoding,
    GenerateJob,
    Message,
    OnDone,
    Reply,
    ScoreJob,
    Scores,
    ToolCall,
    Usage,
    message_dict,
    tool_dict,
)
from shoal.lm.sharing import Tokens, common

TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
"""How Hermes-style chat templates (Qwen and others) write a call."""


class EngineModel(ABC):
    """A model that an engine of this process runs. Whoever owns the engine says how requests reach it, in `run`."""

    def __init__(self, engine: Engine, *, name: str) -> None:
        """
        Args:
            engine: it needs a tokenizer.
            name: as in `LanguageModel`.
        """
        if engine.tokenizer is None:
            raise InvalidInput(f"{name} has no tokenizer, and a language model is asked in text")
        self.engine, self.name = engine, name
        self._appended = appended(engine.tokenizer)

    @abstractmethod
    def run(
        self, prompts: Sequence[Tokens], samplings: Sequence[Sampling], note: Callable[[int, Generation], None]
    ) -> None:
        """Run requests together; `note` hears of each, by its place, as it ends. Raises where one fails."""

    @property
    def batch(self) -> int:
        """Requests that share a pass."""
        return self.engine.runner.cache.num_slots

    def generate(self, jobs: Sequence[GenerateJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """As in `LanguageModel`."""
        prompts = [encode(job.prompt, self.engine.tokenizer) for job in jobs]
        return self._write(prompts, [job.decoding for job in jobs], on_done, tools=False)

    def chat(self, jobs: Sequence[ChatJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """As in `LanguageModel`; raises `InvalidInput` where the checkpoint has no chat template."""
        prompts = [self._render(job.messages, [tool_dict(tool) for tool in job.tools]) for job in jobs]
        encoded = [encode_plain(prompt, self.engine.tokenizer) for prompt in prompts]
        return self._write(encoded, [job.decoding for job in jobs], on_done, tools=True)

    def score(self, jobs: Sequence[ScoreJob], *, on_done: OnDone[Scores] | None = None) -> list[Scores]:
        """As in `LanguageModel`."""
        readings = [self._reading(job) for job in jobs]
        prompts = [prompt for reading in readings for prompt in reading.prompts]
        samplings = [sampling for reading in readings for sampling in reading.samplings]
        owners = [owner for owner, reading in enumerate(readings) for _ in reading.prompts]
        parts: list[list[Generation]] = [[] for _ in jobs]
        answers: dict[int, Scores] = {}

        def note(place: int, done: Generation) -> None:
            owner = owners[place]
            parts[owner].append(done)
            if len(parts[owner]) < len(readings[owner].prompts):
                return
            answers[owner] = Scores(
                logprobs=readings[owner].logprobs(sorted(parts[owner], key=lambda one: one.index)),
                usage=sum((used(one) for one in parts[owner][1:]), used(parts[owner][0])),
            )
            if on_done is not None:
                on_done(owner, answers[owner])

        self.run(prompts, samplings, note)
        return [answers[owner] for owner in range(len(jobs))]

    def cut(self, text: str, max_tokens: int) -> Cut:
        """The first tokens of a text, by the checkpoint's tokenizer."""
        tokenizer = self.engine.tokenizer
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= max_tokens:
            return Cut(text=text, was_cut=False)
        return Cut(text=text[: offsets[max_tokens][0]].rstrip(), was_cut=True)

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """A conversation as the checkpoint's template writes it."""
        if not self.engine.tokenizer.chat_template:
            raise InvalidInput(f"{self.name} has no chat template: ask it with plain prompts")
        text: str = self.engine.tokenizer.apply_chat_template(
            [message_dict(message) for message in messages],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text

    def _write(
        self, prompts: Sequence[Tokens], decodings: Sequence[Decoding], on_done: OnDone[Reply] | None, *, tools: bool
    ) -> list[Reply]:
        """Generate after prompts in tokens."""
        replies: dict[int, Reply] = {}

        def note(place: int, done: Generation) -> None:
            text, calls = parse_calls(done.text) if tools else (done.text, ())
            reason = "tool_calls" if calls else done.finish_reason
            replies[place] = Reply(text=text, finish_reason=reason, usage=used(done), tool_calls=calls)
            if on_done is not None:
                on_done(place, replies[place])

        self.run(prompts, [sampling_of(decoding) for decoding in decodings], note)
        return [replies[place] for place in range(len(prompts))]

    def _reading(self, job: ScoreJob) -> Reading:
        """What to read for a job's scores."""
        tokenizer = self.engine.tokenizer
        if isinstance(job.prompt, str):
            prompt = encode(job.prompt, tokenizer)
            if prompt[-1] == self._appended:  # generation goes on behind it, and so do continuations
                whole = [prompt + encode_plain(continuation, tokenizer) for continuation in job.continuations]
            else:
                whole = [encode(job.prompt + continuation, tokenizer) for continuation in job.continuations]
        else:
            text = self._render(job.prompt)
            prompt = encode_plain(text, tokenizer)
            whole = [encode_plain(text + continuation, tokenizer) for continuation in job.continuations]
        reading = Reading.of(prompt, whole)
        if job.one_call and len(reading.prompts) > 1:
            raise InvalidInput(
                f"{self.name} cannot score {', '.join(map(repr, job.continuations))} in one pass, since they are not a token each "
                "here: use labels that are, or let the model write its answer"
            )
        return reading


@dataclass
class Labels:
    """A logits processor that notes the log-probabilities of some tokens, and changes nothing."""

    token_ids: tuple[int, ...]
    """Whose."""
    logprobs: list[float] = field(default_factory=list)
    """Natural logarithm, in their order."""

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """float32 [V] in and out."""
        self.logprobs = logits.log_softmax(dim=-1)[list(self.token_ids)].tolist()
        return logits


@dataclass(frozen=True)
class Reading:
    """The requests behind the scores of one prompt's continuations."""

    prompts: list[Tokens]
    samplings: list[Sampling]
    labels: Labels | None
    """Where one pass scores all."""
    num_scored: list[int]
    """Per request: trailing tokens of its prompt that belong to the continuation."""

    @classmethod
    def of(cls, prompt: Tokens, whole: Sequence[Tokens]) -> Reading:
        """From token ids of the prompt alone, and of it with each continuation.

        A token may span the border; scores then begin at the first token that the prompt alone does not have.
        """
        shared = common(whole)
        border = min(common([prompt, one]) for one in whole)
        if border == 0:
            raise InvalidInput("the prompt has no token that its continuations leave as it is")
        if len(whole) > 1 and all(len(one) == shared + 1 for one in whole):
            labels = Labels(tuple(one[-1] for one in whole))
            sampling = scoring(shared - border, labels)
            return cls([whole[0][:shared]], [sampling], labels, [shared - border])
        num_scored = [len(one) - border for one in whole]
        return cls(list(whole), [scoring(count) for count in num_scored], None, num_scored)

    def logprobs(self, done: Sequence[Generation]) -> tuple[float, ...]:
        """Per continuation."""
        read = [
            sum(position.logprob for position in (one.prompt_logprobs or ())[-count:]) if count else 0.0
            for one, count in zip(done, self.num_scored, strict=True)
        ]
        return tuple(read) if self.labels is None else tuple(read[0] + one for one in self.labels.logprobs)


def scoring(num_tokens: int, labels: Labels | None = None) -> Sampling:
    """Score the prompt's last `num_tokens`, if any, and what comes after them."""
    return Sampling(
        max_new_tokens=1,
        ignore_eos=True,
        processor=labels,
        prompt_logprobs=1 if num_tokens else None,
        prompt_logprobs_last=num_tokens or None,
    )


def appended(tokenizer: Any) -> int | None:
    """The special token that a tokenizer puts behind every text, such as the separator of `shoal-e2e`; None for most."""
    last: int | None = next(reversed(tokenizer("a").input_ids), None)
    return last if last in tokenizer.all_special_ids else None


def encode_plain(text: str, tokenizer: Any) -> Tokens:
    """Token ids of a text that brings its own special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def sampling_of(decoding: Decoding) -> Sampling:
    """The engine's terms."""
    return Sampling(
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        stop=decoding.stop,
        seed=decoding.seed,
    )


def used(done: Generation) -> Usage:
    """What a request took."""
    ledger = done.ledger
    return Usage(calls=1, paid_calls=1, prompt_tokens=ledger.prompt_tokens, new_tokens=ledger.new_tokens, ledger=ledger)


def parse_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The text without the tool calls that could be read, and those.

    >>> parse_calls('Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    ('Let me see.', (ToolCall(name='add', arguments={'a': 1}, id='call_0'),))
    """
    calls: list[ToolCall] = []

    def read(match: re.Match[str]) -> str:
        try:
            given = json.loads(match[1])
            name, arguments = given["name"], given.get("arguments", {})
        except (ValueError, KeyError, TypeError):
            return match[0]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return match[0]
        calls.append(ToolCall(name=name, arguments=arguments, id=f"call_{len(calls)}"))
        return ""

    rest = TOOL_CALL.sub(read, text)
    return (rest.strip() if calls else text), tuple(calls)
