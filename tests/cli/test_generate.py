"""`shoal generate` from end to end: what it writes, what it says of bad input, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from families import save, tiny_model
from shoal import Dense, Engine, Sampling, SkipDecode, UnifiedSkip
from shoal.cli.main import app
from shoal.depth.first import FirstRouter

runner = CliRunner()
PROMPTS = [f"name[The {n}], eatType[pub]" for n in range(6)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "id": n}) + "\n" for n, text in enumerate(PROMPTS)))
    return path


def shoal(*arguments: object, input: str | None = None) -> Result:
    return runner.invoke(app, ["generate", *map(str, arguments)], input=input, env={"COLUMNS": "200"})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_holds_what_the_engine_returns(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = shoal(checkpoint, prompts, "-o", out, "--depth", "1/2", "--max-new-tokens", "12", "--token-ids")
    assert result.exit_code == 0, result.output
    expected = Engine.from_pretrained(checkpoint).generate(PROMPTS, Sampling(max_new_tokens=12), SkipDecode(depth=0.5))
    lines = read(out)
    assert [(line["index"], line["id"], line["prompt"]) for line in lines] == [(n, n, p) for n, p in enumerate(PROMPTS)]
    assert [line["token_ids"] for line in lines] == [list(done.token_ids) for done in expected]
    assert [line["completion"] for line in lines] == [done.text for done in expected]
    for line, done in zip(lines, expected, strict=True):
        usage = line["usage"]
        assert usage["mean_layers"] == round(done.ledger.mean_layers, 3)
        assert usage["layer_tokens"] + usage["layer_tokens_saved"] == 6 * (
            usage["prompt_tokens"] + usage["new_tokens"] - 1
        )
        assert usage["flops_saved"] > 0
    for part in ("mean layers", "FLOPs", "bytes moved", "time per token", "decode", "whole request"):
        assert part in result.stderr
    assert not result.stdout


def test_drafting_changes_passes_and_nothing_else(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    plain, drafted = tmp_path / "plain.jsonl", tmp_path / "drafted.jsonl"
    options = ["--max-new-tokens", "40", "--ignore-eos", "--token-ids"]
    assert shoal(checkpoint, prompts, "-o", plain, *options).exit_code == 0
    result = shoal(checkpoint, prompts, "-o", drafted, *options, "--draft", "suffix")
    assert result.exit_code == 0, result.output
    assert "Drafting: " in result.stderr
    assert "tokens per pass" in result.stderr
    for one, other in zip(read(plain), read(drafted), strict=True):
        assert one["token_ids"] == other["token_ids"]
        drafting = other["drafting"]
        assert 0 <= drafting["accepted"] <= drafting["drafted"]
        assert drafting["passes"] <= one["usage"]["new_tokens"] - 1
        assert "drafting" not in one
    result = shoal(checkpoint, prompts, "-o", tmp_path / "no.jsonl", "--draft", "sufix")
    assert result.exit_code == 2
    assert "draft must be one of auto, self, ngram, suffix, trigram" in result.stderr


def test_other_policies_and_what_decides_a_resume(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = shoal(checkpoint, prompts, "-o", out, "--policy", "unified", "--depth", "1/2", "--max-new-tokens", "9")
    assert result.exit_code == 0, result.output
    expected = Engine.from_pretrained(checkpoint).generate(PROMPTS, Sampling(max_new_tokens=9), UnifiedSkip(depth=0.5))
    assert [line["completion"] for line in read(out)] == [done.text for done in expected]
    for other in (["--depth", "2/3", "--policy", "unified"], ["--depth", "1/2", "--policy", "d3"], ["--depth", "1/2"]):
        result = shoal(checkpoint, prompts, "-o", out, *other, "--max-new-tokens", "9", "--resume")
        assert result.exit_code == 2, "a file holds completions of one policy at one depth"


def test_a_router_picks_the_layers(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out, directory = tmp_path / "out.jsonl", tmp_path / "router"
    engine = Engine.from_pretrained(checkpoint)
    tensors = {name: torch.zeros(size) for name, size in FirstRouter.sizes(engine.shape).items()}
    tensors["bias"][:] = torch.tensor([0, -1, 1, -1, 1, -1])
    router = FirstRouter(shape=engine.shape, tensors=tensors)
    router.save(directory)
    result = shoal(checkpoint, prompts, "-o", out, "--router", directory, "--max-new-tokens", "9")
    assert result.exit_code == 0, result.output
    lines = read(out)
    assert [line["completion"] for line in lines] == [
        done.text for done in engine.generate(PROMPTS, Sampling(max_new_tokens=9), router)
    ]
    assert all(line["usage"]["mean_layers"] == 3 for line in lines)
    assert shoal(checkpoint, prompts, "-o", out, "--max-new-tokens", "9", "--resume").exit_code == 2
    result = shoal(checkpoint, prompts, "-o", tmp_path / "x", "--router", directory, "--depth", "1/2")
    assert result.exit_code == 2
    assert "picks the layers itself" in result.stderr
    result = shoal(checkpoint, prompts, "-o", tmp_path / "x", "--router", tmp_path)
    assert result.exit_code == 2
    assert "holds no router" in result.stderr


def test_standard_input_to_standard_output_with_every_layer(checkpoint: Path) -> None:
    result = shoal(checkpoint, "-", "-o", "-", "--max-new-tokens", 4, input="\n".join(PROMPTS))
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    dense = Engine.from_pretrained(checkpoint).generate(PROMPTS, Sampling(max_new_tokens=4), Dense())
    assert [line["completion"] for line in lines] == [done.text for done in dense]
    assert all(line["usage"]["layer_tokens_saved"] == 0 for line in lines)


def test_sampling_options_reach_the_engine(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = {
        "max-new-tokens": 10, "min-new-tokens": 2, "temperature": 0.8, "top-k": 50, "top-p": 0.9, "min-p": 0.01,
        "repetition-penalty": 1.1, "presence-penalty": 0.1, "frequency-penalty": 0.1, "stop": "zq", "seed": 3, "n": 2,
        "logprobs": 2, "max-batch": 3, "cache-gib": 0.1, "threads": 1, "dtype": "float32",
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    result = shoal(checkpoint, prompts, "-o", out, "--token-ids", "--ignore-eos", *flags)
    assert result.exit_code == 0, result.output
    sampling = Sampling(
        max_new_tokens=10, min_new_tokens=2, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1,
        presence_penalty=0.1, frequency_penalty=0.1, stop=("zq",), n=2, logprobs=2, ignore_eos=True,
    )  # fmt: skip
    seeds = [replace(sampling, seed=3 + n) for n in range(len(PROMPTS))]
    expected = Engine.from_pretrained(checkpoint).generate(PROMPTS, seeds)
    lines = read(out)
    assert [(line["index"], line["sample"]) for line in lines] == [
        (n, s) for n in range(len(PROMPTS)) for s in range(2)
    ]
    assert [line["token_ids"] for line in lines] == [list(done.token_ids) for done in expected]
    first = lines[0]["logprobs"][0]
    assert expected[0].logprobs is not None
    assert first["logprob"] == pytest.approx(expected[0].logprobs[0].logprob, abs=1e-4)
    assert len(first["top"]) == 2


def test_equal_prompts_draw_noise_of_their_own(checkpoint: Path) -> None:
    """The last seed there is, so that the second prompt's is the first one."""
    flags = ("--max-new-tokens", 8, "--ignore-eos", "--temperature", 1, "--token-ids", "--seed", 2**64 - 1)
    result = shoal(checkpoint, "-", "-o", "-", *flags, input="same\nsame\n")
    assert result.exit_code == 0, result.output
    first, second = (json.loads(line)["token_ids"] for line in result.stdout.splitlines())
    assert first != second
    sampling = Sampling(max_new_tokens=8, ignore_eos=True, temperature=1, seed=0)
    (alone,) = Engine.from_pretrained(checkpoint).generate("same", sampling)
    assert second == list(alone.token_ids)


