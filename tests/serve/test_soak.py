"""A quarter of a minute of what `soak.py` does for twenty: mixed load on a real process, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed (the extra baselines)")

from running import running
from shoal import Engine
from shoal.models.memory import drop_freed
from shoal.serve import worker
from shoal.serve.config import ServeConfig
from soak import slope
from soak_requests import exchange

SOAK = Path(__file__).parents[1] / "soak.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which Linux has")
def test_mixed_load(tmp_path: Path) -> None:
    """Every answer is that of the same request alone, SIGTERM loses none, no file stays open. Memory is for the long run."""
    command = [
        sys.executable,
        SOAK,
        "--minutes",
        "0.25",
        "--size",
        "16",
        "--clients",
        "8",
        "--output",
        tmp_path / "soak.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["equal_to_alone"] > 20
    assert {name.split(":")[0] for name in result["seen"]} >= {"honest", "vanish", "garbage", "too_much"}
    assert result["sigterm"]["lost"] == 0
    assert result["sigterm"]["waiting_at_sigterm"] > 0
    assert not [name for name in result["seen"] if name.endswith("500")]


def test_slopes() -> None:
    """A line is found, and noise of 100 KiB does not hide that nothing grows. Fixed noise: no false alarm."""
    minutes, noise = np.linspace(0, 10, 600), np.random.default_rng(0).normal(scale=100, size=600)
    flat, rising = slope(minutes, 5000 + noise), slope(minutes, 5000 + 50 * minutes + noise)
    assert flat["low"] < 0 < flat["high"]
    assert rising["low"] < 50 < rising["high"]
    assert rising["low"] > 40


def test_freed_memory_goes_back_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again while requests run, not before the first is there."""
    times = []
    monkeypatch.setattr(worker, "TRIM_EVERY_S", 0)
    monkeypatch.setattr(worker, "drop_freed", lambda: times.append(drop_freed()))
    body = {"model": "shoal-e2e", "prompt": "name[The Mill]", "max_tokens": 8, "ignore_eos": True}
    with running(
        Engine.from_pretrained("shoal-e2e", max_batch=2, cache_gib=0.1), ServeConfig(model="shoal-e2e")
    ) as url:
        assert not times
        assert exchange(url.removeprefix("http://"), "/v1/completions", json.dumps(body).encode())[0] == 200
    assert len(times) >= 8
