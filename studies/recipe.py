"""Which way of tuning for depth is best, and does it beat a small dense model? On E2E, every arm with equal tokens and steps.

    python studies/recipe.py --data ../shared/data/e2e_nlg --arms 'any*' 'small-*' dense --seeds 0
    python studies/recipe.py --data ../shared/data/e2e_nlg --split test --save

A 12-layer model from random weights: half of `--steps` dense, the other half tuned in the arm's own way (`recipe_arms.py`). A
second call with the same settings goes on where the first one stopped, and adds arms and seeds. Unlike the model that ships, which
was grown from three layers and hardly needs its middle ones, this one is deep from the start: skipping has something to lose.

Each arm is evaluated by the engine, greedily; BLEU and slot errors with 95% bootstrap intervals over inputs, seeds pooled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OPTConfig
from transformers.utils import logging

from recipe_arms import BUDGETS, NUM_LAYERS, Arm, Stage, arms, name_of
from shoal import Dense, Engine, Sampling
from shoal.depth.policies import policy_at
from shoal.errors import InvalidInput, ShoalError
from shoal.evaluate.bootstrap import Score, Statistics, quotient
from shoal.evaluate.e2e import E2EInput, read_e2e, slot_errors
from shoal.evaluate.text import bleu_counts, bleu_of
from shoal.models.checkpoint import load_tokenizer
from shoal.train.config import TuneConfig
from shoal.train.tune import tune
from study import Clock, chosen, conditions, open_work, parser, read_json, save, table, write_json

SPLITS = {"dev": "devset.csv.gz", "test": "testset_w_refs.csv.gz"}
RATES = (1e-3, 3e-4)
"""Peak learning rates of the two stages."""
MAX_NEW_TOKENS = 80


def main() -> None:
    options = parser(__doc__, work="recipe")
    options.add_argument("--data", type=Path, required=True, help="directory of the E2E files")
    options.add_argument("--steps", type=int, default=1200, help="optimizer steps of an arm, both stages together")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--width", type=int, default=128, help="of the residual stream; 32 per head")
    options.add_argument("--bfloat16", action="store_true", help="train with products in bfloat16")
    options.add_argument(
        "--split", choices=sorted(SPLITS), default="dev", help="choose on dev; test is for one last run"
    )
    chosen_options = options.parse_args()
    try:
        run(chosen_options)
    except ShoalError as error:
        sys.exit(f"Error: {error}")


def run(options: argparse.Namespace) -> None:
    """All chosen arms, then the table of all that are there."""
    if options.list:
        print(table(["arm", "what it is"], [[name, arm.about] for name, arm in arms().items()]))
        return
    names = chosen(options.arms, arms())
    if options.quick:
        options.steps, options.batch_size, options.width = 4, 4, 32
    if options.steps < 2 or options.width % 32:
        raise InvalidInput(
            f"--steps must be 2 or more and --width a multiple of 32, got {options.steps}, {options.width}"
        )
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    work: Path = options.work
    shared = ("steps", "batch_size", "width", "bfloat16", "quick")
    open_work(work, {**{name: getattr(options, name) for name in shared}, "rates": RATES})
    prepare(work, options)
    inputs = read_e2e(options.data / SPLITS[options.split])[: 6 if options.quick else None]
    for seed in options.seeds:
        for name in names:
            arm = arms()[name]
            trained = [train_stage(work, arm, number, seed, options) for number in (0, 1)]
            check_equal(work, name, seed, trained)
            evaluate_arm(work, name, arm, seed, inputs, options)
    result = summarise(work, options.split, inputs)
    print(describe(result))
    if options.save:
        save("recipe", result)
    print(json.dumps({"study": "recipe", **result}))


def prepare(work: Path, options: argparse.Namespace) -> None:
    """Training data, and a directory with config and tokenizer that all arms start from. The tokenizer is the shipped model's."""
    if not (work / "train.jsonl").is_file():
        pairs = [(e.mr, ref) for e in read_e2e(options.data / "trainset.csv.gz") for ref in e.references]
        lines = [json.dumps({"prompt": mr, "completion": ref}, ensure_ascii=False) for mr, ref in pairs]
        (work / "train.partial").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (work / "train.partial").rename(work / "train.jsonl")
    tokenizer = load_tokenizer("shoal-e2e")
    OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        word_embed_proj_dim=options.width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=options.width // 32,
        ffn_dim=4 * options.width,
        max_position_embeddings=512,
        dropout=0.1,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["OPTForCausalLM"],
    ).save_pretrained(work / "init")
    tokenizer.save_pretrained(work / "init")


