"""The claims of the SkipDecode paper, checked one by one on a model and the E2E data.

    check  ->  fine-tune, dense  ->  go on in four ways  ->  a frontier each  ->  exactness  ->  reproduction.json

From the dense checkpoint three tunings go on for every depth and the baseline goes on dense, all for equally many steps over the
same batches. Every stage leaves a file or a directory, whole or not at all; the same command goes on with what is missing.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import DepthPlan
from shoal.errors import InvalidInput
from shoal.evaluate.bootstrap import Statistics
from shoal.evaluate.e2e import E2EInput
from shoal.evaluate.exactness import Exactness, measure_exactness
from shoal.evaluate.frontier import inputs_digest, run_frontier
from shoal.evaluate.frontier_arms import ArmRecord, PlannedArm
from shoal.evaluate.frontier_assembly import conditions
from shoal.evaluate.frontier_result import Arm
from shoal.evaluate.frontier_subject import Report
from shoal.evaluate.metrics import METRICS
from shoal.evaluate.reproduce_claims import Comparison, Judge, Measured, better, compare, judged, negligible
from shoal.evaluate.reproduce_config import WAYS, Checked, ReproduceConfig, check
from shoal.evaluate.suits import spread
from shoal.files import replaced, write_json
from shoal.models.convert import convert_checkpoint
from shoal.models.memory import drop_freed
from shoal.train.config import TuneConfig
from shoal.train.tune import tune

FILE_NAME = "reproduction.json"
FORMAT = 1
"""Version of its schema."""
NUM_PROMPTS = 32
"""Requests of the comparison of exactness: as many as run together."""


def reproduce(config: ReproduceConfig, out: Path, *, report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Run what is missing in `out` and write its `reproduction.json`, whose content is returned (`describe` makes tables of it).

    `report(what, done, total)` follows the progress. Raises `InvalidInput`, `CheckpointError` or `MissingExtra` before anything
    trains, and what tuning and running models raise.
    """
    checked = check(config)
    config = replace(config, device=checked.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    out = out.expanduser().absolute()
    open_out(out, settings_of(config, checked))
    data = write_pairs(checked.pairs, out / "train.jsonl")
    start = checked.model or converted(config.model, out / "model")

    checkpoints, training = out / "checkpoints", {}
    tuned_from = checkpoints / "fine-tuned"
    training["fine-tuned"] = train(start, data, tuned_from, config.tuning(WAYS["dense"]), report)
    for name, way in WAYS.items():
        training[name] = train(tuned_from, data, checkpoints / name, config.tuning(way), report)

    measured: dict[str, dict[float, Measured]] = {}
    for name in WAYS:
        measured[name] = measure(name, checkpoints / name, checked, config, out / "frontiers" / name, report)
    exactness = check_exactness(checkpoints / "skipdecode", checked, config, out / "exactness.json", report)

    result = {
        "format": FORMAT,
        "paper": "SkipDecode (Del Corro et al. 2023), arXiv 2307.02628",
        "model": {"name": public_name(config.model), "num_layers": checked.num_layers},
        "data": {
            "name": "E2E NLG",
            "training_pairs": sum(len(one.references) for one in checked.pairs),
            "test_inputs": len(checked.inputs),
        },
        "settings": {name: value for name, value in asdict(config).items() if name not in ("model", "data")},
        "horizon": horizon_of(checkpoints / "skipdecode"),
        "metric": {"name": checked.metric, "label": METRICS[checked.metric].label},
        "training": training,
        "arms": [arm_summary(one, checked.metric) for arms in measured.values() for one in arms.values()],
        "claims": judged(comparisons(measured, checked.metric, config), exactness),
        "conditions": conditions_of(),
    }
    write_json(out / FILE_NAME, result)
    return result


def comparisons(
    measured: dict[str, dict[float, Measured]], metric: str, config: ReproduceConfig
) -> list[list[Comparison]]:
    """Those of the first three claims, a comparison per depth: against dense, without the warm-up layer, early termination."""

    def against(other: str, judge: Judge) -> list[Comparison]:
        return [
            compare(
                depth,
                measured["skipdecode"].get(depth),
                measured[other].get(1.0 if other == "dense" else depth),
                measured["dense"][1.0],
                names=("skipdecode", other),
                metric=metric,
                judge=judge,
                seed=config.seed,
            )
            for depth in sorted(config.depths, reverse=True)
        ]

    return [against("dense", negligible), against("skipdecode-no-warmup", better), against("early-termination", better)]


def train(model: Path, data: Path, checkpoint: Path, config: TuneConfig, report: Report) -> Any:
    """Tune `checkpoint` where it is not there yet, going on from an interrupted state; returns what the run did.

    That is None where the run was interrupted between its checkpoint and this record.
    """
    name, record = checkpoint.name, checkpoint.with_name(f"{checkpoint.name}.json")
    state = checkpoint.with_name(f"{name}.tuning")
    if not checkpoint.is_dir():
        resume = (state / "settings.json").is_file()
        if not resume:
            shutil.rmtree(state, ignore_errors=True)
        for torn in checkpoint.parent.glob(f".{name}.*"):  # a checkpoint whose writing was interrupted
            shutil.rmtree(torn)

        def show(step: int, num_steps: int, loss: float) -> None:
            report(f"tuning {name}, loss {loss:.3f}", step, num_steps)

        report(f"tuning {name}", 0, 1)
        checkpoint.parent.mkdir(exist_ok=True)
        done = tune(str(model), data, checkpoint, config, resume=resume, report=show)
        loss = (
            done.final_loss if math.isfinite(done.final_loss) else None
        )  # resumed behind its last step: none was made
        write_json(record, {"steps": done.steps, "tokens": done.tokens, "final_loss": loss})
        free_memory()
    shutil.rmtree(state, ignore_errors=True)
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None


def measure(
    name: str, checkpoint: Path, checked: Checked, config: ReproduceConfig, out: Path, report: Report
) -> dict[float, Measured]:
    """A checkpoint's frontier and its report, in `out`; what was measured by depth, 1 being dense."""
    from shoal.evaluate.report import (
        FILE_NAME,
        write_report,
    )  # its templates are an extra, which `check` has looked for

    frontier = run_frontier(
        config.frontier(str(checkpoint), WAYS[name], checked.test),
        out,
        report=lambda what, done, total: report(f"measuring {name}: {what}", done, total),
    )
    write_report(frontier, out / FILE_NAME)
    free_memory()
    return {
        arm.depth: Measured(checkpoint=name, arm=arm, statistics=statistics_of(arm, checked.metric, out))
        for arm in frontier.arms
    }


def statistics_of(arm: Arm, metric: str, frontier: Path) -> Statistics:
    """What each input adds to `metric`, from the arm's file: checkpoints are compared across frontiers, on the same inputs."""
    assert arm.plan is not None
    plan = DepthPlan.from_dict(arm.plan)
    planned = PlannedArm(name=arm.name, model=arm.model, policy=arm.policy, depth=arm.depth, plan=plan)
    path = frontier / "arms" / planned.file_name
    record = ArmRecord.from_dict(json.loads(path.read_text(encoding="utf-8")), path)
    return Statistics(np.asarray(record.counts[metric], float), METRICS[metric].formula)


def check_exactness(
    checkpoint: Path, checked: Checked, config: ReproduceConfig, path: Path, report: Report
) -> Exactness:
    """The comparison of exactness, from its file or run now."""
    if not path.is_file():
        prompts = [one.prompt for one in spread(checked.inputs, NUM_PROMPTS)]
        report("exactness", 0, len(prompts))
        found = measure_exactness(
            checkpoint, prompts, depths=config.depths, max_new_tokens=checked.max_new_tokens, device=checked.device
        )
        write_json(path, asdict(found))
        free_memory()
    return Exactness(**json.loads(path.read_text(encoding="utf-8")))


def arm_summary(one: Measured, metric: str) -> dict[str, Any]:
    """What `reproduction.json` keeps of an arm; all of it is in its frontier."""
    arm = one.arm
    return {
        "checkpoint": one.checkpoint,
        "depth": arm.depth,
        "realised_mean_layers": arm.realised_mean_layers,
        "mean_new_tokens": arm.mean_new_tokens,
        "num_failed": arm.num_failed,
        "score": asdict(arm.scores[metric]),
        "savings": asdict(arm.savings),
    }


def settings_of(config: ReproduceConfig, checked: Checked) -> dict[str, Any]:
    """What decides the results; `threads` is not among it."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("data", "threads")}
    pairs = json.dumps([asdict(one) for one in checked.pairs])
    path = Path(config.model).expanduser()
    return {
        **settings,
        "model": str(path.absolute()) if path.is_dir() else config.model,
        "depths": sorted(config.depths, reverse=True),
        "training_data": hashlib.sha256(pairs.encode()).hexdigest()[:16],
        "test_inputs": inputs_digest(checked.inputs),
    }


def open_out(out: Path, settings: dict[str, Any]) -> None:
    """Make the directory of a reproduction with `settings`, or check that `out` is one. Raises `InvalidInput`."""
    record = out / "settings.json"
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise InvalidInput(
                    f"{out} holds a reproduction with {name} {before.get(name)!r}, not {settings.get(name)!r}: "
                    "choose another --out, or the same settings"
                )
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{out} cannot be made a directory: {error.strerror}") from error
    if any(path.name != f".{record.name}.part" for path in out.iterdir()):
        raise InvalidInput(f"{out} is not empty and holds no reproduction: choose another --out")
    write_json(record, settings)


def write_pairs(data: list[E2EInput], path: Path) -> Path:
    """The training data as `shoal tune` reads it: a line for each description, behind its meaning representation."""
    if not path.is_file():
        pairs = [{"prompt": one.mr, "completion": reference} for one in data for reference in one.references]
        with replaced(path) as partial:
            partial.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return path


def converted(model: str, directory: Path) -> Path:
    """The model's pickled weights as safetensors, as `shoal convert` writes them."""
    return directory if directory.is_dir() else convert_checkpoint(model, directory)


def public_name(model: str) -> str:
    """A hub id, or the last part of a path: results do not say where things lie on a machine."""
    path = Path(model).expanduser()
    return path.absolute().name if path.is_dir() else model


def horizon_of(checkpoint: Path) -> int | None:
    """Clocks over which depth falls."""
    tuned = TunedDepth.load(checkpoint)
    return None if tuned is None else tuned.horizon


def conditions_of() -> dict[str, Any]:
    """As of a frontier, with versions beside the rest and the date."""
    found = conditions()
    return {"date": datetime.date.today().isoformat(), **found.pop("versions"), **found}


def free_memory() -> None:
    """Give back what a stage held. A Trainer refers to itself, so its weights and AdamW's state wait for a collection."""
    gc.collect()
    drop_freed()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
