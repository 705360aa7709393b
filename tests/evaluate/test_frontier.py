"""Frontiers on tiny random models: every number beside the engine's own, resuming, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save, tiny_model
from shoal import Dense, Engine, Sampling, SkipDecode
from shoal.depth.unified import UnifiedSkip
from shoal.errors import InvalidInput, InvalidPrompt, MissingExtra
from shoal.evaluate.bootstrap import Statistics
from shoal.evaluate.frontier import FrontierConfig, model_names, run_frontier
from shoal.evaluate.frontier_assembly import length_bands
from shoal.evaluate.frontier_plot import plot_frontier
from shoal.evaluate.frontier_result import FrontierResult
from shoal.evaluate.metrics import METRICS

NEW_TOKENS, HORIZON = 10, 8
PROMPTS = [f"name[The {word}]" for word in ("Mill", "Vaults", "Blue Spice", "Eagle", "Punter", "Cricketers")]
REFERENCES = [[f"{prompt[5:-1]} is a pub", "A pub " * (n + 1)] for n, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT of 6 layers, 256 positions, a token per byte."""
    return save(tiny_model("opt", num_hidden_layers=6), tmp_path_factory.mktemp("models") / "deep")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 2 layers."""
    return save(tiny_model("opt", num_hidden_layers=2, seed=1), tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "pubs.jsonl"
    rows = [
        {"prompt": prompt, "references": references, "metric": ["chrf", "exact_match"]}
        for prompt, references in zip(PROMPTS, REFERENCES, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config(checkpoint: Path, task: Path) -> FrontierConfig:
    return FrontierConfig(
        models=(str(checkpoint),), task=str(task), policies=("skipdecode", "unified"), depths=(0.5, 0.34, 0.2),
        max_new_tokens=NEW_TOKENS, horizon=HORIZON, batch=4, timing_rounds=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frontier")


@pytest.fixture(scope="module")
def result(config: FrontierConfig, out: Path) -> FrontierResult:
    return run_frontier(config, out)


def test_arms_are_what_the_engine_does(config: FrontierConfig, result: FrontierResult, out: Path):
    engine = Engine.from_pretrained(config.models[0], max_batch=4)
    assert [arm.name for arm in result.arms] == [
        "dense", "skipdecode 0.5", "skipdecode 0.34", "unified 0.5", "unified 0.34",
    ]  # fmt: skip
    policies = {"dense": Dense(), "skipdecode 0.5": SkipDecode(depth=0.5, horizon=HORIZON)}
    done = {
        name: engine.generate(PROMPTS, Sampling(max_new_tokens=NEW_TOKENS), policy) for name, policy in policies.items()
    }
    count = METRICS["chrf"].statistics
    scored: dict[str, Statistics] = {
        name: count(PROMPTS, REFERENCES, [one.text for one in several]) for name, several in done.items()
    }
    for arm in result.arms[:2]:
        several = done[arm.name]
        ledger = several[0].ledger
        for one in several[1:]:
            ledger = ledger + one.ledger
        assert json.loads((out / "arms" / f"{arm.name.replace(' ', '-')}.json").read_text())["outputs"] == [
            one.text for one in several
        ]
        assert arm.scores["chrf"] == scored[arm.name].score()
        assert arm.realised_mean_layers == ledger.mean_layers
        savings = arm.savings
        assert savings.decode.flops.of_dense == ledger.decode_flops / ledger.dense_decode_flops
        assert savings.decode.flops.value == ledger.decode_flops / len(PROMPTS)
        assert savings.request.flops.value == (ledger.prompt_flops + ledger.decode_flops) / len(PROMPTS)
        assert savings.request.mean_layers.value == ledger.layer_tokens / (ledger.prompt_tokens + ledger.decode_passes)
    dense, half = result.arms[:2]
    assert dense.delta == {}
    assert half.delta["chrf"] == scored["skipdecode 0.5"].minus(scored["dense"])
    for part in (dense.savings.decode, dense.savings.request):
        assert {part.mean_layers.of_dense, part.flops.of_dense, part.bytes.of_dense, part.seconds.of_dense} == {1.0}
    assert half.savings.decode.seconds.value > 0
    assert half.savings.decode.bytes.of_dense < 1


def test_what_a_depth_does_not_allow_is_named(result: FrontierResult):
    assert [one.name for one in result.refused] == ["skipdecode 0.2", "unified 0.2"]
    assert "choose between 2/6" in result.refused[0].reason
    assert "of 6 layers" in result.refused[1].reason


@pytest.mark.parametrize("number", [0, 1, 3])
def test_loss_by_position_is_the_engines(config: FrontierConfig, result: FrontierResult, number: int):
    """The engine is made to write the references, under the arm's plan, and says how probable each token was."""
    arm = result.arms[number]
    engine = Engine.from_pretrained(config.models[0], max_batch=4)
    plan = {0: Dense(), 1: SkipDecode(depth=0.5, horizon=HORIZON), 3: UnifiedSkip(depth=0.5)}[number]
    sums, counts = [0.0] * NEW_TOKENS, [0] * NEW_TOKENS
    for prompt, references in zip(PROMPTS, REFERENCES, strict=True):
        wanted = [*engine.tokenizer(references[0]).input_ids, engine.tokenizer.eos_token_id][:NEW_TOKENS]
        start = len(engine.tokenizer(prompt).input_ids)

        def force(
            token_ids: list[int], logits: torch.Tensor, wanted: list[int] = wanted, start: int = start
        ) -> torch.Tensor:
            forced = torch.full_like(logits, -torch.inf)
            forced[wanted[len(token_ids) - start]] = 0
            return forced

        sampling = Sampling(max_new_tokens=len(wanted), ignore_eos=True, logprobs=0, processor=force)
        (done,) = engine.generate(prompt, sampling, plan)
        assert done.token_ids == tuple(wanted)
        assert done.logprobs is not None
        for position, step in enumerate(done.logprobs):
            sums[position] -= step.logprob
            counts[position] += 1
    assert [one.count for one in arm.loss_by_position] == counts
    assert [one.loss for one in arm.loss_by_position] == pytest.approx(
        [total / count for total, count in zip(sums, counts, strict=True)], abs=1e-4
    )


