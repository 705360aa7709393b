"""A reproduction from end to end on a tiny random OPT and a few restaurants: stages, numbers, resuming, what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from families import save, tiny_model
from made_e2e import write_e2e
from shoal import EarlyTermination, SkipDecode
from shoal.depth.checkpoint import TunedDepth
from shoal.errors import CheckpointError, InvalidInput, InvalidPrompt
from shoal.evaluate.frontier_result import FrontierResult
from shoal.evaluate.metrics import METRICS
from shoal.evaluate.reproduce import reproduce
from shoal.evaluate.reproduce_config import ReproduceConfig, check, find_e2e, usable_device
from shoal.evaluate.tasks import load_task

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

NUM_LAYERS, STEPS, DEPTHS = 6, 21, (2 / 3, 1 / 3)
WAYS = ("dense", "skipdecode", "skipdecode-no-warmup", "early-termination")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data."""
    home = tmp_path_factory.mktemp("home")
    save(tiny_model("opt", num_hidden_layers=NUM_LAYERS), home / "model")
    write_e2e(home / "data", inputs=3)
    return home


@pytest.fixture(scope="module")
def config(home: Path) -> ReproduceConfig:
    return ReproduceConfig(
        model=str(home / "model"),
        data=str(home / "data"),
        depths=DEPTHS,
        steps=STEPS,
        batch_size=8,
        learning_rate=1e-3,
        threads=1,
    )


@pytest.fixture(scope="module")
def out(home: Path) -> Path:
    return home / "out"


@pytest.fixture(scope="module")
def result(config: ReproduceConfig, out: Path) -> dict[str, Any]:
    """The uninterrupted run."""
    return reproduce(config, out)


def test_all_ways_take_equal_budgets_from_one_dense_checkpoint(result: dict[str, Any], out: Path):
    training = result["training"]
    assert list(training) == ["fine-tuned", *WAYS]
    assert {one["steps"] for one in training.values()} == {STEPS}
    assert len({training[name]["tokens"] for name in WAYS}) == 1
    start = load_file(out / "checkpoints" / "fine-tuned" / "model.safetensors")
    for name in WAYS:
        tuned = load_file(out / "checkpoints" / name / "model.safetensors")
        moved = max(float((tuned[key] - start[key]).abs().max()) for key in start)
        assert 0 < moved < 0.05, f"{name}: {STEPS} steps of 1e-3 move no weight farther"
    horizons = {name: TunedDepth.load(out / "checkpoints" / name) for name in WAYS}
    assert {tuned.horizon for tuned in horizons.values() if tuned} == {result["horizon"]}
    assert {name: (tuned.policy, tuned.warmup_layers, tuned.depths) for name, tuned in horizons.items() if tuned} == {
        "dense": ("skipdecode", 1, (1.0,)),
        "skipdecode": ("skipdecode", 1, (1.0, *DEPTHS)),
        "skipdecode-no-warmup": ("skipdecode", 0, (1.0, *DEPTHS)),
        "early-termination": ("early-termination", 1, (1.0, *DEPTHS)),
    }


def test_every_way_is_measured_under_its_own_plans(result: dict[str, Any], out: Path):
    horizon = result["horizon"]
    for name, policy in {
        "skipdecode": lambda depth: SkipDecode(depth=depth, horizon=horizon, warmup_layers=1),
        "skipdecode-no-warmup": lambda depth: SkipDecode(depth=depth, horizon=horizon, warmup_layers=0),
        "early-termination": lambda depth: EarlyTermination(depth=depth, horizon=horizon),
    }.items():
        arms = FrontierResult.load(out / "frontiers" / name).arms
        assert [arm.plan for arm in arms[1:]] == [policy(depth).plan(NUM_LAYERS).to_dict() for depth in DEPTHS]
        assert (out / "frontiers" / name / "report.html").stat().st_size > 5000
    assert [arm.name for arm in FrontierResult.load(out / "frontiers" / "dense").arms] == ["dense"]


