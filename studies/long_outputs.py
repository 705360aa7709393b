"""Where does skipping stop working? Long continuations of abstracts: the loss at each position, under plans that get shallower.

    python studies/long_outputs.py --data ../shared/data/arxiv_abstract_title
    python studies/long_outputs.py --data ../shared/data/arxiv_abstract_title --save

On E2E a description ends after 28 tokens. Here models of abstracts read 64 tokens and go on for 192, and depth falls over all of
them, so the deep clocks and the shallow ones lie far apart. Arms, from random weights, all with equal steps on the same batches:

    dense      12 layers, dense; also skipped without tuning
    any-depth  half of the steps dense (shared with `dense`), the other half at depths 1, 1/2, 1/3, 1/4 and 1/5
    small-6    6 layers, dense: the decode cost of depth 1/2
    small-4    4 layers, dense: that of 1/3
    small-2    2 layers, dense: a bit less than that of 1/5, 2.4 layers

The score is the cross-entropy of the text that really follows, teacher-forced under the plan (`shoal frontier --task lm`), by
position. Stages and arms that are done are kept; the same command goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from shoal.errors import InvalidInput, ShoalError
from shoal.evaluate.bootstrap import Score
from shoal.evaluate.frontier import FrontierConfig, run_frontier
from shoal.evaluate.frontier_result import Arm, FrontierResult
from shoal.evaluate.markdown import table
from shoal.evaluate.report import FILE_NAME as REPORT
from shoal.evaluate.report import write_report
from shoal.train.config import TuneConfig
from shoal.train.tune import tune
from study import RESULTS, chosen, conditions, open_work, parser, read_json, save, write_json

READ, WRITTEN = 64, 192
"""Tokens of a window that are the prompt, and that follow."""
NUM_LAYERS, VOCAB_SIZE = 12, 2048
DEPTHS = (1 / 2, 1 / 3, 1 / 5)
TUNED_FOR = (1.0, 1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
SMALL = {"small-6": 6, "small-4": 4, "small-2": 2}
MODELS = ("dense", "any-depth", *SMALL)
BANDS = ((1, 32), (32, 64), (64, 128), (128, WRITTEN))
"""Positions [first, end) over which losses are averaged; position 0 comes from the prompt's pass."""
RATES = (1e-3, 5e-4)
"""Peak learning rates of the two stages."""


def main() -> None:
    options = parser(__doc__, work="long_outputs")
    options.add_argument("--data", type=Path, required=True, help="directory of train.jsonl.gz and test.jsonl.gz")
    options.add_argument("--steps", type=int, default=2000, help="optimizer steps of an arm, both stages together")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--width", type=int, default=64, help="of the residual stream; 32 per head")
    options.add_argument("--windows", type=int, default=400, help="test windows")
    try:
        run(options.parse_args())
    except ShoalError as error:
        sys.exit(f"Error: {error}")


def run(options: argparse.Namespace) -> None:
    """All chosen arms, their frontier, and the table."""
    names = chosen(options.arms, MODELS)
    if options.list:
        print("\n".join(names))
        return
    if options.quick:
        options.steps, options.batch_size, options.width, options.windows = 4, 2, 32, 2
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    work: Path = options.work
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "width", "windows", "quick")}
    open_work(work, {**settings, "rates": RATES})
    prepare(work, options)
    seed = options.seeds[0]
    seconds = {name: train(work, name, seed, options) for name in names}
    config = FrontierConfig(
        models=tuple(str(work / name) for name in names if name not in SMALL),
        dense_models=tuple(str(work / name) for name in names if name in SMALL),
        task="lm",
        data=str(work / "test.txt"),
        depths=DEPTHS,
        limit=options.windows,
        max_new_tokens=WRITTEN,
        horizon=WRITTEN,
        dtype="float32",
        threads=options.threads,
    )
    frontier = run_frontier(config, work / "frontier", report=lambda what, done, total: None)
    write_report(frontier, work / "frontier" / REPORT)
    result = summarise(frontier, {**settings, "seed": seed}, seconds)
    print(describe(result))
    draw(result, work / "long_outputs.svg")
    if options.save:
        save("long_outputs", result)
        draw(result, RESULTS / "long_outputs.svg")
    print(json.dumps({"study": "long_outputs", **result}))


