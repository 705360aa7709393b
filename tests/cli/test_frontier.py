"""`shoal frontier` from end to end: what it prints and writes, a kill in the middle, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shoal.cli.main import app
from shoal.evaluate.frontier_result import FrontierResult

pytest.importorskip("matplotlib", reason="matplotlib comes with the extra 'plot'")
runner = CliRunner()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.jsonl"
    rows = [{"prompt": f"name[The {n}]", "answer": f"The {n}", "metric": "exact_match"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shoal(*arguments: object) -> Result:
    return runner.invoke(app, ["frontier", *map(str, arguments)], env={"COLUMNS": "200"})


def test_it_writes_a_result_and_a_figure(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = shoal(
        "--model", checkpoint, "--task", task, "--policies", "skipdecode,unified", "--depths", "1/2,0.2", "--out", out,
        "--limit", 4, "--max-new-tokens", 6, "--batch", 2, "--timing-rounds", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = FrontierResult.load(out)
    assert [arm.name for arm in made.arms] == ["dense", "skipdecode 0.5", "unified 0.5"]
    assert made.conditions["num_inputs"] == 4
    assert (out / "frontier.png").stat().st_size > 5000
    for text in ("skipdecode 0.5", "unified 0.5", "exact match", "100%"):
        assert text in result.stdout
    assert "not run: unified 0.2: depth 0.2 keeps 1 of 6 layers" in result.stderr


def test_a_killed_run_goes_on(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    arguments = [
        "--model", str(checkpoint), "--task", str(task), "--policies", "skipdecode,unified", "--depths",
        "0.8,0.7,0.5,0.4", "--max-new-tokens", "40", "--timing-rounds", "0", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "shoal.cli.main", "frontier", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    arms = tmp_path / "out" / "arms"
    deadline = time.monotonic() + 120
    while not (arms.is_dir() and any(arms.glob("*.json"))) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in arms.glob("*.json")}
    assert finished
    assert not (tmp_path / "out" / "frontier.json").exists()
    result = shoal(*arguments)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    undisturbed = shoal(*arguments[:-1], str(tmp_path / "whole"))
    assert undisturbed.exit_code == 0, undisturbed.output
    one, other = (FrontierResult.load(tmp_path / name) for name in ("out", "whole"))
    assert [(arm.name, arm.scores, arm.loss_by_position) for arm in one.arms] == [
        (arm.name, arm.scores, arm.loss_by_position) for arm in other.arms
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "unifed"], "unknown policy 'unifed': did you mean 'unified'"),
        (["--depths", "1/2,2"], "outside the allowed range"),
        (["--task", "e2"], "did you mean 'e2e'"),
        (["--metric", "blue"], "did you mean 'bleu'"),
        (["--data", "somewhere"], "leave out the data"),
    ],
)
def test_bad_input_is_a_message(
    checkpoint: Path, task: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = shoal("--model", checkpoint, "--task", task, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