def test_differences_are_those_of_the_outputs(result: dict[str, Any], config: ReproduceConfig, out: Path):
    """BLEU of what the arms wrote, counted anew, and resampled together."""
    _, inputs = load_task("e2e", str(find_e2e(config.data)[1]))

    def statistics(checkpoint: str, arm: str) -> Any:
        written = json.loads((out / "frontiers" / checkpoint / "arms" / f"{arm}.json").read_text())["outputs"]
        return METRICS["bleu"].statistics([one.prompt for one in inputs], [one.references for one in inputs], written)

    for claim, other in zip(result["claims"], ("dense", "skipdecode-no-warmup", "early-termination"), strict=False):
        assert [one["depth"] for one in claim["comparisons"]] == list(DEPTHS)
        for one, arm in zip(claim["comparisons"], ("0.667", "0.333"), strict=True):
            ours = statistics("skipdecode", f"skipdecode-{arm}")
            policy = other.removesuffix("-no-warmup")
            difference = ours.minus(statistics(other, "dense" if other == "dense" else f"{policy}-{arm}"), seed=0)
            assert [one["difference"][end] for end in ("value", "low", "high")] == pytest.approx(
                [difference.value, difference.low, difference.high]
            )
            assert one["verdict"] == "not shown"
            assert one["reason"] == "needs 100 test inputs or more"


def test_batching_and_caching_are_exact(result: dict[str, Any]):
    claim = result["claims"][3]
    assert claim["verdict"] == "holds"
    assert claim["measured"]["num_requests"] == 3
    assert claim["measured"]["num_parted"] == 0
    assert claim["measured"]["uncached_nats"] < 1e-4


