"""What a model that drafts says of its own tokens: the probability of the most probable one, sorted into stretches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BORDERS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.99)
"""Probabilities between two stretches of evidence."""
CONFIDENCE_PRIORS: tuple[float, ...] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 0.97, 0.98)
"""Share accepted in each, as if probabilities were right; what is seen corrects them."""


@torch.inference_mode()
def most_probable(logits: Tensor) -> tuple[list[int], list[int]]:
    """From logits [R, V] the most probable token of each row, and its evidence."""
    logits = logits.float()
    largest, tokens = logits.max(dim=-1)
    probabilities = (largest - logits.logsumexp(dim=-1)).exp()
    evidence = np.searchsorted(BORDERS, probabilities.numpy(force=True), side="right")
    return tokens.tolist(), evidence.tolist()
