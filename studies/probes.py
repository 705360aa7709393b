"""What a probe can read out of a small general model, beside what needs no probe.

    python studies/probes.py --model ~/.cache/shoal/studies/general_model/general --data ../shared/data --seeds 0 1 2 --save

Sentiment, bank intents, hate speech and harmful prompts, classified from the states of the pass that reads a prompt: pooling, gate
and attention, beside MULI (the first token's logits of the same pass) and a bag of words (no model). The search for settings runs
with the first seed, the others take its choice; a seed changes the split into training and validation, order and random weights.
Test sets are read once. Gates that read the lower levels only say how deep the information lies (first seed).

The rule, written before the runs: the gate is at least as good as pooling where its mean F1 over the seeds is (of more than two
classes, the mean over classes).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probe_tasks import TASKS, Task
from shoal import Engine
from shoal.errors import ShoalError
from shoal.evaluate.markdown import table
from shoal.models.passes import Ints
from shoal.signals.extract import States, extract
from shoal.signals.fit import Data, FitConfig, fit, vectors_of
from shoal.signals.labelled import classes_of, split
from shoal.signals.quality import quality
from shoal.signals.report import baselines
from study import chosen, conditions, open_work, parser, read_json, save, write_json

PROBES: dict[str, FitConfig] = {
    "pool": FitConfig(operator="pool", epochs=20, patience=5),
    "gate": FitConfig(operator="gate", epochs=8, patience=2),
    "attention": FitConfig(operator="attention", heads=(2,), learning_rates=(1e-3, 3e-3), epochs=8, patience=2),
}
BASELINES = ("MULI", "bag of words")
MOST_TRAIN, MOST_TEST, MAX_TOKENS = 4000, 2000, 64
SCORES = ("f1", "auprc", "accuracy", "calibration_error")


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """A task with the states of its prompts."""

    texts: list[str]
    labels: Ints
    classes: tuple[str, ...]
    states: States
    num_train: int
    """The first so many prompts are to learn from, the others to be tried on."""

    @property
    def test(self) -> Ints:
        """Places of the test's prompts."""
        return np.arange(self.num_train, len(self.texts))

    def split(self, seed: int) -> tuple[Ints, Ints]:
        """Places to train on and to validate with."""
        known = [Text(text) for text in self.texts[: self.num_train]]
        return split(known, share=0.15, seed=seed)


@dataclass(frozen=True)
class Text:
    """What `split` looks at."""

    text: str


def read_subject(engine: Engine, task: Task, directory: Path, options: argparse.Namespace) -> Subject:
    """Extract the states of a task's prompts, as far as they are not there."""
    most_train, most_test = (200, 80) if options.quick else (options.most_train, MOST_TEST)
    train, test = task.train[:most_train], task.test[:most_test]
    classes = classes_of(train, task.positive)
    test = [one for one in test if one.label in classes]
    everything = [*train, *test]
    texts = [one.text for one in everything]
    states = extract(
        engine, texts, directory, max_tokens=MAX_TOKENS, tokens=True, logits=True, budget_gib=6,
        report=lambda what, done, total: print(f"{what}: {done} of {total}", file=sys.stderr) if done % 1024 == 0 else None,
    )  # fmt: skip
    labels = np.array([classes.index(one.label) for one in everything])
    return Subject(texts=texts, labels=labels, classes=classes, states=states, num_train=len(train))


def probe_arm(
    engine: Engine, subject: Subject, seed: int, config: FitConfig, searched: dict[str, Any] | None
) -> dict[str, Any]:
    """Train one probe and try it. `searched`: what the first seed chose."""
    config = replace(config, seed=seed)
    if searched is not None:
        config = replace(
            config,
            learning_rates=(searched["learning_rate"],),
            **({"poolings": (searched["pooling"],)} if "pooling" in searched else {}),
            **({"heads": (searched["heads"],)} if "heads" in searched else {}),
        )
    train, validation = subject.split(seed)
    fitted = fit(
        subject.states, subject.labels, train, validation, classes=subject.classes, name="probe", model=engine.config,
        max_prompt_tokens=MAX_TOKENS, config=config,
    )  # fmt: skip
    probe = fitted.probe
    data = Data(subject.states, torch.from_numpy(subject.labels), train, validation)
    vectors = vectors_of(probe, data, subject.test)
    probabilities = probe.probabilities(probe.logits(vectors)).numpy()
    found = quality(probabilities, subject.labels[subject.test], threshold=probe.settings.threshold)
    return {
        "quality": asdict(found),
        "validation": asdict(fitted.validation),
        "chosen": dict(fitted.chosen.settings),
        "trials": [asdict(trial) for trial in fitted.trials],
        "parameters": probe.num_parameters,
    }


def baseline_arms(subject: Subject, seed: int) -> dict[str, dict[str, Any]]:
    """Both baselines."""
    assert subject.states.logits is not None
    logits, texts = subject.states.logits.float().numpy(), np.array(subject.texts, dtype=object)
    train, validation = subject.split(seed)
    found = baselines(logits, subject.texts, subject.labels, train, validation, seed=seed)
    inputs = {"MULI": logits, "bag of words": texts}
    return {
        name: {"quality": asdict(quality(
            model.predict_proba(inputs[name][subject.test]), subject.labels[subject.test], threshold=threshold
        ))}
        for name, (model, threshold) in found.items()
    }  # fmt: skip


def levels_of(num_levels: int) -> list[int]:
    """How many levels the gates read whose depth is studied: every other number up to all."""
    return sorted({1, *range(1, num_levels, 2), num_levels})