def prepare(work: Path, options: argparse.Namespace) -> None:
    """Tokenizer, windows of the training text as prompts and completions, and the test text, each abstract under its title."""
    if (work / "train.jsonl").is_file():
        return
    most = 100 if options.quick else None
    texts = {split: read_abstracts(options.data / f"{split}.jsonl.gz")[:most] for split in ("train", "test")}
    tokenizer = train_tokenizer(texts["train"])
    OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        word_embed_proj_dim=options.width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=options.width // 32,
        ffn_dim=4 * options.width,
        max_position_embeddings=READ + WRITTEN + 1,
        dropout=0.1,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["OPTForCausalLM"],
    ).save_pretrained(work / "init")
    tokenizer.save_pretrained(work / "init")
    (work / "test.txt").write_text("".join(texts["test"]), encoding="utf-8")
    # One window per abstract that is long enough: others would hold the middles of two.
    lines = []
    for text in texts["train"]:
        tokens = tokenizer(text).input_ids[: READ + WRITTEN]
        if len(tokens) == READ + WRITTEN:
            parts = {"prompt": tokenizer.decode(tokens[:READ]), "completion": tokenizer.decode(tokens[READ:])}
            if all(part.strip() and "\ufffd" not in part for part in parts.values()):  # no character cut in two
                lines.append(json.dumps(parts, ensure_ascii=False))
    if not lines:
        raise InvalidInput(f"{options.data} has no abstract of {READ + WRITTEN} tokens")
    (work / "train.partial").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (work / "train.partial").rename(work / "train.jsonl")


def read_abstracts(path: Path) -> list[str]:
    """Each title and abstract as one text. Raises `InvalidInput`."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        return ["{title}\n{abstract}\n\n".format(**json.loads(line)) for line in lines]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InvalidInput(f"{path} cannot be read as lines with title and abstract: {error!r}") from error


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left")


def train(work: Path, name: str, seed: int, options: argparse.Namespace) -> float:
    """Both stages of an arm, unless they were done; an interrupted one is resumed. Seconds of training."""
    first = f"{name}-first" if name in SMALL else "first"
    half = options.steps // 2
    shared = {"batch_size": options.batch_size, "horizon": WRITTEN, "save_every": 50}
    stages = (
        (work / "init", work / first,
         TuneConfig(depths=(1.0,), from_scratch=True, num_layers=SMALL.get(name), steps=half, learning_rate=RATES[0],
                    seed=seed, **shared)),
        (work / first, work / name,
         TuneConfig(depths=TUNED_FOR if name == "any-depth" else (1.0,), steps=options.steps - half,
                    learning_rate=RATES[1], seed=seed + 1000, **shared)),
    )  # fmt: skip
    return sum(train_stage(work, start, output, config) for start, output, config in stages)


def train_stage(work: Path, start: Path, output: Path, config: TuneConfig) -> float:
    """One stage; its seconds are kept beside it, those of an interrupted one from the last start."""
    record = work / f"{output.name}.json"
    if record.is_file():
        return float(read_json(record)["seconds"])
    shutil.rmtree(output, ignore_errors=True)

    def watch(step: int, num_steps: int, loss: float) -> None:
        print(f"{output.name} step {step}/{num_steps} loss {loss:.3f}", flush=True)

    resume = output.with_name(output.name + ".tuning").is_dir()
    done = tune(str(start), work / "train.jsonl", output, config, resume=resume, report=watch)
    write_json(record, {"seconds": round(done.seconds, 1), "tokens": done.tokens, "final_loss": done.final_loss})
    return done.seconds


def summarise(frontier: FrontierResult, settings: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Per arm: layers, costs, the loss with its interval, and mean losses over bands of positions."""
    return {
        "settings": settings,
        "conditions": conditions(),
        "train_s": {name: round(value) for name, value in seconds.items()},
        "bands": BANDS,
        "arms": [
            {
                "arm": arm.name,
                "model": arm.model,
                "depth": arm.depth,
                "mean_layers": round(arm.realised_mean_layers, 2),
                "decode_flops": arm.savings.decode.flops.value,
                "loss": {part: round(getattr(arm.scores["loss"], part), 4) for part in ("value", "low", "high")},
                "against_dense": {part: round(getattr(arm.delta["loss"], part), 4) for part in ("value", "low", "high")}
                if arm.delta
                else None,
                "by_band": [round(band_loss(arm, *band), 4) for band in BANDS],
                "by_position": [round(one.loss, 3) for one in arm.loss_by_position],
            }
            for arm in frontier.arms
        ],
    }


