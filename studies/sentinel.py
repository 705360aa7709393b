"""Does a sentinel that reads decoding-entropy traces know how accurate a model is on slices that it has not seen labels of?

    python studies/sentinel.py --data ../shared/data
    python studies/sentinel.py --data ../shared/data --save
    python studies/sentinel.py --data ../shared/data --steps 0 --work ~/.cache/shoal/studies/sentinel_shipped --save

The shipped model, which can describe restaurants, is tuned on arithmetic and dialogue acts as well (`sentinel_tasks.py` says how
much of what, and fixes the slices); it answers each slice with the entropy trace on; every slice in turn is left out, its accuracy
estimated by a sentinel fitted on the others, and compared with the truth, beside length alone and ATC. With `--steps 0` the shipped
model answers as it is, the slices of descriptions alone: minutes, not hours.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from sentinel_tasks import Item, slices, training_pairs
from shoal import Engine, Sampling
from shoal.errors import InvalidInput, ShoalError
from shoal.evaluate.markdown import table
from shoal.files import replaced
from shoal.signals.sentinel import Sentinel, SentinelConfig
from shoal.signals.slices import Affine, Known, SliceEstimate, errors_of, estimate_slice, leave_one_out
from shoal.signals.statistics import STATISTICS
from shoal.signals.traces import read_traces
from shoal.train.config import TuneConfig
from shoal.train.tune import tune
from study import RESULTS, conditions, open_work, parser, read_json, save, write_json

PER_SLICE, MOST_TOKENS, TOP_K = 250, 96, 20
TEMPERATURES = (0.5, 0.0)
SENTINELS = (
    ("10d", "forest"), ("11d", "forest"), ("17d", "forest"), ("3d", "forest"), ("1d", "forest"), ("17d", "logistic"),
)  # fmt: skip
"""The first is the default, which the gates are about."""
FAMILIES = {
    "arithmetic": lambda name: name.startswith(("add", "sub")),
    "terms": lambda name: name.startswith("terms"),
    "e2e": lambda name: name.startswith("e2e"),
    "names": lambda name: name.startswith("names"),
    "domains": lambda name: name in ("restaurant", "laptop", "tv", "hotel"),
}
COLORS = ("#5b4bb5", "#0b3c5d", "#e08e0b", "#3fa796", "#b23a48")


def main() -> None:
    options = parser(__doc__, work="sentinel")
    options.add_argument("--data", type=Path, required=True, help="the directory of all data sets")
    options.add_argument("--steps", type=int, default=500, help="optimizer steps; 0: the shipped model as it is")
    options.add_argument("--batch-size", type=int, default=32)
    try:
        run(options.parse_args())
    except ShoalError as error:
        sys.exit(f"Error: {error}")


def run(options: argparse.Namespace) -> None:
    """Training, answers with traces, and what the sentinel makes of them."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    work: Path = options.work
    count = 3 if options.quick else PER_SLICE
    if options.quick:
        options.steps, options.batch_size = min(options.steps, 4), 4
    open_work(work, {"steps": options.steps, "batch_size": options.batch_size, "quick": options.quick})
    if options.steps:
        prepare(work, options)
        train(work, options)
    for temperature in TEMPERATURES:
        if not traces_file(work, temperature).is_file():
            tuned = options.steps > 0
            engine = Engine.from_pretrained(work / "model" if tuned else "shoal-e2e", dtype="float32", cache_gib=1)
            answer(
                engine, slices(options.data, count, seed=0, tuned=tuned), temperature, traces_file(work, temperature)
            )
    if options.quick:  # too few answers for a sentinel to learn from
        return
    result = measure(work)
    print(describe(result))
    draw(result, work / "sentinel.svg")
    name = "sentinel" if options.steps else "sentinel_shipped"
    if options.save:
        save(name, result)
        draw(result, RESULTS / f"{name}.svg")
    print(json.dumps({"study": name, **result}))


def prepare(work: Path, options: argparse.Namespace) -> None:
    """Training data."""
    if (work / "train.jsonl").is_file():
        return
    pairs = training_pairs(options.data, quick=options.quick)
    lines = [json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) for prompt, text in pairs]
    with replaced(work / "train.jsonl") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(work: Path, options: argparse.Namespace) -> None:
    """The model, unless it is there; an interrupted training goes on."""
    if (work / "training.json").is_file():
        return
    config = TuneConfig(
        depths=(1.0,),
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=5e-4,
        save_every=50,
        seed=options.seeds[0],
    )

    def watch(step: int, num_steps: int, loss: float) -> None:
        print(f"step {step}/{num_steps} loss {loss:.3f}", flush=True)

    resume = (work / "model.tuning").is_dir()
    done = tune("shoal-e2e", work / "train.jsonl", work / "model", config, resume=resume, report=watch)
    write_json(
        work / "training.json",
        {"steps": done.steps, "tokens": done.tokens, "seconds": round(done.seconds), "resumed": resume},
    )
    print(read_json(work / "training.json"))


