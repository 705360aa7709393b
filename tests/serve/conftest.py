"""A server over a tiny random model, in a thread of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from families import save, tiny_model
from running import running
from shoal import Engine
from shoal.serve.config import ServeConfig

CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template; its tokens are bytes."""
    directory = save(tiny_model("llama"), tmp_path_factory.mktemp("served"))
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


@pytest.fixture(scope="session")
def alone(directory: Path) -> Engine:
    """The same model without a server: what a request should give."""
    return Engine.from_pretrained(directory, max_batch=8, cache_gib=0.2)


@pytest.fixture(scope="module")
def served(directory: Path) -> Engine:
    """The engine behind `url`."""
    return Engine.from_pretrained(directory, max_batch=4, max_pass_tokens=64, cache_gib=0.2)


@pytest.fixture(scope="module")
def url(served: Engine) -> Iterator[str]:
    """Where the server is."""
    with running(served, ServeConfig(model="tiny", max_queue=64, max_tokens=200)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    """OpenAI's own client."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
