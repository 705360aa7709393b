"""Tiny models that can stop between layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from families import save, tiny_model
from shoal.baselines.layerwise import LayerwiseDecoder


@pytest.fixture(scope="session")
def network() -> PreTrainedModel:
    """Qwen3 with 6 layers: grouped queries, norms on heads, biases nowhere."""
    return tiny_model("qwen3", num_hidden_layers=6)


@pytest.fixture(scope="session")
def checkpoint(network: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`network` on disk, with a tokenizer whose tokens are bytes."""
    return save(network, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> LayerwiseDecoder:
    """`network` in float32."""
    return LayerwiseDecoder.from_pretrained(checkpoint)
