"""What routers have in common that decide for each layer, from the prompt's states before it, whether decoding runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.depth.shape import ModelShape
from shoal.errors import CheckpointError, InvalidPlan

WEIGHTS, SETTINGS = "router.safetensors", "router.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerRouter:
    """Scores layers; decoding runs those with a score of 0 or more, and always `kept_layers`."""

    kind: ClassVar[str]
    """Name in `router.json`."""
    num_windows: ClassVar[int]
    """As in `Router`."""
    shape: ModelShape
    """The model it was trained for."""
    tensors: Mapping[str, Tensor]
    """float32 weights, each with the layers first."""
    kept_layers: tuple[int, ...] = (0,)
    """Layers that run whatever their score."""

    def __post_init__(self) -> None:
        for name, size in self.sizes(self.shape).items():
            got = tuple(self.tensors[name].shape) if name in self.tensors else None
            if got != size:
                raise InvalidPlan(f"a {self.kind} router for this model needs {name} of shape {size}, got {got}")
        if not all(0 <= layer < self.shape.num_layers for layer in self.kept_layers):
            raise InvalidPlan(f"kept_layers must be within 0..{self.shape.num_layers - 1}, got {self.kept_layers}")

    @classmethod
    def sizes(cls, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        raise NotImplementedError

    def scores(self, states: Tensor) -> Tensor:
        """Scores [L] from float32 states [L, windows, d] before each layer."""
        raise NotImplementedError

    def moved(self, by: float) -> LayerRouter:
        """The same router with `by` added to every score: a higher one runs more layers."""
        raise NotImplementedError

    def check(self, shape: ModelShape) -> None:
        """Raise `InvalidPlan` where the router was made for a model of other sizes."""
        sizes = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "vocab_size")
        for name in sizes:
            if getattr(shape, name) != getattr(self.shape, name):
                raise InvalidPlan(
                    f"this router was trained for another model: its {name} is {getattr(self.shape, name)}, "
                    f"here it is {getattr(shape, name)}"
                )

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 64) -> DepthPlan:
        """The deepest plan: every layer."""
        return DepthPlan((ALWAYS,) * num_layers)

    def route(self, states: NDArray[np.float32]) -> DepthPlan:
        """The layers whose score is 0 or more, and the best one where there would be none."""
        scores = self.scores(torch.from_numpy(states)[:-1])
        runs = scores >= 0
        runs[list(self.kept_layers)] = True
        runs[scores.argmax()] |= not runs.any()
        return DepthPlan(tuple(ALWAYS if one else 0 for one in runs.tolist()))

    def save(self, directory: Path) -> None:
        """Write `router.safetensors` and `router.json` into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, directory / WEIGHTS)
        settings = {"kind": self.kind, "shape": asdict(self.shape), "kept_layers": list(self.kept_layers)}
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def normed(states: Tensor) -> Tensor:
    """States over their root mean square: they grow from layer to layer."""
    return states / states.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)


def read_router(directory: Path, kinds: Mapping[str, type[LayerRouter]]) -> LayerRouter:
    """The router in `directory`. Raises `CheckpointError` where there is none, or none of these `kinds`."""
    try:
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
        kind = kinds[settings["kind"]]
        shape, kept_layers = ModelShape(**settings["shape"]), tuple(settings["kept_layers"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} holds no router that can be read: {error!r}") from error
    return kind(shape=shape, tensors=tensors, kept_layers=kept_layers)
