"""Prompts files: what is read, and what each kind of bad file is told."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from shoal.cli.prompts import read_prompts
from shoal.errors import InvalidInput, InvalidPrompt


def write(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_jsonl_keeps_other_fields_and_counts_blank_lines(tmp_path: Path) -> None:
    """U+2028 is legal inside a JSON string and ends no line."""
    path = write(
        tmp_path, "p.jsonl", '{"prompt": "a\u2028b", "id": 7}\n\n{"prompt_token_ids": [3, 4], "prompt": "x"}\n'
    )
    first, second = read_prompts(path)
    assert (first.line, first.prompt, first.fields) == (1, "a\u2028b", {"prompt": "a\u2028b", "id": 7})
    assert (second.line, second.prompt) == (3, [3, 4])


def test_csv_takes_prompt_the_only_column_or_the_chosen_one(tmp_path: Path) -> None:
    table = write(tmp_path, "p.csv", 'id,prompt\n1,"two\nlines"\n2,b\n')
    assert [(p.line, p.prompt, p.fields["id"]) for p in read_prompts(table)] == [(3, "two\nlines", "1"), (4, "b", "2")]
    assert [p.prompt for p in read_prompts(table, column="id")] == ["1", "2"]
    assert [p.prompt for p in read_prompts(write(tmp_path, "q.csv", "mr\r\na\r\n"))] == ["a"]


def test_text_has_a_prompt_per_line_and_a_byte_order_mark_is_not_one(tmp_path: Path) -> None:
    assert [p.prompt for p in read_prompts(write(tmp_path, "p.txt", "\ufeffone\r\n two \nthree"))] == [
        "one",
        " two ",
        "three",
    ]


def test_standard_input_is_text_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def stdin(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    stdin("one\ntwo\n")
    assert [p.prompt for p in read_prompts("-")] == ["one", "two"]
    stdin('{"prompt": "one"}\n')
    assert [p.prompt for p in read_prompts("-", format="jsonl")] == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.txt", "", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2: expected a JSON object"),
        ("p.jsonl", '{"promt": "a"}', "line 1: no field 'prompt', did you mean 'promt'"),
        ("p.jsonl", '{"prompt": 3}', "line 1: the prompt must be text, got int"),
        ("p.jsonl", '\n{"prompt": ""}', "line 2: empty prompt"),
        ("p.jsonl", '{"prompt_token_ids": []}', "line 1: empty prompt"),
        ("p.jsonl", '{"prompt_token_ids": [1, true]}', "list of whole numbers"),
        ("p.txt", "a\n\nb\n", "line 2: empty prompt"),
        ("p.csv", "id,text\n1,a\n", "no column 'prompt', allowed: id, text"),
        ("p.csv", "id,prompt\n1,a\n2\n", "line 3: this row does not have the 2 fields"),
        ("p.csv", "id,prompt\n1,a,b\n", "line 2: this row does not have the 2 fields"),
        ("p.csv", 'prompt\n"a\n', "not valid CSV"),
        ("p.txt", b"fine\ncaf\xe9\n", "line 2: not UTF-8"),
        ("p.parquet", "a", "say --format"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_prompts(write(tmp_path, name, content))
    assert message in str(error.value)
    assert name in str(error.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such prompts file"):
        read_prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(InvalidInput, match="is a directory"):
        read_prompts(str(tmp_path))


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--prompt-column"):
        read_prompts(write(tmp_path, "p.txt", "a"), column="prompt")
    with pytest.raises(InvalidPrompt, match="line 1"):
        read_prompts(write(tmp_path, "p.jsonl", '{"a": "x"}'), column="b")