def test_the_file_comes_back_as_it_was(result: FrontierResult, out: Path):
    loaded = FrontierResult.load(out)
    assert json.dumps(loaded.to_dict()) == json.dumps(result.to_dict())
    assert FrontierResult.load(out / "frontier.json").arms == loaded.arms == result.arms
    with pytest.raises(InvalidInput, match="no such file"):
        FrontierResult.load(out / "other.json")
    (out / "torn.json").write_text(json.dumps({"format": 1, "task": "t"}))
    with pytest.raises(InvalidInput, match="not a whole frontier"):
        FrontierResult.load(out / "torn.json")


def test_lengths_and_examples(result: FrontierResult):
    assert sum(band.count for band in result.arms[0].by_length) == len(PROMPTS)
    example = result.examples[0]
    assert set(example.outputs) == {arm.name for arm in result.arms}
    assert example.prompt in PROMPTS
    assert length_bands(["a b"] * 5) == [("up to 2 words", [0, 1, 2, 3, 4])]
    assert [members for _, members in length_bands(["a"] * 5 + ["a b c"])] == [[0, 1, 2, 3, 4], [5]]


def test_the_figure(result: FrontierResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra 'plot'")
    plot_frontier(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"shoal\[plot\]"):
        plot_frontier(result, tmp_path / "figure.png")


class Interrupted(Exception):
    """Stands for what ends a run from outside."""


def untimed(result: FrontierResult) -> dict[str, Any]:
    """The result without what differs from run to run."""
    data = json.loads(json.dumps(result.to_dict()))
    for arm in data["arms"]:
        del arm["seconds"]
        for part in arm["savings"].values():
            del part["seconds"]
    return data


def test_an_interrupted_run_goes_on(config: FrontierConfig, result: FrontierResult, tmp_path: Path):
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "skipdecode 0.34" and done:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_frontier(config, tmp_path, report=interrupt)
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "arms").iterdir()}
    assert sorted(finished) == ["dense.json", "skipdecode-0.5.json"]
    ran = set()
    again = run_frontier(config, tmp_path, report=lambda what, done, total: ran.add(what))
    assert "skipdecode 0.34" in ran
    assert not {"dense", "skipdecode 0.5"} & ran
    assert {name: (tmp_path / "arms" / name).stat().st_mtime_ns for name in finished} == finished
    assert untimed(again) == untimed(result)
    ran.clear()
    assert run_frontier(config, tmp_path, report=lambda what, done, total: ran.add(what)) == again
    assert not ran
    # Further arms may be asked for, and are timed beside the others; other settings are not those of this directory.
    more = run_frontier(replace(config, depths=(*config.depths, 0.75)), tmp_path)
    assert "unified 0.75" in [arm.name for arm in more.arms]
    for change, message in (
        ({"limit": 3}, "other inputs"),
        ({"batch": 2}, "batch 4, and it is 2 now"),
        ({"horizon": 5}, "horizon 8, and it is 5 now"),
        ({"metrics": ("chrf",)}, "metrics"),
    ):
        with pytest.raises(InvalidInput, match=message):
            run_frontier(replace(config, **change), tmp_path)
    (tmp_path / "arms" / "dense.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"dense\.json is not an arm of a frontier"):
        run_frontier(config, tmp_path)


def test_a_model_that_changed_is_noticed(config: FrontierConfig, tmp_path: Path):
    model = save(tiny_model("opt", num_hidden_layers=6), tmp_path / "model")
    config = replace(config, models=(str(model),), policies=())
    run_frontier(config, tmp_path / "out")
    save(tiny_model("opt", num_hidden_layers=6, seed=5), tmp_path / "model")
    with pytest.raises(InvalidInput, match="other weights"):
        run_frontier(config, tmp_path / "out")


def test_a_small_dense_model_stands_beside(config: FrontierConfig, small: Path, tmp_path: Path):
    config = replace(config, dense_models=(str(small),), policies=("unified",), depths=(0.5,), timing_rounds=0)
    result = run_frontier(config, tmp_path)
    assert result.model == ("deep", "small")
    assert [arm.name for arm in result.arms] == ["deep: dense", "deep: unified 0.5", "small: dense"]
    deep, _, beside = result.arms
    assert beside.num_layers == 2
    assert beside.savings.request.flops.value < deep.savings.request.flops.value
    assert beside.savings.request.flops.of_dense == 1
    assert deep.savings.decode.seconds.value is None
    assert model_names(["runs/a/x", "runs/b/x", "hub/y"]) == {
        "runs/a/x": "runs/a/x",
        "runs/b/x": "runs/b/x",
        "hub/y": "y",
    }
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra 'plot'")
    plot_frontier(result, tmp_path / "figure.png")


def test_outputs_of_one_token_leave_nothing_to_act_on(config: FrontierConfig, tmp_path: Path):
    result = run_frontier(replace(config, max_new_tokens=1, depths=(0.5,)), tmp_path)
    assert [arm.name for arm in result.arms] == ["dense"]
    assert [one.name for one in result.refused] == ["skipdecode 0.5", "unified 0.5"]
    assert all("no plan can act" in one.reason for one in result.refused)
    assert result.arms[0].savings.decode.flops.of_dense is None


def test_language_modelling(checkpoint: Path, tmp_path: Path):
    text = "once upon a time there was a small fish in shallow water. " * 20
    (tmp_path / "story.txt").write_text(text)
    config = FrontierConfig(
        models=(str(checkpoint),), task="lm", data=str(tmp_path / "story.txt"), policies=("unified",), depths=(0.5,),
        max_new_tokens=16, limit=5, batch=2, timing_rounds=1,
    )  # fmt: skip
    result = run_frontier(config, tmp_path / "out")
    dense, half = result.arms
    assert [one.count for one in dense.loss_by_position] == [5] * 16
    # The first position comes from the prompt's pass; the score is of the others.
    assert half.loss_by_position[0] == dense.loss_by_position[0]
    assert half.scores["loss"].value == pytest.approx(sum(one.loss for one in half.loss_by_position[1:]) / 15)
    assert half.loss_by_position[1] != dense.loss_by_position[1]
    assert half.realised_mean_layers == 3
    assert dense.by_length == ()
    assert result.examples == ()
    assert result.conditions["num_inputs"] == 5
    with pytest.raises(InvalidInput, match="can be at most 192"):
        run_frontier(replace(config, max_new_tokens=200), tmp_path / "long")


def test_bad_input(config: FrontierConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for change, message in (
        ({"policies": ("skipdecod",)}, "unknown policy 'skipdecod': did you mean 'skipdecode'"),
        ({"depths": (1.5,)}, "got 1.5"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"models": ()}, "at least one model"),
    ):
        with pytest.raises(InvalidInput, match=message):
            replace(config, **change)
    with pytest.raises(InvalidInput, match="given twice"):
        run_frontier(replace(config, dense_models=config.models), tmp_path)
    with pytest.raises(InvalidPrompt, match=r"input 1: .* exceed the model's 256 positions"):
        run_frontier(replace(config, max_new_tokens=250), tmp_path)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(MissingExtra, match=r"shoal\[evaluate\]"):
        run_frontier(config, tmp_path / "unmade")
    assert not (tmp_path / "unmade").exists()
