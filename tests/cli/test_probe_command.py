"""`shoal probe`: from labelled prompts to a file that `shoal generate` takes, and what it is worth."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal import Engine, Probe
from shoal.cli.main import app

runner = CliRunner()


def labelled(path: Path, count: int, seed: int = 0) -> Path:
    """Prompts of small letters, and of digits (fewer): a model of bytes tells them apart at its embedding."""
    rng = random.Random(seed)
    lines = []
    for place in range(count):
        digits = place % 3 == 0
        text = "".join(rng.choice("0123456789" if digits else "abcdefghijkl") for _ in range(rng.randint(3, 12)))
        lines.append(json.dumps({"prompt": text, "label": "digits" if digits else "letters"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def invoke(*arguments: Any) -> Any:
    return runner.invoke(app, ["probe", *map(str, arguments)])


@pytest.mark.parametrize("operator", ["pool", "gate", "attention"])
def test_fitted_tried_shown_and_used(operator: str, checkpoint: Path, tmp_path: Path) -> None:
    data, test = labelled(tmp_path / "train.jsonl", 150), labelled(tmp_path / "test.jsonl", 60, seed=1)
    out = tmp_path / "kind.safetensors"
    options = ("--operator", operator, "--learning-rates", "1e-2", "--max-tokens", 10)
    if operator == "attention":
        options = (*options, "--factor", 8)
    done = invoke("fit", checkpoint, "--data", data, "-o", out, *options)
    assert done.exit_code == 0, done.output
    for expected in (
        f"{operator} probe",
        "MULI",
        "bag of words",
        "prompts were cut to 10 tokens",
        "parameters, version",
    ):
        assert expected in done.output
    assert not (tmp_path / "kind.states").exists()
    probe = Probe.load(out)
    assert probe.settings.classes == ("letters", "digits")
    assert probe.settings.name == "kind"
    assert probe.settings.max_prompt_tokens == (10 if operator == "attention" else None)

    if operator != "attention":  # whose test prompts are too long for it, and refused
        figures, picture = tmp_path / "kind.json", tmp_path / "kind.svg"
        tried = invoke("eval", checkpoint, out, "--data", test, "--train", data, "--out", picture, "--json", figures)
        assert tried.exit_code == 0, tried.output
        found = json.loads(figures.read_text())
        assert found["quality"]["f1"] > 0.7
        assert found["baselines"].keys() == {"MULI", "bag of words"}
        assert found["probe"]["version"] == probe.version
        assert all(sum(weights) == pytest.approx(1, abs=1e-4) for weights in found["layer_weights"].values())
        assert "<svg" in picture.read_text()

    shown = invoke("show", out)
    assert probe.version in shown.output
    exported = tmp_path / "kind.out.json"
    assert invoke("export", out, "-o", exported).exit_code == 0
    assert json.loads(exported.read_text())["tensors"].keys() == probe.tensors.keys()

    prompts, completions = tmp_path / "prompts.txt", tmp_path / "completions.jsonl"
    prompts.write_text("abc\n123\n")
    arguments = ["generate", str(checkpoint), str(prompts), "-o", str(completions), "--max-new-tokens", "2"]
    generated = runner.invoke(app, [*arguments, "--probe", str(out)])
    assert generated.exit_code == 0, generated.output
    lines = [json.loads(line) for line in completions.read_text().splitlines()]
    labels = Engine.from_pretrained(checkpoint, cache_gib=0.1).generate(["abc", "123"], probes=[out])
    for line, expected in zip(lines, labels, strict=True):
        assert expected.labels is not None
        assert line["labels"]["kind"]["label"] == expected.labels["kind"].label
        assert line["settings"]["probes"] == [probe.version]


def test_interrupted_extraction_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """What has been read is not read again: states that were changed on the disk come back changed."""
    from shoal.signals.extract import extract

    engine = Engine.from_pretrained(checkpoint, cache_gib=0.1)
    texts = [f"prompt {number}" for number in range(100)]
    calls = []

    def interrupt(what: str, done: int, total: int) -> None:
        calls.append(done)
        if done == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(engine, texts, tmp_path / "states", max_tokens=20, tokens=True, report=interrupt)
    states = extract(
        engine, texts, tmp_path / "states", max_tokens=20, tokens=True, report=lambda *at: calls.append(at[1])
    )
    assert calls == [0, 64, 64, 100]
    whole = extract(engine, texts, tmp_path / "whole", max_tokens=20, tokens=True)
    assert states.pooled.equal(whole.pooled)
    assert states.tokens is not None
    assert whole.tokens is not None
    assert states.tokens.equal(whole.tokens)


def test_mistakes_are_named(checkpoint: Path, tmp_path: Path) -> None:
    data, out = labelled(tmp_path / "train.jsonl", 90), tmp_path / "p.safetensors"
    one_class = tmp_path / "one.jsonl"
    one_class.write_text('{"prompt": "a", "label": 1}\n')
    nothing = tmp_path / "none.jsonl"
    nothing.write_text('{"prompt": "a"}\n')
    for arguments, message in (
        (("fit", checkpoint, "--data", one_class, "-o", out), "two classes or more"),
        (("fit", checkpoint, "--data", nothing, "-o", out), "line 1: needs a 'label'"),
        (("fit", checkpoint, "--data", data, "-o", out, "--positive", "figures"), "got 'figures'"),
        (("fit", checkpoint, "--data", data, "-o", out, "--cache-gib", 1e-9), "cut prompts below 256"),
        (("fit", checkpoint, "--data", data, "-o", out, "--learning-rates", "fast"), "numbers separated by commas"),
        (("fit", checkpoint, "--data", data, "-o", tmp_path / "no" / "p"), "a directory that exists"),
        (("show", data), "holds no probe"),
        (("eval", checkpoint, data, "--data", data, "--out", tmp_path / "a.jpg"), "must be .png or .svg"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert message in " ".join(done.stderr.split()), done.stderr
    assert not out.exists()
