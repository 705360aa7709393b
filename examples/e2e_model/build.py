"""Make the model that ships with Shoal: tokenizer, initial weights, and runs of `shoal tune`.

    python examples/e2e_model/build.py --data ../shared/data/e2e_nlg --work runs/e2e

Stages, each a checkpoint under `--work`; a stage whose checkpoint exists is skipped, an interrupted one is resumed:

    small      3 layers, dense, from scratch
    dense      12 layers: `small` with 9 layers inserted that compute nothing at first, then trained dense
    any-depth  `dense`, tuned for depths 1 to 1/5
    round-1..  it goes on, until a round does not raise the mean BLEU over depths on the development set: the best one ships
    only-1_2.. that round over again at one depth alone

Afterwards: `evaluate.py --split test --card`, then `card.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, set_seed

from evaluate import DEPTHS as EVALUATED
from evaluate import measure
from shoal import Engine
from shoal.depth.checkpoint import TunedDepth
from shoal.evaluate.e2e import E2EInput, read_e2e

PAD, EOS, SEP = "<pad>", "</s>", "<sep>"
VOCAB_SIZE = 2048
SMALL_LAYERS, NUM_LAYERS = 3, 12
BOTTOM_LAYERS = 1  # trained layers below the inserted ones: 0, and L-2, L-1 above, which every depth runs
HORIZON = 26  # median length in tokens of the development set's descriptions
ROUND_HORIZON = 28  # the model writes longer ones: with 28 its mean layers on that set are within 4% of each depth
DROPOUT = 0.1
EPOCHS = (4.0, 1.5, 1.5)
DEPTHS = "1,1,1/2,1/3,1/4,1/5"
ONLY = ("1/2", "1/3", "1/4", "1/5")
ROUND = ["--steps", 150, "--batch-size", 32, "--lr", "2e-4", "--horizon", ROUND_HORIZON, "--save-every", 50]
MOST_ROUNDS = 4
SHIPPED = Path(__file__).parents[2] / "src" / "shoal" / "data" / "shoal-e2e"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of trainset.csv.gz")
    parser.add_argument("--work", type=Path, default=Path("runs/e2e"), help="where checkpoints go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, nargs=3, default=EPOCHS, help="of the three stages")
    parser.add_argument("--machine", default="2 CPU cores", help="for the model card, in generic words")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)

    data = work / "train.jsonl"
    pairs = [(e.mr, ref) for e in read_e2e(options.data / "trainset.csv.gz") for ref in e.references]
    lines = [json.dumps({"prompt": mr, "completion": ref}, ensure_ascii=False) for mr, ref in pairs]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")

    common = ["--horizon", HORIZON, "--batch-size", 64, "--seed", options.seed, "--bfloat16"]
    small, dense, any_depth = options.epochs
    if not (work / "init").exists():
        tokenizer = train_tokenizer([text for pair in pairs for text in pair])
        save(initial_model(tokenizer, SMALL_LAYERS, seed=options.seed), tokenizer, work / "init")
    tune(work, "init", "small", [*common, "--depths", "1", "--epochs", small, "--lr", "1e-3"])
    if not (work / "grown").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "small")
        grown = grow(OPTForCausalLM.from_pretrained(work / "small"), NUM_LAYERS, seed=options.seed)
        save(grown, tokenizer, work / "grown")
    tune(work, "grown", "dense", [*common, "--depths", "1", "--epochs", dense, "--lr", "5e-4"])
    tune(work, "dense", "any-depth", [*common, "--depths", DEPTHS, "--epochs", any_depth, "--lr", "3e-4"])
    best, tried = refine(work, read_e2e(options.data / "devset.csv.gz"))
    last = max(best, 1)
    start = f"round-{last - 1}" if last > 1 else "any-depth"
    for depth in ONLY:
        tune(work, start, f"only-{depth.replace('/', '_')}", [*ROUND, "--seed", last, "--depths", depth])
    shipped = f"round-{best}" if best else "any-depth"
    names = ["small", "dense", "any-depth", *(f"round-{number}" for number in range(1, best + 1))]
    ship(
        work / shipped,
        {
            "num_examples": len(pairs),
            "seed": options.seed,
            "machine": options.machine,
            "stages": [json.loads((work / f"{name}.json").read_text()) for name in names],
            "dev_bleu_by_round": tried,
        },
    )


def refine(work: Path, dev: list[E2EInput]) -> tuple[int, list[float]]:
    """Rounds of tuning until one does not help. The number of the best, 0 being `any-depth`, and the mean BLEU of each tried."""
    tried = [mean_bleu(work / "any-depth", dev)]
    while len(tried) <= MOST_ROUNDS:
        number = len(tried)
        start = f"round-{number - 1}" if number > 1 else "any-depth"
        tune(work, start, f"round-{number}", [*ROUND, "--seed", number, "--depths", DEPTHS])
        tried.append(mean_bleu(work / f"round-{number}", dev))
        print(f"mean BLEU by round: {tried}", flush=True)
        if tried[-1] <= tried[-2]:
            return number - 1, tried
    return MOST_ROUNDS, tried


def mean_bleu(checkpoint: Path, dev: list[E2EInput]) -> float:
    """Mean over the depths, with the horizon of the rounds."""
    engine = Engine.from_pretrained(checkpoint, dtype="bfloat16")
    scores = [measure(engine, dev, depth, horizon=ROUND_HORIZON)[0]["bleu"]["value"] for depth in EVALUATED]
    return round(sum(scores) / len(scores), 2)


def tune(work: Path, model: str, output: str, options: list[object]) -> None:
    """Run one `shoal tune`, unless its output exists; command and wall time go to `<output>.json`."""
    if (work / output).exists():
        return
    arguments = ["tune", work / model, work / "train.jsonl", "-o", work / output, *options]
    command = [str(argument) for argument in arguments]
    record = {"stage": output, "command": "shoal " + " ".join(command)}
    if (work / f"{output}.tuning").exists():
        command.append("--resume")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "shoal.cli.main", *command], check=True)
    record["seconds"] = round(time.perf_counter() - start)
    (work / f"{output}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def ship(trained: Path, training: dict[str, Any]) -> None:
    """Write the package data: bfloat16 weights, tokenizer, `depth_plan.json`, and `card.json` without the evaluation."""
    model = OPTForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained)
    for detail in ("is_local", "local_files_only"):  # how it was loaded here
        tokenizer.init_kwargs.pop(detail, None)
    save(model, tokenizer, SHIPPED)
    (SHIPPED / "model.safetensors").chmod(0o644)
    loaded = TunedDepth.load(trained)
    assert loaded is not None
    tuned = replace(loaded, horizon=ROUND_HORIZON)
    tuned.save(SHIPPED)
    config = model.config
    card = {
        "model": {
            "architecture": "OPT",
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "num_parameters": model.num_parameters(),
            "vocab_size": config.vocab_size,
            "max_positions": config.max_position_embeddings,
            "dtype": "bfloat16",
            "megabytes": round((SHIPPED / "model.safetensors").stat().st_size / 1e6, 1),
        },
        "tuned": {
            "depths": [str(Fraction(depth).limit_denominator(NUM_LAYERS)) for depth in tuned.depths],
            "horizon": tuned.horizon,
            "warmup_layers": tuned.warmup_layers,
        },
        "data": "E2E NLG challenge, trainset.csv, CC BY-SA 4.0",
        "licence": "CC BY-SA 4.0 (weights and tokenizer)",
        "training": {**training, "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}},
    }
    (SHIPPED / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE without an added leading space, so that a completion starts with its first letter.

    The separator between MR and text is added by the tokenizer itself, so a prompt is the MR as it stands:
    `name[The Vaults], eatType[pub]` becomes the MR's pieces and `<sep>`. A completion is tokenised without it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS, SEP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SEP}", special_tokens=[(SEP, tokenizer.token_to_id(SEP))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        sep_token=SEP,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def initial_model(tokenizer: PreTrainedTokenizerFast, num_layers: int, *, seed: int) -> OPTForCausalLM:
    """A random OPT of width 256 with tied head."""
    set_seed(seed)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        word_embed_proj_dim=256,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        ffn_dim=1024,
        max_position_embeddings=512,
        do_layer_norm_before=True,
        dropout=DROPOUT,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return OPTForCausalLM(config)


def grow(small: OPTForCausalLM, num_layers: int, *, seed: int) -> OPTForCausalLM:
    """`small` with layers inserted above its bottom one, whose output projections are zero.

    The grown model computes the same function: 3 layers a b c become a 0 0 0 0 0 0 0 0 0 b c.
    """
    set_seed(seed)
    config = OPTConfig.from_dict({**small.config.to_dict(), "num_hidden_layers": num_layers})
    large = OPTForCausalLM(config)
    inserted = num_layers - small.config.num_hidden_layers
    weights = {}
    for name, value in small.state_dict().items():
        head, layers, tail = name.partition(".layers.")
        if layers:
            index, _, rest = tail.partition(".")
            layer = int(index) if int(index) < BOTTOM_LAYERS else int(index) + inserted
            name = f"{head}.layers.{layer}.{rest}"
        weights[name] = value
    large.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for layer in large.model.decoder.layers[BOTTOM_LAYERS : BOTTOM_LAYERS + inserted]:
            for projection in (layer.self_attn.out_proj, layer.fc2):
                projection.weight.zero_()
                projection.bias.zero_()
    return large


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write model and tokenizer."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
