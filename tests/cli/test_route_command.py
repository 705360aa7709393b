"""`shoal route`: from pairs to a router that `shoal generate` takes."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from shoal import load_router
from shoal.cli.main import app

runner = CliRunner()


def test_a_router_is_trained_saved_and_used(checkpoint: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "pairs.jsonl", tmp_path / "router"
    data.write_text(
        "".join(json.dumps({"prompt": f"say {n}", "completion": "yes " * (n + 1)}) + "\n" for n in range(6))
    )
    arguments = [
        "route",
        str(checkpoint),
        str(data),
        "-o",
        str(out),
        "--depth",
        "1/2",
        "--steps",
        "2",
        "--batch-size",
        "3",
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "a first router, mean depth 0.5" in result.stderr
    assert load_router(out).shape.num_layers == 6
    again = runner.invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_recovery_is_firsts(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = ["route", str(checkpoint), str(data), "-o", str(tmp_path / "r"), "--depth", "1/2"]
    result = runner.invoke(app, [*arguments, "--kind", "dr-llm", "--recover", str(tmp_path / "c")])
    assert result.exit_code == 2
    assert "--kind first" in result.stderr