def stage_name(arm: Arm, number: int, seed: int) -> str:
    """A directory per distinct training: arms with equal first stages share it."""
    stages = [arm.first, arm.second][: number + 1]
    parts = []
    for stage in stages:
        changed = {k: v for k, v in asdict(stage).items() if v != getattr(Stage(), k)}
        parts.append(",".join(f"{k}={written(v)}" for k, v in changed.items()) or "dense")
    return f"{'+'.join(parts)}-seed{seed}"


def written(value: Any) -> str:
    """A setting as part of a directory's name."""
    if isinstance(value, tuple):
        return "_".join(name_of(each).replace("/", "-") for each in value)
    return str(value)


def train_stage(work: Path, arm: Arm, number: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The report of the arm's first (0) or second (1) stage, trained if it is not there; an interrupted one is resumed."""
    home = work / "stages" / stage_name(arm, number, seed)
    checkpoint, record = home / "checkpoint", home / "report.json"
    if record.is_file():
        report: dict[str, Any] = read_json(record)
        return report
    home.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)  # without a report its tokens are not known
    stage = (arm.first, arm.second)[number]
    start = work / "init" if number == 0 else work / "stages" / stage_name(arm, 0, seed) / "checkpoint"
    first_steps = options.steps // 2
    config = TuneConfig(
        policy=stage.policy,
        depths=stage.depths,
        depth_sampling=stage.depth_sampling,  # type: ignore[arg-type]
        warmup_layers=stage.warmup_layers,
        distill=stage.distill,
        lora_rank=stage.lora_rank,
        from_scratch=number == 0,
        num_layers=stage.num_layers if number == 0 else None,
        steps=first_steps if number == 0 else options.steps - first_steps,
        learning_rate=RATES[number] * stage.rate,
        batch_size=options.batch_size,
        bfloat16=options.bfloat16,
        seed=seed + 1000 * number,  # other batches than the first stage's, the same for all arms
        save_every=50,
    )
    clock = Clock(home / "seconds.json")
    began = time.perf_counter()

    def watch(step: int, num_steps: int, loss: float) -> None:
        clock.tick()
        print(f"{home.name} step {step}/{num_steps} loss {loss:.3f} {clock.seconds:.0f} s", flush=True)

    resume = (home / "checkpoint.tuning").is_dir()
    done = tune(str(start), work / "train.jsonl", checkpoint, config, resume=resume, report=watch)
    clock.tick()
    report = {
        "steps": done.steps,
        "tokens": done.tokens,
        "final_loss": round(done.final_loss, 4),
        "seconds": round(clock.seconds if resume else time.perf_counter() - began, 1),
    }
    write_json(record, report)
    shutil.rmtree(home / "checkpoint.tuning", ignore_errors=True)
    return report


def check_equal(work: Path, name: str, seed: int, stages: list[dict[str, Any]]) -> None:
    """Hold the arm's steps and tokens against those of the first arm with this seed. Raises `AssertionError`."""
    totals = {unit: sum(stage[unit] for stage in stages) for unit in ("steps", "tokens")}
    record = work / f"budget-seed{seed}.json"
    if not record.is_file():
        write_json(record, totals)
    assert totals == read_json(record), f"{name}: {totals} where other arms took {read_json(record)}"


