"""A checkpoint's directory: found on disk, in the package or on the hub; and its JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from shoal.errors import CheckpointError, PickledCheckpoint

WANTED = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files that a checkpoint is read from, beside its weights."""
WEIGHTS = {"safetensors": ("*.safetensors",), "pickles": ("*.bin",)}
"""Files of weights; only `shoal convert` reads pickles."""
UNWANTED = ("*/*", "consolidated*")
"""Other formats that repositories hold beside them: subfolders, and Mistral's own copy of the weights."""
SHIPPED = Path(__file__).parent.parent / "data"
"""Models that ship with the package, a directory each; `shoal-e2e` is one."""


def resolve(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    weights: Literal["safetensors", "pickles"] | None = "safetensors",
) -> Path:
    """The directory of a checkpoint: `path_or_hub_id` itself, a model that ships with the package, or the hub's.

    In this order. What comes from the hub (`facebook/opt-125m`) is kept in Hugging Face's cache.

    Args: `revision` is a branch, tag or commit; `token` gives access to private and gated repositories; `weights`
    are what the hub is asked for beside config and tokenizer, None for no weights.
    Raises `CheckpointError` where it is neither a directory nor a repository that can be reached, `PickledCheckpoint`
    where the repository has pickles only.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the directory of a checkpoint")
    name = str(path_or_hub_id)
    if re.fullmatch(r"[\w-]+", name) and (SHIPPED / name).is_dir():
        return SHIPPED / name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise CheckpointError(f"no such directory: {name}")
    import huggingface_hub

    wanted = [*(WEIGHTS[weights] if weights else ()), *WANTED]
    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, token=token, allow_patterns=wanted, ignore_patterns=list(UNWANTED)
            )
        )
        if weights == "safetensors" and not any(directory.glob("*.safetensors")):
            files = huggingface_hub.list_repo_files(name, revision=revision, token=token)
            if any(file.endswith(".bin") for file in files):
                raise PickledCheckpoint(
                    f"{name} holds pickled weights only, which are never loaded: "
                    f"run `shoal convert {name} NEW_DIRECTORY` once and use the new directory"
                )
    except PickledCheckpoint:
        raise
    except Exception as error:  # the client raises errors of its own, of the HTTP library and of the system
        at = f" at revision {revision}" if revision else ""
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"no such directory: {name}; and no model of that name{at} could be had from the hub: {reason}"
        ) from error
    return directory


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises `CheckpointError` where it is missing, unreadable or not an object."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: is it the directory of a Hugging Face checkpoint?")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, with the end tokens of generation_config.json where there is one (chat models often name more
    there)."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        config["eos_token_id"] = eos
    return config
