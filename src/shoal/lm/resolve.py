"""From what a user writes to a model."""

from __future__ import annotations

from typing import Any

from shoal.engine.intake import Plan
from shoal.errors import InvalidInput
from shoal.lm.contract import LanguageModel
from shoal.lm.local import LocalModel


def load_model(
    model: str, *, api: str = "completions", plan: Plan | None = None, limits: Any = None, **options: Any
) -> LanguageModel:
    """A checkpoint by its directory or hub id, or a model on a server as `http://host:8000/v1#name`.

    Args:
        api: of a server: `completions` or `chat`.
        plan: of a checkpoint: the depth of generated tokens.
        limits: of a server: `RemoteLimits`.
        options: of a checkpoint: those of `Engine.from_pretrained`.
    """
    if not model.startswith(("http://", "https://")):
        return LocalModel.from_pretrained(model, plan=plan, **options)
    from shoal.lm.remote import RemoteModel  # needs OpenAI's client

    base_url, _, name = model.partition("#")
    if not name:
        raise InvalidInput(f"{model} names no model: write it as {base_url}#NAME")
    if api not in ("completions", "chat"):
        raise InvalidInput(f"api is completions or chat, got {api!r}")
    if plan is not None:
        raise InvalidInput("a plan is for models that run here: the server decides its own depth")
    return RemoteModel(base_url, name, api=api, limits=limits)  # type: ignore[arg-type]
