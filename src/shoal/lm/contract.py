"""`LanguageModel`: what ranking and every later part asks of a model, wherever it runs.

Three questions, each asked of many inputs at once, each answer with what it took:

    generate   a text after a prompt
    score      how probable given continuations of a prompt are
    chat       the next turn of a conversation, which may call tools

A model answers all jobs of a call or raises; `on_done(i, answer)` hears of each answer as it comes, so that nothing that was paid
for is lost where a later job fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from shoal.engine.ledger import Ledger
from shoal.errors import InvalidInput

A = TypeVar("A")
OnDone = Callable[[int, A], None]
"""Called with a job's place and its answer, from any thread, one call at a time."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What answers took; `a + b` adds two."""

    calls: int = 0
    """Prompts answered, by whomever: continuations that one pass cannot score take one each."""
    paid_calls: int = 0
    """Those that a model ran for; the others came from a cache."""
    prompt_tokens: int = 0
    """Tokens of the prompts."""
    new_tokens: int = 0
    """Tokens emitted."""
    ledger: Ledger | None = None
    """Layers and FLOPs, where the model runs here."""

    def __add__(self, other: Usage) -> Usage:
        ledgers = [one for one in (self.ledger, other.ledger) if one is not None]
        return Usage(
            calls=self.calls + other.calls,
            paid_calls=self.paid_calls + other.paid_calls,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            new_tokens=self.new_tokens + other.new_tokens,
            ledger=sum(ledgers[1:], ledgers[0]) if ledgers else None,
        )


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen, and when they end."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens whose probabilities reach p."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; they are not part of it."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInput(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInput(f"temperature must be 0 (greedy) or more, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool that the model wants called."""

    name: str
    """Of the tool."""
    arguments: Mapping[str, Any]
    """By parameter."""
    id: str = ""
    """The server's name for this call, which the tool's answer repeats."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    """Whose turn."""
    content: str
    """What was said."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of the assistant."""
    tool_call_id: str = ""
    """Of a tool: the call that it answers."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    """Of the function."""
    description: str
    """What it does, for the model."""
    parameters: Mapping[str, Any]
    """JSON schema of its arguments."""


Prompt = str | tuple[Message, ...]
"""A text, or a conversation whose next turn is the assistant's."""


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """A text to go on with."""

    prompt: str
    """Of one character or more."""
    decoding: Decoding = field(default_factory=Decoding)
    """How."""
    template: str = ""
    """Name and version of what wrote the prompt: part of the cache's key, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class ChatJob:
    """A conversation to go on with."""

    messages: tuple[Message, ...]
    """So far."""
    tools: tuple[Tool, ...] = ()
    """That may be called."""
    decoding: Decoding = field(default_factory=Decoding)
    """How."""
    template: str = ""
    """Name and version of what wrote the prompt: part of the cache's key, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """Continuations whose probability is asked for."""

    prompt: Prompt
    """What they come after."""
    continuations: tuple[str, ...]
    """Two or more make labels: where they differ in their last token only, one pass scores all."""
    template: str = ""
    """As in `GenerateJob`."""
    one_call: bool = False
    """Whether it must take one call only, for labels of a token each. A model here that cannot do that raises `InvalidInput`; of a
    server what cannot be told in one is None."""

    def __post_init__(self) -> None:
        if not self.continuations or not all(self.continuations):
            raise InvalidInput(f"continuations must be one or more texts that are not empty, got {self.continuations}")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer in text."""

    text: str
    """Without special tokens, cut before a stop string."""
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    usage: Usage
    """What it took."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of a chat. A call that is no JSON stays in the text."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How probable each continuation is."""

    logprobs: tuple[float | None, ...]
    """Natural logarithm, per continuation. None where the server tells the most probable tokens only and it is none of them."""
    usage: Usage
    """What it took."""
    floor: float | None = None
    """What is None above lies below this: the least that the server told."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The first tokens of a text."""

    text: str
    """What is left."""
    was_cut: bool
    """Whether it is less than it was."""


class LanguageModel(Protocol):
    """A model, wherever it runs. Raises `LanguageModelError` where it fails and `InvalidInput` for jobs that it cannot do."""

    @property
    def name(self) -> str:
        """Which model, at which depth, in which precision: equal names give equal answers. Part of the cache's key."""

    @property
    def batch(self) -> int:
        """Jobs that it runs together."""

    def generate(self, jobs: Sequence[GenerateJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """The text after each prompt."""

    def score(self, jobs: Sequence[ScoreJob], *, on_done: OnDone[Scores] | None = None) -> list[Scores]:
        """The log-probability of each continuation after its prompt."""

    def chat(self, jobs: Sequence[ChatJob], *, on_done: OnDone[Reply] | None = None) -> list[Reply]:
        """The assistant's next turn in each conversation."""

    def cut(self, text: str, max_tokens: int) -> Cut:
        """The first `max_tokens` tokens of a text."""


def message_dict(message: Message) -> dict[str, Any]:
    """A message as OpenAI's API and chat templates have it."""
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        made["tool_call_id"] = message.tool_call_id
    return made


def tool_dict(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI's API and chat templates have it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
