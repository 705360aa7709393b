"""Does a sentinel that reads decoding-entropy traces know how accurate a model is on slices that it has not seen labels of?

    python studies/sentinel.py --data ../shared/data
    python studies/sentinel.py --data ../shared/data --save

One model of 4 layers, width 192 is trained from random weights on arithmetic, descriptions of restaurants and dialogue acts
(`sentinel_tasks.py` says what, and fixes the slices); it answers each slice with the entropy trace on; every slice in turn is left
out, its accuracy estimated by a sentinel fitted on the others, and compared with the truth, beside length alone and ATC.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from sentinel_tasks import training_pairs
from shoal.errors import ShoalError
from shoal.train.config import TuneConfig
from shoal.train.tune import tune
from study import open_work, parser, read_json, write_json

NUM_LAYERS, WIDTH, HEADS, FFN, VOCAB_SIZE = 4, 192, 6, 512, 1024


def main() -> None:
    options = parser(__doc__, work="sentinel")
    options.add_argument("--data", type=Path, required=True, help="the directory of all data sets")
    options.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    options.add_argument("--batch-size", type=int, default=32)
    try:
        run(options.parse_args())
    except ShoalError as error:
        sys.exit(f"Error: {error}")


def run(options: argparse.Namespace) -> None:
    """Training, traces, and what the sentinel makes of them."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    work: Path = options.work
    if options.quick:
        options.steps, options.batch_size = 4, 4
    open_work(work, {"steps": options.steps, "batch_size": options.batch_size, "quick": options.quick})
    prepare(work, options)
    train(work, options)


def prepare(work: Path, options: argparse.Namespace) -> None:
    """Training data, and a directory with the config and a byte-level tokenizer that takes digits one by one."""
    if (work / "train.jsonl").is_file():
        return
    pairs = list(training_pairs(options.data, quick=options.quick))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left"
    ).save_pretrained(work / "init")
    LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(work / "init")
    lines = [json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) for prompt, text in pairs]
    (work / "train.partial").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (work / "train.partial").rename(work / "train.jsonl")


def train(work: Path, options: argparse.Namespace) -> None:
    """The model, unless it is there; an interrupted training goes on."""
    if (work / "training.json").is_file():
        return
    config = TuneConfig(
        depths=(1.0,),
        from_scratch=True,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=2e-3,
        save_every=100,
        seed=options.seeds[0],
    )

    def watch(step: int, num_steps: int, loss: float) -> None:
        print(f"step {step}/{num_steps} loss {loss:.3f}", flush=True)

    resume = (work / "model.tuning").is_dir()
    done = tune(str(work / "init"), work / "train.jsonl", work / "model", config, resume=resume, report=watch)
    write_json(
        work / "training.json",
        {"steps": done.steps, "tokens": done.tokens, "seconds": round(done.seconds), "resumed": resume},
    )
    print(read_json(work / "training.json"))


if __name__ == "__main__":
    main()
