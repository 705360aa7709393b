"""How much each layer changes the residual stream: the cosine of its input and output, and the norm of what it adds.

Cosines near 1 are what layer-skipping methods look for (AdaSkip, arXiv 2501.02336, chooses sub-layers by them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.evaluate.predictions import batches
from shoal.train.data import IGNORED, Example, collate, prompt_columns
from shoal.train.depth_context import decoder_layers


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """Means over tokens of a dense pass, for one layer.

    With a token's input x and output y, both [hidden]: cosine(x, y), and the relative change |y - x| / max(|x|, |y|), from 0
    (nothing) to 2 (y = -x). Dividing by the larger norm is our choice: many models multiply the first token's norm by a thousand
    in one layer, which would otherwise be all that a mean over prompt tokens shows.
    """

    prompt_cosine: float
    """Over prompt tokens."""
    prompt_change: float
    """Over prompt tokens."""
    completion_cosine: float
    """Over the completion tokens that decode passes consume."""
    completion_change: float
    """Over the completion tokens that decode passes consume."""


def layer_changes(network: Any, examples: Sequence[Example]) -> tuple[LayerChange, ...]:
    """The change of each layer, bottom first, when all layers run `examples`, of which one at least has a decode pass."""
    device = next(network.parameters()).device
    sums = torch.zeros(len(decoder_layers(network)), 4, dtype=torch.float64)
    num_prompt = num_completion = 0
    for indices in batches(examples, vocab_size=network.config.vocab_size):
        batch = collate([examples[index] for index in indices], pad_token_id=0)
        mask, labels, columns = batch["attention_mask"].bool(), batch["labels"], prompt_columns(batch)
        prompt, completion = torch.zeros_like(mask), torch.zeros_like(mask)
        prompt[:, :columns] = mask[:, :columns]
        completion[:, columns:] = (
            labels[:, 1:] != IGNORED
        )  # not the last token of a shorter completion: nothing follows it
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "position_ids")}
        with record_changes(network) as layers, torch.inference_mode():
            network(**inputs, logits_to_keep=1, use_cache=False)
        for layer, measures in enumerate(layers):
            sums[layer] += torch.stack([values[where].sum() for where in (prompt, completion) for values in measures])
        num_prompt, num_completion = num_prompt + int(prompt.sum()), num_completion + int(completion.sum())
    means = sums / torch.tensor([num_prompt, num_prompt, num_completion, num_completion])
    return tuple(
        LayerChange(prompt_cosine=a, prompt_change=b, completion_cosine=c, completion_change=d)
        for a, b, c, d in means.tolist()
    )


@contextmanager
def record_changes(network: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within it, a forward pass appends each layer's (cosine, relative change) to the list.

    Both float64 [batch, columns] on the CPU.
    """
    layers: list[tuple[Tensor, Tensor]] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x, y = (args[0] if args else kwargs["hidden_states"]).float(), output.float()
        larger = torch.maximum(x.norm(dim=-1), y.norm(dim=-1)).clamp(min=torch.finfo(torch.float32).tiny)
        change = (y - x).norm(dim=-1) / larger
        layers.append((torch.cosine_similarity(x, y, dim=-1).double().cpu(), change.double().cpu()))

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in decoder_layers(network)]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()
