"""`DepthPlan`: one integer per layer decides which layers every pass of a request runs.

Clock `i` is the decode pass that consumes the i-th generated token (0 = the first). Layer `l` runs it if and only if
`i < cutoffs[l]`. Worked example, 4 layers, cutoffs (ALWAYS, 0, 2, ALWAYS), a request that emits 4 tokens a b c d:

    pass       prompt   a (i=0)   b (i=1)   c (i=2)      d is never consumed: 4 tokens, 3 decode passes
    layers      0123      0 23      0 23      0  3

A layer that runs now ran at every earlier clock, so each key and value that it reads exists: the cache is exact.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.depth.cost import PlanCost, plan_cost
from shoal.depth.shape import ModelShape
from shoal.errors import InvalidPlan

ALWAYS = 2**31 - 1
"""A cutoff that no clock reaches."""


@dataclass(frozen=True)
class DepthPlan:
    """Which layers run for which token of one request. Frozen, hashable, nested by construction.

    Raises `InvalidPlan` if no layer is always on, a cutoff is negative, or a layer that decodes is missing from the prompt's.
    """

    cutoffs: tuple[int, ...]
    """One per layer, bottom first: how many decode passes the layer serves; `ALWAYS` for all of them."""
    prompt_layers: tuple[int, ...] | None = None
    """Layers that the prompt runs, ascending; None means all. A layer with a cutoff above 0 must be one of them."""
    horizon: int | None = None
    """Clock at which the plan stops getting shallower, for plans that do; a request that passes it is told so."""

    def __post_init__(self) -> None:
        try:
            cutoffs = tuple(ALWAYS if c >= ALWAYS else operator.index(c) for c in self.cutoffs)
        except TypeError as error:
            raise InvalidPlan(f"cutoffs must be whole numbers, one per layer, got {self.cutoffs!r}") from error
        object.__setattr__(self, "cutoffs", cutoffs)
        if not self.cutoffs:
            raise InvalidPlan("a depth plan needs a cutoff for at least one layer")
        if min(self.cutoffs) < 0:
            raise InvalidPlan(f"cutoffs must be 0 or more (ALWAYS = {ALWAYS} for never), got {min(self.cutoffs)}")
        if max(self.cutoffs) < ALWAYS:
            raise InvalidPlan("at least one layer must always run: give one layer the cutoff ALWAYS")
        if self.prompt_layers is not None:
            layers = tuple(sorted({int(layer) for layer in self.prompt_layers}))
            object.__setattr__(self, "prompt_layers", layers)
            if layers and not 0 <= layers[0] <= layers[-1] < self.num_layers:
                raise InvalidPlan(f"prompt_layers must be within 0..{self.num_layers - 1}, got {list(layers)}")
            orphans = [layer for layer, c in enumerate(self.cutoffs) if c > 0 and layer not in layers]
            if orphans:
                raise InvalidPlan(
                    f"layers {orphans} run for generated tokens but not for the prompt: "
                    "their cache would miss the prompt; add them to prompt_layers"
                )

    @property
    def num_layers(self) -> int:
        """Layers of the model that this plan is for."""
        return len(self.cutoffs)

    @cached_property
    def runs_prompt(self) -> tuple[bool, ...]:
        """Per layer: whether the prompt's tokens run it."""
        if self.prompt_layers is None:
            return (True,) * self.num_layers
        return tuple(layer in self.prompt_layers for layer in range(self.num_layers))

    def active(self, clock: int) -> tuple[int, ...]:
        """Layers that the decode pass at `clock` runs, bottom first."""
        return tuple(layer for layer, cutoff in enumerate(self.cutoffs) if clock < cutoff)

    def depth(self, clock: int) -> int:
        """How many layers the decode pass at `clock` runs."""
        return sum(clock < cutoff for cutoff in self.cutoffs)

    def mean_depth(self, num_passes: int) -> float:
        """Mean share of the layers over the first `num_passes` decode passes (1.0 for none)."""
        if num_passes == 0:
            return 1.0
        return sum(min(c, num_passes) for c in self.cutoffs) / (num_passes * self.num_layers)

    def cost(self, shape: ModelShape, *, prompt_tokens: int, new_tokens: int, batch: int = 1) -> PlanCost:
        """What a batch of equal requests costs under this plan, known before the first token (design: cost of a fixed plan).

        Args: `prompt_tokens` and `new_tokens` per request; `batch` requests that share every pass at one clock.
        """
        if shape.num_layers != self.num_layers:
            raise InvalidPlan(f"the plan is for {self.num_layers} layers, the model has {shape.num_layers}")
        return plan_cost(
            self.cutoffs, self.runs_prompt, shape, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `null` stands for ALWAYS."""
        return {
            "cutoffs": [None if c >= ALWAYS else c for c in self.cutoffs],
            "prompt_layers": None if self.prompt_layers is None else list(self.prompt_layers),
            "horizon": self.horizon,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DepthPlan:
        """Inverse of `to_dict`."""
        prompt_layers = data.get("prompt_layers")
        return cls(
            cutoffs=tuple(ALWAYS if c is None else c for c in data["cutoffs"]),
            prompt_layers=None if prompt_layers is None else tuple(prompt_layers),
            horizon=data.get("horizon"),
        )

    @classmethod
    def load(cls, path: Path) -> DepthPlan:
        """Read the plan of a file, as `shoal draft-plan` and `shoal plan --json` write it. Raises `InvalidPlan`."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8"))["plan"])
        except InvalidPlan as error:
            raise InvalidPlan(f"{path}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = "no field 'plan'" if isinstance(error, KeyError) and error.args == ("plan",) else error
            raise InvalidPlan(f"no plan can be read from {path}: {reason}") from error


class DepthPolicy(Protocol):
    """Makes the plan of one request. Anything with this method may be given as `plan=`."""

    def plan(self, num_layers: int, *, prompt_tokens: int, max_new_tokens: int) -> DepthPlan:
        """The plan for a model of `num_layers`, a prompt of `prompt_tokens` and at most `max_new_tokens` generated."""
        ...


class Router(Protocol):
    """A policy that looks at the prompt: its plan is made once the prompt has been read, by every layer."""

    num_windows: int
    """Stretches of equal length that the prompt is cut into; shorter prompts have one per token."""

    def plan(self, num_layers: int, *, prompt_tokens: int, max_new_tokens: int) -> DepthPlan:
        """The deepest plan that `route` may make: what the request reserves until then. All layers must read the prompt."""
        ...

    def check(self, shape: ModelShape) -> None:
        """Raise `InvalidPlan` where the router was made for another model."""
        ...

    def route(self, states: NDArray[np.float32]) -> DepthPlan:
        """The plan, from states [L + 1, windows, d]: the mean of each window's tokens before every layer, and after the last."""
        ...


@dataclass(frozen=True)
class Dense:
    """Every layer for every token: the baseline."""

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 0) -> DepthPlan:
        """A plan in which every cutoff is `ALWAYS`."""
        return DepthPlan((ALWAYS,) * num_layers)
