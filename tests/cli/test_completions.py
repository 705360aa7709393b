"""The output file: order, whole lines, and continuing after any byte was the last one written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from shoal.cli.completions import CompletionsFile
from shoal.cli.prompts import PromptLine
from shoal.errors import InvalidInput

PROMPTS = [PromptLine(n + 1, text, {"prompt": text, "id": n}) for n, text in enumerate(["a", "bé", "c", "d"])]


def indices(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_lines_are_in_the_order_of_the_prompts(tmp_path: Path, order: tuple[int, ...]) -> None:
    path = tmp_path / "out.jsonl"
    with CompletionsFile(str(path), PROMPTS) as out:
        for step, index in enumerate(order):
            out.add(index, 0, {"completion": str(index)})
            finished = set(order[: step + 1])
            assert indices(path) == list(itertools.takewhile(finished.__contains__, range(4)))
    assert [json.loads(line)["completion"] for line in path.read_text().splitlines()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("samples", [1, 3])
def test_resume_repeats_none_and_misses_none_wherever_the_file_was_cut(tmp_path: Path, samples: int) -> None:
    def fill(out: CompletionsFile) -> None:
        for index in range(out.num_written, len(PROMPTS)):
            for sample in reversed(range(samples)):
                out.add(index, sample, {"completion": f"{index}.{sample}"})

    whole = tmp_path / "whole.jsonl"
    with CompletionsFile(str(whole), PROMPTS, samples=samples) as out:
        fill(out)
    data = whole.read_bytes()
    cut = tmp_path / "cut.jsonl"
    for length in range(len(data) + 1):
        cut.write_bytes(data[:length])
        with CompletionsFile(str(cut), PROMPTS, samples=samples, resume=True) as out:
            assert out.num_written == data[:length].count(b"\n") // samples
            fill(out)
        assert cut.read_bytes() == data


def test_resume_starts_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with CompletionsFile(str(path), PROMPTS, resume=True) as out:
        assert out.num_written == 0
        out.add(0, 0, {})
    assert indices(path) == [0]


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(InvalidInput, match="--resume"):
        CompletionsFile(str(path), PROMPTS)
    assert path.read_text() == "precious\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("precious\n", "line 1: expected the completion of prompt 0"),
        ('{"index": 1, "prompt": "bé", "id": 1}\n', "line 1: expected the completion of prompt 0"),
        ('{"index": 0, "prompt": "z", "id": 0}\n', "answers another prompt than line 1"),
        ('{"index": 0, "prompt": "a", "id": 0, "sample": 1}\n', "expected the completion of prompt 0"),
        ("precious", "line 1: expected the completion of prompt 0"),
        ('{"index": 10, "prompt', "line 1: expected the completion of prompt 0"),
        ('{"index": 0, "prompt": "a", "id": 0}\nprecious', "line 2: expected the completion of prompt 1"),
        ('{"index": 0, "prompt": "a", "id": 0}\n{"index": 0,', "line 2: expected the completion of prompt 1"),
    ],
)
def test_resume_refuses_a_file_of_other_prompts(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        CompletionsFile(str(path), PROMPTS, resume=True)
    assert path.read_text() == content


def test_resume_refuses_other_settings_by_name(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with CompletionsFile(str(path), PROMPTS, settings={"model": "m", "depth": 0.5}) as out:
        out.add(0, 0, {})
    content = path.read_text()
    for settings, message in [
        ({"model": "n", "depth": 0.5}, 'another model: "m" there, "n" now'),
        ({"model": "m"}, 'another depth: 0.5 there, "the default" now'),
        ({"model": "m", "depth": 0.5, "seed": 1}, 'another seed: "the default" there, 1 now'),
    ]:
        with pytest.raises(InvalidInput, match=message):
            CompletionsFile(str(path), PROMPTS, settings=settings, resume=True)
    assert path.read_text() == content
    with CompletionsFile(str(path), PROMPTS, settings={"depth": 0.5, "model": "m"}, resume=True) as out:
        assert out.num_written == 1


def test_resume_refuses_a_file_of_more_prompts(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with CompletionsFile(str(path), PROMPTS) as out:
        for index in range(4):
            out.add(index, 0, {})
    with pytest.raises(InvalidInput, match="line 3"):
        CompletionsFile(str(path), PROMPTS[:2], resume=True)


def test_standard_output_cannot_be_resumed() -> None:
    with pytest.raises(InvalidInput, match="-o"):
        CompletionsFile("-", PROMPTS, resume=True)
