"""`shoal serve` as a process: it says where it is, refuses what it cannot do, and ends without losing what it has taken."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI
from typer.testing import CliRunner

from families import save, tiny_model
from shoal.cli.main import app

SHOAL = [sys.executable, "-m", "shoal.cli.main", "serve"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("llama"), tmp_path_factory.mktemp("served"))


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its URL."""
    process = subprocess.Popen([*SHOAL, *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://[^ ]+/", line):
                yield process, found[0].rstrip("/")
                return
        pytest.fail("".join(lines))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_ending_loses_nothing(directory: Path, ending: signal.Signals) -> None:
    """Requests that run and wait when the signal comes are answered in full; then the process is gone."""
    with serving(str(directory), "--max-batch", "2", "--depth", "1/2") as (process, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        body = {"model": str(directory), "prompt": "abc", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
        counts: list[int] = []
        started = threading.Barrier(7)

        def whole() -> None:
            started.wait()
            counts.append(client.completions.create(**body).usage.completion_tokens)

        def streamed() -> None:
            pieces = client.completions.create(**body, stream=True, stream_options={"include_usage": True})
            next(pieces)
            started.wait()
            counts.append([piece.usage for piece in pieces][-1].completion_tokens)

        threads = [threading.Thread(target=target) for target in (streamed, streamed, whole, whole, whole, whole)]
        for thread in threads:
            thread.start()
        started.wait()
        client.models.list()  # the others are under way, too: theirs were sent before
        process.send_signal(ending)
        for thread in threads:
            thread.join(60)
        client.close()
        assert counts == [200] * 6
        assert process.wait(60) in (-ending, 0, 128 + ending)


def test_options_reach_the_server(directory: Path, tmp_path: Path) -> None:
    """Name, keys, plan, limits."""
    keys, plan = tmp_path / "keys", tmp_path / "plan.json"
    keys.write_text("alice sk-one\n")
    plan.write_text(json.dumps({"policy": "skipdecode", "depth": 0.5}))
    arguments = (
        "--name",
        "small",
        "--api-key-file",
        str(keys),
        "--plan",
        str(plan),
        "--max-tokens",
        "9",
        "--min-depth",
        "0.6",
    )
    with serving(str(directory), *arguments) as (_, url), OpenAI(base_url=f"{url}/v1", api_key="sk-one") as client:
        card = client.models.retrieve("small").shoal
        assert (card["max_tokens"], card["min_depth"]) == (9, 0.6)
        answer = client.completions.create(model="small", prompt="abc", max_tokens=9, extra_body={"ignore_eos": True})
        assert answer.usage.shoal["mean_layers"] < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "port"),
        (["--host", "203.0.113.1"], "203.0.113.1"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere"),
        (["--plan", "nowhere"], "--plan nowhere"),
        (["--depth", "1/2", "--plan", "x"], "--depth and --plan"),
        (["--min-depth", "0"], "min_depth"),
        (["--max-queue", "-1"], "max_queue"),
        (["--max-rank-calls", "0"], "max_rank_calls"),
        (["--max-batch", "0", "--port", "0"], "max_batch"),
        (["--depth", "1/100", "--port", "0"], "warm-up"),
    ],
)
def test_refusals(
    directory: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code 2 and one line, before anything is served."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", str(directory), *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"policy": "nosuch"}', '{"cutoffs": 3}', '{"policy": "skipdecode", "nosuch": 1}']
)
def test_plans_that_are_none(directory: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    result = CliRunner().invoke(app, ["serve", str(directory), "--plan", str(tmp_path / "plan.json")])
    assert result.exit_code == 2, result.output
    assert "--plan" in result.output
