"""`shoal probe`: from labelled prompts to a file that `shoal generate` takes, and what it is worth."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shoal import Engine, Probe
from shoal.cli.main import app
from shoal.errors import InvalidInput, ShoalError

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
        assert "Baselines and levels:" not in tried.output
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


def extracted(engine: Engine, directory: Path, **more: Any) -> Any:
    from shoal.signals.extract import extract

    texts = [f"prompt {number}" for number in range(100)]
    return extract(engine, texts, directory, **{"max_tokens": 20, "tokens": True, **more})


def test_damaged_states_are_read_anew(checkpoint: Path, tmp_path: Path) -> None:
    """A file that is gone or cut does not come back as zeros, and half a record is no traceback."""
    engine, directory = Engine.from_pretrained(checkpoint, cache_gib=0.1), tmp_path / "states"
    whole = extracted(engine, directory).pooled.clone()
    for damage in (
        lambda: (directory / "tokens").unlink(),
        lambda: (directory / "pooled").write_bytes(b"1234"),
        lambda: (directory / "states.json").write_text('{"model": "a'),
    ):
        damage()
        again = extracted(engine, directory)
        assert again.pooled.equal(whole)
        assert again.tokens.any(dim=-1).all()


def test_directories_of_others_are_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    engine = Engine.from_pretrained(checkpoint, cache_gib=0.1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(InvalidInput, match="holds files that are no states"):
        extracted(engine, tmp_path / "mine")
    with pytest.raises(InvalidInput, match="cannot hold states"):
        extracted(engine, tmp_path / "mine" / "thesis.txt")
    extracted(engine, tmp_path / "states")
    with pytest.raises(InvalidInput, match="another choice of files:"):
        extracted(engine, tmp_path / "states", tokens=False)
    with pytest.raises(InvalidInput, match="another choice of prompts:"):
        extracted(engine, tmp_path / "states", max_tokens=3)
    assert len(extracted(engine, tmp_path / "states", max_tokens=3, replace=True).tokens) == 300
    with pytest.raises(InvalidInput, match="the cache may take nan"):
        extracted(engine, tmp_path / "other", budget_gib=float("nan"))
    assert not (tmp_path / "other").exists()

    data, taken = labelled(tmp_path / "train.jsonl", 90), tmp_path / "p.states"
    taken.mkdir()
    (taken / "thesis.txt").write_text("")
    done = invoke("fit", checkpoint, "--data", data, "-o", tmp_path / "p.safetensors", "--learning-rates", "1e-2")
    assert done.exit_code == 2
    assert "p.states holds files that are no states" in done.stderr
    assert (taken / "thesis.txt").exists()


def test_the_probe_is_kept_where_baselines_fail(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written as soon as it is fitted, and its states stay until all is done."""
    from shoal.signals import report

    def fail(*arguments: Any, **more: Any) -> Any:
        raise ShoalError("no memory")

    monkeypatch.setattr(report, "baselines", fail)
    data, out = labelled(tmp_path / "train.jsonl", 90), tmp_path / "p.safetensors"
    done = invoke("fit", checkpoint, "--data", data, "-o", out, "--operator", "pool", "--learning-rates", "1e-2")
    assert done.exit_code == 1, done.output
    assert Probe.load(out).settings.name == "p"
    assert (tmp_path / "p.states" / "states.json").exists()
    monkeypatch.undo()
    done = invoke("fit", checkpoint, "--data", data, "-o", out, "--learning-rates", "1e-2")  # a gate needs other files
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "p.states").exists()


def test_names_that_are_markup(checkpoint: Path, tmp_path: Path) -> None:
    """Printed as they are, also as mathematics."""
    data, out = tmp_path / "train.jsonl", tmp_path / "[b].safetensors"
    lines = labelled(data, 90).read_text()
    data.write_text(lines.replace('"digits"', '"[/b] "').replace('"letters"', '"$\\\\frac$"'), encoding="utf-8-sig")
    done = invoke("fit", checkpoint, "--data", data, "-o", out, "--operator", "pool", "--learning-rates", "1e-2")
    assert done.exit_code == 0, done.output
    assert "[b].safetensors: " in done.output
    assert "30 '[/b]'" in done.output
    assert "[/b] from" in invoke("show", out).output
    done = invoke("eval", checkpoint, out, "--data", data, "--out", tmp_path / "p.svg")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "p.svg").exists()