def band_loss(arm: Arm, first: int, end: int) -> float:
    """Mean loss over positions [first, end), each weighed by how many windows reach it."""
    band = [one for one in arm.loss_by_position if first <= one.position < end]
    return sum(one.loss * one.count for one in band) / sum(one.count for one in band)


def shown(score: dict[str, float] | None, sign: str = "") -> str:
    """A loss with its interval."""
    return "" if score is None else f"{Score(**score):{sign}.3f}"


def describe(result: dict[str, Any]) -> str:
    """The table, and what it says."""
    header = ("arm", "mean layers", "loss", "against its own dense", *(f"{a} to {b - 1}" for a, b in result["bands"]))
    rows = [
        [
            one["arm"],
            f"{one['mean_layers']:.2f}",
            shown(one["loss"]),
            shown(one["against_dense"], "+"),
            *(f"{loss:.3f}" for loss in one["by_band"]),
        ]
        for one in result["arms"]
    ]
    settings = result["settings"]
    seconds = ", ".join(f"{name} {value}" for name, value in result["train_s"].items())
    intro = (
        f"Abstracts: {READ} tokens read, {WRITTEN} written, {settings['windows']} windows of the test set; {settings['steps']} "
        f"steps of {settings['batch_size']} windows, width {settings['width']}. Losses in nats per token with 95% intervals, and "
        f"means over bands of positions. Training, s: {seconds}."
    )
    return "\n\n".join([intro, table(header, rows), "\n".join(f"- {sentence}" for sentence in verdicts(result))])


def verdicts(result: dict[str, Any]) -> list[str]:
    """Per depth, in words that follow the numbers: what skipping costs early and late, and whether a small model is better."""
    arms = {one["arm"]: one for one in result["arms"]}
    dense = arms.get("any-depth: dense")
    found = []
    for depth, small in zip(DEPTHS, SMALL, strict=True):
        skipped, other = arms.get(f"any-depth: skipdecode {depth:.3g}"), arms.get(f"{small}: dense")
        if dense is None or skipped is None or other is None:
            continue
        early, late = (skipped["by_band"][i] - dense["by_band"][i] for i in (0, -1))
        if skipped["loss"]["high"] < other["loss"]["low"]:
            who = "the plan is better than"
        elif other["loss"]["high"] < skipped["loss"]["low"]:
            who = "the plan is worse than"
        else:
            who = "no difference beyond the intervals from"
        found.append(
            f"depth {depth:.3g} ({skipped['mean_layers']:.1f} layers): {early:+.3f} nats in the first band, {late:+.3f} in the "
            f"last, against the same model dense; {who} the small dense model of {other['mean_layers']:.0f} layers "
            f"({skipped['loss']['value']:.3f} against {other['loss']['value']:.3f})."
        )
    return found or ["not enough arms have run for a verdict"]


COLORS = ("#0b3c5d", "#328cc1", "#3fa796", "#e08e0b", "#b23a48")


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss above the tuned dense model by position, in steps of 8 positions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "shoal"})
    arms = {one["arm"]: one["by_position"] for one in result["arms"]}
    base = arms.get("any-depth: dense", next(iter(arms.values())))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    parts = (("any-depth: skipdecode", "one model, depth falling"), ("small-", "small dense models"))
    for panel, (prefix, title) in zip(axes, parts, strict=True):
        for color, name in zip(COLORS, (name for name in arms if name.startswith(prefix)), strict=False):
            starts = range(0, len(base) - 7, 8)
            above = [statistics.mean(arms[name][i + k] - base[i + k] for k in range(8)) for i in starts]
            panel.plot(
                [i + 3.5 for i in starts],
                above,
                color=color,
                lw=1.5,
                label=name.split(": ")[-2 if prefix == "small-" else -1],
            )
        panel.axhline(0, color="#9aa3ab", lw=0.8)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("position in the continuation, tokens")
        panel.grid(axis="y", color="#e6e9ec")
        panel.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("loss above the dense model, nats")
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="svg", metadata={"Date": None})
    plt.close(figure)
    partial.replace(path)


if __name__ == "__main__":
    main()
