"""How often do some layers of a model say what all of them say? Measured on texts that the whole model wrote greedily.

A draft reads the exact keys and values of what stands before it, and its own of the tokens that it has drafted itself. So a text is
cut into drafts of 4 tokens, each given what was written:

    prompt p q, written a b c d e f      the first draft reads p q, consumes a b c d and should say b c d e
                                         the second reads p q a b c d, consumes e and should say f

Keys and values of a draft take the place of exact ones. The last draft therefore goes first: those before it do not read what it
wrote. Equal drafts of all texts share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shoal.depth.plan import DepthPlan
from shoal.engine.batch import Rows, build_pass
from shoal.engine.cache import KVCache
from shoal.engine.sampler import greedy
from shoal.models.executor import Executor

DRAFT_TOKENS = 4
"""Tokens of one draft."""

Text = tuple[Sequence[int], Sequence[int]]
"""A prompt, and what was written after it: two tokens or more, since the prompt's own pass predicts the first."""


class WrittenTexts:
    """Texts with their exact cache. It holds them twice: drafts write into one."""

    def __init__(self, decoder: Executor, texts: Sequence[Text]) -> None:
        """Reads the texts with all layers of `decoder`."""
        self.decoder, self.texts = decoder, texts
        self.num_layers = decoder.config.shape.num_layers
        self.num_drafted = sum(len(written) - 1 for _, written in texts)
        self.cache = KVCache(
            decoder.config.shape,
            dtype=decoder.dtype,
            device=decoder.device,
            num_slots=len(texts),
            budget_bytes=2**62,
        )
        self.cache.reserve(max(len(prompt) + len(written) for prompt, written in texts))
        for slot, (prompt, written) in enumerate(texts):
            token_ids = [*prompt, *written[:-1]]
            count = np.array([len(token_ids)])
            served = np.repeat(count[:, None], self.num_layers, axis=1)
            self.cache.hold(np.array([slot]), served)
            rows = Rows(slots=np.array([slot]), starts=np.array([0]), num_tokens=count, served=served)
            decoder(build_pass(rows, token_ids, np.zeros(1, dtype=np.int64)), self.cache)
        self._tensors = [*self.cache.keys, *self.cache.values]
        self._exact = [tensor.clone() for tensor in self._tensors]

    def agreement(self, plan: DepthPlan) -> float:
        """Share of the tokens, each text's first left out, that the layers of `plan` would have drafted."""
        longest = max(len(written) for _, written in self.texts) - 1
        agreed = sum(self._draft(plan, first) for first in reversed(range(0, longest, DRAFT_TOKENS)))
        with torch.inference_mode():
            for tensor, exact in zip(self._tensors, self._exact, strict=True):
                tensor.copy_(exact)
        return agreed / self.num_drafted

    def _draft(self, plan: DepthPlan, first: int) -> int:
        """How many tokens are as written in the drafts that begin with written token `first`, one of each text that has it."""
        slots = [slot for slot, (_, written) in enumerate(self.texts) if len(written) > first + 1]
        parts = [list(self.texts[slot][1][first : first + DRAFT_TOKENS + 1]) for slot in slots]
        counts = np.array([len(part) - 1 for part in parts])
        cutoffs = np.minimum(np.array(plan.cutoffs), first + DRAFT_TOKENS)
        rows = Rows(
            slots=np.array(slots),
            starts=np.array([len(self.texts[slot][0]) + first for slot in slots]),
            num_tokens=counts,
            served=np.minimum(np.maximum(cutoffs - first, 0), counts[:, None]),
        )
        token_ids = [token for part in parts for token in part[:-1]]
        expected = [token for part in parts for token in part[1:]]
        tokens, _ = greedy(self.decoder(build_pass(rows, token_ids, counts), self.cache))
        return sum(token == wanted for token, wanted in zip(tokens, expected, strict=True))
