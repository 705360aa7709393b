"""Run a transformers model with a gate for each row and layer: what a router decides per prompt, differentiably.

A gate g in [0, 1] scales what a layer adds to the columns of generated tokens; columns of the prompt run every layer. With P = 2
prompt columns, the row's states before the layer x, and the layer's output y:

    column      0 1 | 2               3
    result      y y | x + g (y - x)   x + g (y - x)

With g = 0 the layer's keys and values of generated tokens weigh in nowhere, so it equals a depth plan without the layer; with
g = 1 the layer runs. Gates differ from row to row, which the plan of a `depth_context` cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoal.train.depth_context import decoder_layers

Gate = Callable[[int, Tensor], Tensor]
"""From a layer's index and its input [batch, columns, d] to the gates [batch]."""


@contextmanager
def gated_context(model: nn.Module, gate: Gate, *, prompt_columns: int) -> Iterator[None]:
    """Within it, forward passes of `model` run under `gate`, on batches made by `shoal.train.data.collate`; no cache."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for index, layer in enumerate(decoder_layers(model)):
            replaced.append((layer, layer.__dict__.get("forward")))
            layer.forward = _gated(layer.forward, index, gate, prompt_columns)
        yield
    finally:
        for layer, own_forward in replaced:
            if own_forward is None:
                del layer.forward
            else:
                layer.forward = own_forward


def _gated(forward: Callable[..., Tensor], index: int, gate: Gate, prompt_columns: int) -> Callable[..., Tensor]:
    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gates = gate(index, hidden_states).to(hidden_states.dtype)[:, None, None]
        output = forward(hidden_states, *args, **kwargs)
        before, after = hidden_states[:, prompt_columns:], output[:, prompt_columns:]
        return torch.cat((output[:, :prompt_columns], before + gates * (after - before)), dim=1)

    return run


def window_means(states: Tensor, mask: Tensor, num_windows: int) -> tuple[Tensor, Tensor]:
    """Means [batch, windows, d] over each row's windows of prompt tokens, and bool [batch, windows]: which of them a row has.

    As the engine makes them (`engine/routing.py`): a row of P tokens has min(windows, P), token t in number floor(t W / P).

    Args: `states` [batch, columns, d] of left-padded prompts; `mask` [batch, columns], 1 where there is a token.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    windows = lengths.clamp(max=num_windows)
    place = (mask.cumsum(dim=1) - 1).clamp(min=0) * windows // lengths
    member = torch.nn.functional.one_hot(place, num_windows) * mask[..., None]  # [batch, columns, windows]
    counts = member.sum(dim=1)
    sums = torch.einsum("bcw,bcd->bwd", member.to(states.dtype), states)
    return sums / counts.clamp(min=1)[..., None], counts > 0
