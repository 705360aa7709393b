"""Every benchmark runs at tiny sizes and ends with a JSON line that has its fields. Nothing here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CONDITIONS = {"date", "cpu", "features", "cores", "threads", "python", "shoal", "torch", "transformers"}
DEPTHS = ["1/2", "1/3", "1/4", "1/5"]


def run(script: str, *options: str) -> list[dict[str, Any]]:
    """The runs in the last line that a benchmark prints at quick sizes."""
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--threads", "1", "--rounds", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == script.removesuffix(".py")
    assert all(one["conditions"].keys() == CONDITIONS for one in result["runs"])
    return result["runs"]


def test_decode_reports_four_savings_twice_and_the_bound() -> None:
    runs = run("decode.py", "--dtypes", "float32", "bfloat16", "--peers", "none", "--gates")
    assert [tuple(one["case"].values()) for one in runs] == [
        (model, dtype, batch)
        for model in ("OPT-quick", "Llama-quick")
        for dtype in ("float32", "bfloat16")
        for batch in (1, 2)
    ]
    for one in runs:
        assert one["peers"] == one["absent"] == []
        ours = one["variants"]
        assert [row["variant"] for row in ours] == ["dense", *(f"depth {depth}" for depth in DEPTHS)]
        assert all({"prompt_s", "decode_s", "total_s", "decode_speedup", "total_speedup"} <= row.keys() for row in ours)
        assert all(("agreement" in row) == (one["case"]["dtype"] == "bfloat16") for row in ours)
        layers = [row["decode_mean_layers"] for row in ours]
        assert layers[0] == 12
        assert layers == sorted(layers, reverse=True)
        for saving in ("decode_flops_ratio", "decode_bytes_ratio", "total_flops_ratio", "total_bytes_ratio", "bound"):
            values = [row[saving] for row in ours]
            assert values[0] == 1
            assert values == sorted(values), saving
        assert all(row["bound"] < 12 / row["decode_mean_layers"] for row in ours[1:]), "the head is in the bound"


def test_peers_are_measured_or_named_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_PEER_OPENVINO", raising=False)
    for one in run("prefill.py", "--dtypes", "float32", "--peers", "transformers", "openvino"):
        (measured,), (absent,) = one["peers"], one["absent"]
        assert measured["peer"] == "transformers"
        assert measured["version"] == one["conditions"]["transformers"]
        assert measured["over"].keys() == {"dense"}
        assert absent["peer"] == "openvino"
        assert "SHOAL_PEER_OPENVINO" in absent["reason"]
        assert one["floor_s"] > 0


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux to know resident memory")
def test_memory_is_growth_and_loading_is_beside_reading() -> None:
    (one,) = run("memory.py", "--dtypes", "float32", "--peers", "none", "--gates")
    held = [one[f"{what}_bytes"]["median"] for what in ("loaded", "generating", "peak")]
    assert 0 < held[0] < held[1] <= 1.05 * held[2]
    assert one["weight_bytes"] == pytest.approx(one["file_bytes"], rel=0.05)
    assert (
        one["cache_bytes"] == 2 * 12 * 2 * 32 * 4 * 16
    )  # rows, layers, keys and values, width, bytes, positions of a block
    assert one["load_s"]["median"] > one["read_s"]["median"] > 0


def test_clocks_serve_the_same_requests_staggered_and_together() -> None:
    (one,) = run("clocks.py")
    rows = {(row["plans"], row["admission"]): row for row in one["variants"]}
    for plans in ("depth 1", "depth 1/2", "depth 1/3", "depth 1/5", "four plans"):
        assert rows[plans, "together"]["flops_ratio"] == rows[plans, "staggered"]["flops_ratio"]
    # Dense reads all weights in as many passes either way; at depth, some row keeps nearly every layer busy.
    assert rows["depth 1", "staggered"]["bytes_over_together"] == 1
    assert rows["depth 1/5", "staggered"]["bytes_over_together"] > 1
    assert rows["four plans", "a small batch each"]["bytes_over_together"] > 1
    for (plans, admission), row in rows.items():
        # No bound above the products saved: layers that some row keeps busy are read, whoever else they serve.
        assert 0.9 < row["bound"] < 12
        assert (row["bound"] == row["decode_bound"] == 1) == (plans == "depth 1"), (plans, admission)


def test_short_requests_save_more_with_a_shallower_prompt() -> None:
    runs = run("short_requests.py")
    assert [one["case"]["batch"] for one in runs] == [1, 2]
    for one in runs:
        assert {"fixed_s", "layer_s", "r_squared"} <= one["fixed_cost"].keys()
        rows = {row["variant"]: row for row in one["variants"]}
        for depth in ("1/2", "1/3", "1/5"):
            plain, shallow = rows[f"depth {depth}"], rows[f"depth {depth}, prompt too"]
            assert plain["decode_mean_layers"] == shallow["decode_mean_layers"]
            assert plain["total_flops_ratio"] < shallow["total_flops_ratio"]
            assert shallow["prompt_layers"] < plain["prompt_layers"] == 12


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    (one,) = run("agreement.py", "--model", "random", "--dtypes", "bfloat16")
    assert [row["depth"] for row in one["variants"]] == ["1", "1/2", "1/5"]
    for row in one["variants"]:
        assert row["completions"] == 6
        assert row["tokens"] == 6 * 12
        assert 0 <= row["same_completions"] <= row["tokens_before_difference"] <= 1


@pytest.mark.skipif(not list((BENCHMARKS / "results").glob("*.json")), reason="no results have been saved")
def test_the_tables_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "tables.py"), "--check"], check=False)
    assert done.returncode == 0, "run: python benchmarks/tables.py"


def test_drafting_emits_the_same_tokens() -> None:
    runs = run("drafting.py", "--gates", "--dtype", "float32")
    assert [one["case"]["text"] for one in runs] == ["edit", "free", "greedy"]
    for one in runs:
        rows = {row["draft"]: row for row in one["variants"]}
        assert rows.keys() == {"none", "ngram", "suffix", "trigram", "auto", "self", "small model"}
        assert all(row["same_tokens"] == 1 for row in rows.values())
        assert all(
            {"speedup", "acceptance", "draft_share", "tokens_per_pass", "off"} <= row.keys() for row in rows.values()
        )
    edited = {row["draft"]: row for row in runs[0]["variants"]}
    assert edited["suffix"]["tokens_per_pass"] > 1.5
    assert edited["suffix"]["acceptance"] > 0.5


def test_probes_are_timed_beside_none() -> None:
    (one,) = run("probes.py", "--dtypes", "float32", "--gates")
    rows = {row["probes"]: row for row in one["variants"]}
    assert list(rows) == ["none", "pool, mean", "pool, max", "gate", "four gates", "attention"]
    assert rows["none"]["over_none"] == {"median": 1, "min": 1, "max": 1}
    assert rows["none"]["flops_share"] == rows["none"]["parameters"] == 0
    assert rows["four gates"]["parameters"] == 4 * rows["gate"]["parameters"]
    assert 0 < rows["pool, max"]["flops_share"] < rows["gate"]["flops_share"] < rows["four gates"]["flops_share"]


def test_rank_times_every_ranker() -> None:
    from shoal.rank import RANKERS

    (one,) = run("rank.py", "--gates")
    assert one["seconds_per_1000_queries"].keys() == RANKERS.keys()
    assert (one["budget"], one["batch"], one["documents"]) == (200, 32, 100)


def test_the_server_is_asked_at_every_load_by_every_variant() -> None:
    poisson, saturated = run("serve.py", "--gates")
    half = "depth 1/2, staggered"
    assert [one["case"]["load"] for one in (poisson, saturated)] == ["0.5", "saturated"]
    for one in (poisson, saturated):
        labels = [row["variant"] for row in one["variants"]]
        assert labels == ["dense", "depth 1/2", half, f"{half}, at once", "depth 1/5", "mixed"]
        target = one["target"]
        assert target["ttft_at_most_s"] == pytest.approx(5 * target["alone_ttft_s"], rel=1e-2)
        for row in one["variants"]:
            assert row["requests"] == 8
            for latency in ("ttft_s", "itl_s", "tpot_s"):
                percentiles = list(row[latency].values())
                assert percentiles == sorted(percentiles)
            assert row["goodput_per_s"] == pytest.approx(row["good_share"] * row["offered_per_s"], rel=1e-2)
    assert saturated["variants"][0]["over_forecast"]["median"] > 0
    assert all(row["tokens_per_event"] == 1 for row in saturated["variants"])
    assert all(0 < row["pass_share"]["median"] < 1 for row in saturated["variants"])


def test_entropy_is_measured_beside_none() -> None:
    for one in run("entropy.py", "--gates"):
        assert [row["trace"] for row in one["variants"]] == ["none", "top 20", "full vocabulary"]
        assert one["variants"][0]["over_none"]["median"] == 1
