"""The token that a model drafts, and how sure it is of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.draft.proposal import Proposal
from shoal.engine.request import Request
from shoal.engine.sampler import draw
from shoal.engine.sampling import uniform_noise

BORDERS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.99)
"""Probabilities between two stretches of evidence."""
CONFIDENCE_PRIORS: tuple[float, ...] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 0.97, 0.98)
"""Share accepted in each, as if probabilities were right; what is seen corrects them."""
DRAWN = 0xD4AF7
"""Makes of a request's seed the seed of what is drawn for its drafts: independent of its own draws."""


class ModelDraft:
    """A draft by a model, under way."""

    def __init__(self, request: Request, *, coupled: bool) -> None:
        """`coupled`: draw from the drafting model at the request's temperature, to be accepted with probability min(1, p/q);
        otherwise, and where the request is greedy, take the most probable token."""
        self.request = request
        self.coupled = coupled and request.sampling.temperature > 0
        self.tokens: list[int] = []
        self.evidence: list[int] = []
        self.distributions: list[Tensor] = []

    def proposal(self) -> Proposal:
        """What has been drafted."""
        return Proposal(
            tokens=tuple(self.tokens), evidence=tuple(self.evidence), distributions=tuple(self.distributions)
        )

    def draw(self, logits: Tensor) -> None:
        """Instead of `append` where coupled: the next token from the drafting model's float32 logits [V]."""
        q = soften(logits, self.request.sampling.temperature)
        position = len(self.request.output) + len(self.tokens)
        token = draw(q, uniform_noise(self.request.sampling.seed ^ DRAWN, self.request.sample, position))
        self.append(token, int(np.searchsorted(BORDERS, float(q[token]), side="right")))
        self.distributions.append(q)

    def append(self, token: int, evidence: int) -> None:
        """Take the most probable token."""
        self.tokens.append(token)
        self.evidence.append(evidence)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """What drafts are drawn from: float32 logits [V] of the drafting model at a temperature above 0, as probabilities."""
    return ((logits - logits.max()) / max(temperature, torch.finfo(logits.dtype).tiny)).softmax(dim=-1)


@torch.inference_mode()
def extend(drafts: Sequence[ModelDraft], logits: Tensor) -> None:
    """Give each draft its next token, from the drafting model's logits [R, V]."""
    logits = logits.float()
    largest, tokens = logits.max(dim=-1)
    probabilities = (largest - logits.logsumexp(dim=-1)).exp()
    evidence = np.searchsorted(BORDERS, probabilities.numpy(force=True), side="right")
    for row, (draft, token, bin_) in enumerate(zip(drafts, tokens.tolist(), evidence.tolist(), strict=True)):
        if draft.coupled:
            draft.draw(logits[row])
        else:
            draft.append(token, bin_)
