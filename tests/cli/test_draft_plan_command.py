"""`shoal draft-plan` as a user meets it, and its file in `shoal generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shoal import DepthPlan
from shoal.cli.main import app


def shoal(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160", "TERM": "dumb"})


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a pub\nby the river\nname[The Mill]\nfood[French]\n")
    return path


def test_search_then_generate(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft_plan.json"
    search = ("draft-plan", checkpoint, prompts, "-o", out, "--max-new-tokens", 12, "--layers", 2)
    result = shoal(*search, "--trials", 8)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    found = json.loads(out.read_text())
    assert next(row for row in rows if row[:1] == ["found"])[1:3] == [str(layer) for layer in found["layers"]]
    assert DepthPlan.load(out).active(0) == tuple(found["layers"])
    assert len(found["scores"]) == 8
    assert found["searched"]["agreement"] == max(found["scores"].values())

    again = shoal(*search, "--trials", 8)
    assert again.exit_code == 2
    assert "go on with --resume" in again.stderr
    more = shoal(*search, "--trials", 15, "--resume")
    assert more.exit_code == 0, more.output
    assert len(json.loads(out.read_text())["scores"]) == 15
    absent = shoal(*search[:4], tmp_path / "absent.json", "--resume")
    assert absent.exit_code == 2
    assert "leave --resume out" in absent.stderr

    plain, drafted = tmp_path / "plain.jsonl", tmp_path / "drafted.jsonl"
    options = ("--max-new-tokens", 20, "--ignore-eos")
    assert shoal("generate", checkpoint, prompts, "-o", plain, *options).exit_code == 0
    result = shoal("generate", checkpoint, prompts, "-o", drafted, *options, "--draft-plan", out)
    assert result.exit_code == 0, result.output
    assert "Drafting: " in result.stderr
    completions = [
        [json.loads(line)["completion"] for line in path.read_text().splitlines()] for path in (plain, drafted)
    ]
    assert completions[0] == completions[1]


def test_refused(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft_plan.json"
    for extra, message in (
        (("--layers", 6), "must be 1 to 5"),
        (("--limit", 0), "--limit must be 1 or more"),
        (("--limit", 1), "2 texts or more"),
    ):
        result = shoal("draft-plan", checkpoint, prompts, "-o", out, *extra)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not out.exists()
    generate = ("generate", checkpoint, prompts, "-o", tmp_path / "out.jsonl", "--draft-plan", out)
    for extra, message in (((), "no plan can be read"), (("--draft", "suffix"), "leave --draft suffix out")):
        result = shoal(*generate, *extra)
        assert result.exit_code == 2
        assert message in result.stderr