def test_the_file_names_no_place_on_the_machine(result: dict[str, Any], home: Path, out: Path):
    text = (out / "reproduction.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(result))
    assert str(home) not in text
    assert result["model"] == {"name": "model", "num_layers": NUM_LAYERS}
    savings = [arm["savings"]["decode"] for arm in result["arms"] if arm["checkpoint"] == "skipdecode"]
    assert [one["mean_layers"]["of_dense"] for one in savings] == sorted(
        (one["mean_layers"]["of_dense"] for one in savings), reverse=True
    )
    assert all(one[saving]["of_dense"] > 0 for one in savings for saving in ("flops", "bytes", "seconds"))


class Interrupted(Exception):
    """Stands for what ends a run from outside."""


def test_an_interrupted_run_goes_on(config: ReproduceConfig, result: dict[str, Any], home: Path, tmp_path: Path):
    """From pickled weights, too: interrupted within a tuning, within a frontier, and after the last stage."""
    shutil.copytree(home / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    config, out = replace(config, model=str(tmp_path / "model")), tmp_path / "out"
    ran: list[str] = []

    def until(stage: str, done: int) -> None:
        def report(what: str, progress: int, total: int) -> None:
            ran.append(what)
            if what.startswith(stage) and progress >= done:
                raise Interrupted

        ran.clear()
        with pytest.raises(Interrupted):
            reproduce(config, out, report=report)

    until("tuning skipdecode,", 20)
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "checkpoints" / "skipdecode.tuning" / "settings.json").is_file()
    finished = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").glob("*/model.safetensors")}
    assert sorted(path.parent.name for path in finished) == ["dense", "fine-tuned"]
    (out / "checkpoints" / ".skipdecode.torn").mkdir()
    until("measuring skipdecode: skipdecode 0.333", 1)
    assert not {what for what in ran if what.startswith(("tuning fine-tuned", "tuning dense"))}
    assert not list((out / "checkpoints").glob(".*"))
    finished |= {path: path.stat().st_mtime_ns for path in out.rglob("arms/*.json")}
    assert "skipdecode-0.667.json" in {path.name for path in finished}

    again = reproduce(config, out)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    for part in ("training", "claims", "horizon", "data"):
        assert again[part] == result[part]
    ran.clear()
    assert reproduce(config, out, report=lambda what, done, total: ran.append(what)) == again
    assert not ran

    for change, message in (
        ({"seed": 1}, "holds a reproduction with seed 0, not 1"),
        ({"steps": 5}, "steps 21, not 5"),
        ({"model": str(home / "model")}, "with model"),
        ({"limit": 2}, "limit None, not 2"),
    ):
        with pytest.raises(InvalidInput, match=message):
            reproduce(replace(config, **change), out)


def test_values_that_cannot_be_are_refused(config: ReproduceConfig):
    for change, message in (
        ({"depths": ()}, "at least one depth"),
        ({"depths": (1 / 2, 1.0)}, r"below 1 \(dense is always measured\), got 1.0"),
        ({"depths": (1 / 2, 1 / 2)}, "named twice"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"batch_size": 8, "accumulate": 3}, "multiple of accumulate"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
    ):
        with pytest.raises(InvalidInput, match=message):
            replace(config, **change)


def test_nothing_is_made_where_something_is_wrong(config: ReproduceConfig, home: Path, tmp_path: Path):
    out = tmp_path / "out"
    write_e2e(tmp_path / "half").joinpath("testset_w_refs.csv.gz").unlink()
    (write_e2e(tmp_path / "none") / "trainset.csv").write_text("mr,ref\n")
    (write_e2e(tmp_path / "other") / "trainset.csv").write_text("prompt,completion\na,b\n")
    long = write_e2e(tmp_path / "long", inputs=1) / "testset_w_refs.csv.gz"
    long.write_bytes(gzip.compress(f"mr,ref\nname[{'x' * 160}],pub\n".encode()))
    shutil.copytree(home / "model", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"torn")
    for change, error, message in (
        (
            {"data": str(tmp_path / "nowhere")},
            InvalidInput,
            r"no trainset\.csv and testset_w_refs\.csv: .* plain or \.gz",
        ),
        ({"data": str(tmp_path / "half")}, InvalidInput, r"has no testset_w_refs\.csv: give"),
        ({"data": str(tmp_path / "none")}, InvalidInput, "holds no training examples"),
        ({"data": str(tmp_path / "other")}, InvalidInput, "expected the columns 'mr' and 'ref'"),
        ({"data": str(tmp_path / "long")}, InvalidPrompt, "input 1: .* exceed the model's 256 positions"),
        ({"model": str(tmp_path / "nowhere")}, CheckpointError, "no such directory"),
        ({"model": str(tmp_path / "broken")}, CheckpointError, "not a whole safetensors file"),
        ({"model": "shoal-e2e"}, InvalidInput, r"tuned to skip layers already \(policy skipdecode\)"),
        (
            {"depths": (1 / 2, 1 / 5)},
            InvalidInput,
            "has 6 layers, and skipdecode 0.2 cannot run: .* choose between 2/6",
        ),
        ({"depths": (0.99,)}, InvalidInput, "it changes nothing"),
        ({"device": "cuda:1"}, InvalidInput, "must be cpu or cuda"),
    ):
        with pytest.raises(error, match=message):
            reproduce(replace(config, **change), out)
        assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for wrong, message in (
        (tmp_path / "full", "not empty"),
        (tmp_path / "full" / "letter.txt", "cannot be made a directory"),
    ):
        with pytest.raises(InvalidInput, match=message):
            reproduce(config, wrong)


def test_data_by_name(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path))
    with pytest.raises(
        InvalidInput, match=r"e2e_nlg \(\$SHOAL_DATA/e2e_nlg\) has no trainset\.csv and testset_w_refs\.csv"
    ):
        find_e2e("e2e")
    shutil.copytree(home / "data", tmp_path / "e2e_nlg")
    assert [path.name for path in find_e2e("e2e")] == ["trainset.csv", "testset_w_refs.csv.gz"]
    checked = check(ReproduceConfig(model=str(home / "model"), depths=DEPTHS, limit=2))
    assert (len(checked.inputs), checked.num_layers, checked.metric) == (2, NUM_LAYERS, "bleu")
    assert np.sum([len(one.references) for one in checked.pairs]) == 24


def test_a_device_that_tuning_would_not_take_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The Trainer takes the GPU where PyTorch sees one; here it is told what to see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device(None) == usable_device("cpu") == "cpu"
    with pytest.raises(InvalidInput, match="sees no GPU"):
        usable_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable_device(None) == usable_device("cuda") == "cuda"
    with pytest.raises(InvalidInput, match="CUDA_VISIBLE_DEVICES=''"):
        usable_device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidInput, match="sees 2: choose one"):
        usable_device("cuda")
