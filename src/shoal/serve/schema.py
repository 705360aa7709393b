"""Bodies of requests. What is not here is refused by name, and so is a value outside its range: nothing is ignored.

The fields of OpenAI's API mean what they mean there. `depth`, `plan` and `draft` are Shoal's, and the sampling fields below
`ignore_eos` are those that other open servers have as well.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Tokens = list[Annotated[int, Field(ge=0)]]
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_STOPS = 32
Bias = Annotated[float, Field(ge=-100, le=100)]
"""Of logits, which are float32: with 1e308 there would be nothing left to choose from."""
StopString = Annotated[str, Field(max_length=256)]
"""Looked for after every token by the thread that all requests share, hence no longer and no more of them."""


class Body(BaseModel):
    """A body without unknown fields; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


def misplaced(field: str, reason: str) -> PydanticCustomError:
    """A field that does not go with the others; `errors.on_validation_error` names it."""
    return PydanticCustomError("misplaced", "{reason}", {"field": field, "reason": reason})


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool = Field(False, description="A last event with `usage`.")
    include_layers: bool = Field(False, description="Per event the tokens, and how many layers computed each.")
    include_obfuscation: Literal[False] = Field(False, description="Padding against eavesdroppers: there is none.")


class JsonSchema(Body):
    """A named schema."""

    name: str = "schema"
    description: str = ""
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = Field(True, description="The schema is always enforced: false is refused.")


class ResponseFormat(Body):
    """What the completion has to look like."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice"]
    json_schema: JsonSchema | None = Field(None, description="With type json_schema.")
    regex: str | None = Field(None, description="With type regex: the whole completion matches it.")
    choice: list[str] | None = Field(None, min_length=1, description="With type choice: the completion is one of them.")

    @model_validator(mode="after")
    def _has_its_field(self) -> ResponseFormat:
        for name in ("json_schema", "regex", "choice"):
            if (getattr(self, name) is not None) != (self.type == name):
                raise misplaced(name, f"does not go together with type {self.type!r}")
        return self


class Plan(Body):
    """A policy with its settings, or a depth plan layer by layer."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    policy: str | None = Field(None, description="skipdecode, unified, ...; its settings stand beside it.")
    cutoffs: list[int | None] | None = Field(
        None, description="Instead: per layer the decode passes that it serves; null for all of them."
    )


class Depth(Body):
    """What a request may ask of Shoal."""

    depth: float | None = Field(None, gt=0, le=1, description="Mean share of the layers that a new token runs.")
    plan: Plan | None = Field(None, description="Instead of a depth.")


class Generate(Depth):
    """What both kinds of completion have."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] = Field([])
    seed: int | None = None
    presence_penalty: Bias = 0.0
    frequency_penalty: Bias = 0.0
    logit_bias: dict[str, Bias] = Field({}, max_length=MAX_BIASES, description="By token id, as a string.")
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions.model_validate({})
    user: str | None = Field(None, max_length=256, description="Stands in the log beside the request.")
    draft: str | None = Field(None, description="How to draft; the tokens stay the same. off: not at all.")
    probes: list[str] = Field([], description="Names of probes that label the prompt before its first new token.")
    timeout_s: float | None = Field(None, gt=0, description="Seconds that it may take, waiting included.")
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    entropy: bool = Field(
        False, description="The entropy trace of each completion over the top 20 tokens, in usage.shoal.traces."
    )
    service_tier: Literal["auto", "default"] = Field("auto", description="There is one: others are refused.")

    @model_validator(mode="after")
    def _streams(self) -> Generate:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise misplaced("stream_options", "is for streams: set stream")
        return self


class Completion(Generate):
    """Body of `/v1/completions`."""

    prompt: str | Tokens | list[str] | list[Tokens] = Field(min_length=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = Field(
        False, description="The prompt comes back before the completion, with log-probabilities of its own."
    )
    best_of: int | None = Field(None, description="Only the value of n.")
    suffix: Literal[""] = Field("", description="Text after the completion: no model here inserts.")


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a chat."""

    role: str
    content: str | list[TextPart]
    name: str | None = None


class Chat(Generate):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    modalities: list[Literal["text"]] = Field(["text"], min_length=1, max_length=1, description="Text.")
    parallel_tool_calls: Literal[True] = Field(True, description="OpenAI's default; no tool is ever called.")
    store: Literal[False] = Field(False, description="Nothing is stored: true is refused.")

    @model_validator(mode="after")
    def _one_limit(self) -> Chat:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise misplaced("max_tokens", "says the same as max_completion_tokens: give one")
        if "top_logprobs" in self.model_fields_set and not self.logprobs:
            raise misplaced("top_logprobs", "needs logprobs")
        return self


class Score(Depth):
    """Body of `/v1/score`: how probable each continuation of a prompt is."""

    model: str
    prompt: str | Tokens = Field(min_length=1)
    continuations: list[str | Tokens] = Field(min_length=1)
    timeout_s: float | None = Field(None, gt=0)


class Document(Body):
    """A document to rank."""

    text: str


class Rerank(Depth):
    """Body of `/v1/rerank`: documents to put in order. Fields up to `return_documents` are those of other APIs."""

    model: str
    query: str = Field(min_length=1)
    documents: list[str | Document] = Field(
        min_length=1, description="In the order of a first stage, the best first, where there was one."
    )
    top_n: int | None = Field(None, ge=1, description="Most documents that come back, and places that matter.")
    max_tokens_per_doc: int = Field(128, ge=1, description="Tokens of each document that are shown to the model.")
    return_documents: bool = False
    ranker: str = Field("auto", description="Who decides what to compare.")
    budget: int | None = Field(None, ge=1, description="Most model calls.")
    mode: Literal["score", "generate"] = Field("score", description="Whether answers are scored or written.")
    direction: Literal["one", "both", "random"] = Field("random", description="In which order documents are shown.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of directions, and of what rankers draw.")
    timeout_s: float | None = Field(None, gt=0, description="Seconds that all of it may take.")

    @property
    def texts(self) -> list[str]:
        """Of the documents."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Body of every refusal."""

    error: Problem


class Tokenize(Body):
    """Body of `/tokenize`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True


class Detokenize(Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: Tokens
