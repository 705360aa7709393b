"""Plans that a router makes from the prompt: states are added up while the prompt is read, and decide once it has been.

A prompt of P tokens has W windows; token t is in window floor(t W / P). Example, P = 5, W = 2: tokens 0 1 2 and 3 4. Sums go on
from chunk to chunk of a long prompt in the order of its tokens, so that neither chunks nor company change them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.depth.plan import DepthPlan, Router
from shoal.depth.shape import ModelShape
from shoal.engine.batch import Rows
from shoal.errors import RequestFailed
from shoal.models.passes import Ints, StateSums


class PromptStates:
    """What one request's router will read."""

    def __init__(self, router: Router, shape: ModelShape, prompt_tokens: int) -> None:
        self.router, self.prompt_tokens = router, prompt_tokens
        self.num_windows = min(router.num_windows, prompt_tokens)
        self.sums: Tensor = torch.zeros(shape.num_layers + 1, self.num_windows, shape.hidden_size)

    def windows(self, start: int, count: int) -> Ints:
        """The window of each of the prompt's tokens `start .. start + count`."""
        windows: Ints = np.arange(start, start + count) * self.num_windows // self.prompt_tokens
        return windows

    def route(self, num_layers: int) -> DepthPlan:
        """The router's plan. Raises `RequestFailed` where it makes none for this model."""
        sizes = np.bincount(self.windows(0, self.prompt_tokens), minlength=self.num_windows)
        states = (self.sums / torch.from_numpy(sizes).to(self.sums)[:, None]).cpu().numpy()
        try:
            plan = self.router.route(states)
        except Exception as error:
            raise RequestFailed(f"the router raised {error!r}") from error
        if not isinstance(plan, DepthPlan) or plan.num_layers != num_layers or plan.prompt_layers is not None:
            raise RequestFailed(
                f"the router made {plan!r}: expected a DepthPlan for {num_layers} layers, all of which read the prompt"
            )
        return plan


class Watch:
    """The prompts of one pass that routers will read."""

    def __init__(self, rows: Rows, states: dict[int, PromptStates], device: torch.device) -> None:
        """`states`: by row."""
        self.states = list(states.values())
        groups = np.full(int(rows.num_tokens.sum()), -1)
        first_tokens = np.cumsum(rows.num_tokens) - rows.num_tokens
        first_group = 0
        for row, one in states.items():
            count = int(rows.num_tokens[row])
            groups[first_tokens[row] :][:count] = first_group + one.windows(int(rows.starts[row]), count)
            first_group += one.num_windows
        self.sums = StateSums(groups, torch.cat([one.sums for one in self.states], dim=1).to(device))

    def keep(self) -> None:
        """Hand the sums back after the pass."""
        parts = torch.split(self.sums.sums, [one.num_windows for one in self.states], dim=1)
        for one, part in zip(self.states, parts, strict=True):
            one.sums = part


def watch(rows: Rows, states: Sequence[PromptStates | None], device: torch.device) -> Watch | None:
    """What to watch in a pass over rows with these `states` [R]; None where no router is waiting for a prompt."""
    reading = {row: one for row, one in enumerate(states) if one is not None and rows.starts[row] < one.prompt_tokens}
    return Watch(rows, reading, device) if reading else None
