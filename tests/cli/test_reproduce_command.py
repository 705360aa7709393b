"""`shoal reproduce` from end to end: a kill in the middle, what it prints and writes, and bad input."""

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

from made_e2e import write_e2e
from shoal.cli.main import app

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
runner = CliRunner()


def shoal(*arguments: object) -> Result:
    return runner.invoke(app, ["reproduce", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_killed_run_goes_on_to_a_verdict_on_every_claim(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "skipdecode", "--model", str(checkpoint), "--data", str(write_e2e(tmp_path / "e2e")), "--out", str(out),
        "--depths", "1/2", "--steps", "3", "--batch-size", "4", "--lr", "1e-3", "--limit", "2", "--threads", "1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "shoal.cli.main", "reproduce", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / "dense").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/*/model.safetensors")}
    assert {path.parent.name for path in kept} >= {"fine-tuned", "dense"}
    assert not (out / "reproduction.json").exists()

    result = shoal(*arguments)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    made = json.loads((out / "reproduction.json").read_text(encoding="utf-8"))
    assert [claim["verdict"] for claim in made["claims"]] == ["not shown", "not shown", "not shown", "holds"]
    for claim in made["claims"]:
        assert claim["title"] in result.stdout
        assert claim["rule"] in result.stdout
    for text in ("6 layers; E2E, 2 test inputs", "skipdecode-no-warmup", "early-termination", "decode FLOPs"):
        assert text in result.stdout
    assert "measuring skipdecode: skipdecode 0.5" in result.stderr
    assert "tuning dense" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["skipdecode", "--depths", "1/2,2"], "outside the allowed range"),
        (["skipdecode", "--depths", "1"], "below 1 (dense is always measured)"),
        (["skipdecode", "--lr", "0"], "learning_rate must be above 0"),
        (["skipdecode", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["skipdecode", "--data", "nowhere"], "with trainset.csv and testset_w_refs.csv, plain or .gz"),
        (["calm"], "'calm' is not"),
    ],
)
def test_bad_input_is_a_message(checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    data = write_e2e(tmp_path / "e2e")
    result = shoal("--model", checkpoint, "--data", data, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
