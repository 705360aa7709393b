"""CALM: each token exits at the first layer after which it is confident (Schuster et al. 2022, arXiv 2207.07061).

It cannot be a depth plan: which layers a token runs is known only when it has run them. So it stands here as a baseline,
with what it costs counted in full. The rules, for a decoder-only model:

*Prompts* run every layer, and the first token is chosen after the last one. From then on each decode pass consumes one generated
token of every row, at clock t = 0, 1, ...

*Exit*: after layer l = min_exit_layer .. L-1 the token's confidence c is held against the threshold at its clock; c >= threshold
exits. Its next token is the most probable one by the head on its state there. After layer L every token exits.

*Cache*: the exit state is propagated upward. Every deeper layer's key and value are made of the state in which the token exited,
as if the layers between had changed nothing: norm, key and value products, rotation to the token's position (the paper's way; it is
an approximation). Later tokens read them like any others. Nothing is filled in in a row's last pass, as no token follows.

*Batch*: a step ends when its last row exits; confident rows wait. Rows that have ended leave.

    clock 0, L = 4   row 0   1 2 . .    exits at 2; layers 3 and 4 get keys and values of its state after 2
                     row 1   1 2 3 4    the batch has paid for 4 layers
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.baselines.confidence import Confidence, SoftmaxGap
from shoal.baselines.exit_cost import BatchCost, ExitCost, Tally
from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.engine.intake import Prompt
from shoal.engine.sampler import greedy
from shoal.errors import InvalidInput, RequestFailed
from shoal.models.layout import on
from shoal.models.passes import Ints, LayerCaches, Pass


@dataclass(frozen=True, kw_only=True)
class Calm:
    """When a token exits. Raises `InvalidInput` for values outside their range."""

    threshold: float
    """Lambda, 0 to 1. Above 1 nothing is ever confident: no check is made, and what runs is the dense model in the same code."""
    confidence: Confidence = field(default_factory=SoftmaxGap)
    """What is held against the threshold."""
    min_exit_layer: int = 1
    """Fewest layers that every token runs: the first exit that is checked."""
    tau: float = 4.0
    """How fast the threshold falls over the completion; 0 leaves it at 0.9 lambda + 0.1."""

    def __post_init__(self) -> None:
        if not (isinstance(self.threshold, int | float) and 0 <= self.threshold < math.inf):
            raise InvalidInput(f"threshold must be 0 to 1, or above 1 for no exits, got {self.threshold!r}")
        if not (isinstance(self.min_exit_layer, int) and self.min_exit_layer >= 1):
            raise InvalidInput(f"min_exit_layer must be 1 or more layers, got {self.min_exit_layer!r}")
        if not (isinstance(self.tau, int | float) and 0 <= self.tau < math.inf):
            raise InvalidInput(f"tau must be 0 or more, got {self.tau!r}")

    def threshold_at(self, clock: int, max_new_tokens: int) -> float:
        """clip(0.9 lambda + 0.1 exp(-tau t / N), 0, 1), the paper's decay: strict at first, when a wrong token would spoil all that
        follows.

        Our reading: t is the clock, N is `max_new_tokens`; and a lambda above 1 is not clipped but reached by nothing, since a
        confidence of exactly 1 would exit otherwise. (The public code of FREE multiplies instead: lambda (0.9 + 0.1 exp(...)).)

        >>> [round(Calm(threshold=0.5).threshold_at(clock, 100), 3) for clock in (0, 50, 100)]
        [0.55, 0.464, 0.452]
        """
        if self.threshold > 1:
            return math.inf
        decayed = 0.9 * self.threshold + 0.1 * math.exp(-self.tau * clock / max_new_tokens)
        return min(max(decayed, 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class ExitCompletion:
    """A finished greedy completion."""

    index: int
    """Place of its prompt among the prompts."""
    text: str
    """Without special tokens."""
    token_ids: tuple[int, ...]
    """Emitted tokens, the end-of-sequence token included."""
    exit_layers: tuple[int, ...]
    """Per token, how many layers ran in the pass that chose it; the first is L, since the prompt runs every layer."""
    finish_reason: Literal["stop", "length"]
    """`stop`: end of sequence; `length`: max_new_tokens."""
    cost: ExitCost
    """What it spent."""


@dataclass(frozen=True, kw_only=True)
class ExitRun:
    """Completions of several prompts and what they cost."""

    completions: tuple[ExitCompletion, ...]
    """In the order of the prompts."""
    batch: BatchCost
    """What the rows of a batch shared: steps, their layers, bytes, seconds."""

    @property
    def cost(self) -> ExitCost:
        """The sum over completions."""
        return reduce(add, (completion.cost for completion in self.completions))


def generate(
    model: LayerwiseDecoder,
    prompts: Prompt | Iterable[Prompt],
    rule: Calm,
    *,
    max_new_tokens: int = 64,
    ignore_eos: bool = False,
    batch_size: int = 32,
) -> ExitRun:
    """Complete prompts greedily with confidence exits.

    Args:
        prompts: a string, a list of token ids, or several of those.
        max_new_tokens: most tokens to emit; the N over which the threshold falls.
        ignore_eos: go on past end-of-sequence tokens.
        batch_size: prompts that run together, taken in their order; a batch ends before the next begins.

    Raises `InvalidInput` before anything runs for a rule that does not fit the model or a bad size, `InvalidPrompt` for prompts;
    `RequestFailed` where logits are not finite.
    """
    if rule.min_exit_layer > model.num_layers:
        raise InvalidInput(f"min_exit_layer is {rule.min_exit_layer}, and the model has {model.num_layers} layers")
    if batch_size < 1:
        raise InvalidInput(f"batch_size must be 1 or more, got {batch_size}")
    rule.confidence.check(model)
    encoded = model.encode(prompts, max_new_tokens=max_new_tokens)
    end_tokens = frozenset() if ignore_eos else frozenset(model.config.eos_token_ids)
    shared = BatchCost()
    completions: list[ExitCompletion] = []
    for first in range(0, len(encoded), batch_size):
        batch = encoded[first : first + batch_size]
        completions += _complete(model, batch, rule, max_new_tokens, end_tokens, first, shared)
    return ExitRun(completions=tuple(completions), batch=shared)


@torch.inference_mode()
def _complete(
    model: LayerwiseDecoder,
    prompts: Sequence[list[int]],
    rule: Calm,
    max_new_tokens: int,
    end_tokens: frozenset[int],
    first_index: int,
    shared: BatchCost,
) -> list[ExitCompletion]:
    """One batch from its prompts to its last token; row r is also slot r of the cache."""
    began = time.perf_counter()
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    cache = model.new_cache(len(prompts), int(lengths.max()) + max_new_tokens - 1)
    tally = Tally(model.config.shape, len(prompts), shared)
    outputs = [[token] for token in _read(model, prompts, cache)]
    exit_layers = [[model.num_layers] for _ in prompts]
    shared.prompt_s += time.perf_counter() - began

    began = time.perf_counter()
    for clock in range(max_new_tokens - 1):
        rows = np.array([row for row, output in enumerate(outputs) if output[-1] not in end_tokens], dtype=np.int64)
        if not len(rows):
            break
        step = _Step(model, cache, tally, rows, lengths[rows] + clock, [outputs[row][-1] for row in rows])
        step.run(rule, rule.threshold_at(clock, max_new_tokens))
        for row, token, exit_layer in zip(rows, step.tokens.tolist(), step.exit_layers.tolist(), strict=True):
            outputs[row].append(token)
            exit_layers[row].append(exit_layer)
        if clock + 2 < max_new_tokens:
            step.fill(np.array([token not in end_tokens for token in step.tokens.tolist()]))
    shared.decode_s += time.perf_counter() - began

    measure_flops = rule.confidence.flops(model.config.shape)
    return [
        ExitCompletion(
            index=first_index + row,
            text=model.text(output),
            token_ids=tuple(output),
            exit_layers=tuple(exit_layers[row]),
            finish_reason="stop" if output[-1] in end_tokens else "length",
            cost=tally.cost(row, prompt_tokens=len(prompts[row]), new_tokens=len(output), measure_flops=measure_flops),
        )
        for row, output in enumerate(outputs)
    ]


def _read(model: LayerwiseDecoder, prompts: Sequence[list[int]], cache: LayerCaches) -> list[int]:
    """Run the prompts through every layer; the first token of each."""
    num_rows = len(prompts)
    work = model.work(prompts, np.arange(num_rows), np.zeros(num_rows, dtype=np.int64))
    *_, x = model.states(work, cache)
    return _most_probable(model.decoder.logits(x[on(model.decoder.device, work.logit_tokens)]), "the prompt")


def _most_probable(logits: Tensor, after: str) -> list[int]:
    best, finite = greedy(logits)
    if not all(finite):
        raise RequestFailed(f"logits after {after} are not finite: the weights or the dtype's range are at fault")
    return best


class _Step:
    """One decode pass of n rows, layer by layer, until the last has exited. Indices are places among the n."""

    def __init__(
        self,
        model: LayerwiseDecoder,
        cache: LayerCaches,
        tally: Tally,
        rows: Ints,
        positions: Ints,
        token_ids: Sequence[int],
    ) -> None:
        self.model, self.cache, self.tally = model, cache, tally
        self.rows, self.positions, self.token_ids = rows, positions, np.array(token_ids)
        self.tokens = np.zeros(len(rows), dtype=np.int64)
        self.exit_layers = np.zeros(len(rows), dtype=np.int64)
        self.exit_states = torch.empty(0)

    def run(self, rule: Calm, threshold: float) -> None:
        """Run layers until every row has chosen its token."""
        decoder = self.model.decoder
        running = np.arange(len(self.rows))
        work = self._work(running)
        state, attention = decoder.embed(work), decoder.attention(work, self.cache)
        self.exit_states = torch.empty_like(state)
        self.tally.shared.steps += 1
        for depth, layer in enumerate(decoder.layers, start=1):
            before, state = state, state.clone()
            layer(state, attention(depth - 1))
            self.tally.layer(self.rows[running], self.positions[running])
            exits, logits = self._exits(rule, threshold, depth, running, before, state)
            if not exits.any():
                continue
            out = np.flatnonzero(exits)
            leaving, picked = running[out], on(decoder.device, out)
            chosen_from = self._logits(state[picked], leaving) if logits is None else logits[picked]
            self.tokens[leaving] = _most_probable(chosen_from, f"layer {depth}")
            self.exit_layers[leaving] = depth
            self.exit_states[on(decoder.device, leaving)] = state[picked]
            running, state = running[~exits], state[on(decoder.device, np.flatnonzero(~exits))]
            if not len(running):
                return
            attention = decoder.attention(self._work(running), self.cache)

    def fill(self, goes_on: NDArray[np.bool_]) -> None:
        """Write the keys and values of the layers that rows left out, for the rows that later tokens follow."""
        for index in range(int(self.exit_layers.min()), self.model.num_layers):
            skipped = np.flatnonzero(goes_on & (self.exit_layers <= index))
            if len(skipped):
                rows, states = self.rows[skipped], self.exit_states[on(self.model.decoder.device, skipped)]
                self.model.fill(index, states, rows, self.positions[skipped], self.cache)
                self.tally.fill(rows)

    def _exits(
        self, rule: Calm, threshold: float, depth: int, running: Ints, before: Tensor, state: Tensor
    ) -> tuple[NDArray[np.bool_], Tensor | None]:
        """Which of the running rows exit after `depth` layers, and their logits [n, V] where the check has made them."""
        if depth == self.model.num_layers:
            return np.ones(len(running), dtype=bool), None
        if depth < rule.min_exit_layer or threshold > 1:
            return np.zeros(len(running), dtype=bool), None
        logits = self._logits(state, running) if rule.confidence.reads_logits else None
        self.tally.check(self.rows[running])
        return (rule.confidence(before, state, logits) >= threshold).cpu().numpy(), logits

    def _work(self, running: Ints) -> Pass:
        tokens = [[token] for token in self.token_ids[running].tolist()]
        return self.model.work(tokens, self.rows[running], self.positions[running])

    def _logits(self, states: Tensor, running: Ints) -> Tensor:
        self.tally.head(self.rows[running])
        return self.model.decoder.logits(states)
