"""Trained routers by name."""

from __future__ import annotations

from pathlib import Path

from shoal.depth.dr_llm import DrLLMRouter
from shoal.depth.first import FirstRouter
from shoal.depth.layer_router import LayerRouter, read_router

ROUTERS: dict[str, type[LayerRouter]] = {"first": FirstRouter, "dr-llm": DrLLMRouter}


def load_router(directory: Path) -> LayerRouter:
    """The router saved in `directory`: a policy for `plan=`. Raises `CheckpointError` where there is none."""
    return read_router(directory, ROUTERS)
