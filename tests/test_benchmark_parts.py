"""What benchmarks compute from what they measure: floors, gates and tables. Nothing here looks at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from shoal import Dense, Engine, Sampling, SkipDecode
from shoal.depth.plan import DepthPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import decode_tables
import gates
import http_load
import serve_process
import served
from machine import Limits
from models import random_checkpoint

sys.path.pop(0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny model."""
    checkpoint = random_checkpoint("OPT-quick", tmp_path_factory.mktemp("checkpoints"))
    return Engine.from_pretrained(checkpoint, dtype="float32", cache_gib=0.1)


def plans(num_layers: int) -> list[DepthPlan]:
    return [Dense().plan(num_layers), *(SkipDecode(depth=d, horizon=8).plan(num_layers) for d in (1 / 2, 1 / 3, 1 / 5))]


def test_recorded_passes_add_up_to_the_ledgers_and_the_bytes(engine: Engine) -> None:
    """Ragged prompts under four plans, so that layers serve different rows, and a request that comes late."""
    engine.stats.reset()
    sampling = Sampling(max_new_tokens=9, ignore_eos=True)
    done = []
    with served.recording(engine) as recorded:
        for row, plan in enumerate(plans(engine.shape.num_layers)):
            engine.add([1 + row] * (3 + row), sampling, plan)
            done += engine.step()
        while engine.has_work:
            done += engine.step()
    ledgers = [chunk.generation.ledger for chunk in done if chunk.generation is not None]
    passes = [one.served(engine.shape) for one in recorded]
    parts = [part for one in passes for part in one.parts]
    assert len(ledgers) == 4
    assert [one.has_prompt for one in passes] == [True] * 4 + [False] * 8
    assert sum(part.flops for part in parts) == sum(one.prompt_flops + one.decode_flops for one in ledgers)
    assert sum(part.bytes_moved for part in parts) == engine.stats.prompt_bytes + engine.stats.decode_bytes
    assert "record" not in vars(engine.runner.slots), "recording is over"


def test_the_floor_at_one_clock_is_that_of_what_ran(engine: Engine) -> None:
    shape = engine.shape
    limits = Limits(engine.runner.decoder, rows=3, quick=True)
    limits.bandwidth, limits.peak = 1e9, 40e9  # float32: two operations per value for every row and four bytes
    for plan in plans(shape.num_layers):
        with served.recording(engine) as recorded:
            engine.generate([[1, 2, 3]] * 3, Sampling(max_new_tokens=9, ignore_eos=True), plan)
        prompt, *decode = (one.served(shape) for one in recorded)
        expected = served.decode_floor_s(plan, shape, limits, prompt_tokens=3, new_tokens=9, batch=3)
        assert sum(one.floor_s(limits) for one in decode) == pytest.approx(expected)
        if plan == Dense().plan(shape.num_layers):
            assert prompt == served.prompt_pass(shape, batch=3, length=3)


def decode_run(*, batch: int = 8, over_openvino: float = 0.9) -> dict[str, Any]:
    """A run as decode.py makes it, as far as gates and summaries read it."""

    def peer(name: str, over: float) -> dict[str, Any]:
        ratio = {"median": over, "min": over, "max": over}
        half = {"median": 2 * over, "min": over, "max": over}
        return {
            "peer": name,
            "version": "1.2",
            "note": "computes",
            "decode_tokens_per_s": 200,
            "over": {"dense": {"decode": ratio, "total": ratio}, "depth 1/2": {"decode": half, "total": half}},
        }

    rows = [
        {
            "variant": variant,
            "decode_tokens_per_s": 100,
            "time_over_floor": 2,
            "decode_speedup": {"median": gain},
            "gain_over_bound": gain / 2,
        }
        for variant, gain in (("dense", 1.0), ("depth 1/2", 1.9), ("depth 1/3", 1.7))
    ]
    return {
        "case": {"model": "M", "dtype": "bfloat16", "batch": batch},
        "variants": rows,
        "peers": [peer("openvino", over_openvino), peer("transformers", 1.8)],
        "absent": [{"peer": "vllm", "reason": "not installed"}],
    }