def evaluate_arm(
    work: Path, name: str, arm: Arm, seed: int, inputs: list[E2EInput], options: argparse.Namespace
) -> None:
    """Generate and count, unless it was done; the arm's file keeps what each input adds to BLEU and slot errors."""
    path = work / "arms" / f"{name}-{options.split}-seed{seed}.json"
    if path.is_file():
        return
    path.parent.mkdir(exist_ok=True)
    began = time.perf_counter()
    stages = [read_json(work / "stages" / stage_name(arm, number, seed) / "report.json") for number in (0, 1)]
    checkpoint = work / "stages" / stage_name(arm, 1, seed) / "checkpoint"
    engine = Engine.from_pretrained(checkpoint, dtype="float32", threads=options.threads, cache_gib=1)
    rows = [
        {"policy": policy, "depth": depth, "budget": budget, **measure(engine, inputs, policy, depth, options.quick)}
        for policy, depth, budget in arm.evaluate
    ]
    totals = {unit: sum(stage[unit] for stage in stages) for unit in ("steps", "tokens", "seconds")}
    spent = {"train_s": round(totals.pop("seconds"), 1), "evaluate_s": round(time.perf_counter() - began, 1)}
    losses = [stage["final_loss"] for stage in stages]
    write_json(path, {"arm": name, "seed": seed, **totals, **spent, "final_losses": losses, "rows": rows})
    print(f"{name} seed {seed}: {totals}, {spent}", flush=True)


def measure(engine: Engine, inputs: list[E2EInput], policy: str, depth: float, quick: bool) -> dict[str, Any]:
    """One arm at one depth: mean layers as they ran, texts, and counts per input."""
    plan = Dense() if depth == 1 else policy_at(policy, depth)
    sampling = Sampling(max_new_tokens=8 if quick else MAX_NEW_TOKENS)
    done = engine.generate([e.mr for e in inputs], sampling=sampling, plan=plan)
    passes = sum(g.ledger.decode_passes for g in done)
    texts = [g.text for g in done]
    errors = [slot_errors(e.mr, text) for e, text in zip(inputs, texts, strict=True)]
    return {
        "mean_layers": round(sum(g.ledger.decode_layer_tokens for g in done) / max(1, passes), 3),
        "decode_flops": round(sum(g.ledger.decode_flops for g in done) / max(1, passes)),
        "unfinished": sum(g.finish_reason != "stop" for g in done),
        "bleu_counts": bleu_counts(texts, [e.references for e in inputs]).astype(int).tolist(),
        "slot_counts": [[100 * e.count, e.num_slots] for e in errors],
        "texts": texts,
    }


def summarise(work: Path, split: str, inputs: list[E2EInput]) -> dict[str, Any]:
    """Everything that the table says, from the arms' files of one split; without texts and counts."""
    files = sorted((work / "arms").glob(f"*-{split}-seed*.json"))
    runs = [read_json(path) for path in files]
    pooled: dict[tuple[float, str], dict[str, Any]] = {}
    for one in runs:
        for row in one["rows"]:
            entry = pooled.setdefault((row["budget"], one["arm"]), {"runs": [], "rows": []})
            entry["runs"].append(one)
            entry["rows"].append(row)
    budgets = []
    for budget in BUDGETS:
        here = {name: entry for (at, name), entry in pooled.items() if at == budget}
        if here:
            budgets.append({"depth": budget, **compare(here)})
    order = [name for name in arms() if any(one["arm"] == name for one in runs)]
    losses = {name: [one["final_losses"] for one in runs if one["arm"] == name] for name in order}
    return {
        "settings": {**read_json(work / "study.json"), "split": split, "num_inputs": len(inputs)},
        "conditions": conditions(),
        "budget_of_an_arm": {unit: sorted({one[unit] for one in runs}) for unit in ("steps", "tokens")},
        "about": {name: arms()[name].about for name in order},
        "final_losses": losses,
        "budgets": budgets,
    }


