"""What a frontier found: the schema of `frontier.json`, which plots and reports are made from.

An *arm* is one model under one depth plan on one task. Every arm is compared with the dense arm of its own model; a small dense
model is an arm of its own, which stands in the same figure by its FLOPs, since its layers are not those of the large one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.errors import InvalidInput
from shoal.evaluate.bootstrap import Score
from shoal.files import write_json

FILE_NAME = "frontier.json"
FORMAT = 1
"""Version of the schema."""


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """A metric of the task."""

    name: str
    """Key of the `scores`, such as `rouge_l`."""
    label: str
    """As people write it, such as `ROUGE-L`."""
    higher_is_better: bool
    """False for losses and error rates."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """One of the four savings, of one part of the requests."""

    value: float | None
    """Absolute; see `Spending` for the unit. None where it was not measured."""
    of_dense: float | None
    """As a share of the same model's dense run (1.0 for itself). Layers, FLOPs and bytes are compared with what running every
    layer for the *same tokens in the same passes* would take; seconds with a dense run that emitted as many tokens."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """The four savings of one part (decode passes, or the whole request with its prompt)."""

    mean_layers: Spent
    """Layers per token that was consumed."""
    flops: Spent
    """Floating-point operations per request."""
    bytes: Spent
    """Bytes moved per request: what requests of a batch share is divided by their number."""
    seconds: Spent
    """Wall clock per request, shared likewise; median over rounds in which the arms of a model take turns."""


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Both parts."""

    decode: Spending
    """Passes that consume generated tokens."""
    request: Spending
    """These and the prompt."""


@dataclass(frozen=True, kw_only=True)
class LengthBand:
    """Scores of the inputs whose references are about equally long."""

    label: str
    """Such as `up to 18 words`."""
    count: int
    """Inputs."""
    scores: Mapping[str, Score]
    """By metric."""


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Teacher-forced loss at one position of the completion."""

    position: int
    """0 is the first completion token, which comes from the prompt's pass and so from every layer."""
    loss: float
    """Mean cross-entropy in nats."""
    count: int
    """Completions that are at least this long."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model under one plan."""

    name: str
    """Unique in the file: the policy and its nominal depth, after the model's name where there are several models."""
    model: str
    """One of `FrontierResult.model`."""
    policy: str
    """`dense`, or a name of `shoal.depth.policies`."""
    depth: float
    """Nominal share of the layers; 1.0 for dense."""
    plan: Mapping[str, Any] | None
    """`DepthPlan.to_dict`; None where the policy makes a plan of its own for each request."""
    realised_mean_layers: float
    """Mean layers over the decode passes that ran."""
    num_layers: int
    """Of the model."""
    mean_new_tokens: float
    """Emitted per request, the end-of-sequence token included."""
    num_failed: int
    """Requests that ended with an error; their output counts as empty."""
    scores: Mapping[str, Score]
    """By metric, over all inputs."""
    delta: Mapping[str, Score]
    """By metric: this arm minus the dense arm of its model, by a paired bootstrap (the same resamples). Empty for dense."""
    savings: Savings
    """What it cost."""
    by_length: tuple[LengthBand, ...]
    """Terciles of reference length; empty for language modelling."""
    loss_by_position: tuple[PositionLoss, ...]
    """On the first reference of each input, under the plan."""
    seconds: float
    """Wall clock of making this arm, its scoring included."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An arm that cannot run, or that could not change anything."""

    name: str
    """As the arm would have been called."""
    reason: str
    """Why."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One input and what the arms made of it."""

    prompt: str
    """As given to the models."""
    references: tuple[str, ...]
    """What people wrote."""
    outputs: Mapping[str, str]
    """Completion by name of arm."""


@dataclass(frozen=True, kw_only=True)
class FrontierResult:
    """Everything that `shoal frontier` found."""

    task: str
    """Name or path of the task."""
    model: tuple[str, ...]
    """Names of the models, in the order they were given."""
    settings: Mapping[str, Any]
    """What was asked for, as JSON."""
    metrics: tuple[MetricInfo, ...]
    """The first one is the task's main metric."""
    arms: tuple[Arm, ...]
    """Model by model, the dense arm of each first, then policy by policy from deep to shallow."""
    refused: tuple[Refused, ...]
    """Arms that were asked for and are not in `arms`."""
    examples: tuple[Example, ...]
    """A few inputs; empty for language modelling."""
    conditions: Mapping[str, Any]
    """Processor, threads, versions, number of inputs, and how the intervals were made."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: dataclasses as objects, by the names of their fields."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FrontierResult:
        """Inverse of `to_dict`. Raises `KeyError` or `TypeError` where fields are missing or unknown."""
        fields = {name: value for name, value in data.items() if name != "format"}
        return cls(
            **{
                **fields,
                "model": tuple(data["model"]),
                "metrics": tuple(MetricInfo(**metric) for metric in data["metrics"]),
                "arms": tuple(_arm(arm) for arm in data["arms"]),
                "refused": tuple(Refused(**refused) for refused in data["refused"]),
                "examples": tuple(
                    Example(**{**example, "references": tuple(example["references"])}) for example in data["examples"]
                ),
            }
        )

    def save(self, directory: Path) -> Path:
        """Write `frontier.json` into `directory`, atomically; returns its path."""
        path = directory / FILE_NAME
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, path: Path) -> FrontierResult:
        """Read a `frontier.json`, or the one in a directory. Raises `InvalidInput` where it is missing or not one."""
        path = path / FILE_NAME if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InvalidInput(f"{path}: no such file; `shoal frontier ... --out DIR` writes one") from None
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise InvalidInput(f"{path} is not a frontier of format {FORMAT} (found {found!r}): make it anew")
        try:
            return cls.from_dict(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a whole frontier: {error!r}") from error


def _arm(data: Mapping[str, Any]) -> Arm:
    savings = {
        part: Spending(**{name: Spent(**spent) for name, spent in spending.items()})
        for part, spending in data["savings"].items()
    }
    bands = [LengthBand(**{**band, "scores": _scores(band["scores"])}) for band in data["by_length"]]
    return Arm(
        **{
            **data,
            "scores": _scores(data["scores"]),
            "delta": _scores(data["delta"]),
            "savings": Savings(**savings),
            "by_length": tuple(bands),
            "loss_by_position": tuple(PositionLoss(**loss) for loss in data["loss_by_position"]),
        }
    )


def _scores(data: Mapping[str, Mapping[str, float]]) -> dict[str, Score]:
    return {name: Score(**score) for name, score in data.items()}
