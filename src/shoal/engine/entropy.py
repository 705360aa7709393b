"""The entropy trace: how unsure the model was at each token that it emitted, from logits that the sampler has at hand.

Per token two numbers in nats, both of the model's own logits, before temperature, penalties, bias and processors:

    entropy    -sum p log p over the k most probable tokens, p as it is: the tail is dropped, nothing is renormalised
               (Entropy Sentinel, arXiv 2601.09001, section 3; k = 20 is what servers return at most)
    nll        -log p of the token that was emitted

Example, k = 2: probabilities (1/2, 1/4, 1/8, 1/8) give 0.347 + 0.347 = 0.693; over the full vocabulary it would be 1.213.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

TopK = int | Literal["full"]
"""How many of the most probable tokens an entropy sums over."""
SEGMENT = 64
"""Logits in a segment of the vocabulary; the segments' maxima say where the top k can be."""


@dataclass(frozen=True, kw_only=True)
class EntropyTrace:
    """The trace of one completion."""

    top_k: TopK
    """What the entropies sum over; traces of different k are not compared."""
    entropies: tuple[float, ...]
    """Per emitted token, the end of sequence included, in nats."""
    nlls: tuple[float, ...]
    """-log p of each emitted token, in nats."""

    @property
    def mean_entropy(self) -> float:
        """Mean over the tokens, in nats; NaN where there are none."""
        return math.fsum(self.entropies) / len(self.entropies) if self.entropies else math.nan

    @property
    def g_nll(self) -> float:
        """Sum of the negative log-probabilities, whatever the length. Of a greedy completion it is G-NLL (Aichberger et al. 2024,
        arXiv 2412.15176), which stands for the most probable sequence's."""
        return math.fsum(self.nlls)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, numbers to six digits behind the point."""
        return {
            "top_k": self.top_k,
            "mean_entropy": round(self.mean_entropy, 6) if self.entropies else None,
            "g_nll": round(self.g_nll, 6),
            "entropies": [round(value, 6) for value in self.entropies],
            "nlls": [round(value, 6) for value in self.nlls],
        }


def token_uncertainty(logits: Tensor, token_ids: Sequence[int], top_k: TopK) -> list[tuple[float, float]]:
    """(entropy, nll) of one token per row of logits [R, V], each row's largest being finite. Rows do not depend on each other."""
    logits = logits.float()
    num_rows, vocab_size = logits.shape
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    # [R, V] as [R, SEGMENT, S] and a rest, so that maxima and sums run down columns: fast, and in one order whatever R is.
    num_segments = vocab_size // SEGMENT
    segments = logits[:, : num_segments * SEGMENT].view(num_rows, SEGMENT, num_segments)
    rest = logits[:, num_segments * SEGMENT :]
    maxima = segments.amax(dim=1)
    largest = torch.cat([maxima, rest], dim=1).amax(dim=1, keepdim=True)
    total = (segments - largest[:, :, None]).exp_().sum(dim=1).sum(dim=1) + (rest - largest).exp().sum(dim=1)
    log_total = total.log()[:, None]  # above the largest
    kept = logits if top_k == "full" else most_probable(segments, maxima, rest, min(top_k, vocab_size))
    log_p = kept - largest - log_total
    entropies = -(log_p.exp() * log_p).nansum(dim=1)  # 0 times -inf counts as 0
    return list(zip(entropies.tolist(), (log_total - (chosen - largest))[:, 0].tolist(), strict=True))


def most_probable(segments: Tensor, maxima: Tensor, rest: Tensor, k: int) -> Tensor:
    """The k largest of each row [R, k] of logits in segments [R, SEGMENT, S], whose maxima are [R, S], and a rest [R, < SEGMENT].

    Only the k segments with the largest maxima can hold any: one look at all logits, and a selection among k SEGMENT of them.
    Selecting from all of them takes several times as long.
    """
    if maxima.shape[1] > k:
        segments = segments.gather(2, maxima.topk(k).indices[:, None, :].expand(-1, SEGMENT, -1))
    return torch.cat([segments.flatten(1), rest], dim=1).topk(k).values
