"""Prompts and completions for tuning: read, checked, tokenised, grouped by length, and padded around the prompt's end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from shoal.errors import InvalidInput, nearest
from shoal.jsonl import parse_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a column that has no loss."""

FIELDS = ("prompt", "completion")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised training example."""

    prompt: list[int]
    """Prompt tokens, with the special tokens that the tokenizer adds to a prompt."""
    completion: list[int]
    """Completion tokens, the end-of-sequence token last."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def read_fields(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """(line number, object) of each line of a UTF-8 JSONL file; blank lines are skipped.

    Raises `InvalidInput` naming the line for anything else than an object whose fields are non-empty strings: all that are
    `required`, perhaps those that are `optional`, and no others.
    """
    fields = (*required, *optional)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InvalidInput(f"{path}: no such file") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InvalidInput(f"{path} is not a UTF-8 text file: {error}") from error
    rows = []
    for number, row in parse_jsonl(text, str(path)):
        for field in fields:
            if field not in row:
                if field in optional:
                    continue
                hint = f"; the line has {', '.join(map(repr, row)) or 'none'}"
                raise InvalidInput(f"{path}, line {number}: field {field!r} is missing{hint}")
            if not isinstance(row[field], str) or not row[field].strip():
                raise InvalidInput(f"{path}, line {number}: {field!r} must be a non-empty string")
        for name in row:
            if name not in fields:
                raise InvalidInput(f"{path}, line {number}: unknown field {name!r}, {nearest(name, fields)}")
        rows.append((number, row))
    if not rows:
        raise InvalidInput(f"{path} has no examples")
    return rows


def read_jsonl(path: Path) -> list[tuple[int, str, str]]:
    """(line number, prompt, completion) of each line of a UTF-8 JSONL file; blank lines are skipped.

    Raises `InvalidInput` naming the line for anything else than an object with two non-empty strings `prompt`, `completion`.
    """
    return [(number, row["prompt"], row["completion"]) for number, row in read_fields(path, FIELDS)]


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, *, max_positions: int) -> list[Example]:
    """Read and tokenise a JSONL file; see `tokenise`."""
    return tokenise(read_jsonl(path), tokenizer, path=path, max_positions=max_positions)


def tokenise(
    rows: Sequence[tuple[int, str, str]], tokenizer: PreTrainedTokenizerBase, *, path: Path, max_positions: int
) -> list[Example]:
    """Tokenise (line number, prompt, completion) of `path`.

    A prompt is tokenised as the engine does it, with the special tokens that the tokenizer adds; a completion without them, and
    with the end-of-sequence token behind it. Raises `InvalidInput` (line number) for an example longer than `max_positions`.
    """
    if tokenizer.eos_token_id is None:
        raise InvalidInput("the tokenizer has no end-of-sequence token, so a completion could never end")
    prompts = tokenizer([prompt for _, prompt, _ in rows])["input_ids"]
    completions = tokenizer([completion for _, _, completion in rows], add_special_tokens=False)["input_ids"]
    examples = []
    for (number, _, _), prompt, completion in zip(rows, prompts, completions, strict=True):
        example = Example(prompt, [*completion, tokenizer.eos_token_id])
        if not prompt or not completion:
            raise InvalidInput(f"{path}, line {number}: the prompt or the completion has no tokens")
        if len(example) > max_positions:
            raise InvalidInput(
                f"{path}, line {number}: {len(example)} tokens, but the model has {max_positions} positions; shorten the line"
            )
        examples.append(example)
    return examples


def collate(examples: Sequence[Example], *, pad_token_id: int) -> dict[str, Any]:
    """A batch in which all prompts end at column P = `input_ids.shape[1] - labels.shape[1] + 1`.

    Prompts (2, 3 tokens) and completions (3, 1 tokens) give, with the last token left out because nothing follows it:

        input_ids  . a b | c d        labels   c d e
                   a b c | d .                 d - -

    Keys: `input_ids`, `attention_mask`, `position_ids` [batch, P + C - 1]; `labels` [batch, C] are the tokens that the last C
    columns predict, already shifted (`shift_labels` says so to transformers); `logits_to_keep` = C.
    """
    prompt_width = max(len(e.prompt) for e in examples)
    completion_width = max(len(e.completion) for e in examples)
    shape = (len(examples), prompt_width + completion_width)
    ids = torch.full(shape, pad_token_id)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full((len(examples), completion_width), IGNORED)
    for row, example in enumerate(examples):
        start, end = prompt_width - len(example.prompt), prompt_width + len(example.completion)
        ids[row, start:end] = torch.tensor(example.prompt + example.completion)
        mask[row, start:end] = 1
        labels[row, : len(example.completion)] = torch.tensor(example.completion)
    ids, mask = ids[:, :-1], mask[:, :-1]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": labels,
        "shift_labels": labels,
        "logits_to_keep": completion_width,
    }


def prompt_columns(batch: dict[str, Tensor]) -> int:
    """P of a batch made by `collate`."""
    return batch["input_ids"].shape[1] - batch["labels"].shape[1] + 1


class LengthGrouped(Sampler[int]):
    """Shuffled order in which neighbours have similar lengths, a function of (seed, epoch) alone so that a run can resume.

    Examples are shuffled and cut into chunks of 100 batches; a chunk is sorted by prompt length, cut into groups of 10 batches,
    a group is sorted by completion length, and finally all batches are shuffled. Sorting by total length instead would pad far
    more: prompt and completion are padded apart.
    """

    def __init__(self, examples: Sequence[Example], *, batch_size: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; called by the training loop."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self.examples)))
        rng.shuffle(order)
        chunk, group = 100 * self.batch_size, 10 * self.batch_size
        batches = []
        for start in range(0, len(order), chunk):
            part = sorted(order[start : start + chunk], key=lambda i: len(self.examples[i].prompt))
            for left in range(0, len(part), group):
                near = sorted(part[left : left + group], key=lambda i: len(self.examples[i].completion))
                batches += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
        rng.shuffle(batches)
        # A short batch in the middle would shift all batches behind it.
        batches.sort(key=len, reverse=True)
        return (i for batch in batches for i in batch)
