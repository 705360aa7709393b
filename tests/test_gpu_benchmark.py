"""The GPU benchmark at tiny sizes on the CPU: what it measures, and that it gives a reason for what it does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CASES = [("OPT-quick", "bfloat16", batch) for batch in (1, 2)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark's module, saving into a directory of the test's."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return gpu


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict]:
    """What its `main` saves."""
    command = ["gpu.py", "--quick", "--device", "cpu", "--threads", "1", "--rounds", "1", "--save", *options]
    monkeypatch.setattr(sys, "argv", command)
    printed: list[dict] = []
    monkeypatch.setattr(gpu, "print_json", lambda name, runs: printed.extend(runs))
    gpu.main()
    json.dumps(printed)
    assert [tuple(one["case"].values())[1:] for one in printed] == CASES
    return printed


def test_depths_beside_their_bound_and_a_peer(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = run(gpu, monkeypatch)
    for one in runs:
        *ours, peer = one["variants"]
        assert [row["variant"] for row in ours] == ["dense", *(f"depth 1/{n}" for n in (2, 3, 4, 5))]
        assert [row["decode_mean_layers"] for row in ours] == sorted(row["decode_mean_layers"] for row in ours)[::-1]
        assert all(row["bytes_over_bandwidth"] > 0 and row["bound"] >= 1 for row in ours)
        assert peer["variant"] == "transformers"
        assert one["same_first_tokens"] == 1, "both engines have the same weights"
        assert not one["peer_compiled"], "on a CPU"
    saved = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["runs"]
    assert [one["case"] for one in saved] == [one["case"] for one in runs]


def test_no_time_left(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = run(gpu, monkeypatch, "--minutes", "0.1")
    assert all("and 6 are left" in one["skipped"] for one in runs)
    assert not (tmp_path / "gpu.json").exists(), "a case that was measured before is kept"


def test_time_for_ours_only(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = run(gpu, monkeypatch, "--minutes", "1")
    assert all("compiling takes about" in one["without_peer"] for one in runs)
    assert all(len(one["variants"]) == 5 for one in runs)


def test_a_failure_costs_its_own_case(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's leaves ours, and one batch's leaves the next."""
    measure = gpu.measure

    def failing(engine: object, peer: object, batch: int, *rest: object) -> object:
        if batch == 1:
            raise RuntimeError("out of memory\nand so on")
        return measure(engine, peer, batch, *rest)

    def no_peer(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu, "measure", failing)
    monkeypatch.setattr(gpu, "Peer", type("Peer", (), {"__init__": no_peer}))
    first, second = run(gpu, monkeypatch)
    assert first["skipped"] == "RuntimeError: out of memory"
    assert second["without_peer"] == "RuntimeError: no compiler"
    assert len(second["variants"]) == 5
