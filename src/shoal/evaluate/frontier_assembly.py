"""From the records of arms to a `FrontierResult`: intervals, paired differences, savings, bands of length, examples."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.depth.shape import ModelShape
from shoal.engine.ledger import EngineStats, Ledger
from shoal.evaluate.bootstrap import RESAMPLES, Statistics
from shoal.evaluate.frontier_arms import ArmRecord, PlannedArm
from shoal.evaluate.frontier_result import (
    Arm,
    Example,
    FrontierResult,
    LengthBand,
    MetricInfo,
    PositionLoss,
    Refused,
    Savings,
    Spending,
    Spent,
)
from shoal.evaluate.metrics import METRICS
from shoal.evaluate.tasks import Task, TaskInput

NUM_EXAMPLES = 6
"""Inputs shown side by side."""
PACKAGES = ("shoal", "torch", "transformers", "numpy", "sacrebleu", "rouge-score")
"""Whose versions a result names."""


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """An arm, what it did, and how long it took beside the others."""

    arm: PlannedArm
    """What was planned."""
    record: ArmRecord
    """What came of it."""
    shape: ModelShape
    """Of its model."""
    times: list[list[float]]
    """[prompt, decode] seconds per request, by round; empty where not measured."""

    def statistics(self) -> dict[str, Statistics]:
        """What each input adds to each metric."""
        return {
            name: Statistics(np.asarray(counts, float), METRICS[name].formula)
            for name, counts in self.record.counts.items()
        }


def assemble(
    runs: Sequence[ArmRun],
    refused: Sequence[Refused],
    task: Task,
    inputs: Sequence[TaskInput],
    *,
    settings: Mapping[str, Any],
    seed: int,
) -> FrontierResult:
    """The result of all arms, the dense one of each model coming first of its model's."""
    dense: dict[str, ArmRun] = {}
    for run in runs:
        dense.setdefault(run.arm.model, run)
    bands = length_bands([one.completion for one in inputs]) if task.prefix_tokens is None else []
    return FrontierResult(
        task=task.name,
        model=tuple(dense),
        settings=settings,
        metrics=tuple(
            MetricInfo(name=name, label=METRICS[name].label, higher_is_better=METRICS[name].higher_is_better)
            for name in task.metrics
        ),
        arms=tuple(_arm(run, dense[run.arm.model], bands, seed) for run in runs),
        refused=tuple(refused),
        examples=_examples(runs, inputs, seed) if task.prefix_tokens is None else (),
        conditions={**conditions(), "num_inputs": len(next(iter(runs[0].record.counts.values())))},
    )


def _arm(run: ArmRun, dense: ArmRun, bands: Sequence[tuple[str, list[int]]], seed: int) -> Arm:
    arm, record, stats = run.arm, run.record, run.statistics()
    ledger = Ledger(**record.ledger)
    full = dense.statistics()
    return Arm(
        name=arm.name,
        model=arm.model,
        policy=arm.policy,
        depth=arm.depth,
        plan=arm.plan.to_dict(),
        realised_mean_layers=ledger.mean_layers,
        num_layers=arm.plan.num_layers,
        mean_new_tokens=statistics.fmean(record.new_tokens),
        num_failed=record.num_failed,
        scores={name: one.score(seed=seed) for name, one in stats.items()},
        delta={} if run is dense else {name: one.minus(full[name], seed=seed) for name, one in stats.items()},
        savings=savings(run, dense),
        by_length=tuple(
            LengthBand(
                label=label,
                count=len(members),
                scores={name: one.of(members).score(seed=seed) for name, one in stats.items()},
            )
            for label, members in bands
        ),
        loss_by_position=tuple(
            PositionLoss(position=position, loss=total / count, count=count)
            for position, (total, count) in enumerate(zip(record.loss_sums, record.loss_counts, strict=True))
        ),
        seconds=record.seconds,
    )