def test_gates_say_what_was_missed_and_what_was_not_measured() -> None:
    def verdicts(**run: Any) -> dict[str, str]:
        return {gate.what: gate.verdict for gate in gates.gates_of("decode", [decode_run(**run)])}

    assert verdicts() == {
        "dense over transformers": "PASS",
        "dense over OpenVINO": "PASS",
        "depth 1/2 over openvino": "PASS",
        "depth 1/2 over transformers": "PASS",
        "gain over bound, one clock, worst depth": "FAIL",
    }
    missed = {what for what, verdict in verdicts(over_openvino=0.4, batch=32).items() if verdict == "FAIL"}
    assert missed == {"dense over OpenVINO", "depth 1/2 over openvino", "gain over bound, one clock, worst depth"}
    assert verdicts(over_openvino=0.75, batch=1)["dense over OpenVINO"] == "PASS", "less is asked for one row"
    assert verdicts(batch=128) == {"depth 1/2 over openvino": "PASS", "depth 1/2 over transformers": "PASS"}

    alone = decode_run()
    alone["peers"] = []
    assert {gate.verdict for gate in gates.gates_of("decode", [alone])} == {"not measured", "FAIL"}


def test_the_summary_names_every_peer_and_those_that_are_absent() -> None:
    alone = decode_run(batch=1)
    alone["peers"] = []
    summary = decode_tables.summary([alone, decode_run()])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary.splitlines()]
    assert ["M", "bfloat16", "8", "100", "1.80", "1.80", "2.00", "1.90 (0.95)", "1.70 (0.85)"] in lines
    assert ["M", "bfloat16", "1", "100", "-", "-", "2.00", "1.90 (0.95)", "1.70 (0.85)"] in lines
    assert ["M", "bfloat16", "8", "100", "200 (0.90, 1.80)", "200 (1.80, 3.60)"] in lines
    assert "- vllm is absent (M bfloat16): not installed" in summary


def test_what_is_served_is_held_beside_what_was_forecast() -> None:
    def row(variant: str, speedup: float, over: float) -> dict[str, Any]:
        return {"variant": variant, "speedup": {"median": speedup}, "over_forecast": {"median": over}}

    case = {"model": "M", "dtype": "bfloat16", "load": "saturated"}
    run = {"case": case, "variants": [row("dense", 1, 0.95), row("depth 1/2", 1.2, 1.2)]}
    found = gates.gates_of("serve", [run, {"case": case | {"load": "0.5"}, "variants": []}])
    assert [gate.verdict for gate in found] == ["FAIL", "PASS", "FAIL"]
    assert found[1].cells()[3] == ">= 0.9, <= 1.1"
    del run["variants"][0]["over_forecast"]
    assert gates.gates_of("serve", [run])[1].verdict == "not measured"


def test_a_forecast_of_full_slots_counts_whole_fillings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of layers that a pass reads. Where only they cost, waves are best: every filling is one batch at one clock. At once,
    evenly staggered rows keep deep layers busy in every pass."""
    monkeypatch.setattr(engine.step_time, "seconds", lambda work: float(work[1]))
    new_tokens, num_layers = 33, engine.shape.num_layers
    sizes = {"prompt_tokens": 4, "new_tokens": new_tokens}
    assert serve_process.forecast(engine, depths=[1], **sizes)["seconds"] == num_layers * new_tokens
    plan = SkipDecode(depth=1 / 2).plan(num_layers, max_new_tokens=new_tokens)
    sizes |= {"staggered": True}
    in_waves = serve_process.forecast(engine, depths=[1 / 2], **sizes)
    assert in_waves["level"] == 0
    assert in_waves["seconds"] == num_layers + sum(plan.depth(clock) for clock in range(new_tokens - 1))
    assert (
        serve_process.forecast(engine, depths=[1 / 2], **sizes | {"staggered": False})["seconds"] == in_waves["seconds"]
    )
    at_once = serve_process.forecast(engine, depths=[1 / 2], waves=False, **sizes)
    assert in_waves["seconds"] < at_once["seconds"] <= num_layers * new_tokens


def test_arrivals_are_random_and_come_at_the_rate() -> None:
    times = http_load.arrivals(5, 2000, seed=1)
    assert times == sorted(times) == http_load.arrivals(5, 2000, seed=1) != http_load.arrivals(5, 2000, seed=2)
    assert times[-1] == pytest.approx(2000 / 5, rel=0.1)


def test_a_request_is_timed_by_its_events() -> None:
    answer = http_load.Answer(sent_s=1, token_s=[3, 4, 6], num_tokens=5)  # two tokens came with others
    assert (answer.first_s, answer.gaps_s, answer.per_token_s) == (2, [1, 2], 3 / 4)
