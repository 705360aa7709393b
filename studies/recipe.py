"""Which way of tuning for depth is best, and does it beat a small dense model? On E2E, every arm with equal tokens and steps.

    python studies/recipe.py --data ../shared/data/e2e_nlg --arms 'any*' 'small-*' dense --seeds 0
    python studies/recipe.py --data ../shared/data/e2e_nlg --split test --save

A 12-layer model from random weights: half of `--steps` dense, the other half tuned in the arm's own way (`recipe_arms.py`;
routers: `recipe_routers.py`). A second call with the same settings goes on where the first one stopped, and adds arms and seeds;
`results/` keeps what the arms counted, so that an empty work directory need not train them again.
Unlike the model that ships, which was grown from three layers and hardly needs its middle ones, this one is deep from the start:
skipping has something to lose.

Each arm is evaluated by the engine, greedily (`recipe_measure.py`); BLEU and slot errors with 95% bootstrap intervals over inputs,
seeds pooled (`recipe_table.py`). CALM, which the engine does not run, stands in a table of its own.
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

import torch
from transformers import OPTConfig
from transformers.utils import logging

from recipe_arms import NUM_LAYERS, Arm, Stage, arms, name_of
from recipe_measure import measure, measure_calm, thresholds
from recipe_routers import router_path, search_routers, train_first_stage
from recipe_table import describe, summarise
from shoal import Engine
from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.depth.policies import policy_at
from shoal.depth.routers import load_router
from shoal.errors import InvalidInput, ShoalError
from shoal.evaluate.e2e import E2EInput, read_e2e
from shoal.evaluate.markdown import table
from shoal.models.checkpoint import load_tokenizer
from shoal.train.config import TuneConfig
from shoal.train.tune import tune
from study import Clock, chosen, open_work, pack, parser, read_json, save, unpack, write_json

SPLITS = {"dev": "devset.csv.gz", "test": "testset_w_refs.csv.gz"}
RATES = (1e-3, 3e-4)
"""Peak learning rates of the two stages."""


def main() -> None:
    options = parser(__doc__, work="recipe")
    options.add_argument("--data", type=Path, required=True, help="directory of the E2E files")
    options.add_argument("--steps", type=int, default=3000, help="optimizer steps of an arm, both stages together")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--width", type=int, default=64, help="of the residual stream; 32 per head")
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
    unpack("recipe", work)
    prepare(work, options)
    inputs = inputs_of(options.split, options)
    for seed in options.seeds:
        for name in names:
            if arm_file(work, name, seed, options).is_file():
                continue
            arm = arms()[name]
            trained = [train_stage(work, arm, number, seed, options) for number in (0, 1)]
            check_equal(work, name, seed, trained)
            evaluate_arm(work, name, arm, seed, inputs, options)
    result = summarise(work, options.split, inputs)
    print(describe(result))
    if options.save:
        save("recipe", result)
        pack("recipe", work, leave_out=("texts",))
    print(json.dumps({"study": "recipe", **result}))


def arm_file(work: Path, name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where an arm's results are, once they are there."""
    return work / "arms" / f"{name}-{options.split}-seed{seed}.json"


def inputs_of(split: str, options: argparse.Namespace) -> list[E2EInput]:
    """The inputs of a split; a few of them with `--quick`."""
    return read_e2e(options.data / SPLITS[split])[: 6 if options.quick else None]


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


def stage_name(arm: Arm, number: int, seed: int, *after: str) -> str:
    """A directory per distinct training: arms with equal first stages share it. `after`: what was done to its checkpoint."""
    stages = [arm.first, arm.second][: number + 1]
    parts = []
    for stage in stages:
        changed = {k: v for k, v in asdict(stage).items() if v != getattr(Stage(), k)}
        parts.append(",".join(f"{k}={written(v)}" for k, v in changed.items()) or "dense")
    return f"{'+'.join([*parts, *after])}-seed{seed}"


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

    def watch(step: int, num_steps: int, loss: float | None = None) -> None:
        clock.tick()
        what = "router" if loss is None else f"loss {loss:.3f}"
        print(f"{home.name} step {step}/{num_steps} {what} {clock.seconds:.0f} s", flush=True)

    resume = (home / "checkpoint.tuning").is_dir()
    goes_on = resume or (home / "router").is_dir()
    if stage.router_share:
        report = train_first_stage(start, work / "train.jsonl", home, stage, config, watch)
    else:
        done = tune(str(start), work / "train.jsonl", checkpoint, config, resume=resume, report=watch)
        report = {"steps": done.steps, "tokens": done.tokens, "final_loss": round(done.final_loss, 4)}
    clock.tick()
    report["seconds"] = round(clock.seconds if goes_on else time.perf_counter() - began, 1)
    write_json(record, report)
    shutil.rmtree(home / "checkpoint.tuning", ignore_errors=True)
    return report