def traces_file(work: Path, temperature: float, part: str = "") -> Path:
    """Where the answers at a temperature are, once they are there; `part` tells several sets of slices apart."""
    return work / f"traces{part}-{temperature:g}.jsonl"


def answer(engine: Engine, asked: dict[str, list[Item]], temperature: float, path: Path) -> None:
    """Write the model's answers to every slice, with traces and whether they are right."""
    items = [(name, item) for name, some in asked.items() for item in some]
    samplings = [
        Sampling(max_new_tokens=MOST_TOKENS, temperature=temperature, seed=seed, entropy_top_k=TOP_K)
        for seed in range(len(items))
    ]
    done = engine.generate([item.prompt for _, item in items], samplings)
    lines = []
    for (name, item), one in zip(items, done, strict=True):
        assert one.trace is not None
        correct = int(item.is_right(one.text))
        row = {
            "slice": name,
            "prompt": item.prompt,
            "completion": one.text,
            "correct": correct,
            "trace": one.trace.to_dict(),
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    with replaced(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(work: Path, part: str = "") -> dict[str, Any]:
    """Every slice from the others, at each temperature and by each kind of sentinel."""
    found: dict[str, Any] = {
        "settings": read_json(work / "study.json"),
        "conditions": conditions(),
        "training": read_json(work / "training.json") if (work / "training.json").is_file() else None,
        "runs": [],
    }
    for temperature in TEMPERATURES:
        traced = read_traces(traces_file(work, temperature, part))
        for features, classifier in SENTINELS:
            sentinel = Sentinel.fit(traced, SentinelConfig(features=features, classifier=classifier))
            left_out = leave_one_out(sentinel)
            run = {
                "temperature": temperature,
                "features": features,
                "classifier": classifier,
                "errors": {name: asdict(one) for name, one in errors_of(left_out).items()},
                "inside_interval": sum(one.low <= (one.accuracy or 0) <= one.high for one in left_out),
            }
            if (features, classifier) == SENTINELS[0]:
                run |= {
                    "slices": [{**asdict(one), "alarm": one.alarm} for one in left_out],
                    "families": families_out(sentinel),
                    "recalibrated": recalibrated(left_out),
                    "calibration": calibration(sentinel),
                    "auroc": auroc(sentinel),
                }
            found["runs"].append(run)
            print(temperature, features, classifier, run["errors"], flush=True)
    return found


def families_out(sentinel: Sentinel) -> list[dict[str, Any]]:
    """Every kind of slice by a sentinel that has seen none of its kind, where the others hold right and wrong answers."""
    values, rows = np.array(sentinel.slices), []
    for family, inside in FAMILIES.items():
        names = [name for name in dict.fromkeys(sentinel.slices) if inside(name)]
        if not names:
            continue
        try:
            known = Known(sentinel.without(*names))
        except InvalidInput:  # the others are all right, or all wrong
            continue
        found = []
        for name in names:
            here = values == name
            labels = sentinel.correct[here].astype(float)
            found.append(estimate_slice(known, name, sentinel.values[here], labels))
        errors = {name: one.mean_absolute_error for name, one in errors_of(found).items()}
        rows.append({"family": family, "slices": len(names), "alarms": sum(one.alarm for one in found), **errors})
    return rows


def recalibrated(left_out: list[SliceEstimate], draws: int = 200) -> dict[str, float]:
    """Mean absolute error on the other slices once three slices, drawn at random, are labelled: before, and after an affine fit."""
    rng = np.random.default_rng(0)
    before, after = [], []
    for _ in range(draws):
        chosen = set(rng.choice(len(left_out), 3, replace=False).tolist())
        try:
            affine = Affine.fit([left_out[place] for place in chosen])
        except InvalidInput:  # the three contradict the order of their estimates
            affine = Affine()
        others = [one for place, one in enumerate(left_out) if place not in chosen]
        before.append(errors_of(others)["sentinel"].mean_absolute_error)
        after.append(errors_of([affine.apply(one) for one in others])["sentinel"].mean_absolute_error)
    return {"before": float(np.mean(before)), "after": float(np.mean(after))}


def calibration(sentinel: Sentinel) -> list[dict[str, float]]:
    """In ten bins of P, each slice by the others: mean P, and the share that is right."""
    slices_, p = np.array(sentinel.slices), np.zeros(len(sentinel.slices))
    for name in dict.fromkeys(sentinel.slices):
        p[slices_ == name] = sentinel.without(name).probabilities(sentinel.values[slices_ == name])
    bins = np.minimum((10 * p).astype(int), 9)
    return [
        {
            "p": float(p[bins == b].mean()),
            "right": float(sentinel.correct[bins == b].mean()),
            "count": int((bins == b).sum()),
        }
        for b in range(10)
        if (bins == b).any()
    ]


def auroc(sentinel: Sentinel) -> dict[str, dict[str, float]]:
    """How well one statistic alone tells right from wrong answers, above 0.5 either way: over all, and the mean within slices."""
    from sklearn.metrics import roc_auc_score

    found, slices_ = {}, np.array(sentinel.slices)
    mixed = [name for name in dict.fromkeys(sentinel.slices) if 0 < sentinel.correct[slices_ == name].mean() < 1]
    for column, name in enumerate(STATISTICS):
        score = sentinel.values[:, column]
        over_all = roc_auc_score(sentinel.correct, score)
        sign = 1 if over_all >= 0.5 else -1
        within = [roc_auc_score(sentinel.correct[slices_ == s], sign * score[slices_ == s]) for s in mixed]
        found[name] = {"all": float(max(over_all, 1 - over_all)), "within": float(np.mean(within))}
    return found


def describe(result: dict[str, Any]) -> str:
    """Tables in Markdown."""
    parts = []
    for temperature in TEMPERATURES:
        runs = [run for run in result["runs"] if run["temperature"] == temperature]
        main_run = runs[0]
        rows = [
            [one["name"], str(one["count"]), f"{one['accuracy']:.3f}", f"{one['estimate']:.3f}",
             f"{one['low']:.3f} to {one['high']:.3f}", f"{one['length_only']:.3f}", f"{one['atc']:.3f}",
             f"{one['drift']:.2f}" + ("!" if one["alarm"] else "")]
            for one in main_run["slices"]
        ]  # fmt: skip
        parts.append(f"T = {temperature:g}, each slice by a sentinel (forest, 10d) fitted on the others:")
        parts.append(table(["slice", "n", "accuracy", "estimate", "interval", "length alone", "ATC", "drift"], rows))
        rows = [[f"{run['classifier']}, {run['features']}", *written(run["errors"]["sentinel"])] for run in runs]
        rows += [[name, *written(main_run["errors"][name])] for name in ("length alone", "ATC")]
        parts.append(table(["", "mean absolute error", "Spearman"], rows))
        rows = [
            [one["family"], str(one["slices"]), *(f"{one[name]:.3f}" for name in ("sentinel", "length alone", "ATC")),
             str(one["alarms"])]
            for one in main_run["families"]
        ]  # fmt: skip
        parts.append("A whole family left out, mean absolute error:")
        parts.append(table(["family", "slices", "sentinel", "length alone", "ATC", "alarms"], rows))
        once = main_run["recalibrated"]
        parts.append(
            f"{main_run['inside_interval']} of {len(main_run['slices'])} accuracies lie inside the interval. Three slices "
            f"labelled: mean absolute error on the others {once['before']:.3f}, after the affine fit {once['after']:.3f}."
        )
    return "\n\n".join(parts)


def written(errors: dict[str, float]) -> list[str]:
    """Cells of an `Errors`."""
    return [f"{errors['mean_absolute_error']:.3f}", f"{errors['rank_correlation']:.2f}"]


def draw(result: dict[str, Any], path: Path) -> None:
    """Estimates against accuracies, and the calibration of P, at each temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "shoal"})
    figure, axes = plt.subplots(1, 2 * len(TEMPERATURES), figsize=(11, 3), layout="constrained")
    mains = [run for run in result["runs"] if "slices" in run]
    for place, run in enumerate(mains):
        panel, beside = axes[2 * place], axes[2 * place + 1]
        for color, (family, inside) in zip(COLORS, FAMILIES.items(), strict=True):
            some = [one for one in run["slices"] if inside(one["name"])]
            if not some:
                continue
            x = [one["accuracy"] for one in some]
            y = [one["estimate"] for one in some]
            below = [max(0.0, one["estimate"] - one["low"]) for one in some]  # near 0 and 1 an estimate may lie outside
            spread = [below, [max(0.0, one["high"] - one["estimate"]) for one in some]]
            panel.errorbar(x, y, yerr=spread, fmt="o", ms=4, lw=1, color=color, label=family)
        beside.plot(
            [b["p"] for b in run["calibration"]], [b["right"] for b in run["calibration"]], "o-", color=COLORS[0]
        )
        for one, title in ((panel, "slices"), (beside, "answers")):
            one.plot([0, 1], [0, 1], color="#9aa3ab", lw=0.8)
            one.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title=f"T = {run['temperature']:g}: {title}")
        panel.set(xlabel="accuracy", ylabel="estimate without its labels")
        beside.set(xlabel="P(correct)", ylabel="share right")
    axes[0].legend(frameon=False, fontsize=7)
    with replaced(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
