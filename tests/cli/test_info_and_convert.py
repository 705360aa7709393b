"""`shoal info` and `shoal convert` as a user meets them."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from families import save, tiny_model
from shoal.cli.main import app
from shoal.depth.checkpoint import TunedDepth


def shoal(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Ten layers, so that depth 1/5 is just possible."""
    return save(tiny_model("qwen3", num_hidden_layers=10), tmp_path / "model", dtype=torch.bfloat16)


def facts(output: str) -> dict[str, str]:
    """The lines `name  value` of the first table."""
    lines = output.split("\n\n")[0].splitlines()
    return {line[:12].strip(): line[12:].strip() for line in lines}


def test_info_of_a_tuned_model(checkpoint: Path) -> None:
    TunedDepth(horizon=40, warmup_layers=1, depths=(1.0, 0.5, 0.2)).save(checkpoint)
    result = shoal("info", checkpoint)
    assert result.exit_code == 0
    assert facts(result.stdout) == {
        "family": "qwen3",
        "layers": "10 of width 48",
        "attention": "6 heads of 24, 2 for keys and values",
        "MLP": "76 gated, silu",
        "vocabulary": "263, head tied to the embedding",
        "positions": "256 rotary",
        "parameters": "308 k",  # 10 x (48 (144 + 96) + 144 48 + 3 48 76 + 2 48 + 2 24) + 263 48 + 48
        "dtype": "bfloat16",
        "tokenizer": "TokenizersBackend, 258 tokens",
        "tuned for": "skipdecode at depth 1, 0.5, 0.2; horizon 40, 1 warm-up",
    }
    assert "40 new tokens after 128, batch 1; depths from 2/10 to 1" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line[:1] == "1"]
    assert [row[0] for row in rows] == ["1", "1/2", "1/3", "1/4", "1/5"]
    assert rows[1][1:4] == ["8", "to", "2"]
    assert rows[0][-1] == "100%"
    shares = [int(row[-1].removesuffix("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] > 20, (
        "the head is read at every depth, so a fifth of the layers is more than a fifth of the bytes"
    )


def test_info_of_a_shallow_untuned_model_without_tokenizer(tmp_path: Path) -> None:
    save(tiny_model("opt"), tmp_path, tokenizer=False)
    result = shoal("info", tmp_path, "--dtype", "float16", "--batch", "8")
    assert result.exit_code == 0
    shown = facts(result.stdout)
    assert shown["positions"] == "256 learned"
    assert shown["dtype"] == "float16"
    assert "has no tokenizer" in shown["tokenizer"]
    assert "shoal tune" in result.stdout
    assert ["1/3", "not", "with", "4", "layers"] in [line.split() for line in result.stdout.splitlines()]


@pytest.mark.parametrize("command", ["info", "plan"])
def test_the_hub_is_not_asked_for_weights(
    command: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face's cache after its configs were fetched, and no network."""
    asked: list[list[str]] = []
    download = huggingface_hub.snapshot_download

    def spy(*arguments: Any, allow_patterns: list[str], **options: Any) -> str:
        asked.append(allow_patterns)
        return download(*arguments, allow_patterns=allow_patterns, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "4" * 40
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(checkpoint, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    result = shoal(command, "someone/tiny")
    assert result.exit_code == 0, result.output
    assert asked
    assert not any(fnmatch.fnmatch("model.safetensors", pattern) for patterns in asked for pattern in patterns)
    if command == "info":
        shown = facts(result.stdout)
        assert shown["parameters"].startswith("about 306 k by config.json")  # as above, without the norms
        assert shown["dtype"] == "bfloat16"


def test_info_of_an_interrupted_download(checkpoint: Path) -> None:
    """Weights are not read, but a tensor of the wrong shape is found all the same."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    result = shoal("info", checkpoint)
    assert result.exit_code == 2
    assert "truncated" in result.stderr
    assert "Traceback" not in result.stderr


def test_convert_then_info(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    refused = shoal("info", checkpoint)
    assert refused.exit_code == 2
    assert f"shoal convert {checkpoint}" in refused.stderr

    converted = tmp_path / "converted"
    result = shoal("convert", checkpoint, converted)
    assert result.exit_code == 0
    assert f"shoal info {converted}" in result.stdout
    assert facts(shoal("info", converted).stdout)["family"] == "qwen3"

    again = shoal("convert", checkpoint, converted)
    assert again.exit_code == 2
    assert "nothing is overwritten" in again.stderr


@pytest.mark.parametrize("command", ["info", "convert"])
def test_no_such_model(command: str, tmp_path: Path) -> None:
    arguments = [tmp_path / "none"] + ([tmp_path / "new"] if command == "convert" else [])
    result = shoal(command, *arguments)
    assert result.exit_code == 2
    assert f"no such directory: {tmp_path / 'none'}" in result.stderr
    assert "Traceback" not in result.stderr


def test_examples_in_the_help() -> None:
    assert "shoal info shoal-e2e" in shoal("info", "--help").stdout
    assert "shoal convert facebook/opt-1.3b models/opt-1.3b" in shoal("convert", "--help").stdout
