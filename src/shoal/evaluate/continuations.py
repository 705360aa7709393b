"""Scoring given continuations as if they were generated, and counting the layers that predicted them.

Depth acts on generated tokens, so what a plan does to the log-probability of a text shows only where the text is emitted: the
engine reads the context, each step leaves one token to choose, and the log-probabilities that the engine reports are those of the
model before that. The context's pass predicts the first token, each further one comes from a decode pass. Example, 12 layers, a
continuation of 3 tokens under a plan whose first clocks run 9 and 8 layers: (12 + 9 + 8) / 3 = 9.67 mean layers of scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.depth.plan import DepthPolicy
from shoal.engine.intake import resolve_plan
from shoal.engine.request import Generation
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidPlan
from shoal.evaluate.frontier_arms import check_acts


@dataclass(frozen=True)
class Forced:
    """A logits processor that leaves one token to choose: the next of a continuation."""

    prompt_tokens: int
    """Length of the context."""
    continuation: Sequence[int]
    """Token ids."""

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """float32 [V]: 0 for the next token of the continuation, -inf for all others."""
        forced = torch.full_like(logits, -torch.inf)
        forced[self.continuation[len(token_ids) - self.prompt_tokens]] = 0
        return forced


def forced(prompt: Sequence[int], continuation: Sequence[int]) -> Sampling:
    """Sampling under which a request with this prompt emits the continuation, and reports what the model thought of it."""
    return Sampling(
        max_new_tokens=len(continuation), ignore_eos=True, logprobs=1, processor=Forced(len(prompt), continuation)
    )


def score(done: Generation) -> tuple[float, bool]:
    """Of a continuation that was forced: its log-probability (natural logarithm), and whether greedy decoding would write it."""
    assert done.logprobs is not None
    logprob = sum(position.logprob for position in done.logprobs)
    greedy = all(next(iter(p.top)) == token for p, token in zip(done.logprobs, done.token_ids, strict=True))
    return logprob, greedy


@dataclass(kw_only=True)
class TaskCost:
    """What the requests of one task took."""

    requests: int = 0
    """That ran; answers from the harness's cache are not among them."""
    scored_tokens: int = 0
    """Tokens of continuations, or emitted."""
    scored_by_prompt: int = 0
    """Those that a prompt's pass predicted: the first of each request."""
    layer_tokens: float = 0.0
    """Sum over the scored tokens of the layers that predicted them."""
    truncated_contexts: int = 0
    """Contexts that lost tokens on the left, to fit the model's positions."""

    def add(self, done: Generation) -> None:
        """Count a finished request."""
        ledger = done.ledger
        self.requests += 1
        self.scored_tokens += ledger.new_tokens
        self.scored_by_prompt += 1
        self.layer_tokens += ledger.prompt_layer_tokens / ledger.prompt_tokens + ledger.decode_layer_tokens

    def to_dict(self) -> dict[str, float]:
        """As the results show it."""
        return {
            "requests": self.requests,
            "scored_tokens": self.scored_tokens,
            "scored_by_prompt": self.scored_by_prompt,
            "mean_layers_of_scored_tokens": self.layer_tokens / max(1, self.scored_tokens),
            "truncated_contexts": self.truncated_contexts,
        }


def check_plan_acts(policy: DepthPolicy, num_layers: int, requests: Iterable[tuple[str, int, int]]) -> None:
    """Raise `InvalidPlan` for a task none of whose requests (task, prompt tokens, most new tokens) would skip a layer."""
    why_not: dict[str, str | None] = {}
    for task, prompt_tokens, new_tokens in requests:
        if why_not.get(task, "") is None:
            continue
        plan = resolve_plan(policy, prompt_tokens, new_tokens, num_layers, None)
        try:
            check_acts(plan, new_tokens)
            why_not[task] = None
        except InvalidPlan as error:
            why_not[task] = str(error)
    for task, reason in why_not.items():
        if reason is not None:
            raise InvalidPlan(
                f"task {task!r}: depth cannot act on any of its requests, its scores would be the dense model's ({reason}). "
                "Run it without depth, or skip layers of the prompt, too (prompt=max_layers)"
            )
