"""A small general language model, for studies of what a pass tells: read once through English text of many kinds.

    python studies/general_model.py --data ../shared/data
    python studies/general_model.py --data ../shared/data --steps 400

8 layers of width 320 with Llama's decoder and a vocabulary of 8,192 made of the same text: 12.5 million parameters, about an hour
and a half on one core with bfloat16 units. Novels, Wikipedia articles, abstracts, stories, meetings, instructions, questions and
short messages; of the classification sets that probes are judged on, nothing. The first documents of each source are held out.
The run goes on where it stopped; the checkpoint is `WORK/general`; `results/general_model.json` has its losses (--save).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shoal.errors import InvalidInput, ShoalError
from study import conditions, open_work, parser, read_json, save, write_json

WINDOW, VOCAB_SIZE = 256, 8192
NUM_LAYERS, WIDTH, HEADS, FFN = 8, 320, 5, 864
HELD_OUT = 200
"""One document of so many is held out, for the losses."""
END = "<|end|>"


def lines_of(path: Path) -> Iterator[Any]:
    """Objects of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def text_of(path: Path) -> str:
    """A gzipped text."""
    return gzip.decompress(path.read_bytes()).decode()


def pieces(text: str, size: int = 6000) -> Iterator[str]:
    """A long text as documents of whole lines, of about `size` characters."""
    piece, length = [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= size:
            yield "".join(piece)
            piece, length = [], 0
    yield "".join(piece)


def articles(text: str) -> Iterator[str]:
    """WikiText with the spaces of its tokens taken out."""
    for mark in ("@-@", "@,@", "@.@"):
        text = text.replace(f" {mark} ", mark[1])
    for mark in (",", ".", ";", ":", "'s", ")", "?", "!"):
        text = text.replace(f" {mark} ", f"{mark} ")
    yield from pieces(text.replace("( ", "("))


def documents(data: Path) -> dict[str, Iterable[str]]:
    """Texts by source."""

    def novels() -> Iterator[str]:
        for path in sorted((data / "text_novels_eltec").glob("novels-*.jsonl.gz")):
            for novel in lines_of(path):
                yield from pieces(novel["text"])

    def abstracts() -> Iterator[str]:
        for paper in lines_of(data / "arxiv_abstract_title" / "train.jsonl.gz"):
            yield f"{paper['title']}\n{paper['abstract']}"

    def stories() -> Iterator[str]:
        seen: set[str] = set()
        for path in sorted((data / "text_tinystories_sample").glob("*.gz")):
            for story in text_of(path).split("\n\n"):
                if story not in seen:
                    seen.add(story)
                    yield story
        for one in lines_of(data / "squality" / "train.jsonl.gz"):
            yield from pieces(one["document"])

    def meetings() -> Iterator[str]:
        for one in lines_of(data / "qmsum" / "train.jsonl.gz"):
            turns = (f"{turn['speaker']}: {turn['content']}\n" for turn in one["meeting_transcripts"])
            yield from pieces("".join(turns))

    def instructions() -> Iterator[str]:
        for one in lines_of(data / "instructions_p3_sample" / "p3_sample.jsonl.gz"):
            yield f"{one['prompt']}\n{one['completion']}"
        for one in lines_of(data / "instructions_dolly_sample" / "dolly_sample.jsonl.gz"):
            yield (one["prompt"] + one["answer"]).replace("###eos_token###", "")
        for one in lines_of(data / "instructions_self_instruct" / "seed_tasks.jsonl.gz"):
            for instance in one["instances"]:
                yield "\n".join(filter(None, (one["instruction"], instance["input"], instance["output"])))
        for one in lines_of(data / "gsm8k" / "train.jsonl.gz"):
            yield f"{one['question']}\n{one['answer']}"

    def messages() -> Iterator[str]:
        rows = csv.DictReader(
            io.StringIO(text_of(data / "cls_goemotions" / "train.tsv.gz")), delimiter="\t", quoting=csv.QUOTE_NONE
        )
        yield from (row["text"] for row in rows)
        asked = json.loads(text_of(data / "cls_clinc150" / "data_full.json.gz"))
        yield from (text for text, _ in asked["train"])

    return {
        "novels": novels(),
        "wikipedia": articles(text_of(data / "text_wikitext2" / "train.txt.gz")),
        "abstracts": abstracts(),
        "stories": stories(),
        "meetings": meetings(),
        "instructions": instructions(),
        "messages": messages(),
    }


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def prepare(work: Path, data: Path, most: int | None) -> None:
    """Tokenizer, and the tokens of all sources: documents in random order, an end after each."""
    if (work / "train.npy").is_file():
        return
    texts = {name: [text for text in source if text.strip()][:most] for name, source in documents(data).items()}
    rng = random.Random(0)
    for source in texts.values():
        rng.shuffle(source)
    tokenizer = train_tokenizer([text for source in texts.values() for text in source[: len(source) // 3 + 1]])
    tokenizer.save_pretrained(work / "tokenizer")
    held: dict[str, list[int]] = {}
    read: list[list[int]] = []
    for name, source in texts.items():
        tokens = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(source).input_ids]
        count = len(tokens) // HELD_OUT + 1
        held[name] = [token for document in tokens[:count] for token in document][: 40 * WINDOW]
        read += tokens[count:]
    rng.shuffle(read)
    write_json(work / "held_out.json", held)
    with open(work / "train.npy.partial", "wb") as file:
        np.save(file, np.concatenate([np.array(document, dtype=np.uint16) for document in read]))
    (work / "train.npy.partial").rename(work / "train.npy")


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Stretches of the training text."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tokens) // WINDOW

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(self.tokens[index * WINDOW : (index + 1) * WINDOW].astype(np.int64))
        return {"input_ids": window, "labels": window}


def network(quick: bool) -> LlamaForCausalLM:
    """Random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64 if quick else WIDTH,
        num_hidden_layers=2 if quick else NUM_LAYERS,
        num_attention_heads=HEADS - 1 if quick else HEADS,
        num_key_value_heads=HEADS - 1 if quick else HEADS,
        intermediate_size=128 if quick else FFN,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@torch.inference_mode()
def losses(model: LlamaForCausalLM, held: dict[str, list[int]]) -> dict[str, float]:
    """Mean nats per token of each source's held-out text."""
    found = {}
    for name, tokens in held.items():
        windows = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)
        found[name] = round(float(np.mean([model(w[None], labels=w[None]).loss.item() for w in windows])), 3)
    return found


def run(options: argparse.Namespace) -> None:
    """Text, training, losses."""
    torch.set_num_threads(options.threads)
    work: Path = options.work
    if options.quick:
        options.steps, options.batch_size = 4, 2
    open_work(work, {"steps": options.steps, "batch_size": options.batch_size, "quick": options.quick})
    output = work / "general"
    if not output.is_dir():
        prepare(work, options.data, 200 if options.quick else None)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
        model = network(options.quick)
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(Windows(work / 'train.npy')):,} windows"
        )
        args = transformers.TrainingArguments(
            output_dir=str(work / "training"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=0.05,
            adam_beta2=0.98,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_steps=100,
            save_total_limit=2,
            logging_steps=20,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(model=model, args=args, train_dataset=Windows(work / "train.npy"))
        began = time.perf_counter()
        saved = any((work / "training").glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=saved or None)
        write_json(work / "seconds.json", round(time.perf_counter() - began))
        model.save_pretrained(output.with_suffix(".partial"))
        tokenizer.save_pretrained(output.with_suffix(".partial"))
        output.with_suffix(".partial").rename(output)
        shutil.rmtree(work / "training")
    model = LlamaForCausalLM.from_pretrained(output).eval()
    result = {
        "settings": read_json(work / "study.json"),
        "conditions": conditions(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": options.steps * options.batch_size * WINDOW,
        "train_s": read_json(work / "seconds.json"),
        "nats_per_token": losses(model, read_json(work / "held_out.json")),
    }
    for name, nats in result["nats_per_token"].items():
        print(f"{name:13} {nats:.3f} nats per token, perplexity {math.exp(nats):.1f}")
    if options.save:
        save("general_model", result)
    print(json.dumps({"study": "general_model", **result}))


def main() -> None:
    options = parser(__doc__, work="general_model")
    options.add_argument("--data", type=Path, required=True, help="the directory of all data sets")
    options.add_argument("--steps", type=int, default=1800, help="of --batch-size windows of 256 tokens")
    options.add_argument("--batch-size", type=int, default=32)
    try:
        run(options.parse_args())
    except (ShoalError, InvalidInput) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
