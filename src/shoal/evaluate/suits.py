"""How much does a model have to skip, as it is? Each layer's change, and what each policy costs at each depth without tuning.

Newer models leave less to skip ("Diminishing returns of early-exit decoding", arXiv 2603.23701), and without tuning contiguous
skips break modern models even at small savings (measured in AdaSkip, arXiv 2501.02336). So measure before promising anything.

Completions are given (teacher-forced), the prompt is read by all layers. A completion's first token is predicted by the prompt's
pass, which no plan changes; it is left out, so the tokens that count here are those that decode passes predict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from shoal.depth.checkpoint import TunedDepth, fit_horizon
from shoal.depth.plan import Dense, DepthPlan
from shoal.depth.policies import POLICIES, policy_at
from shoal.engine.engine import Engine
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput, InvalidPlan, RequestFailed
from shoal.evaluate.bootstrap import Score, ratio
from shoal.evaluate.layer_change import LayerChange, layer_changes
from shoal.evaluate.predictions import Predictions, predict
from shoal.models.checkpoint import DTYPES
from shoal.models.directory import resolve
from shoal.train.data import Example, read_fields, tokenise
from shoal.train.depth_context import decoder_layers
from shoal.train.start import load

T = TypeVar("T")
Report = Callable[[int, int], None]
"""`report(done, total)`: forward runs over the examples, done and in all."""


@dataclass(frozen=True, kw_only=True)
class SuitsConfig:
    """What to measure."""

    depths: tuple[float, ...] = (0.9, 0.8, 2 / 3, 1 / 2, 1 / 3)
    """Shares of the layers, each above 0 and below 1."""
    max_examples: int = 32
    """Examples to measure on, taken evenly from the file."""
    max_new_tokens: int = 64
    """Most tokens of a completion that the model writes itself, where the data has none."""
    dtype: str = "float32"
    """Of weights and activations: float32, bfloat16 or float16."""
    device: str = "cpu"
    """cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(sorted(set(self.depths), reverse=True)))
        wrong = [depth for depth in self.depths if not 0 < depth < 1]
        if wrong or not self.depths:
            got = f"got {wrong[0]}" if wrong else "got none"
            raise InvalidInput(f"depths must lie above 0 and below 1, the depth that they are compared with; {got}")
        for name in ("max_examples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise InvalidInput(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one policy does at one depth, over the tokens that decode passes predict."""

    policy: str
    """Its name in `shoal.depth.policies.POLICIES`."""
    depth: float
    """As asked for: the mean over the horizon."""
    realised_depth: float
    """Mean share of the layers over the decode passes of these completions."""
    agreement: Score
    """Share of tokens at which the most probable token is the dense model's; interval over examples."""
    loss_increase: Score
    """Mean cross-entropy per token minus the dense model's, in nats; interval over examples."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A depth that a policy does not allow on this model."""

    policy: str
    """Its name."""
    depth: float
    """As asked for."""
    reason: str
    """What the policy says."""


@dataclass(frozen=True, kw_only=True)
class Suitability:
    """What was measured on one model with one file."""

    model: str
    """As it was named."""
    num_layers: int
    """Decoder layers, L."""
    num_examples: int
    """Examples that were measured."""
    num_tokens: int
    """Tokens that their decode passes predict."""
    self_written: bool
    """Whether the model wrote the completions itself, greedily at full depth, because the data had none."""
    horizon: int
    """Clocks over which depth falls: the checkpoint's, else the median completion of these examples."""
    tuned: TunedDepth | None
    """What the checkpoint's `depth_plan.json` says."""
    dense_loss: float
    """Mean cross-entropy per token at full depth, in nats."""
    layers: tuple[LayerChange, ...]
    """Bottom first."""
    outcomes: tuple[Outcome, ...]
    """Deepest first; at one depth the highest agreement first, and the lower loss among equals."""
    refused: tuple[Refusal, ...]
    """Depths that a policy does not allow here."""

    def agreement(self, depth: float) -> dict[str, float]:
        """Agreement by policy at `depth`, best first: what `rank_correlation` compares with tuned results."""
        return {outcome.policy: outcome.agreement.value for outcome in self.outcomes if outcome.depth == depth}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def suits(model: str, data: Path, config: SuitsConfig, *, report: Report = lambda done, total: None) -> Suitability:
    """Measure a checkpoint (directory or hub id) on a JSONL file with 'prompt' and, in every line or none, 'completion'.

    Raises `InvalidInput` (data, device), `InvalidPlan` where no policy allows any of the depths on this model, `CheckpointError`.
    """
    rows = read_rows(data)
    rows = spread(rows, config.max_examples)
    self_written = "completion" not in rows[0][1]
    directory = resolve(model)
    written = write_completions(directory, data, rows, config) if self_written else []
    loaded, tokenizer = load(str(directory))
    network: Any = loaded
    try:
        network.to(torch.device(config.device), DTYPES[config.dtype])
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise InvalidInput(f"device {config.device!r} cannot be used: {reason}") from error
    examples = written or tokenise(
        [(number, row["prompt"], row["completion"]) for number, row in rows],
        tokenizer,
        path=data,
        max_positions=network.config.max_position_embeddings,
    )
    return measure(
        network.eval(),
        examples,
        config.depths,
        model=model,
        self_written=self_written,
        tuned=TunedDepth.load(directory),
        report=report,
    )


def measure(
    network: Any,
    examples: Sequence[Example],
    depths: Sequence[float],
    *,
    model: str = "",
    self_written: bool = False,
    tuned: TunedDepth | None = None,
    report: Report = lambda done, total: None,
) -> Suitability:
    """Measure a transformers model that is loaded; arguments are fields of `Suitability` and `SuitsConfig`, errors as of `suits`.

    One-token completions are left out: they have no decode pass.
    """
    examples = [example for example in examples if len(example.completion) > 1]
    if not examples:
        raise InvalidInput(
            "every completion is a single token, which the prompt's pass predicts at full depth: use longer ones"
        )
    passes = [len(example.completion) - 1 for example in examples]
    num_tokens, num_layers = sum(passes), len(decoder_layers(network))
    horizon = tuned.horizon if tuned else fit_horizon(len(example.completion) for example in examples)
    plans, refused = plans_at(depths, num_layers, horizon=horizon, tuned=tuned)

    full_depth = Dense().plan(num_layers)
    predictions: dict[DepthPlan, list[Predictions]] = {}
    distinct = dict.fromkeys([full_depth, *plans.values()])
    for plan in distinct:
        predictions[plan] = predict(network, examples, plan)
        report(len(predictions), len(distinct))
    dense = predictions[full_depth]

    outcomes = []
    for (policy, depth), plan in plans.items():
        pairs = list(zip(predictions[plan], dense, strict=True))
        outcomes.append(
            Outcome(
                policy=policy,
                depth=depth,
                realised_depth=sum(n * plan.mean_depth(n) for n in passes) / num_tokens,
                agreement=ratio([float((ours.tokens == full.tokens)[1:].sum()) for ours, full in pairs], passes),
                loss_increase=ratio([float((ours.losses - full.losses)[1:].sum()) for ours, full in pairs], passes),
            )
        )
    return Suitability(
        model=model,
        num_layers=num_layers,
        num_examples=len(examples),
        num_tokens=num_tokens,
        self_written=self_written,
        horizon=horizon,
        tuned=tuned,
        dense_loss=sum(float(full.losses[1:].sum()) for full in dense) / num_tokens,
        layers=layer_changes(network, examples),
        outcomes=tuple(sorted(outcomes, key=lambda o: (-o.depth, -o.agreement.value, o.loss_increase.value))),
        refused=tuple(refused),
    )


def plans_at(
    depths: Sequence[float], num_layers: int, *, horizon: int, tuned: TunedDepth | None
) -> tuple[dict[tuple[str, float], DepthPlan], list[Refusal]]:
    """The plan of each policy at each depth, and what they refuse. Raises `InvalidPlan` where nothing is left."""
    plans, refused = {}, []
    for name in POLICIES:
        for depth in depths:
            try:
                policy = policy_at(name, depth)
                if tuned is not None:
                    policy = tuned.fill(policy)
                plans[name, depth] = policy.plan(num_layers, prompt_tokens=0, max_new_tokens=horizon)
            except InvalidPlan as error:
                refused.append(Refusal(policy=name, depth=depth, reason=str(error)))
    if not plans:
        raise InvalidPlan(f"no policy can skip anything on {num_layers} layers at these depths: {refused[0].reason}")
    return plans, refused


def read_rows(data: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, object) of each line: 'prompt', and 'completion' in every line or none. Raises `InvalidInput`."""
    rows = read_fields(data, ("prompt",), optional=("completion",))
    having = [number for number, row in rows if "completion" in row]
    if 0 < len(having) < len(rows):
        lacking = next(number for number, row in rows if "completion" not in row)
        raise InvalidInput(
            f"{data}, line {lacking}: field 'completion' is missing, but line {having[0]} has it: give it in every line, "
            "or in none, and the model writes the completions itself"
        )
    return rows


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, at even distances: files are often sorted, and neighbours alike.

    >>> spread("abcdefg", 3)
    ['a', 'c', 'e']
    """
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def write_completions(
    directory: Path, data: Path, rows: Sequence[tuple[int, dict[str, str]]], config: SuitsConfig
) -> list[Example]:
    """The model's own greedy completions at full depth. Raises `InvalidInput` (line number) for a prompt that does not fit."""
    engine = Engine.from_pretrained(directory, dtype=config.dtype, device=config.device)
    for index, (number, row) in enumerate(rows):
        try:
            engine.add(row["prompt"], Sampling(max_new_tokens=config.max_new_tokens), index=index, streaming=False)
        except InvalidInput as error:
            raise type(error)(f"{data}, line {number}: {error}") from error
    completions: dict[int, list[int]] = {}
    while engine.has_work:
        for chunk in engine.step():
            if chunk.generation is not None:
                if chunk.generation.error is not None:
                    raise RequestFailed(f"{data}, line {rows[chunk.index][0]}: {chunk.generation.error}")
                completions[chunk.index] = list(chunk.generation.token_ids)
    prompts = engine.tokenizer([row["prompt"] for _, row in rows])["input_ids"]
    return [Example(prompt, completions[index]) for index, prompt in enumerate(prompts)]