def check_equal(work: Path, name: str, seed: int, stages: list[dict[str, Any]]) -> None:
    """Hold the arm's steps and tokens against those of the first arm with this seed. Raises `AssertionError`.

    What a Dr.LLM router or a threshold of CALM takes beside its network's two stages has no equal among the others: it is reported.
    """
    # FiRST's recovery has a data order of its own, so that the examples of its batches meet in other batches. What is compared are
    # the tokens of the same examples in the batches of the other arms. What it has read differs from that by at most one token an
    # example: the last token of a batch's longest completions predicts nothing and is not read.
    totals = {
        "steps": sum(stage["steps"] for stage in stages),
        "tokens": sum(stage.get("tokens_as_grouped", stage["tokens"]) for stage in stages),
    }
    record = work / f"budget-seed{seed}.json"
    if not record.is_file():
        write_json(record, totals)
    assert totals == read_json(record), f"{name}: {totals} where other arms took {read_json(record)}"
    apart = abs(sum(stage["tokens"] for stage in stages) - totals["tokens"])
    assert apart <= sum(stage.get("regrouped_examples", 0) for stage in stages), f"{name}: {apart} tokens apart"


def evaluate_arm(
    work: Path, name: str, arm: Arm, seed: int, inputs: list[E2EInput], options: argparse.Namespace
) -> None:
    """Generate and count; the arm's file keeps what each input adds to BLEU and slot errors."""
    path = arm_file(work, name, seed, options)
    path.parent.mkdir(exist_ok=True)
    stages = [read_json(work / "stages" / stage_name(arm, number, seed) / "report.json") for number in (0, 1)]
    home = work / "stages" / stage_name(arm, 1, seed)
    router = {key: stages[1][key] for key in ("router_steps", "tokens_as_grouped") if key in stages[1]}
    searched = work / "stages" / stage_name(arm, 1, seed, "dr-llm")
    if any(policy == "dr-llm" for policy, _, _ in arm.evaluate):
        data = work / "train.jsonl"
        router = search_routers(
            home / "checkpoint", data, searched, seed=seed, threads=options.threads, quick=options.quick
        )
    began = time.perf_counter()
    if name.startswith("calm-"):
        rows = calm_rows(work / "stages" / stage_name(arm, 1, seed, "calm"), home / "checkpoint", arm, inputs, options)
    else:
        engine = Engine.from_pretrained(home / "checkpoint", dtype="float32", threads=options.threads, cache_gib=1)
        rows = [
            {
                "policy": policy,
                "depth": depth,
                "budget": budget,
                **measure(engine, inputs, plan_of(policy, depth, home / "checkpoint", searched), options.quick),
            }
            for policy, depth, budget in arm.evaluate
        ]
    totals = {unit: sum(stage[unit] for stage in stages) for unit in ("steps", "tokens", "seconds")}
    train_s = totals.pop("seconds") + router.get("search_s", 0) + router.get("router_s", 0)
    spent = {"train_s": round(train_s, 1), "evaluate_s": round(time.perf_counter() - began, 1)}
    losses = [stage["final_loss"] for stage in stages]
    beside = {"router": router} if router else {}
    write_json(path, {"arm": name, "seed": seed, **totals, **spent, **beside, "final_losses": losses, "rows": rows})
    print(f"{name} seed {seed}: {totals}, {spent}", flush=True)


def plan_of(policy: str, depth: float, checkpoint: Path, searched: Path) -> Any:
    """What the engine runs: a policy at a depth, FiRST's router beside its checkpoint, or Dr.LLM's of the stage `searched`."""
    if policy == "first":
        return load_router(checkpoint)
    if policy == "dr-llm":
        return load_router(router_path(searched, depth))
    return policy_at(policy, depth)


def calm_rows(
    home: Path, checkpoint: Path, arm: Arm, inputs: list[E2EInput], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The arm under CALM at each budget; `home` keeps the thresholds."""
    model = LayerwiseDecoder.from_pretrained(checkpoint, dtype="float32")
    depths = [depth for _, depth, _ in arm.evaluate]
    found = thresholds(model, inputs_of("dev", options), depths, home, options.quick)
    return [
        {"policy": policy, "depth": depth, "budget": budget, **measure_calm(model, inputs, threshold, options.quick)}
        for (policy, depth, budget), threshold in zip(arm.evaluate, found, strict=True)
    ]


if __name__ == "__main__":
    main()
