"""Shoal as a model of EleutherAI's lm-evaluation-harness (`lm_eval`), under the name `shoal`.

    python -m shoal.evaluate.harness run --model shoal --model_args pretrained=shoal-e2e,depth=1/3 --batch_size auto --tasks ...

Depth acts on generated tokens, so a continuation is scored as if it were generated (`continuations.py`). What is scored is what
would be served, and its layers are in the engine's own ledger. Where no request of a task would skip a layer (continuations of one
token) the task is refused: its scores would be the dense model's.

The results hold what each task took under `config.shoal.tasks`.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from shoal import __version__
from shoal.depth.plan import Dense, DepthPolicy
from shoal.depth.policies import policy_at
from shoal.engine.engine import Engine
from shoal.engine.request import Generation
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput, InvalidPlan, MissingExtra, RequestFailed, ShoalError, nearest
from shoal.evaluate.continuations import TaskCost, check_plan_acts, forced, score

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise MissingExtra("the evaluation harness is not installed: pip install 'shoal[harness]'") from error

Tokens = list[int]
AUTO_BATCH = 32
"""Requests that run together where the harness leaves the number to the model."""
MAX_NEW_TOKENS = 256
"""Of an answer where the task gives no number: the harness's own default."""
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
"""Generation settings of a task that are passed on as they are."""

logger = logging.getLogger(__name__)


class ShoalLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """An engine and a depth policy, asked by the harness."""

    def __init__(
        self,
        pretrained: str,
        *,
        depth: float | str = 1,
        policy: str = "skipdecode",
        horizon: int | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        revision: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        """Usually made by the harness, from `--model_args`.

        Args:
            pretrained: a checkpoint directory, a hub id or `shoal-e2e`.
            depth: mean share of the layers, as 0.5 or 1/2; 1 is dense.
            policy: a name of `shoal.depth.policies.POLICIES`.
            horizon: clocks over which depth falls; None takes the checkpoint's.
            dtype, device, threads, revision: as in `Engine.from_pretrained`.
            batch_size: requests that run together; `auto` is `max_batch_size`, or 32. The harness's command line says 1.
            settings: further fields of the policy, such as `warmup_layers` or `prompt`.

        Raises `InvalidInput`, and what loading a checkpoint raises.
        """
        super().__init__()
        share = parse_depth(depth)
        policy_made = policy_at(policy, share, horizon=horizon, **settings)
        if share == 1 and (horizon is not None or settings or policy != "skipdecode"):
            raise InvalidPlan("policy, horizon and its other settings shape a plan: give it a depth, such as depth=1/2")
        if share != 1 and horizon is not None and not hasattr(policy_made, "horizon"):
            raise InvalidPlan(f"the policy {policy!r} has no horizon: leave it out")
        self.engine = Engine.from_pretrained(
            pretrained,
            dtype=dtype,
            device=device,
            threads=threads,
            revision=revision,
            max_batch=parse_batch_size(batch_size, max_batch_size),
        )
        if self.engine.tokenizer is None:
            raise InvalidInput(f"{pretrained} has no tokenizer, and the harness asks in text")
        self.tokenizer = self.engine.tokenizer
        tuned = self.engine.tuned
        self.policy: DepthPolicy = policy_made if tuned is None else tuned.fill(policy_made)
        self.costs: defaultdict[str, TaskCost] = defaultdict(TaskCost)
        self._pretrained, self._depth = pretrained, share

    # What the harness asks for -----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context: the log-probability, and whether greedy decoding would write it."""
        pairs = [(request.args, *self._encode(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, tasks=[task_of(r) for r in requests], disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text: its log-probability, in windows of the model's length."""
        pairs: list[tuple[Any, Tokens, Tokens]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows = [make_disjoint_window(window) for window in windows]
            pairs += [(None, context, continuation) for context, continuation in windows]
            owners += [owner] * len(windows)
        tasks = [task_of(requests[owner]) for owner in owners]
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(pairs, tasks=tasks, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to a stop string."""
        tasks = [task_of(request) for request in requests]
        samplings = [sampling_of(request.args[1], seed) for seed, request in enumerate(requests)]
        prompts = [
            self._fit(self.tok_encode(request.args[0]) or [self.prefix_token_id], sampling.max_new_tokens, task)
            for request, sampling, task in zip(requests, samplings, tasks, strict=True)
        ]
        answers = self._run(prompts, samplings, tasks, "generate_until", disable_tqdm=disable_tqdm)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in answers]

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model, under `config`; asked for when all tasks are done."""
        tasks = {task: cost.to_dict() for task, cost in self.costs.items()}
        return {
            "shoal": {
                "version": __version__,
                "pretrained": str(self._pretrained),
                "depth": self._depth,
                "policy": str(self.policy),
                "num_layers": self.engine.shape.num_layers,
                "tasks": tasks,
            }
        }

    # Tokens ------------------------------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Most tokens that predict one; the harness adds the predicted one."""
        window = self.engine.config.sliding_window or self.engine.config.max_positions
        return min(self.engine.config.max_positions, window) - 1

    @property
    def max_gen_toks(self) -> int:
        """Of an answer where the task gives no number."""
        return MAX_NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        if self.tokenizer.eos_token_id is None:
            raise InvalidInput(
                f"the tokenizer of {self._pretrained} has no end-of-sequence token, which texts start from"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's cache of requests."""
        return str(self._pretrained).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Tokens:
        """Token ids; with the special tokens around a text unless it brings its own, as the harness's other models do it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        encoded: Tokens = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return encoded

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _encode(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """Tokens of both; an empty context is the prefix token."""
        if context:
            context_ids, continuation_ids = self._encode_pair(context, continuation)
        else:
            tokens = self.tok_encode(continuation, add_special_tokens=False)
            starts = tokens[:1] == [self.prefix_token_id]
            context_ids, continuation_ids = [self.prefix_token_id], tokens[1:] if starts else tokens
        if not continuation_ids:
            raise InvalidInput(f"the continuation {continuation!r} has no token of its own after its context")
        return context_ids, continuation_ids

    def _fit(self, context: Tokens, new_tokens: int, task: str) -> Tokens:
        """The context, cut on the left where it does not fit beside the new tokens."""
        room = self.max_length + 1 - new_tokens
        if room < 1:
            raise InvalidInput(
                f"task {task!r}: {new_tokens} new tokens leave no room for a context in {self.max_length + 1} positions"
            )
        if len(context) > room:
            self.costs[task].truncated_contexts += 1
        return context[-room:]

    # Running -----------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Tokens, Tokens]],
        *,
        tasks: Sequence[str],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score (cache key, context, continuation) in tokens. Raises `InvalidInput` for a plan that depends on the answer."""
        if getattr(self.policy, "horizon", 0) is None:
            raise InvalidInput(
                "scoring needs horizon=...: this checkpoint names none, and depth would fall over the length of each continuation, "
                "so that the length of an answer would decide how deep it is read"
            )
        prompts = [self._fit(context, len(c), task) for (_, context, c), task in zip(requests, tasks, strict=True)]
        samplings = [forced(prompt, c) for prompt, (_, _, c) in zip(prompts, requests, strict=True)]
        scored = [
            score(done) for done in self._run(prompts, samplings, tasks, "loglikelihood", disable_tqdm=disable_tqdm)
        ]
        for (key, _, _), one in zip(requests, scored, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, one)
        return scored

    def _run(
        self,
        prompts: Sequence[Tokens],
        samplings: Sequence[Sampling],
        tasks: Sequence[str],
        what: str,
        *,
        disable_tqdm: bool,
    ) -> list[Generation]:
        """Run requests and count what they took. Raises `InvalidPlan` where a plan cannot act, `RequestFailed` where one fails."""
        if not isinstance(self.policy, Dense):
            lengths = [(t, len(p), s.max_new_tokens) for t, p, s in zip(tasks, prompts, samplings, strict=True)]
            check_plan_acts(self.policy, self.engine.shape.num_layers, lengths)
        done: dict[int, Generation] = {}
        with tqdm(total=len(prompts), desc=f"Running {what} requests", disable=disable_tqdm) as bar:
            for chunk in self.engine.stream(prompts, samplings, self.policy):
                if chunk.generation is None:
                    continue
                done[chunk.index] = chunk.generation
                if chunk.generation.error is not None:
                    raise RequestFailed(f"task {tasks[chunk.index]!r}: {chunk.generation.error}")
                self.costs[tasks[chunk.index]].add(chunk.generation)
                bar.update()
        for task in dict.fromkeys(tasks):
            cost, layers = self.costs[task].to_dict(), self.engine.shape.num_layers
            logger.info(
                "%s: %d scored tokens, %.2f of %d layers in the mean, the first of each request from its prompt's pass",
                task, cost["scored_tokens"], cost["mean_layers_of_scored_tokens"], layers,
            )  # fmt: skip
        return [done[index] for index in range(len(prompts))]


def task_of(request: Any) -> str:
    """Name of the task that a request of the harness belongs to."""
    name: str = request.task_name or "unnamed"
    return name


def sampling_of(settings: dict[str, Any], seed: int) -> Sampling:
    """A task's generation settings. `seed` is that of the draw, so that repeats of one request differ.

    Raises `InvalidInput` for settings that Shoal does not have.
    """
    known = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
    sampled, temperature = known.pop("do_sample"), known.pop("temperature", None)
    until, max_new_tokens = known.pop("until") or [], known.pop("max_gen_toks")
    for name in known:
        if name not in SAMPLING:
            raise InvalidInput(f"generation setting {name!r} is not supported, {nearest(name, SAMPLING)}")
    return Sampling(
        max_new_tokens=max_new_tokens,
        stop=tuple(text for text in until if text),
        temperature=(1.0 if temperature is None else temperature) if sampled else 0.0,
        **{**known, "seed": known.get("seed", 0) + seed},
    )


def parse_depth(depth: float | str) -> float:
    """
    >>> parse_depth("1/2"), parse_depth(0.25), parse_depth(1)
    (0.5, 0.25, 1.0)
    """
    try:
        return float(Fraction(str(depth)))
    except (ValueError, ZeroDivisionError):
        raise InvalidInput(f"depth is a share of the layers, written as 0.5 or 1/2, got {depth!r}") from None


def parse_batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    """
    >>> parse_batch_size(8, None), parse_batch_size("auto", 64), parse_batch_size("auto:4", None)
    (8, 64, 32)
    """
    if str(batch_size).startswith("auto"):
        return max_batch_size or AUTO_BATCH
    try:
        return int(batch_size)
    except ValueError:
        raise InvalidInput(f"batch_size is a number of requests or auto, got {batch_size!r}") from None


register_model("shoal")(ShoalLM)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ShoalError as error:
        sys.exit(f"Error: {error}")
