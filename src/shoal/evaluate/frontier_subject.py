"""One model on one task: loaded when an arm needs it, run under a plan, read under a plan, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from shoal.depth.checkpoint import TunedDepth, fit_horizon
from shoal.depth.plan import DepthPlan
from shoal.depth.shape import ModelShape
from shoal.engine.engine import Engine
from shoal.engine.request import Generation
from shoal.engine.run_cost import RunCost
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput, InvalidPlan, ShoalError
from shoal.evaluate.frontier_arms import ArmRecord, PlannedArm, weights_digest
from shoal.evaluate.metrics import metric_named
from shoal.evaluate.predictions import predict
from shoal.evaluate.tasks import Task, TaskInput
from shoal.models.checkpoint import load_tokenizer, read_sizes
from shoal.models.directory import resolve
from shoal.train.data import Example
from shoal.train.start import load

Report = Callable[[str, int, int], None]
"""`report(what, done, total)`."""


class Subject:
    """One model, its weights loaded when an arm needs them, and the task's inputs as its tokens."""

    def __init__(
        self,
        model: str,
        name: str,
        task: Task,
        inputs: Sequence[TaskInput],
        *,
        limit: int | None,
        batch: int,
        dtype: str,
        device: str,
        threads: int | None,
        horizon: int | None,
    ) -> None:
        """Arguments as in `frontier.FrontierConfig`; `task.max_new_tokens` and `inputs` are those of the run."""
        self.name, self.task = name, task
        self.directory = resolve(model)
        self.shape: ModelShape = read_sizes(self.directory, dtype=dtype)[0].shape
        self.tuned = TunedDepth.load(self.directory)
        self.tokenizer = load_tokenizer(self.directory)
        self._engine_options = {"dtype": dtype, "device": device, "threads": threads, "max_batch": batch}
        self.batch, self._device = batch, device
        self.examples = self._examples(inputs, limit)
        self.horizon = horizon or (self.tuned.horizon if self.tuned else self._fitted_horizon())

    @cached_property
    def engine(self) -> Engine:
        """Runs it."""
        return Engine.from_pretrained(self.directory, **self._engine_options)  # type: ignore[arg-type]

    @cached_property
    def network(self) -> nn.Module:
        """The same as a transformers model in float32, for teacher forcing."""
        network: nn.Module = load(str(self.directory))[0].to(self._device).eval()  # type: ignore[arg-type]
        return network

    def _examples(self, inputs: Sequence[TaskInput], limit: int | None) -> list[Example]:
        """What teacher forcing reads: prompt and first reference of each input, or windows of the text. Raises `InvalidInput`."""
        most, max_positions = self.task.max_new_tokens, read_sizes(self.directory)[0].max_positions
        if self.task.prefix_tokens is not None:
            tokens = self.tokenizer(inputs[0].completion, add_special_tokens=False, verbose=False).input_ids
            examples = windows(tokens, self.task.prefix_tokens, most, start=self._start_token())[:limit]
            if not examples:
                raise InvalidInput(
                    f"the text has {len(tokens)} tokens for {self.name}, and one window takes "
                    f"{self.task.prefix_tokens + most}: give a longer text or fewer --max-new-tokens"
                )
            if len(examples[0]) > max_positions:
                raise InvalidInput(
                    f"a window of {len(examples[0])} tokens exceeds the {max_positions} positions of {self.name}: "
                    f"--max-new-tokens can be at most {max_positions - len(examples[0].prompt)}"
                )
            return examples
        end = self.tokenizer.eos_token_id
        prompts = self.tokenizer([one.prompt for one in inputs]).input_ids
        completions = self.tokenizer([one.completion for one in inputs], add_special_tokens=False).input_ids
        return [
            Example(prompt, [*completion, *([] if end is None else [end])][:most])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def _start_token(self) -> list[int]:
        """The token that the tokenizer puts before a text, if it does."""
        first = self.tokenizer("a").input_ids[0]
        return [first] if first == self.tokenizer.bos_token_id else []

    def _fitted_horizon(self) -> int:
        return fit_horizon(max(1, len(example.completion)) for example in self.examples)

    def settings(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the results of this model's arms, but for their plans."""
        return {**shared, "weights": weights_digest(self.directory), "horizon": self.horizon}

    def run(self, arm: PlannedArm, inputs: Sequence[TaskInput], settings: dict[str, Any], report: Report) -> ArmRecord:
        """Generate, score, and read the references under the arm's plan. Raises the engine's errors."""
        began = time.perf_counter()
        generates = self.task.prefix_tokens is None
        if generates:
            sampling = Sampling(max_new_tokens=self.task.max_new_tokens, stop=self.task.stop)
            prompts: list[Any] = [one.prompt for one in inputs]
        else:  # costs only: as many tokens as a window has
            sampling = Sampling(max_new_tokens=self.task.max_new_tokens, ignore_eos=True)
            prompts = [example.prompt for example in self.examples[: self.batch]]
        done, cost = complete(
            self.engine, prompts, [sampling] * len(prompts), arm.plan, lambda n: report(arm.name, n, len(prompts))
        )
        report(f"{arm.name}: loss", 0, len(self.examples))
        losses = [one.losses for one in predict(self.network, self.examples, arm.plan)]
        if generates:
            outputs = [one.text if one.finish_reason != "error" else "" for one in done]
            counts = {
                name: metric_named(name)
                .statistics([one.prompt for one in inputs], [one.references for one in inputs], outputs)
                .counts
                for name in self.task.metrics
            }
        else:
            outputs = []
            counts = {"loss": np.array([[float(one[1:].sum()), len(one) - 1] for one in losses])}
        sums, reaching = position_sums(losses)
        return ArmRecord(
            settings=settings,
            outputs=outputs,
            new_tokens=[len(one.token_ids) for one in done],
            num_failed=cost.num_failed,
            ledger=asdict(cost.ledger),
            stats=asdict(cost.stats),
            counts={name: values.tolist() for name, values in counts.items()},
            loss_sums=sums,
            loss_counts=reaching,
            seconds=time.perf_counter() - began,
        )

    def time(
        self,
        arms: Sequence[PlannedArm],
        inputs: Sequence[TaskInput],
        dense_tokens: Sequence[int],
        rounds: int,
        report: Report,
    ) -> dict[str, list[tuple[float, float]]]:
        """(prompt seconds, decode seconds) of each arm in each round, after one round to warm up; per request.

        Every arm gets the same batch and emits as many tokens as the dense one did, so seconds compare as they are. Arms
        take turns, each round beginning with another one.
        """
        if self.task.prefix_tokens is None:
            prompts: list[Any] = [one.prompt for one in inputs]
        else:
            prompts = [example.prompt for example in self.examples]
        prompts = prompts[: min(len(dense_tokens), self.batch)]
        samplings = [Sampling(max_new_tokens=n, ignore_eos=True) for n in dense_tokens[: len(prompts)]]
        seconds: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
        for turn in range(rounds + 1):
            first = turn % len(arms)
            for number, arm in enumerate([*arms[first:], *arms[:first]]):
                report(f"{self.name}: wall clock", turn * len(arms) + number, (rounds + 1) * len(arms))
                cost = complete(self.engine, prompts, samplings, arm.plan)[1]
                if turn:
                    spent = cost.stats.prompt_s / len(prompts), cost.stats.decode_s / len(prompts)
                    seconds[arm.name].append(spent)
        return seconds


def complete(
    engine: Engine,
    prompts: Sequence[Any],
    samplings: Sequence[Sampling],
    plan: DepthPlan,
    report: Callable[[int], None] = lambda done: None,
) -> tuple[list[Generation], RunCost]:
    """Complete prompts under one plan, and what that cost. Raises the engine's error with the number of the input."""
    engine.stats.reset()
    for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        try:
            engine.add(prompt, sampling, plan, index=index, streaming=False)
        except InvalidPlan:
            raise
        except ShoalError as error:
            raise type(error)(f"input {index + 1}: {error}") from error
    cost, done = RunCost(), {}
    while engine.has_work:
        for chunk in engine.step():
            if chunk.generation is not None:
                done[chunk.index] = chunk.generation
                cost.add(chunk.generation)
        report(len(done))
    cost.stats = replace(engine.stats)
    return [done[index] for index in range(len(prompts))], cost


def windows(tokens: Sequence[int], prefix: int, follow: int, *, start: Sequence[int] = ()) -> list[Example]:
    """Cut a text into examples of `prefix` tokens to read, after `start`, and `follow` tokens to predict; the rest is left out.

    >>> [(one.prompt, one.completion) for one in windows([1, 2, 3, 4, 5, 6, 7], 2, 1, start=[0])]
    [([0, 1, 2], [3]), ([0, 4, 5], [6])]
    """
    width = prefix + follow
    pieces = [tokens[left : left + width] for left in range(0, len(tokens) - width + 1, width)]
    return [Example([*start, *piece[:prefix]], list(piece[prefix:])) for piece in pieces]


def position_sums(losses: Sequence[NDArray[np.float32]]) -> tuple[list[float], list[int]]:
    """Sum of the losses at each position, and how many completions reach it.

    >>> position_sums([np.float32([3, 1]), np.float32([1])])
    ([4.0, 1.0], [2, 1])
    """
    longest = max(map(len, losses), default=0)
    sums, reaching = np.zeros(longest), np.zeros(longest, int)
    for one in losses:
        sums[: len(one)] += one
        reaching[: len(one)] += 1
    return sums.tolist(), reaching.tolist()
