"""`shoal suits`: the tables, the picture, the JSON file, and what is wrong with its options."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.main import app
from shoal.depth.policies import POLICIES

runner = CliRunner()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"prompt {i}", "completion": f"completion {i * i}"} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tables_picture_and_json(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    picture, numbers = tmp_path / "suits.png", tmp_path / "suits.json"
    arguments = ["--data", data, "--depths", "2/3,1/2", "--out", picture, "--json", numbers, "--max-examples", 4]
    result = runner.invoke(app, ["suits", *map(str, [checkpoint, *arguments])], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for name in (*POLICIES, "cosine", "agreement", "4 examples"):
        assert name in result.stdout
    record = json.loads(numbers.read_text(encoding="utf-8"))
    assert record["model"] == str(checkpoint)
    assert record["data"] == str(data)
    assert record["advice"] in " ".join(result.stdout.split())
    assert f"{100 * record['outcomes'][0]['agreement']['value']:.1f} [" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "suits.json", "suits.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "1/2,1"], "above 0 and below 1"),
        (["--depths", "half"], "write it as 0.5 or 1/2"),
        (["--depths", "0.1"], "no policy can skip anything on 6 layers at these depths"),
        (["--out", "suits.jpg"], "the suffix must be .png"),
        (["--json", "/no/such/directory/suits.json"], "give a file in a directory that exists"),
        (["--max-examples", "0"], "max_examples must be 1 or more"),
        (["--dtype", "int8"], "--dtype"),
        (["--data", "/no/such/file.jsonl"], "no such file"),
    ],
)
def test_bad_options_get_a_message_and_no_traceback(
    checkpoint: Path, data: Path, arguments: list[str], message: str
) -> None:
    given = arguments if "--data" in arguments else ["--data", str(data), *arguments]
    result = runner.invoke(app, ["suits", str(checkpoint), *given], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_picture_without_matplotlib(checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message comes before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = runner.invoke(app, ["suits", str(checkpoint), "--data", str(data), "--out", "suits.png"])
    assert result.exit_code == 2
    assert "pip install 'shoal[plot]'" in result.stderr
    assert not result.stdout
