"""Deep reading, shallow writing: does SkipDecode pay where the answer takes several steps over the prompt?

    python studies/deep_reading.py --tasks pointers --seeds 0 1 2
    python studies/deep_reading.py --tasks pointers facts --data ../shared/data/kg_metaqa --seeds 0 1 2 --save

The hypothesis: a plan that reads the prompt with all layers and writes with few keeps answers that need many steps over the prompt;
a small dense model, whose tokens cost the same, cannot find them. Arms, all of one width:

    deep              8 layers, trained at depths 1, 1/2, 3/8 and 1/4 in turn (SkipDecode)
    shallow-prompt    the same, but the plans read the prompt with few layers too: should lose what `deep` has
    small-4, -3, -2   dense models of as many layers as `deep` runs in the mean at 1/2, 3/8 and 1/4

Tasks (`reading_tasks.py`): pointers on a cycle, up to 5 steps; questions over facts of MetaQA, up to 3. Training
(`reading_training.py`): a curriculum over steps, until the loss is flat or the training's steps are used up. Scores are
shares of right answers on new problems, generated greedily by the engine, by the number of steps that the question needs. The first
answer of a prompt is left out: it comes from the prompt's own pass, whatever the plan says. Equal decode cost is not equal cost:
`deep` reads the prompt with 8 layers.

`--stop-after-s` ends the call cleanly; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from reading_tasks import FactQuestions, PointerChasing, Task, read_graph
from reading_training import Progress, Recipe, train
from shoal import Dense, Engine, Sampling, SkipDecode
from shoal.depth.plan import DepthPlan
from shoal.errors import InvalidInput, ShoalError
from shoal.evaluate.markdown import table
from study import RESULTS, chosen, conditions, open_work, parser, read_json, save, write_json

DEEP_LAYERS = 8
DEPTHS = (1.0, 1 / 2, 3 / 8, 1 / 4)
TEST_SEED = 2**31
"""Problems that are not training's, whose seeds are small."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model and how its tokens are run."""

    num_layers: int
    depths: tuple[float, ...] = (1.0,)
    prompt: Literal["all", "max_layers"] = "all"

    def plans(self, task: Task) -> dict[float, DepthPlan]:
        """The plan of each depth; the horizon is the decode passes that the answers take."""
        found = {}
        for depth in self.depths:
            policy = SkipDecode(depth=depth, horizon=max(1, task.num_answers - 1), warmup_layers=1, prompt=self.prompt)
            found[depth] = (Dense() if depth == 1 else policy).plan(
                self.num_layers, prompt_tokens=task.prompt_tokens, max_new_tokens=task.num_answers
            )
        return found


ARMS = {
    "deep": Arm(num_layers=DEEP_LAYERS, depths=DEPTHS),
    "shallow-prompt": Arm(num_layers=DEEP_LAYERS, depths=DEPTHS, prompt="max_layers"),
    **{f"small-{round(DEEP_LAYERS * depth)}": Arm(num_layers=round(DEEP_LAYERS * depth)) for depth in DEPTHS[1:]},
}


def main() -> None:
    options = parser(__doc__, work="deep_reading")
    options.add_argument("--tasks", nargs="+", choices=("pointers", "facts"), default=["pointers"])
    options.add_argument("--data", type=Path, help="directory of MetaQA's kb.txt.gz, for the task facts")
    options.add_argument("--width", type=int, default=Recipe.width)
    options.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    options.add_argument("--steps", type=int, default=Recipe.steps, help="most optimizer steps of an arm")
    options.add_argument("--problems", type=int, default=1000, help="test problems")
    options.add_argument("--stop-after-s", type=float, default=float("inf"), help="end after this many seconds")
    try:
        run(options.parse_args())
    except ShoalError as error:
        sys.exit(f"Error: {error}")


