"""A tiny model, here and behind a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from families import save, tiny_model
from running import running
from shoal import Engine
from shoal.lm import LocalModel
from shoal.lm.remote import RemoteLimits, RemoteModel
from shoal.serve.config import ServeConfig

CHAT = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template; its tokens are bytes."""
    directory = save(tiny_model("llama", max_position_embeddings=2048), tmp_path_factory.mktemp("asked"))
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


@pytest.fixture(scope="session")
def local(directory: Path) -> LocalModel:
    """In this process."""
    return LocalModel.from_pretrained(directory, max_batch=4, cache_gib=0.2)


@pytest.fixture(scope="session")
def url(directory: Path) -> Iterator[str]:
    """A server of the same model."""
    engine = Engine.from_pretrained(directory, max_batch=4, cache_gib=0.2)
    with running(engine, ServeConfig(model="tiny", max_queue=64)) as url:
        yield f"{url}/v1"


@pytest.fixture
def remote(url: str) -> RemoteModel:
    """Through OpenAI's client."""
    return RemoteModel(url, "tiny", limits=RemoteLimits(concurrency=3, max_retries=0))
