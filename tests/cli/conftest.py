"""A tiny random OPT checkpoint on disk, and prompts for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import save, tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT of 6 layers with 256 positions and a tokenizer of bytes."""
    return save(tiny_model("opt", num_hidden_layers=6), tmp_path_factory.mktemp("opt"))
