"""`shoal voids` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from shoal import Engine, Sampling
from shoal.cli.main import app


def shoal(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "160", "TERM": "dumb"}, input=stdin
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a pub", "answer": "yes!"}, {"prompt": "by the river", "answer": "no"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_table_picture_and_json(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    picture, counts = tmp_path / "voids.png", tmp_path / "voids.json"
    result = shoal(
        "voids", checkpoint, "--prompts", prompts, "--out", picture, "--json", counts, "--max-new-tokens", "9"
    )
    assert result.exit_code == 0, result.output
    assert "Nothing is saved by this" in result.stdout
    data = json.loads(counts.read_text())
    assert (data["alpha"], data["num_layers"]) == (0.8, 6)
    assert data["prompt"]["tokens"] == [1] * 7 + [2] * 5
    dense = Engine.from_pretrained(checkpoint).generate(["a pub", "by the river"], Sampling(max_new_tokens=9))
    assert sum(data["response"]["tokens"]) == sum(len(done.token_ids) - 1 for done in dense)
    rows = [line.split() for line in result.stdout.splitlines()[1:8]]
    assert [row[0] for row in rows] == ["5", "4", "3", "2", "1", "0", "all"]
    for row in rows[:-1]:
        assert row[1] == f"{100 * data['prompt']['share_by_layer'][int(row[0])]:.1f}%"
        assert row[2] == f"{100 * data['response']['share_by_layer'][int(row[0])]:.1f}%"
    with Image.open(picture) as image:
        assert np.asarray(image.convert("RGB")).std() > 10, "not a blank picture"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prompts.jsonl", "voids.json", "voids.png"]


def test_responses_of_the_file(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    counts = tmp_path / "voids.json"
    result = shoal("voids", checkpoint, "--prompts", prompts, "--response-column", "answer", "--json", counts)
    assert result.exit_code == 0, result.output
    assert json.loads(counts.read_text())["response"]["tokens"] == [2, 2, 1, 1]
    missing = shoal("voids", checkpoint, "--prompts", prompts, "--response-column", "completion")
    assert missing.exit_code == 2
    assert "line 1: no field 'completion' that holds a response" in missing.stderr


def test_standard_input(checkpoint: Path) -> None:
    result = shoal("voids", checkpoint, "--prompts", "-", "--max-new-tokens", "1", stdin="a pub\n")
    assert result.exit_code == 0, result.output
    assert "5 prompt tokens and 0 response tokens" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "1.5"], "--alpha must be 0 to 1, got 1.5"),
        (["--out", "heat.gif"], "suffix must be one of .png, .svg, .pdf"),
        (["--out", "/no/such/place/heat.png"], "cannot be written"),
        (["--json", "/"], "cannot be written"),
        (["--max-new-tokens", "0"], "max_new_tokens must be 1 or more"),
        (["--max-new-tokens", "300"], "line 1: 5 prompt tokens + 300 new tokens exceed"),
    ],
)
def test_bad_input(arguments: list[str], message: str, checkpoint: Path, prompts: Path) -> None:
    result = shoal("voids", checkpoint, "--prompts", prompts, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_empty_prompts(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("")
    result = shoal("voids", checkpoint, "--prompts", path)
    assert result.exit_code == 2
    assert "holds no prompts" in result.stderr
    path.write_text("a\n\n")
    result = shoal("voids", checkpoint, "--prompts", path)
    assert result.exit_code == 2
    assert "line 2: empty prompt" in result.stderr