def test_depth_options_reach_the_plan(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """Bounds, horizon, warm-up, clock and prompt layers: the counted layer-tokens are those of the plan."""
    out = tmp_path / "out.jsonl"
    result = shoal(
        checkpoint, prompts, "-o", out, "--min-layers", 3, "--max-layers", 5, "--horizon", 6, "--warmup-layers", 2,
        "--prompt-layers", "max_layers", "--max-new-tokens", 10, "--ignore-eos",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    policy = SkipDecode(min_layers=3, max_layers=5, horizon=6, warmup_layers=2, prompt="max_layers")
    for line, prompt in zip(read(out), PROMPTS, strict=True):
        plan = policy.plan(6, prompt_tokens=len(prompt), max_new_tokens=10)
        layer_tokens = 5 * len(prompt) + sum(plan.depth(clock) for clock in range(9))
        assert line["usage"]["layer_tokens"] == layer_tokens
        assert line["past_horizon"]
    assert "6 of 6 completions ran on past the horizon" in result.stderr
    assert read(out)[0]["settings"] == {
        "model": str(checkpoint), "min_layers": 3, "max_layers": 5, "horizon": 6, "warmup_layers": 2,
        "prompt_layers": "max_layers", "max_new_tokens": 10, "ignore_eos": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lengths.txt", "3\n5\n9\n"),
        (
            "completions.jsonl",
            '{"completion": "abcd"}\n{"completion": "ab"}\n{"prompt_token_ids": [3], "completion": "abcdefgh"}\n',
        ),
    ],
)
def test_horizon_is_the_median_of_expected_lengths(
    checkpoint: Path, prompts: Path, tmp_path: Path, name: str, content: str
) -> None:
    """Tokens are bytes here, and the end of a completion is one more: 'abcd' is 5 tokens."""
    lengths = tmp_path / name
    lengths.write_text(content)
    result = shoal(
        checkpoint, prompts, "-o", "-", "--depth", "1/2", "--horizon-from", lengths, "--max-new-tokens", 12, "--ignore-eos"
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "horizon 5" in result.stderr
    plan = SkipDecode(depth=0.5, horizon=5).plan(6, max_new_tokens=12)
    layer_tokens = 6 * len(PROMPTS[0]) + sum(plan.depth(clock) for clock in range(11))
    assert json.loads(result.stdout.splitlines()[0])["usage"]["layer_tokens"] == layer_tokens


def test_compare_dense_prints_a_speedup(checkpoint: Path, prompts: Path) -> None:
    result = shoal(checkpoint, prompts, "-o", "-", "--depth", "1/2", "--max-new-tokens", 4, "--compare-dense")
    assert result.exit_code == 0, result.output
    assert "Speedup over every layer" in result.stderr
    assert "one run of each, not repeated" in result.stderr
    assert len(result.stdout.splitlines()) == len(PROMPTS)


def test_a_run_that_timed_out_is_unfinished_and_resumes(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """Time is up before the first pass: nothing is done, and nothing counts as done."""
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    result = shoal(checkpoint, prompts, "-o", out, "--max-new-tokens", 4, "--timeout-s", 1e-9)
    assert result.exit_code == 1, result.output
    assert f"Timed out: 0 of 6 prompts are in {out}" in result.stderr
    assert "--resume" in result.stderr
    assert not out.read_bytes()
    assert shoal(checkpoint, prompts, "-o", out, "--max-new-tokens", 4, "--resume").exit_code == 0
    assert shoal(checkpoint, prompts, "-o", whole, "--max-new-tokens", 4).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_request_that_fails_alone_is_a_line_with_an_error(tmp_path: Path) -> None:
    """The embedding of `Z` is NaN; the head is separate, so only prompts with a Z are spoilt."""
    model = tiny_model("opt", tie_word_embeddings=False)
    directory = save(model, tmp_path / "opt")
    engine = Engine.from_pretrained(directory)
    (token,) = engine.tokenizer.encode("Z")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    save(model, directory)
    out = tmp_path / "out.jsonl"
    result = shoal(directory, "-", "-o", out, "--max-new-tokens", 4, "--token-ids", input="good\nbad Z\nfine\n")
    assert result.exit_code == 1
    assert "1 of 3 completions failed" in result.stderr
    lines = read(out)
    assert [line["finish_reason"] == "error" for line in lines] == [False, True, False]
    assert "logits are not finite (prompt 1" in lines[1]["error"]
    clean = engine.generate(["good", "fine"], Sampling(max_new_tokens=4))
    assert [lines[0]["token_ids"], lines[2]["token_ids"]] == [list(done.token_ids) for done in clean]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "1/7"], "Error: depth 0.1429 is outside what 6 layers"),
        (["--depth", "2"], "outside the allowed range"),
        (["--min-layers", "5", "--max-layers", "4"], "min_layers 5 is above max_layers 4"),
        (["--temperature", "-1"], "temperature must be 0 (greedy) or more"),
        (["--max-new-tokens", "0"], "max_new_tokens must be 1 or more"),
        (["--max-new-tokens", "240"], "line 1: "),
        (["--max-batch", "0"], "max_batch must be 1 or more"),
        (["--cache-gib", "0.00001"], "line 1: "),
        (["--horizon-from", "lengths.txt"], "--horizon-from goes with --depth"),
        (["--depth", "1/2", "--horizon-from", "lengths.txt"], "no such prompts file"),
        (["--compare-dense"], "--compare-dense compares a plan with every layer"),
        (["--horizon", "20"], "--horizon, --warmup-layers, --clock and --prompt-layers shape a plan"),
        (["--temprature", "1"], "--temperature"),
        (["--format", "xml"], "jsonl"),
    ],
)
def test_bad_options_get_a_message_and_write_nothing(
    checkpoint: Path, prompts: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out.jsonl"
    result = shoal(checkpoint, prompts, "-o", out, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists() or not out.read_bytes()


def test_a_device_is_as_good_as_a_file(checkpoint: Path, prompts: Path) -> None:
    result = shoal(checkpoint, prompts, "-o", os.devnull, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert "6 completions" in result.stderr


def test_bad_files_get_a_message(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for arguments, message in [
        ((tmp_path / "none", prompts, "-o", out), "none"),
        ((checkpoint, tmp_path / "none.jsonl", "-o", out), "no such prompts file"),
        ((checkpoint, tmp_path / "[bold].jsonl", "-o", out), "[bold].jsonl"),
        ((checkpoint, prompts, "-o", tmp_path / "no" / "out.jsonl"), "cannot be written"),
        ((checkpoint, prompts, "-o", "-", "--resume"), "--resume needs a file"),
    ]:
        result = shoal(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


def test_a_bad_file_of_lengths_is_refused_before_the_model_loads(prompts: Path, tmp_path: Path) -> None:
    for name, content, message in [
        ("lengths.txt", "12\nmany\n", "line 2: expected a length in tokens"),
        ("lengths.txt", "0\n", "each 1 token or more"),
        ("completions.jsonl", '{"prompt_token_ids": [3]}\n', "line 1: no field 'completion'"),
        ("completions.jsonl", '{"completion": \n', "line 1: not valid JSON"),
    ]:
        (tmp_path / name).write_text(content)
        result = shoal(
            tmp_path / "none", prompts, "-o", tmp_path / "out", "--depth", "1/2", "--horizon-from", tmp_path / name
        )
        assert result.exit_code == 2, result.output
        assert message in result.stderr


def test_resume_with_another_depth_is_refused(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert shoal(checkpoint, prompts, "-o", out, "--max-new-tokens", 2, "--depth", "1/2").exit_code == 0
    result = shoal(checkpoint, prompts, "-o", out, "--max-new-tokens", 2, "--depth", "2/3", "--resume")
    assert result.exit_code == 2, result.output
    assert "another depth: 0.5 there, 0.6666666666666666 now" in result.stderr


def test_a_bad_prompt_is_named_by_its_line_before_anything_runs(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("short\n" + ("long " * 60 + "\n") * 3)
    out = tmp_path / "out.jsonl"
    result = shoal(checkpoint, prompts, "-o", out)
    assert result.exit_code == 2
    assert "line 2: " in result.stderr
    assert "prompts refused besides: 2" in result.stderr
    assert not out.read_bytes()


# A process that is killed or interrupted in the middle, then continued, leaves the file of an undisturbed run.
LONG_RUN = ("--depth", "1/2", "--max-new-tokens", "40", "--max-batch", "4", "--ignore-eos", "--temperature", "1")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "many.txt"
    path.write_text("".join(f"name[The {n}]\n" for n in range(400)))
    return path


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, many: Path) -> bytes:
    out = many.with_suffix(".jsonl")
    result = shoal(checkpoint, many, "-o", out, *LONG_RUN)
    assert result.exit_code == 0, result.output
    return out.read_bytes()


def stop_in_the_middle(checkpoint: Path, many: Path, out: Path, number: signal.Signals, *more: str) -> tuple[int, str]:
    """Run in a process of its own, send the signal once some more lines are there; returns exit code and stderr."""
    command = [sys.executable, "-m", "shoal.cli.main", "generate", checkpoint, many, "-o", out, *LONG_RUN, *more]
    before = out.stat().st_size if out.exists() else 0
    environment = {**os.environ, "COLUMNS": "200"}

    def heed_interrupts() -> None:  # whoever runs the tests in the background has had them ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts
    ) as process:
        while process.poll() is None and not (out.exists() and out.stat().st_size > before + 2000):
            time.sleep(0.005)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def test_kill_twice_then_resume(checkpoint: Path, many: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, _ = stop_in_the_middle(checkpoint, many, out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 0 < out.stat().st_size < len(undisturbed)
    out.write_bytes(out.read_bytes()[:-7])  # what a kill in the middle of a write leaves
    code, _ = stop_in_the_middle(checkpoint, many, out, signal.SIGKILL, "--resume")
    assert code == -signal.SIGKILL
    assert undisturbed.startswith(out.read_bytes())
    result = shoal(checkpoint, many, "-o", out, *LONG_RUN, "--resume")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == undisturbed


def test_interrupt_then_resume(checkpoint: Path, many: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, stderr = stop_in_the_middle(checkpoint, many, out, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in stderr
    written = out.read_bytes()
    assert written.endswith(b"\n")
    # The interrupt may come between a write and its being counted.
    num_written = written.count(b"\n")
    assert any(f"{count} of 400 prompts are in {out}" in stderr for count in (num_written, num_written - 1))
    assert f"{out} {shlex.join(LONG_RUN)} --resume" in stderr
    result = shoal(checkpoint, many, "-o", out, *LONG_RUN, "--resume")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == undisturbed
