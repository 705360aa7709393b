"""Deferral curves: their ends are the two models, a rule that knows beats chance, and the learned rule sees no answer it scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from families import save, tiny_model
from shoal.cli.main import app
from shoal.errors import InvalidInput
from shoal.evaluate.cascade import CHANCE, LEARNED, RULES, SHARES, Answers, deferral_curves


def made(num_inputs: int = 400, *, seed: int = 7) -> tuple[Answers, Answers]:
    """A small model that is right where its worst token is likely, and a large one that is right nine times of ten."""
    rng = np.random.default_rng(seed)
    worst = rng.uniform(-6, 0, num_inputs)
    logprobs = tuple(np.concatenate(([low], rng.uniform(-0.5, 0, rng.integers(3, 40)))) for low in worst)
    small_right = rng.random(num_inputs) < np.exp(worst / 2)
    large_right = rng.random(num_inputs) < 0.9
    ones = np.ones(num_inputs)
    return (
        Answers(counts=np.stack((100.0 * small_right, ones), axis=1), flops=ones, logprobs=logprobs),
        Answers(counts=np.stack((100.0 * large_right, ones), axis=1), flops=10 * ones, logprobs=logprobs),
    )


def test_curves_run_from_one_model_to_the_other() -> None:
    small, large = made()
    found = deferral_curves(small, large, "exact_match")
    assert found.curves.keys() == {*RULES, LEARNED, CHANCE}
    for points in found.curves.values():
        assert [point.share for point in points] == list(SHARES)
        assert points[0].score.value == pytest.approx(small.counts[:, 0].mean())
        assert points[-1].score.value == pytest.approx(large.counts[:, 0].mean())
        assert [point.flops for point in points] == pytest.approx([1 + 10 * share for share in SHARES])


def test_rules_that_know_beat_chance() -> None:
    """The worst token says it all here; the sum hears it, too; the median does not."""
    found = deferral_curves(*made(), "exact_match")
    assert found.areas[CHANCE] == 0
    assert found.areas["lowest"] > 3
    assert found.areas[LEARNED] > 3
    assert found.areas["lowest"] > found.areas["quantile 0.5"] + 2


def test_nothing_is_learnt_from_noise() -> None:
    """Whether answers are right has nothing to do with log-probabilities: no rule is far from chance."""
    small, large = made()
    shuffled = np.random.default_rng(1).permutation(len(small.counts))
    unrelated = Answers(counts=small.counts[shuffled], flops=small.flops, logprobs=small.logprobs)
    found = deferral_curves(unrelated, large, "exact_match")
    assert max(map(abs, found.areas.values())) < 3


def test_too_few_inputs() -> None:
    small, large = made(9)
    with pytest.raises(InvalidInput, match="10 inputs or more, got 9"):
        deferral_curves(small, large, "exact_match")


def test_the_command(tmp_path: Path) -> None:
    for name, seed in (("small", 1), ("large", 2)):
        save(tiny_model("llama", seed=seed), tmp_path / name)
    lines = [{"prompt": f"{n} + 1 =", "answer": str(n + 1), "metric": "exact_match"} for n in range(12)]
    task, out = tmp_path / "sums.jsonl", tmp_path / "deferral.json"
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["defer", tmp_path / "small", tmp_path / "large", "--task", task, "-o", out, "--max-new-tokens", 4]
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "Best on average over the curve" in result.stdout
    written = json.loads(out.read_text())
    assert written["inputs"] == 12
    assert written["curves"].keys() == {*RULES, LEARNED, CHANCE}
    assert written["adaptive"] == []
    result = CliRunner().invoke(app, [*map(str, arguments), "--adaptive"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "Entropy Adaptive Decoding at its best" in result.stdout
    both = json.loads(out.read_text())
    assert both["curves"] == written["curves"]
    rows = {
        line.split()[0]: line.split()
        for line in result.stdout.splitlines()
        if line.split()[:1] and "%" in line.split()[0]
    }
    assert {point["share"] for point in both["adaptive"]} < set(SHARES)
    for share in SHARES:
        points = [point for point in both["adaptive"] if point["share"] == share]
        by_large = [f"{point['by_large']:.0%}" for point in points]
        assert [cell for cell in rows[f"{share:.0%}"][1:] if "%" in cell] == by_large
    result = CliRunner().invoke(app, [*map(str, arguments[:5]), "--limit", "3"])
    assert result.exit_code == 2
    assert "10 inputs or more, got 3" in result.stderr
