"""Frontiers: quality against what was spent, for models x policies x depths on one task.

    plan the arms  ->  run each that has no file yet  ->  time the arms of a model in turns  ->  assemble `frontier.json`

Every arm is one file in the output directory, written whole or not at all; a rerun goes on with what is missing, and may ask for
further policies, depths and models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.depth.policies import POLICIES
from shoal.errors import InvalidInput, nearest
from shoal.evaluate.frontier_arms import ArmRecord, PlannedArm, plan_arms, read_record, save_record
from shoal.evaluate.frontier_assembly import ArmRun, assemble
from shoal.evaluate.frontier_result import FrontierResult, Refused
from shoal.evaluate.frontier_subject import Report, Subject
from shoal.evaluate.metrics import metric_named
from shoal.evaluate.tasks import Task, TaskInput, load_task
from shoal.files import write_json


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """What to measure."""

    models: tuple[str, ...]
    """Checkpoint directories or hub ids that run dense and under every policy."""
    dense_models: tuple[str, ...] = ()
    """Further models that run dense only, such as a small one of equal decode cost."""
    task: str
    """A name of `tasks.TASKS`, or a JSONL file of one's own."""
    data: str | None = None
    """File, directory or hub dataset of a built-in task."""
    metrics: tuple[str, ...] | None = None
    """Instead of the task's own."""
    policies: tuple[str, ...] = ("skipdecode",)
    """Names of `shoal.depth.policies.POLICIES`."""
    depths: tuple[float, ...] = (2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
    """Mean shares of the layers."""
    limit: int | None = None
    """First so many inputs (windows of the text in language modelling)."""
    max_new_tokens: int | None = None
    """Most tokens of an output. None: the task's."""
    horizon: int | None = None
    """Clocks over which depth falls. None: the checkpoint's, else the median length of the first references in tokens."""
    batch: int = 32
    """Most requests that run together."""
    seed: int = 0
    """Of the resamples behind the intervals, and of the choice of examples."""
    timing_rounds: int = 3
    """Rounds of wall clock, in which the arms of a model take turns on one batch; 0 leaves seconds out."""
    dtype: str = "auto"
    """Of the weights that generate; losses are always computed in float32."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:1`."""
    threads: int | None = None
    """CPU threads; None leaves PyTorch's choice."""

    def __post_init__(self) -> None:
        if not self.models and not self.dense_models:
            raise InvalidInput("give at least one model")
        for policy in self.policies:
            if policy not in POLICIES:
                raise InvalidInput(f"unknown policy {policy!r}: {nearest(policy, POLICIES)}")
        wrong = [depth for depth in self.depths if not 0 < depth <= 1]
        if wrong:
            raise InvalidInput(f"depths are shares of the layers, above 0 and at most 1, got {wrong[0]}")
        for name, least in {
            "limit": 1,
            "max_new_tokens": 1,
            "horizon": 1,
            "batch": 1,
            "seed": 0,
            "timing_rounds": 0,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInput(f"{name} must be {least} or more, got {value}")


def run_frontier(
    config: FrontierConfig, out: Path, *, report: Report = lambda what, done, total: None
) -> FrontierResult:
    """Run what is missing in `out` and assemble its `frontier.json`.

    `report(what, done, total)` follows the progress of each arm. Raises `InvalidInput` for bad task files and for an `out` that
    was made with other settings, `MissingExtra` for a metric without its library, and what loading and running models raise.
    """
    task, inputs = read_task(config)
    try:
        (out / "arms").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{out} cannot be made a directory: {error.strerror}") from error
    shared = {
        "task": config.task,
        "inputs": inputs_digest(inputs),
        "limit": config.limit,
        "metrics": list(task.metrics),
        "max_new_tokens": task.max_new_tokens,
        "batch": config.batch,
        "dtype": config.dtype,
        "device": config.device,
    }
    names = model_names([*config.models, *config.dense_models])
    runs: list[ArmRun] = []
    refused: list[Refused] = []
    for model, name in names.items():
        subject = Subject(
            model,
            name,
            task,
            inputs,
            limit=config.limit,
            batch=config.batch,
            dtype=config.dtype,
            device=config.device,
            threads=config.threads,
            horizon=config.horizon,
        )
        arms, cannot = plan_arms(
            name,
            subject.shape.num_layers,
            subject.tuned,
            policies=config.policies if model in config.models else (),
            depths=config.depths,
            horizon=subject.horizon,
            max_new_tokens=task.max_new_tokens,
            prefix=f"{name}: " if len(names) > 1 else "",
        )
        ran, in_vain = run_arms(subject, arms, inputs, out, subject.settings(shared), config.timing_rounds, report)
        runs += ran
        refused += cannot + in_vain
    result = assemble(runs, refused, task, inputs, settings=asdict(config), seed=config.seed)
    result.save(out)
    return result


def read_task(config: FrontierConfig) -> tuple[Task, list[TaskInput]]:
    """The task with the run's `max_new_tokens`, and the inputs that it looks at. Every metric is tried once, on a reference."""
    task, inputs = load_task(config.task, config.data, metrics=config.metrics, max_new_tokens=config.max_new_tokens)
    if task.prefix_tokens is not None:
        return task, inputs
    inputs = inputs[: config.limit]
    for name in task.metrics:  # a missing library should be known before hours of work, not after
        first = inputs[0]
        metric_named(name).statistics([first.prompt], [first.references], [first.references[0]])
    return task, inputs


def run_arms(
    subject: Subject,
    arms: Sequence[PlannedArm],
    inputs: Sequence[TaskInput],
    out: Path,
    settings: dict[str, Any],
    timing_rounds: int,
    report: Report,
) -> tuple[list[ArmRun], list[Refused]]:
    """Every arm of one model, from its file or run now; and those that turned out to have nothing to act on."""
    records: dict[str, ArmRecord] = {}
    refused: list[Refused] = []
    for arm in arms:
        dense = records.get(arms[0].name)
        if dense is not None and not dense.ledger["decode_passes"] and all(arm.plan.runs_prompt):
            reason = "every output of the dense model is one token, which the prompt's pass predicts: no plan can act"
            refused.append(Refused(name=arm.name, reason=reason))
            continue
        path = out / "arms" / arm.file_name
        its_settings = {**settings, "plan": arm.plan.to_dict()}
        saved = read_record(path, its_settings)
        if saved is not None:
            records[arm.name] = ArmRecord.from_dict(saved, path)
            continue
        records[arm.name] = subject.run(arm, inputs, its_settings, report)
        save_record(path, records[arm.name])
    ran = [arm for arm in arms if arm.name in records]
    times = timings(subject, ran, inputs, records[arms[0].name], out, settings, timing_rounds, report)
    runs = [
        ArmRun(arm=arm, record=records[arm.name], shape=subject.shape, times=times.get(arm.name, [])) for arm in ran
    ]
    return runs, refused


def timings(
    subject: Subject,
    arms: Sequence[PlannedArm],
    inputs: Sequence[TaskInput],
    dense: ArmRecord,
    out: Path,
    settings: dict[str, Any],
    rounds: int,
    report: Report,
) -> dict[str, list[list[float]]]:
    """[prompt, decode] seconds per request by arm and round, from their file or measured now; none without rounds.

    The file is measured anew where other arms are asked for: arms that have not taken turns cannot be compared.
    """
    if not rounds:
        return {}
    path = out / "arms" / f"times of {arms[0].file_name}"
    its_settings = {**settings, "arms": [arm.name for arm in arms], "rounds": rounds}
    if path.is_file():
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if saved["settings"] == its_settings:
                seconds: dict[str, list[list[float]]] = saved["seconds"]
                return seconds
        except (ValueError, KeyError, TypeError):
            pass  # measured anew below
    measured = {
        name: [list(spent) for spent in times]
        for name, times in subject.time(arms, inputs, dense.new_tokens, rounds, report).items()
    }
    write_json(path, {"settings": its_settings, "seconds": measured})
    return measured


def model_names(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model: the last part of its path or hub id, or all of it where two would be the same.

    >>> model_names(["runs/tuned/", "facebook/opt-125m"])
    {'runs/tuned/': 'tuned', 'facebook/opt-125m': 'opt-125m'}
    """
    if len(set(models)) < len(models):
        twice = next(model for model in models if models.count(model) > 1)
        raise InvalidInput(f"the model {twice} is given twice")
    short = [Path(model).name or model for model in models]
    return {model: name if short.count(name) == 1 else model for model, name in zip(models, short, strict=True)}


def inputs_digest(inputs: Sequence[TaskInput]) -> str:
    """A digest of prompts, references and completions."""
    return hashlib.sha256(json.dumps([asdict(one) for one in inputs]).encode()).hexdigest()[:16]
