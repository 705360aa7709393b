"""Pickled checkpoints to safetensors: the one place where pickles are read, and only as plain tensors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shoal.errors import CheckpointError, InvalidInput
from shoal.models.checkpoint import Checkpoint
from shoal.models.directory import read_config, read_json, resolve
from shoal.models.families import configure
from shoal.models.tensors import INDEX, PICKLED, WEIGHTS

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
"""Files that a converted checkpoint takes over as they are: config, tokenizer, chat template."""


def convert_checkpoint(
    source: str | Path, destination: Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Write the pickled checkpoint `source`, a directory or a hub id, as safetensors into the new directory `destination`.

    Pickles are read with `weights_only=True`, which builds tensors and runs no code. One shard becomes one file. The
    result is checked like any checkpoint before it appears under its name, whole or not at all.

    Raises `InvalidInput` where `destination` exists; `CheckpointError` for a source that is no pickled checkpoint of a
    supported family, or whose pickles hold anything but tensors.
    """
    if destination.exists():
        raise InvalidInput(f"{destination} exists: choose a new directory, nothing is overwritten")
    directory = resolve(source, revision=revision, token=token, weights="pickles")
    _, family = configure(read_config(directory))
    files = _pickle_files(directory)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        weight_map = {}
        for number, file in enumerate(files, start=1):
            name = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            tensors = _load_pickle(directory / file)
            if family.tied:
                for head in family.head:
                    tensors.pop(f"{head}.weight", None)
            save_file(_apart(tensors), partial / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, name))
        if len(files) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for pattern in COPIED:
            for path in directory.glob(pattern):
                if path.name not in PICKLED:
                    shutil.copy(path, partial / path.name)
        Checkpoint.open(partial).check()
        partial.rename(destination)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{destination} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return destination


def _pickle_files(directory: Path) -> list[str]:
    """The pickles of a checkpoint, in order."""
    single, index = PICKLED
    if (directory / single).is_file():
        return [single]
    if (directory / index).is_file():
        return sorted(set(read_json(directory / index).get("weight_map", {}).values()))
    if (directory / WEIGHTS).is_file() or (directory / INDEX).is_file():
        raise CheckpointError(f"{directory} holds safetensors already: use it as it is")
    raise CheckpointError(f"{directory} holds no pickled weights: expected {single}, or {index} with its shards")


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of one pickle, mapped into memory where its format allows."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though {PICKLED[1]} lists it")
    try:
        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The error's own text suggests running whatever is in the file, which is what this function is there to prevent.
        raise CheckpointError(f"{path} is not a pickle of tensors alone, and nothing else is ever loaded") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt {str(error)[:200]}".rstrip()) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a flat table of tensors")
    return dict(state)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and none sharing memory with another, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor.clone() if shared else tensor.contiguous()
    return apart
