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
    runs = run("decode.py", "--dtypes", "float32")
    assert [tuple(one["case"].values()) for one in runs] == [
        (model, "float32", batch) for model in ("OPT-quick", "Llama-quick") for batch in (2, 1)
    ]
    for one in runs:
        assert one["dense_over_transformers"]["same_completions"] == 1
        *ours, peer = one["variants"]
        assert [row["variant"] for row in ours] == ["dense", *(f"depth {depth}" for depth in DEPTHS)]
        assert peer["variant"] == "transformers"
        assert all(
            {"prompt_s", "decode_s", "total_s", "decode_speedup", "total_speedup"} <= row.keys()
            for row in (*ours, peer)
        )
        layers = [row["decode_mean_layers"] for row in ours]
        assert layers[0] == 12
        assert layers == sorted(layers, reverse=True)
        for saving in ("decode_flops_ratio", "decode_bytes_ratio", "total_flops_ratio", "total_bytes_ratio", "bound"):
            values = [row[saving] for row in ours]
            assert values[0] == 1
            assert values == sorted(values), saving
        assert all(row["bound"] < 12 / row["decode_mean_layers"] for row in ours[1:]), "the head is in the bound"


def test_clocks_serve_the_same_requests_staggered_and_together() -> None:
    (one,) = run("clocks.py")
    rows = {(row["plans"], row["admission"]): row for row in one["variants"]}
    for plans in ("depth 1", "depth 1/2", "depth 1/3", "depth 1/5", "four plans"):
        assert rows[plans, "together"]["flops_ratio"] == rows[plans, "staggered"]["flops_ratio"]
    # Dense reads all weights in as many passes either way; at depth, some row keeps nearly every layer busy.
    assert rows["depth 1", "staggered"]["bytes_over_together"] == 1
    assert rows["depth 1/5", "staggered"]["bytes_over_together"] > 1
    assert rows["four plans", "a small batch each"]["bytes_over_together"] > 1


def test_short_requests_save_more_with_a_shallower_prompt() -> None:
    runs = run("short_requests.py")
    assert [one["case"]["batch"] for one in runs] == [1, 2]
    for one in runs:
        assert {"fixed_s", "layer_s", "r_squared", "products_s", "beyond_products_share"} <= one["fixed_cost"].keys()
        rows = {row["variant"]: row for row in one["variants"]}
        for depth in ("1/2", "1/3", "1/5"):
            plain, shallow = rows[f"depth {depth}"], rows[f"depth {depth}, prompt too"]
            assert plain["decode_mean_layers"] == shallow["decode_mean_layers"]
            assert plain["total_flops_ratio"] < shallow["total_flops_ratio"]
            assert shallow["prompt_layers"] < plain["prompt_layers"] == 12


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    (one,) = run("agreement.py", "--model", "random")
    assert [row["depth"] for row in one["variants"]] == ["1", "1/2", "1/5"]
    for row in one["variants"]:
        assert row["completions"] == 6
        assert row["tokens"] == 6 * 12
        assert 0 <= row["same_completions"] <= row["tokens_before_difference"] <= 1


@pytest.mark.skipif(not list((BENCHMARKS / "results").glob("*.json")), reason="no results have been saved")
def test_the_tables_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "tables.py"), "--check"], check=False)
    assert done.returncode == 0, "run: python benchmarks/tables.py"
