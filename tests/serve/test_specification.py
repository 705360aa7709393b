"""Requests that nobody would write, made from the server's own description of itself: none of them breaks it.

By hand for longer, against `shoal serve shoal-e2e`:

    schemathesis --config-file tests/serve/schemathesis.toml run http://127.0.0.1:8000/openapi.json \\
        --checks not_a_server_error --continue-on-failure --seed 1 --max-time 1200 --request-timeout 60
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

from openai import OpenAI

from shoal import Engine

CONFIG = Path(__file__).parent / "schemathesis.toml"


def test_no_request_breaks_the_server(url: str, served: Engine, client: OpenAI, tmp_path: Path) -> None:
    """A short run with a fixed seed. The server answers afterwards, and holds nothing."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{url}/openapi.json",
        "--checks", "not_a_server_error", "--continue-on-failure", "--seed", "1", "--max-examples", "10",
        "--phases", "examples,fuzzing", "--generation-deterministic", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices
    assert not served.has_work
    assert served.runner.cache.blocks_in_use == 0


def test_the_description_names_every_path(url: str) -> None:
    """And the model, so that a program may learn all that it needs from it."""
    with urlopen(f"{url}/openapi.json") as answer:
        described = json.load(answer)
    assert set(described["paths"]) == {
        "/v1/completions", "/v1/chat/completions", "/v1/plan", "/v1/chat/plan", "/v1/score", "/v1/rerank", "/v1/models",
        "/v1/models/{name}", "/tokenize", "/detokenize", "/health", "/ready", "/metrics",
    }  # fmt: skip
    schemas = described["components"]["schemas"]
    assert schemas["Completion"]["properties"]["model"]["enum"] == ["tiny"]
    assert all(
        "422" not in operation["responses"] for path in described["paths"].values() for operation in path.values()
    )
