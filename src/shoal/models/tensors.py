"""Reading safetensors files: which file holds which tensor, memory-mapped, with errors that name both."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.errors import CheckpointError, PickledCheckpoint
from shoal.models.directory import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class TensorFiles:
    """The tensors of a checkpoint directory by name. Files stay mapped as long as the object or a tensor of it
    lives."""

    def __init__(self, directory: Path) -> None:
        """Open every file and read its header.

        Raises `PickledCheckpoint` where there are pickles only; `CheckpointError` for a missing, truncated or corrupt
        file.
        """
        self.directory = directory
        self._handle_of: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in self._weight_files():
            try:
                handle: Any = safe_open(directory / file, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{directory / file} is not a whole safetensors file "
                    f"(truncated, corrupt, or a git-lfs pointer): {error}"
                ) from error
            for name in handle.keys():  # noqa: SIM118  (a handle is not a mapping)
                self._handle_of[name], self._file_of[name] = handle, file

    def _weight_files(self) -> list[str]:
        if (self.directory / WEIGHTS).is_file():
            return [WEIGHTS]
        if (self.directory / INDEX).is_file():
            weight_map = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{self.directory / INDEX} has no weight_map")
            files = sorted(set(weight_map.values()))
            missing = [file for file in files if not (self.directory / file).is_file()]
            if missing:
                raise CheckpointError(f"{self.directory / missing[0]} is missing, though {INDEX} lists it")
            return files
        pickles = [file for file in PICKLED if (self.directory / file).is_file()]
        if pickles:
            raise PickledCheckpoint(
                f"{self.directory} holds pickled weights only ({pickles[0]}), which are never loaded: "
                f"run `shoal convert {self.directory} NEW_DIRECTORY` once and use the new directory"
            )
        raise CheckpointError(
            f"{self.directory} holds no weights: expected {WEIGHTS}, or {INDEX} with the shards it lists "
            "(pickled weights of a hub repository go through `shoal convert` first)"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._handle_of

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._handle_of)

    def fingerprint(self) -> str:
        """Tells these weights from all others: a digest of every tensor's name, shape and first values. How they are spread over
        files does not matter."""
        digest = hashlib.sha256()
        for name in sorted(self.names()):
            part = self._handle_of[name].get_slice(name)
            shape = tuple(part.get_shape())
            first = part[tuple(slice(1) for _ in shape[:-1]) + (slice(16),) * bool(shape)] if shape else None
            values = () if first is None else first.flatten().double().tolist()
            digest.update(repr((name, shape, values)).encode())
        return digest.hexdigest()[:16]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A view of the mapped file; pages are read when the values are.

        Raises `CheckpointError` where the tensor is missing, mis-shaped or not floating-point.
        """
        if name not in self._handle_of:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing; {shape} expected")
        where = f"{self.directory / self._file_of[name]}: tensor {name}"
        got = tuple(self._handle_of[name].get_slice(name).get_shape())
        if got != shape:
            raise CheckpointError(f"{where} has shape {got}, but config.json makes it {shape}")
        tensor: Tensor = self._handle_of[name].get_tensor(name)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise CheckpointError(
                f"{where} is stored as {str(tensor.dtype).removeprefix('torch.')}: quantised weights are not supported"
            )
        return tensor