def run(options: argparse.Namespace) -> None:
    """Every arm that has no file yet."""
    engine = Engine.from_pretrained(options.model, dtype="bfloat16", max_batch=64, cache_gib=1)
    settings = {
        "model": engine.config.fingerprint, "most_train": options.most_train, "most_test": MOST_TEST,
        "max_tokens": MAX_TOKENS, "quick": options.quick,
    }  # fmt: skip
    open_work(options.work, settings)
    (options.work / "arms").mkdir(exist_ok=True)
    first = options.seeds[0]
    for name in chosen(options.arms, TASKS):
        subject: Subject | None = None
        for seed in options.seeds:
            wanted = [*PROBES, *BASELINES]
            if seed == first:
                wanted += [f"gate of {count}" for count in levels_of(engine.shape.num_layers + 1)[:-1]]
            for arm in wanted:
                path = arm_file(options.work, name, arm, seed)
                if path.is_file():
                    continue
                if subject is None:
                    subject = read_subject(engine, TASKS[name](options.data), options.work / "states" / name, options)
                if arm in BASELINES:
                    for which, found in baseline_arms(subject, seed).items():
                        write_json(arm_file(options.work, name, which, seed), found)
                else:
                    kind = arm.split(" ")[0]
                    searched = (
                        read_json(arm_file(options.work, name, kind, first))["chosen"]
                        if arm != kind or seed != first
                        else None
                    )
                    config = PROBES[kind] if arm == kind else replace(PROBES[kind], num_levels=int(arm.split(" ")[-1]))
                    if options.quick:
                        config = replace(config, epochs=2, learning_rates=config.learning_rates[:1])
                    write_json(path, probe_arm(engine, subject, seed, config, searched))
                print(f"{name}, {arm}, seed {seed}: {read_json(path)['quality']}", file=sys.stderr, flush=True)


def arm_file(work: Path, task: str, arm: str, seed: int) -> Path:
    """Where an arm's numbers are."""
    return work / "arms" / f"{task}-{arm.replace(' ', '_')}-{seed}.json"


def collect(work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """All arms that there are."""
    tasks: dict[str, Any] = {}
    for name in TASKS:
        arms: dict[str, Any] = {}
        for path in sorted((work / "arms").glob(f"{name}-*.json")):
            arm, seed = path.stem.removeprefix(f"{name}-").rsplit("-", 1)
            if int(seed) in seeds:
                arms.setdefault(arm.replace("_", " "), {})[seed] = read_json(path)
        if arms:
            tasks[name] = arms
    return {
        "settings": read_json(work / "study.json"),
        "conditions": conditions(),
        "seeds": list(seeds),
        "tasks": tasks,
    }


def mean_of(arm: dict[str, Any], score: str) -> float:
    """Over the seeds."""
    return statistics.mean(one["quality"][score] for one in arm.values())


def verdicts(result: dict[str, Any]) -> list[str]:
    """By the rule above."""
    lines, held = [], []
    for name, arms in result["tasks"].items():
        if {"gate", "pool"} <= arms.keys():
            gate, pool = mean_of(arms["gate"], "f1"), mean_of(arms["pool"], "f1")
            held.append(gate >= pool)
            lines.append(
                f"- {name}: gate {gate:.3f}, pooling {pool:.3f}: {'at least' if gate >= pool else 'below'} pooling."
            )
    return [*lines, f"- The gate is at least pooling on {sum(held)} of {len(held)} tasks."]


def describe(result: dict[str, Any]) -> str:
    """Tables and verdicts."""

    def cell(arm: dict[str, Any], score: str) -> str:
        values = [100 * one["quality"][score] for one in arm.values()]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    rows = [
        [name, arm, f"{next(iter(arms[arm].values())).get('parameters', 0):,}" if arm in PROBES else "",
         *(cell(arms[arm], score) for score in SCORES)]
        for name, arms in result["tasks"].items()
        for arm in (*PROBES, *BASELINES)
        if arm in arms
    ]  # fmt: skip
    header = ("task", "arm", "parameters", "F1, %", "AUPRC, %", "accuracy, %", "calibration error, %")
    deep = []
    for name, arms in result["tasks"].items():
        first = str(result["seeds"][0])
        counts = sorted(int(arm.split(" ")[-1]) for arm in arms if arm.startswith("gate of "))
        shown = {**{count: arms[f"gate of {count}"] for count in counts}, "all": arms.get("gate", {})}
        deep.append(
            [name, *(f"{100 * arm[first]['quality']['f1']:.1f}" if first in arm else "" for arm in shown.values())]
        )
    counts = sorted(
        {int(arm.split(" ")[-1]) for arms in result["tasks"].values() for arm in arms if arm.startswith("gate of ")}
    )
    return "\n\n".join(
        [
            f"Test sets, mean ± standard deviation of {len(result['seeds'])} seeds; F1 and AUPRC of more than two "
            "classes are means over them.",
            table(header, rows),
            "F1 of gates that read the lowest levels only (level 0 is the embedding), in %, first seed:",
            table(("levels read", *map(str, counts), "all"), deep),
            "\n".join(verdicts(result)),
        ]
    )


def main() -> None:
    options = parser(__doc__, work="probes")
    options.add_argument("--model", required=True, help="checkpoint of general_model.py, or another")
    options.add_argument("--data", type=Path, required=True, help="directory of the data sets")
    options.add_argument("--most-train", type=int, default=MOST_TRAIN, help="most prompts of a task to learn from")
    chosen_options = options.parse_args()
    try:
        torch.set_num_threads(chosen_options.threads)
        if chosen_options.list:
            print("\n".join(TASKS))
            return
        run(chosen_options)
    except ShoalError as error:
        sys.exit(f"Error: {error}")
    result = collect(chosen_options.work, chosen_options.seeds)
    print(describe(result))
    if chosen_options.save:
        save("probes", result)
    print(json.dumps({"study": "probes", **result}))


if __name__ == "__main__":
    main()
