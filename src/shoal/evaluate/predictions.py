"""What a model under a depth plan predicts along given completions: loss and most probable token at each position.

One forward pass per batch, with the numbers of the engine's passes when it is made to emit these completions
(`tests/evaluate/test_predictions.py`): `depth_context` restricts each layer to the columns that it would serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from shoal.depth.plan import DepthPlan
from shoal.errors import CheckpointError
from shoal.train.data import Example, collate, prompt_columns
from shoal.train.depth_context import depth_context

LOGITS_AT_ONCE = 2**26
"""Most logits in one batch: 256 MiB of float32. One example may have more."""
ROWS_AT_ONCE = 32
"""Most examples in one batch."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Of one completion, an element per token.

    Element 0 comes from the prompt's pass, element i + 1 from the decode pass at clock i. Example, `a b c </s>`: the prompt's pass
    predicts a; the passes at clocks 0, 1, 2 consume a, b, c and predict b, c, </s>.
    """

    losses: NDArray[np.float32]
    """Cross-entropy of the completion's token given all before it, in nats."""
    tokens: NDArray[np.int64]
    """The most probable token."""


def predict(network: Any, examples: Sequence[Example], plan: DepthPlan) -> list[Predictions]:
    """Run `examples` through a causal language model of transformers under `plan`.

    It stays on its device and in its dtype; loss and argmax are taken in float32. Raises `CheckpointError` where logits are not
    finite, `InvalidPlan` for a plan of another number of layers.
    """
    device = next(network.parameters()).device
    predictions: dict[int, Predictions] = {}
    for indices in batches(examples, vocab_size=network.config.vocab_size):
        batch = collate([examples[index] for index in indices], pad_token_id=0)  # masked, so any id will do
        labels = batch["labels"].to(device)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "position_ids")}
        with depth_context(network, plan, prompt_columns=prompt_columns(batch)), torch.inference_mode():
            logits = network(**inputs, logits_to_keep=labels.shape[1]).logits.float()
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").cpu().numpy()
            tokens = logits.argmax(-1).cpu().numpy()
        for row, index in enumerate(indices):
            length = len(examples[index].completion)
            predictions[index] = Predictions(losses=losses[row, :length], tokens=tokens[row, :length])
            if not np.isfinite(losses[row, :length]).all():
                raise CheckpointError(
                    "the model's logits are not finite: its weights are broken, or too large for this dtype (try float32)"
                )
    return [predictions[index] for index in range(len(examples))]


def batches(examples: Sequence[Example], *, vocab_size: int) -> Iterator[list[int]]:
    """Indices of examples that run together: neighbours in length, the longest first: what lacks memory fails at once."""
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].prompt), -len(examples[i].completion)))
    while order:
        longest = max(len(examples[index].completion) for index in order[:ROWS_AT_ONCE])
        rows = min(ROWS_AT_ONCE, max(1, LOGITS_AT_ONCE // (longest * vocab_size)))
        yield order[:rows]
        order = order[rows:]