def test_eval_names_the_line_before_anything_runs(checkpoint: Path, tmp_path: Path) -> None:
    data, out = labelled(tmp_path / "train.jsonl", 90), tmp_path / "p.safetensors"
    done = invoke("fit", checkpoint, "--data", data, "-o", out, "--operator", "pool", "--learning-rates", "1e-2")
    assert done.exit_code == 0, done.output
    tried = invoke("eval", checkpoint, out, "--data", data, "--states", tmp_path / "unused")
    assert tried.exit_code == 0, tried.output
    assert not (tmp_path / "unused").exists(), "nothing needs states"

    long, one_class = tmp_path / "long.jsonl", tmp_path / "one.jsonl"
    long.write_text(data.read_text() + "\n" + json.dumps({"prompt": "7" * 5000, "label": "digits"}) + "\n")
    one_class.write_text('{"prompt": "a", "label": "letters"}\n{"prompt": "b", "label": "letters"}\n')
    for arguments, message in (
        (("--data", long), "long.jsonl, line 92: 5000 prompt tokens"),
        (("--data", data, "--train", one_class), "class 'digits' has no prompt to train on"),
    ):
        done = invoke("eval", checkpoint, out, *arguments)
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.stderr.split())
        assert "labelling" not in done.stderr
    probe = Probe.load(out)
    Probe(probe.settings, {**probe.tensors, "head_bias": torch.tensor([torch.nan])}).save(out)
    done = invoke("eval", checkpoint, out, "--data", data)
    assert done.exit_code == 1
    assert "train.jsonl, line 1: probe 'p' made probabilities that are not finite" in " ".join(done.stderr.split())


def test_mistakes_are_named(checkpoint: Path, tmp_path: Path) -> None:
    data, out = labelled(tmp_path / "train.jsonl", 90), tmp_path / "p.safetensors"
    one_class = tmp_path / "one.jsonl"
    one_class.write_text('{"prompt": "a", "label": 1}\n')
    repeated = tmp_path / "repeated.jsonl"
    repeated.write_text('{"prompt": "a", "label": "x"}\n{"prompt": "b", "label": "y"}\n' * 20)
    nothing = tmp_path / "none.jsonl"
    nothing.write_text('{"prompt": "a"}\n')
    for arguments, message in (
        (("fit", checkpoint, "--data", one_class, "-o", out), "two classes or more"),
        (("fit", checkpoint, "--data", nothing, "-o", out), "line 1: needs a 'label'"),
        (("fit", checkpoint, "--data", data, "-o", out, "--positive", "figures"), "got 'figures'"),
        (("fit", checkpoint, "--data", data, "-o", out, "--cache-gib", 1e-9), "cut prompts below 256"),
        (("fit", checkpoint, "--data", data, "-o", out, "--learning-rates", "fast"), "numbers separated by commas"),
        (("fit", checkpoint, "--data", data, "-o", tmp_path / "no" / "p"), "a directory that exists"),
        (("fit", checkpoint, "--data", data, "-o", out, "--seed", -1), "seed must be 0 to"),
        (("fit", checkpoint, "--data", data, "-o", out, "--weight-decay", -1), "weight_decay must be 0 or more"),
        (("fit", checkpoint, "--data", data, "-o", out, "--gate-scale", 100), "gate_scale of a probe must be above 0"),
        (("fit", checkpoint, "--data", data, "-o", out, "--levels", 99), "num_levels of a probe must be 1 to"),
        (("fit", checkpoint, "--data", data, "-o", out, "--factor", 8), "--factor is for --operator attention"),
        (("fit", checkpoint, "--data", data, "-o", out, "--name", ""), "name of a probe must be a name"),
        (("fit", checkpoint, "--data", repeated, "-o", out), "has no prompt to validate with"),
        (("show", data), "holds no probe"),
        (("eval", checkpoint, data, "--data", data, "--out", tmp_path / "a.jpg"), "must be .png or .svg"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert message in " ".join(done.stderr.split()), done.stderr
    assert not out.exists()
    assert not (tmp_path / "p.states").exists()
