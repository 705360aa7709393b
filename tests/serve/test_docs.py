"""docs/serving.md tells the truth: its commands and its program print what stands there, its table of paths is the server's."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from running import running
from shoal import Engine
from shoal.serve.config import ServeConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.+)\n((?:(?!\$ |```).*\n)*)", TEXT, flags=re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """What the docs call localhost:8000."""
    with running(
        Engine.from_pretrained("shoal-e2e", max_batch=4, cache_gib=0.1), ServeConfig(model="shoal-e2e")
    ) as url:
        yield url.removeprefix("http://")


@pytest.mark.parametrize(("command", "output"), COMMANDS, ids=[command[:70] for command, _ in COMMANDS])
def test_commands(address: str, command: str, output: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command.replace("localhost:8000", address)], capture_output=True, text=True, check=True
    )
    assert doctest.OutputChecker().check_output(output, done.stdout.strip() + "\n", FLAGS), done.stdout


def test_the_program(address: str) -> None:
    (session,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    test = doctest.DocTestParser().get_doctest(
        session.replace("localhost:8000", address), {}, "serving.md", "serving.md", 0
    )
    results = doctest.DocTestRunner(optionflags=FLAGS).run(test)
    test.globs["client"].close() if "client" in test.globs else None
    assert results.attempted >= 7
    assert results.failed == 0


def test_every_path_is_in_the_table(address: str) -> None:
    table = "".join(line for line in TEXT.splitlines() if line.startswith(("| `POST", "| `GET")))
    with urlopen(f"http://{address}/openapi.json") as answer:
        for path in json.load(answer)["paths"]:
            assert f"{path}`" in table, path


def test_what_is_said_of_the_soak_is_what_was_measured() -> None:
    """Numbers of the last section are those of the committed result."""
    result = json.loads((ROOT / "studies" / "results" / "serve_soak.json").read_text(encoding="utf-8"))
    said = " ".join(TEXT[TEXT.index("## What it was put through") :].split())
    growth = result["resident_kib"]["kib_per_minute"]
    for number in (
        f"{result['requests']} requests", f"{result['equal_to_alone']} answers",
        f"{growth['per_minute']:.1f} KiB per minute [{growth['low']:.1f}, {growth['high']:.1f}]",
        f"{result['sigterm']['accepted']} accepted",
    ):  # fmt: skip
        assert number in said, number
    assert result["wrong"] == []


def test_the_docker_file_and_the_docs_say_the_same() -> None:
    """Build arguments that the docs pass are arguments of the file, which ends as a user of its own, with a health check."""
    recipe = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    deploy = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    given = set(re.findall(r"--build-arg (\w+)=", deploy))
    assert given
    assert given <= set(re.findall(r"^ARG (\w+)", recipe, flags=re.MULTILINE))
    assert re.search(r"^USER (?!root)", recipe, flags=re.MULTILINE)
    assert "HEALTHCHECK" in recipe