def compare(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arms that compete at one budget, best first, each with its paired difference to the best one.

    Seeds are pooled: what an input adds is summed over them, so that resamples are of inputs. Arms with different seeds are not
    compared in pairs.
    """
    statistics = {name: Statistics(summed(entry, "bleu_counts"), bleu_of) for name, entry in entries.items()}
    order = sorted(entries, key=lambda name: -statistics[name].score().value)
    best, found = order[0], []
    for name in order:
        entry = entries[name]
        seeds = [one["seed"] for one in entry["runs"]]
        by_seed = [Statistics(np.array(row["bleu_counts"], float), bleu_of).score().value for row in entry["rows"]]
        paired = seeds == [one["seed"] for one in entries[best]["runs"]] and name != best
        found.append(
            {
                "arm": name,
                "seeds": seeds,
                "mean_layers": round(float(np.mean([row["mean_layers"] for row in entry["rows"]])), 2),
                "bleu": rounded(statistics[name].score()),
                "bleu_by_seed": [round(value, 2) for value in by_seed],
                "behind_best": rounded(statistics[best].minus(statistics[name])) if paired else None,
                "slot_error_rate": rounded(Statistics(summed(entry, "slot_counts"), quotient).score()),
                "train_s": [one["train_s"] for one in entry["runs"]],
            }
        )
    return {"arms": found}


def summed(entry: dict[str, Any], counts: str) -> Any:
    """[N, K]: what each input adds, over the seeds."""
    return np.sum([np.array(row[counts], float) for row in entry["rows"]], axis=0)


def rounded(score: Score) -> dict[str, float]:
    """A score as JSON."""
    return {name: round(getattr(score, name), 2) for name in ("value", "low", "high")}


def shown(score: dict[str, float] | None) -> str:
    """A score in a table."""
    return "" if score is None else f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def verdict(budget: dict[str, Any]) -> str:
    """Who wins at a budget, in a sentence that follows the numbers."""
    best, *others = budget["arms"]
    at = f"At depth {name_of(budget['depth'])}"
    if not others:
        return f"{at} only `{best['arm']}` has run ({best['bleu']['value']:.1f} BLEU)."
    close = [one for one in others if one["behind_best"] is None or one["behind_best"]["low"] <= 0]
    if not close:
        return f"{at} `{best['arm']}` wins with {best['bleu']['value']:.1f} BLEU; every other arm is behind it beyond chance."
    names = ", ".join(f"`{one['arm']}`" for one in close)
    small = [one for one in others if one["arm"].startswith("small-")]
    text = f"{at} `{best['arm']}` is best with {best['bleu']['value']:.1f} BLEU, but within chance of {names}."
    if small and not best["arm"].startswith("small-") and small[0] not in close:
        text += f" The small dense model `{small[0]['arm']}` is behind beyond chance."
    return text


HEADER = ("arm", "mean layers", "BLEU", "behind the best", "slot errors, %", "BLEU by seed", "training, s")


def describe(result: dict[str, Any]) -> str:
    """The table, and who wins."""
    rows = []
    for budget in result["budgets"]:
        rows.append([f"**depth {name_of(budget['depth'])}**", *[""] * (len(HEADER) - 1)])
        for one in budget["arms"]:
            rows.append(
                [
                    one["arm"],
                    f"{one['mean_layers']:.2f}",
                    shown(one["bleu"]),
                    shown(one["behind_best"]),
                    shown(one["slot_error_rate"]),
                    " ".join(f"{value:.1f}" for value in one["bleu_by_seed"]),
                    " ".join(f"{seconds:.0f}" for seconds in one["train_s"]),
                ]
            )
    settings = result["settings"]
    tokens = ", ".join(f"{count:,}" for count in result["budget_of_an_arm"]["tokens"])
    intro = (
        f"E2E {settings['split']} set, {settings['num_inputs']} inputs; 12 layers of width {settings['width']}, "
        f"{settings['steps']} steps of {settings['batch_size']} examples, {tokens} tokens for every arm of a seed."
    )
    verdicts = "\n".join(f"- {verdict(budget)}" for budget in result["budgets"])
    return f"{intro}\n\n{table(HEADER, rows)}\n\n{verdicts}"


if __name__ == "__main__":
    main()
