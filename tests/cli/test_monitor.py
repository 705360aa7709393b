"""`shoal monitor`, from labelled traces to estimates; and `shoal generate --entropy`, which writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from made_traces import TRAINING, made_slice
from shoal.cli.main import app
from shoal.signals.traces import Traced, read_traces


def write(path: Path, traced: list[Traced] | tuple[Traced, ...]) -> Path:
    rows = []
    for one in traced:
        trace = {"top_k": one.trace.top_k, "entropies": one.trace.entropies, "nlls": one.trace.nlls}
        rows.append(
            {"slice": one.slice, "trace": trace} | ({} if one.correct is None else {"correct": int(one.correct)})
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shoal(*arguments: object, exit_code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == exit_code, done.output
    return done.output


def test_from_labels_to_estimates(tmp_path: Path) -> None:
    labelled, sentinel = write(tmp_path / "labelled.jsonl", TRAINING), tmp_path / "sentinel.json"
    said = shoal("monitor", "fit", labelled, "-o", sentinel, "--classifier", "logistic")
    assert "600 responses of 4 slices" in said
    assert "Mean absolute error over 4 slices: sentinel 0.0" in said
    unseen = write(
        tmp_path / "unseen.jsonl",
        [
            *made_slice("new", 0.6, 100, seed=7, labelled=False),
            *made_slice("far", 0.6, 50, seed=7, labelled=False, scale=20),
        ],
    )
    said = shoal("monitor", "estimate", sentinel, unseen, "--json", tmp_path / "slices.json")
    assert "Drift: far: its" in said
    assert "Label next: far." in said
    assert "Every slice has labels." in shoal("monitor", "estimate", sentinel, labelled)
    result = json.loads((tmp_path / "slices.json").read_text())
    new, far = result["slices"]
    assert (new["name"], new["count"], new["alarm"], far["alarm"]) == ("new", 100, False, True)
    assert new["estimate"] == pytest.approx(0.6, abs=0.15)
    few = write(tmp_path / "few.jsonl", made_slice("known", 0.9, 60, seed=8))
    shoal("monitor", "estimate", sentinel, unseen, "--recalibrate", few, "--json", tmp_path / "slices.json")
    assert json.loads((tmp_path / "slices.json").read_text())["affine"]["offset"] != 0
    said = shoal("monitor", "watch", sentinel, unseen, "--window", "50", "--html", tmp_path / "page.html", "--once")
    assert "new window 1:" in said
    assert "far window 0:" in said
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "No window is full yet." in shoal("monitor", "watch", sentinel, unseen, "--window", "500", "--once")
    shoal("monitor", "watch", sentinel, unseen, "--every-s", "inf", exit_code=2)


def test_what_is_refused(tmp_path: Path) -> None:
    labelled = write(tmp_path / "labelled.jsonl", made_slice("a", 0.5, 30, seed=1, labelled=False))
    shoal("monitor", "fit", labelled, "-o", tmp_path / "s.json", exit_code=2)
    shoal("monitor", "estimate", tmp_path / "absent.json", labelled, exit_code=2)
    shoal("monitor", "fit", tmp_path / "absent.jsonl", "-o", tmp_path / "s.json", exit_code=2)
    assert not (tmp_path / "s.json").exists()


def test_generate_writes_traces(checkpoint: Path, tmp_path: Path) -> None:
    """Slices and labels of the prompts' file go through."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "traces.jsonl"
    prompts.write_text('{"prompt": "ab", "slice": "x", "correct": 1}\n{"prompt": "cd", "slice": "y", "correct": 0}\n')
    shoal("generate", checkpoint, prompts, "-o", out, "--entropy", "--max-new-tokens", "6", "--ignore-eos")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        trace = row["trace"]
        assert len(trace["entropies"]) == len(trace["nlls"]) == 6
        assert trace["top_k"] == 20
        assert trace["mean_entropy"] == pytest.approx(sum(trace["entropies"]) / 6, abs=1e-5)
        assert trace["g_nll"] == pytest.approx(sum(trace["nlls"]), abs=1e-5)
    assert [(one.slice, one.correct) for one in read_traces(out)] == [("x", True), ("y", False)]
