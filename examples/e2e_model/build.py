"""Make the model that ships with Shoal: tokenizer, initial weights, and three runs of `shoal tune`.

    python examples/e2e_model/build.py --data ../shared/data/e2e_nlg --work runs/e2e

Stages, each a checkpoint under `--work`; a stage whose checkpoint exists is skipped, an interrupted one is resumed:

    small      3 layers, dense, from scratch
    dense      12 layers: `small` with 9 layers inserted that compute nothing at first, then trained dense
    any-depth  `dense`, tuned for depths 1 to 1/5: the model that ships
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, set_seed

from shoal.evaluate.e2e import read_e2e

PAD, EOS, SEP = "<pad>", "</s>", "<sep>"
VOCAB_SIZE = 2048
SMALL_LAYERS, NUM_LAYERS = 3, 12
BOTTOM_LAYERS = 1  # trained layers below the inserted ones: 0, and L-2, L-1 above, which every depth runs
HORIZON = 26  # median length in tokens of the development set's descriptions
DROPOUT = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of trainset.csv.gz")
    parser.add_argument("--work", type=Path, default=Path("runs/e2e"), help="where checkpoints go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, nargs=3, default=(4.0, 1.5, 2.5), help="of the three stages")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)

    data = work / "train.jsonl"
    pairs = [(e.mr, ref) for e in read_e2e(options.data / "trainset.csv.gz") for ref in e.references]
    with data.open("w", encoding="utf-8") as file:
        for mr, ref in pairs:
            file.write(json.dumps({"prompt": mr, "completion": ref}, ensure_ascii=False) + "\n")

    small_epochs, dense_epochs, any_epochs = options.epochs
    stage = [sys.executable, "-m", "shoal.cli.main", "tune"]
    common = ["--horizon", str(HORIZON), "--batch-size", "64", "--seed", str(options.seed), "--bfloat16"]
    if not (work / "init").exists():
        tokenizer = train_tokenizer([text for pair in pairs for text in pair])
        save(initial_model(tokenizer, SMALL_LAYERS, seed=options.seed), tokenizer, work / "init")
    run(
        stage,
        work / "init",
        data,
        work / "small",
        [*common, "--depths", "1", "--epochs", str(small_epochs), "--lr", "1e-3"],
    )
    if not (work / "grown").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "small")
        save(
            grow(OPTForCausalLM.from_pretrained(work / "small"), NUM_LAYERS, seed=options.seed),
            tokenizer,
            work / "grown",
        )
    run(
        stage,
        work / "grown",
        data,
        work / "dense",
        [*common, "--depths", "1", "--epochs", str(dense_epochs), "--lr", "5e-4"],
    )
    run(
        stage,
        work / "dense",
        data,
        work / "any-depth",
        [*common, "--depths", "1,1,1/2,1/3,1/4,1/5", "--epochs", str(any_epochs), "--lr", "5e-4"],
    )


def run(stage: list[str], model: Path, data: Path, output: Path, options: list[str]) -> None:
    """Run one `shoal tune`, unless its output exists, and record command and wall time in `<output>.json`."""
    if output.exists():
        return
    command = [*stage, str(model), str(data), "-o", str(output), *options]
    if output.with_name(output.name + ".tuning").exists():
        command.append("--resume")
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = round(time.perf_counter() - start)
    command = ["shoal", *command[command.index("tune") :]]
    output.with_suffix(".json").write_text(json.dumps({"command": " ".join(command), "seconds": seconds}) + "\n")


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
