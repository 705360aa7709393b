"""A request and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from shoal.depth.plan import DepthPlan
from shoal.engine.drafting import DraftStats
from shoal.engine.entropy import EntropyTrace
from shoal.engine.ledger import Ledger
from shoal.engine.observing import Findings, Label, Reading
from shoal.engine.routing import PromptStates
from shoal.engine.sampling import Sampling
from shoal.engine.text import TextStream
from shoal.errors import RequestFailed

if TYPE_CHECKING:
    from shoal.engine.prefixes import Prefix

FinishReason = Literal["stop", "length", "blocked", "cancelled", "timeout", "error"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one generated position, natural logarithm, from unscaled and unpenalised logits."""

    logprob: float
    """Of the emitted token."""
    top: dict[int, float]
    """Of the most probable tokens, most probable first, as many as `Sampling.logprobs` asked for."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished completion."""

    index: int
    """Place of its prompt among the prompts given together."""
    sample: int
    """0 .. n-1 among the completions of one prompt."""
    text: str
    """Decoded completion without special tokens, cut before a stop string."""
    token_ids: tuple[int, ...]
    """Emitted tokens, the end-of-sequence token included."""
    finish_reason: FinishReason
    """`stop`: end of sequence or a stop string; `length`: max_new_tokens; `blocked`: by a probe, before the first token; or
    `cancelled`, `timeout`, `error`."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One per token where asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    """One per token of the prompt from the second on, or of its last ones, where asked for; fewer where it ended before it was
    read."""
    ledger: Ledger
    """What it cost."""
    past_horizon: bool
    """Whether it ran on past its plan's horizon, at the plan's minimum depth."""
    plan: DepthPlan
    """What decided its layers: as given, made by the policy, or by the router from its prompt."""
    trace: EntropyTrace | None = None
    """How unsure the model was at each token, where asked for."""
    drafting: DraftStats | None = None
    """What drafting did for it, where it was asked for."""
    error: str | None = None
    """Why it ended with `error`."""
    labels: Mapping[str, Label] | None = None
    """By the name of the probe, where probes were asked for and the prompt has been read."""
    blocked_by: str | None = None
    """The probe that ended it with `blocked`."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a request gained in one pass."""

    request_id: int
    """The engine's id of the request."""
    index: int
    """As in `Generation`."""
    sample: int
    """As in `Generation`."""
    token_ids: tuple[int, ...]
    """Tokens committed in this pass."""
    text: str
    """Text that is now certain: held back while it may still become a stop string or an incomplete character."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One per token where asked for."""
    generation: Generation | None
    """The whole result in the request's last chunk."""
    labels: Mapping[str, Label] | None = None
    """As in `Generation`, in the request's first chunk: known before the first token is chosen."""


@dataclass(kw_only=True, eq=False)
class Request:
    """One completion under way: what it asked for and what it has emitted. Only the engine changes it."""

    request_id: int
    index: int
    sample: int
    prompt: tuple[int, ...]
    sampling: Sampling
    plan: DepthPlan
    stop_token_ids: frozenset[int]
    """Tokens that end it: end of sequence unless ignored, and stop strings that are special tokens."""
    eos_token_ids: frozenset[int]
    """Tokens that may not come before `Sampling.min_new_tokens`."""
    text: TextStream
    deadline: float | None
    """`time.monotonic()` at which it ends with `timeout`; None for never."""
    future_blocks: NDArray[np.int64]
    """[max_new_tokens]: most cache blocks it can hold from its k-th pass on, the prompt's being pass 0."""
    prompt_states: PromptStates | None = None
    """Where a router decides: what it will read."""
    reading: Reading | None = None
    """Where probes read the prompt: what they have read."""
    shared_tokens: int = 0
    """Leading tokens of its prompt that other prompts begin with, too, and that it need not compute itself."""
    prefix: Prefix | None = None
    """Those tokens, while it waits for them or computes them for all."""
    priority: float = 0.0
    """Among waiting requests the lowest enters first, and of equal ones the first that came."""
    draft: object | None = None
    """How it is drafted for, in its `Drafter`'s terms; None for not at all."""
    draft_stats: DraftStats = field(default_factory=DraftStats)
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    uncertainty: list[tuple[float, float]] = field(default_factory=list)
    """(entropy, nll) of each token of the output, where asked for."""

    @property
    def known(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def findings(self) -> Findings | None:
        """What was read out of the prompt, where it has been read."""
        found = self.reading.findings if self.reading else None
        return None if isinstance(found, RequestFailed) else found

    @property
    def reports_logprobs(self) -> bool:
        """Whether `logprobs` has one per token of the output."""
        return self.sampling.logprobs is not None

    @property
    def first_scored(self) -> int | None:
        """The first token of the prompt after which logits are wanted, to score the one that follows; None where none is scored."""
        if self.sampling.prompt_logprobs is None:
            return None
        last = self.sampling.prompt_logprobs_last
        return 0 if last is None else max(0, len(self.prompt) - 1 - last)

    def trace(self) -> EntropyTrace | None:
        """The trace of the output, where asked for."""
        top_k = self.sampling.entropy_top_k
        if top_k is None:
            return None
        entropies, nlls = zip(*self.uncertainty, strict=True) if self.uncertainty else ((), ())
        return EntropyTrace(top_k=top_k, entropies=entropies, nlls=nlls)

    def tokens(self, start: int, count: int) -> list[int]:
        """Known tokens `start .. start + count`."""
        if start >= len(self.prompt):
            start -= len(self.prompt)
            return self.output[start : start + count]
        head = self.prompt[start : start + count]
        return [*head, *self.output[: count - len(head)]]

    def finish_reason(self) -> FinishReason | None:
        """Why it ends after the last committed token, or None."""
        if self.text.stopped or self.output[-1] in self.stop_token_ids:
            return "stop"
        return "length" if len(self.output) == self.sampling.max_new_tokens else None

    def chunk(self, *, token_ids: tuple[int, ...], text: str, generation: Generation | None = None) -> Chunk:
        """What it gained in a pass."""
        return Chunk(
            request_id=self.request_id,
            index=self.index,
            sample=self.sample,
            token_ids=token_ids,
            text=text,
            logprobs=tuple(self.logprobs[len(self.logprobs) - len(token_ids) :]) if self.reports_logprobs else None,
            generation=generation,
            labels=self.findings.labels if self.findings and len(self.output) == len(token_ids) else None,
        )