def savings(run: ArmRun, dense: ArmRun) -> Savings:
    """The four savings of both parts; see `frontier_result.Spent` for what each is compared with."""
    ledger, shared = Ledger(**run.record.ledger), EngineStats(**run.record.stats)  # type: ignore[arg-type]
    requests = len(run.record.new_tokens)
    passes, consumed = ledger.decode_passes, ledger.prompt_tokens + ledger.decode_passes
    dense_layer_tokens = ledger.dense_prompt_layer_tokens + ledger.dense_decode_layer_tokens
    rounds = list(zip(run.times, dense.times, strict=True))

    def seconds(parts: slice) -> Spent:
        """Medians over rounds; the ratio is of the two arms in the same round."""
        if not rounds:
            return Spent(value=None, of_dense=None)
        pairs = [(sum(own[parts]), sum(full[parts])) for own, full in rounds]
        shares = [own / full for own, full in pairs if full]
        return Spent(
            value=statistics.median(own for own, _ in pairs), of_dense=statistics.median(shares) if shares else None
        )

    return Savings(
        decode=Spending(
            mean_layers=_spent(ledger.decode_layer_tokens, ledger.dense_decode_layer_tokens, passes),
            flops=_spent(ledger.decode_flops, ledger.dense_decode_flops, requests),
            bytes=_spent(shared.decode_bytes, shared.dense_decode_bytes, requests),
            seconds=seconds(slice(1, 2)),
        ),
        request=Spending(
            mean_layers=_spent(ledger.layer_tokens, dense_layer_tokens, consumed),
            flops=_spent(
                ledger.prompt_flops + ledger.decode_flops,
                ledger.dense_prompt_flops + ledger.dense_decode_flops,
                requests,
            ),
            bytes=_spent(
                shared.prompt_bytes + shared.decode_bytes,
                shared.dense_prompt_bytes + shared.dense_decode_bytes,
                requests,
            ),
            seconds=seconds(slice(0, 2)),
        ),
    )


def _spent(value: int, dense: int, per: int) -> Spent:
    return Spent(value=value / per if per else 0.0, of_dense=value / dense if dense else None)


def length_bands(texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Thirds of the texts by their number of words: (label, indices); fewer bands where lengths are equal.

    >>> length_bands(["a", "a b", "a b c", "a b c d", "a b c d e", "a b c d e f"])
    [('up to 2 words', [0, 1]), ('3 to 4 words', [2, 3]), ('5 words or more', [4, 5])]
    """
    lengths = [len(text.split()) for text in texts]
    ranked = sorted(lengths)
    limits = sorted({ranked[(len(ranked) - 1) // 3], ranked[2 * (len(ranked) - 1) // 3]} - {ranked[-1]})
    bands = []
    for low, high in zip([0, *limits], [*limits, ranked[-1]], strict=True):
        members = [index for index, length in enumerate(lengths) if low < length <= high]
        if low == 0:
            label = f"up to {high} words"
        elif high == ranked[-1]:
            label = f"{low + 1} words or more"
        else:
            label = f"{low + 1} to {high} words" if high > low + 1 else f"{high} words"
        bands.append((label, members))
    return bands


def _examples(runs: Sequence[ArmRun], inputs: Sequence[TaskInput], seed: int) -> tuple[Example, ...]:
    """A few inputs drawn by `seed`, with what every arm wrote."""
    drawn = np.random.default_rng(seed).permutation(len(inputs))[:NUM_EXAMPLES]
    return tuple(
        Example(
            prompt=inputs[index].prompt,
            references=inputs[index].references,
            outputs={run.arm.name: run.record.outputs[index] for run in runs},
        )
        for index in sorted(drawn.tolist())
    )


def conditions() -> dict[str, Any]:
    """What a reader needs to judge the numbers: processor, threads, versions. Nothing that names the host."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        cpu = found[1] if found else cpu
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "decoding": "greedy",
        "intervals": f"95%, bootstrap over inputs, {RESAMPLES} resamples; differences are paired",
        "loss_dtype": "float32",
    }
