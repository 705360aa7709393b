"""A tiny random model, and engines over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from families import save, tiny_model
from shoal import Engine
from shoal.models.checkpoint import load_checkpoint, load_tokenizer
from shoal.models.decoder import Decoder
from shoal.models.executor import Executor, make_decoder


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    """Mistral with 6 layers: grouped queries, rotary positions, and slots that do not end where a page of memory does."""
    return tiny_model("mistral", num_hidden_layers=6, num_key_value_heads=3, head_dim=8)


@pytest.fixture(scope="session")
def checkpoint(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` on disk, with a tokenizer whose tokens are bytes."""
    return save(model, tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="session")
def decoder(checkpoint: Path) -> Executor:
    """`model` in float32, as engines run it on this machine."""
    return make_decoder(*load_checkpoint(checkpoint))


@pytest.fixture(scope="session")
def plain_decoder(checkpoint: Path) -> Decoder:
    """`model` in float32 by PyTorch's operations alone."""
    return Decoder(*load_checkpoint(checkpoint))


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """A token per byte."""
    return load_tokenizer(checkpoint)


@pytest.fixture
def make_engine(decoder: Executor, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Engine]:
    """Make an engine with options of its own over the shared decoder."""

    def make(**options: object) -> Engine:
        return Engine(decoder, tokenizer, **{"cache_gib": 0.25, **options})  # type: ignore[arg-type]

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """A fresh engine."""
    return make_engine()