def run(options: argparse.Namespace) -> None:
    """All chosen arms of all tasks and seeds, then table and figure of what is there."""
    names = chosen(options.arms, ARMS)
    if options.list:
        print("\n".join(names))
        return
    stop_at = time.perf_counter() + options.stop_after_s
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    recipe = Recipe(
        width=options.width,
        batch_size=options.batch_size,
        steps=options.steps,
        fall_steps=min(Recipe.fall_steps, max(1, options.steps // 2)),
    )
    if options.quick:
        recipe = Recipe(width=16, heads=2, batch_size=4, steps=6, fall_steps=2)
        options.problems = 8
    tasks = {name: make_task(name, options) for name in options.tasks}
    open_work(options.work, {**asdict(recipe), "problems": options.problems})
    for name, task in tasks.items():
        for seed in options.seeds:
            for arm in names:
                if not run_arm(options.work, name, task, arm, recipe, seed, options, stop_at):
                    print("stopped; the same command goes on", flush=True)
                    return
    result = summarise(options.work, {name: task.max_hops for name, task in tasks.items()})
    print(describe(result))
    draw(result, options.work / "deep_reading.svg")
    if options.save:
        save("deep_reading", result)
        draw(result, RESULTS / "deep_reading.svg")
    print(json.dumps({"study": "deep_reading", **result}))


def make_task(name: str, options: argparse.Namespace) -> Task:
    """The task of this name. Raises `InvalidInput` where it needs data that is not given."""
    if name == "pointers":
        return PointerChasing()
    if options.data is None:
        raise InvalidInput("the task facts is made from MetaQA: give the directory of its kb.txt.gz with --data")
    graph, relations = read_graph(options.data / "kb.txt.gz")
    return FactQuestions(graph=graph, relations=relations)


def run_arm(
    work: Path,
    task_name: str,
    task: Task,
    arm_name: str,
    recipe: Recipe,
    seed: int,
    options: argparse.Namespace,
    stop_at: float,
) -> bool:
    """Train and evaluate, unless it was done; the arm's file has everything. False where time was over first."""
    name = f"{task_name}-{arm_name}-seed{seed}"
    path, checkpoint = work / "arms" / f"{name}.json", work / "checkpoints" / name
    if path.is_file():
        return True
    path.parent.mkdir(exist_ok=True)
    checkpoint.mkdir(parents=True, exist_ok=True)
    arm = ARMS[arm_name]
    plans = arm.plans(task)

    def watch(at: Progress) -> None:
        step, level, loss, accuracy = at.history[-1]
        print(f"{name} step {step:.0f} level {level:.0f} loss {loss:.3f} "
              f"right {accuracy:.2f} {at.seconds:.0f} s", flush=True)  # fmt: skip

    trained = train(
        task, arm.num_layers, list(plans.values()), recipe,
        seed=seed, state=checkpoint / "state.pt", stop_at=stop_at, report=watch,
    )  # fmt: skip
    if trained is None:
        return False
    model, progress = trained
    model.save_pretrained(checkpoint)
    tokenizer(task).save_pretrained(checkpoint)
    engine = Engine.from_pretrained(checkpoint, dtype="float32", threads=options.threads, max_batch=64, cache_gib=1)
    rows = [{"depth": depth, **measure(engine, task, plan, options.problems)} for depth, plan in plans.items()]
    record = {
        "task": task_name,
        "arm": arm_name,
        "seed": seed,
        "num_layers": arm.num_layers,
        "steps": progress.step,
        "tokens": progress.step * recipe.batch_size * (task.prompt_tokens + task.num_answers - 1),
        "level": progress.level,
        "train_s": round(progress.seconds, 1),
        "history": progress.history,
        "rows": rows,
    }
    write_json(path, record)
    (checkpoint / "state.pt").unlink(missing_ok=True)
    print(f"{name}: {progress.step} steps, {progress.seconds:.0f} s, level {progress.level}", flush=True)
    return True


def tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One token per word of the task's vocabulary."""
    words = {word: i for i, word in enumerate(task.vocabulary)}
    made = Tokenizer(WordLevel(words, unk_token="="))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="=", unk_token="=")


def measure(engine: Engine, task: Task, plan: DepthPlan, num_problems: int) -> dict[str, Any]:
    """Right answers by steps needed, [right, asked], of the first answer and of those that decode passes write; and their cost."""
    batch = task.batch(num_problems, max_hops=task.max_hops, seed=(TEST_SEED,))
    sampling = Sampling(max_new_tokens=task.num_answers, ignore_eos=True)
    done = engine.generate(batch.prompts.tolist(), sampling=sampling, plan=plan)
    right = torch.tensor([g.token_ids for g in done]).numpy() == batch.answers
    passes = sum(g.ledger.decode_passes for g in done)
    counts: dict[str, dict[str, list[int]]] = {"first": {}, "written": {}}
    for hops in range(task.max_hops + 1):
        asked = batch.hops == hops
        for part, columns in (("first", slice(0, 1)), ("written", slice(1, None))):
            here = asked[:, columns]
            counts[part][str(hops)] = [int((right[:, columns] & here).sum()), int(here.sum())]
    return {
        "mean_layers": round(sum(g.ledger.decode_layer_tokens for g in done) / passes, 3),
        "decode_flops": round(sum(g.ledger.decode_flops for g in done) / passes),
        "prompt_flops": round(sum(g.ledger.prompt_flops for g in done) / len(done)),
        **counts,
    }


def summarise(work: Path, max_hops: Mapping[str, int]) -> dict[str, Any]:
    """Per task, arm and depth: the shares of right written answers by steps, one per seed."""
    runs = [read_json(path) for path in sorted((work / "arms").glob("*.json"))]
    tasks = {}
    for task, most in max_hops.items():
        points = []
        for arm in ARMS:
            same = [one for one in runs if one["task"] == task and one["arm"] == arm]
            for i, row in enumerate(same[0]["rows"] if same else []):
                rows = [one["rows"][i] for one in same]
                points.append(
                    {
                        "arm": arm,
                        "depth": row["depth"],
                        "mean_layers": row["mean_layers"],
                        "decode_flops": row["decode_flops"],
                        "prompt_flops": row["prompt_flops"],
                        "seeds": [one["seed"] for one in same],
                        "levels": [one["level"] for one in same],
                        "steps": [one["steps"] for one in same],
                        "train_s": [one["train_s"] for one in same],
                        "right": {part: {str(k): [share(r[part][str(k)]) for r in rows] for k in range(1, most + 1)}
                                  for part in ("first", "written")},
                    }
                )  # fmt: skip
        tasks[task] = {"max_hops": most, "points": points, "verdicts": verdicts(points, most)}
    return {"settings": read_json(work / "study.json"), "conditions": conditions(), "tasks": tasks}


def share(counted: list[int]) -> float | None:
    """Right over asked, None where nothing was asked."""
    right, asked = counted
    return round(right / asked, 4) if asked else None


def several(point: Mapping[str, Any], max_hops: int) -> list[float]:
    """Per seed: the mean share of right written answers over the questions of two steps and more."""
    by_hops = [point["right"]["written"][str(k)] for k in range(min(2, max_hops), max_hops + 1)]
    return [statistics.mean(each) for each in zip(*by_hops, strict=True) if None not in each]


def verdicts(points: list[dict[str, Any]], max_hops: int) -> list[str]:
    """A sentence per depth: confirmed where every seed of `deep` is above every seed of both others, refuted where every seed is
    below every one of the small dense model."""
    found = []
    at = {(point["arm"], point["depth"]): several(point, max_hops) for point in points}
    for depth in DEPTHS[1:]:
        scores = [
            at.get(key, [])
            for key in (("deep", depth), (f"small-{round(DEEP_LAYERS * depth)}", 1.0), ("shallow-prompt", depth))
        ]
        if not all(scores):
            continue
        deep, small, shallow = scores
        if min(deep) > max(small) and min(deep) > max(shallow):
            word = "confirmed"
        elif max(deep) < min(small):
            word = "refuted"
        else:
            word = "open"
        means = [f"{100 * statistics.mean(score):.0f}%" for score in scores]
        found.append(
            f"depth {Fraction(depth)}: {word}. Of questions with two steps or more, deep reading gets {means[0]} right, the small "
            f"dense model {means[1]}, deep layers with a shallow prompt {means[2]} (means of {seeds_of(scores)})."
        )
    return found


def seeds_of(scores: Sequence[Sequence[float]]) -> str:
    """How many seeds stand behind several means, as words.

    >>> seeds_of([[1.0, 0.9], [0.5, 0.4]]), seeds_of([[1.0, 0.9], [0.5]])
    ('2 seeds', '2 and 1 seeds')
    """
    counts = [str(len(each)) for each in scores]
    if len(set(counts)) == 1:
        return f"{counts[0]} seeds"
    return f"{', '.join(counts[:-1])} and {counts[-1]} seeds"


def describe(result: dict[str, Any]) -> str:
    """A table per task, and the verdicts."""
    parts = []
    for name, task in result["tasks"].items():
        hops = [str(k) for k in range(1, task["max_hops"] + 1)]
        header = [
            "arm",
            "depth",
            "mean layers",
            *(f"{k} step{'s' if k != '1' else ''}" for k in hops),
            "level reached",
            "steps",
            "training, s",
        ]
        rows = []
        for point in task["points"]:
            cells = [spread(point["right"]["written"][k]) for k in hops]
            lists = [" ".join(f"{value:.0f}" for value in point[key]) for key in ("levels", "steps", "train_s")]
            rows.append([point["arm"], str(Fraction(point["depth"])), f"{point['mean_layers']:.2f}", *cells, *lists])
        said = "\n".join(f"- {sentence}" for sentence in task["verdicts"]) or "- not enough arms have run for a verdict"
        parts.append(f"**{name}**: right answers in %, least to most of the seeds\n\n{table(header, rows)}\n\n{said}")
    return "\n\n".join(parts)


def spread(shares: list[float | None]) -> str:
    """Least and most over the seeds, in percent."""
    known = [100 * value for value in shares if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f}..{high:.0f}"


STYLES = {"deep": ("#0b3c5d", "o-"), "shallow-prompt": ("#3fa796", "s--"), "small": ("#e08e0b", "D-")}


def draw(result: dict[str, Any], path: Path) -> None:
    """Quality against decode cost: a row per task, a panel per number of steps; bars are the seeds' range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "shoal"})
    tasks = result["tasks"]
    columns = max(task["max_hops"] for task in tasks.values())
    figure, axes = plt.subplots(
        len(tasks), columns, figsize=(2.2 * columns, 2.6 * len(tasks)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (name, task) in zip(axes, tasks.items(), strict=True):
        for hops, panel in enumerate(row, 1):
            if hops > task["max_hops"]:
                panel.set_axis_off()
                continue
            for series, (color, style) in STYLES.items():
                points = [point for point in task["points"] if point["arm"].startswith(series)]
                points.sort(key=lambda point: point["mean_layers"])
                shares = [[v for v in point["right"]["written"][str(hops)] if v is not None] for point in points]
                drawn = [(p["mean_layers"], s) for p, s in zip(points, shares, strict=True) if s]
                if not drawn:
                    continue
                x, means = [layers for layers, _ in drawn], [statistics.mean(s) for _, s in drawn]
                errors = [[m - min(s) for m, (_, s) in zip(means, drawn, strict=True)],
                          [max(s) - m for m, (_, s) in zip(means, drawn, strict=True)]]  # fmt: skip
                label = {"small": "small dense model", "deep": "SkipDecode"}.get(series, "SkipDecode, shallow prompt")
                panel.errorbar(x, means, yerr=errors, fmt=style, color=color, ms=4, lw=1.5, capsize=2, label=label)
            panel.set_title(f"{name}, {hops} step{'s' if hops > 1 else ''}", fontsize=9)
            panel.set(ylim=(-0.03, 1.05), xlim=(0, DEEP_LAYERS + 0.5))
            panel.grid(axis="y", color="#e6e9ec")
        row[0].set_ylabel("right answers")
    figure.supxlabel("mean layers per generated token", fontsize=9)
    axes[0][0].legend(frameon=False, fontsize=7)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="svg", metadata={"Date": None})
    plt.close(figure)
    partial.replace(path)


if __name__ == "__main__":
    main()
