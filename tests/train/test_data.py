"""Training data: read, checked, grouped and padded around the prompt's end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from families import save_tokenizer
from shoal.errors import InvalidInput
from shoal.train.data import IGNORED, Example, LengthGrouped, collate, prompt_columns, read_examples, read_jsonl


def test_collate_puts_all_prompt_ends_at_one_column():
    batch = collate([Example([11, 12], [13, 14, 15]), Example([21, 22, 23], [24])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[0, 11, 12, 13, 14], [21, 22, 23, 24, 0]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]
    # The last three columns predict these.
    assert batch["labels"].tolist() == [[13, 14, 15], [24, IGNORED, IGNORED]]
    assert batch["logits_to_keep"] == 3
    assert prompt_columns(batch) == 3


def test_grouped_order_is_a_permutation_keyed_by_seed_and_epoch():
    examples = [Example([5] * (1 + i * 7 % 13), [6] * (1 + i * 5 % 11)) for i in range(500)]
    sampler = LengthGrouped(examples, batch_size=8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(500)) == list(range(len(sampler)))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGrouped(examples, batch_size=8, seed=2)) != first

    def padding(order: list[int]) -> int:
        batches = [[examples[i] for i in order[k : k + 8]] for k in range(0, 500, 8)]
        return sum(len(b) * (max(len(e.prompt) for e in b) + max(len(e.completion) for e in b)) for b in batches)

    assert padding(first) < 0.8 * padding(list(range(500)))


GOOD = {"prompt": "a b", "completion": "c"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 3: not valid JSON"),
        (r'{"prompt": "a", "completion": "\ud800"}', "line 3: .* half of a character"),
        ("[" * 100_000, "line 3: nested too deeply"),
        ("[1]", "line 3: expected a JSON object"),
        ('{"prompt": "a"}', "line 3: field 'completion' is missing"),
        ('{"prompt": "a", "completion": ""}', "line 3: 'completion' must be a non-empty string"),
        ('{"prompt": 3, "completion": "b"}', "line 3: 'prompt' must be a non-empty string"),
        ('{"prompt": "a", "completion": "b", "promt": "c"}', "did you mean 'prompt'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: str, message: str):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{bad}\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match=message):
        read_jsonl(file)


def test_bad_files(tmp_path: Path):
    with pytest.raises(InvalidInput, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match="not a UTF-8 text file"):
        read_jsonl(tmp_path)
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="not a UTF-8 text file"):
        read_jsonl(file)
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="no examples"):
        read_jsonl(file)


def test_a_completion_ends_with_eos_and_must_fit(tmp_path: Path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    file = tmp_path / "data.jsonl"
    # U+2028 is a line separator to str.splitlines, not to JSON lines.
    file.write_text(
        json.dumps({"prompt": "a\u2028b", "completion": "c d"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (example,) = read_examples(file, tokenizer, max_positions=64)
    assert example.completion[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in example.prompt
    with pytest.raises(
        InvalidInput, match=f"line 1: {len(example)} tokens, but the model has {len(example) - 1} positions"
    ):
        read_examples(file, tokenizer, max_positions=len(example) - 1)
    read_examples(file, tokenizer, max_positions=len(example))
