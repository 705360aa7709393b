"""Entropy Adaptive Decoding: two models write one text, the large one where the text is uncertain. Lossy.

arXiv 2502.06833: H is the entropy in bits of the next token's distribution under whoever is writing, as the model gave it; where
its mean over the last `window` tokens exceeds a threshold the large model writes on, otherwise the small one. A model that comes
back has not seen what the other wrote: it reads that in one pass, like a prompt (our reading of how caches are kept; the paper
does not say). Who writes changes after `hold` tokens at the earliest, so that they do not take turns at every token.

Example with window 1, hold 1 and a threshold of 2 bits; the small model begins, and entropies are 1, 3, 4, 1, 1: it writes the
first token and the second, the large one the third and the fourth, the small one the fifth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from shoal.depth.cost import causal_pairs, flops
from shoal.engine.batch import Rows, build_pass
from shoal.engine.cache import KVCache
from shoal.engine.text import TextStream
from shoal.errors import InvalidInput
from shoal.models.executor import Executor


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """When the large model writes."""

    threshold_bits: float
    """Mean entropy above which it does; infinity leaves all to the small model, a number below 0 everything after the first token
    to the large one."""
    window: int = 5
    """Tokens whose entropies are averaged."""
    hold: int = 1
    """Tokens that a model writes at least before the other one may."""
    max_new_tokens: int = 64
    """Most tokens of the text, end of sequence included."""

    def __post_init__(self) -> None:
        for name in ("window", "hold", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class AdaptiveText:
    """What both wrote."""

    token_ids: tuple[int, ...]
    """Emitted tokens, end of sequence included."""
    by_large: tuple[bool, ...]
    """Per token, who wrote it."""
    entropies: tuple[float, ...]
    """Per token, bits, under its writer."""
    flops: int
    """Of both models, what they read after each other included."""


class Reader:
    """One model and how far it has read one text."""

    def __init__(self, decoder: Executor, num_positions: int) -> None:
        """`num_positions`: the longest that the text may get."""
        self.decoder, self.shape = decoder, decoder.config.shape
        self.num_read = self.flops = 0
        self.cache = KVCache(self.shape, dtype=decoder.dtype, device=decoder.device, num_slots=1, budget_bytes=2**62)
        self.cache.reserve(num_positions)

    def read(self, text: Sequence[int]) -> Tensor:
        """Logits [V], float32, after `text`, reading what it has not read of it in one pass."""
        new = list(text[self.num_read :])
        count, start = np.array([len(new)]), np.array([self.num_read])
        served = np.repeat(count[:, None], self.shape.num_layers, axis=1)
        rows = Rows(slots=np.array([0]), starts=start, num_tokens=count, served=served)
        self.cache.hold(rows.slots, start[:, None] + served)
        logits = self.decoder(build_pass(rows, new, np.ones(1, dtype=np.int64)), self.cache)
        layers = self.shape.num_layers
        pairs = layers * causal_pairs(self.num_read, len(new))
        self.flops += flops(self.shape, layer_tokens=layers * len(new), layer_pairs=pairs, heads=1)
        self.num_read = len(text)
        return logits[0].float()


@torch.inference_mode()
def adaptive_decode(
    small: Executor, large: Executor, prompt: Sequence[int], config: AdaptiveConfig, *, stream: TextStream | None = None
) -> AdaptiveText:
    """Write one text greedily. Both models have one tokenizer; the large one's end-of-sequence tokens end it.

    Args: `stream`: gets every token as it comes, and ends the text where it finds a stop string.

    Raises `InvalidInput` where the vocabularies differ in size or the text may get too long for one of the models.
    """
    if small.config.shape.vocab_size != large.config.shape.vocab_size:
        raise InvalidInput(
            f"the models have {small.config.shape.vocab_size} and {large.config.shape.vocab_size} tokens: they must share a "
            "tokenizer"
        )
    if not prompt:
        raise InvalidInput("the prompt is empty: give at least one token")
    room = min(small.config.max_positions, large.config.max_positions)
    most = len(prompt) + config.max_new_tokens
    if most > room:
        raise InvalidInput(f"{len(prompt)} prompt tokens + {config.max_new_tokens} new tokens exceed {room} positions")
    readers = (Reader(small, most), Reader(large, most))
    text, writer, held = list(prompt), 0, 0
    by_large: list[bool] = []
    entropies: list[float] = []
    while len(by_large) < config.max_new_tokens:
        logits = readers[writer].read(text)
        entropies.append(entropy_bits(logits))
        by_large.append(bool(writer))
        text.append(int(logits.argmax()))
        held += 1
        if stream is not None:
            stream.push(text[-1:])
        if text[-1] in large.config.eos_token_ids or (stream is not None and stream.stopped):
            break
        wanted = int(mean_of_last(entropies, config.window) > config.threshold_bits)
        if wanted != writer and held >= config.hold:
            writer, held = wanted, 0
    return AdaptiveText(
        token_ids=tuple(text[len(prompt) :]),
        by_large=tuple(by_large),
        entropies=tuple(entropies),
        flops=sum(reader.flops for reader in readers),
    )


def mean_of_last(entropies: Sequence[float], window: int) -> float:
    """What is held against the threshold.

    >>> mean_of_last([8.0, 1.0, 3.0], window=2)
    2.0
    """
    recent = entropies[-window:]
    return sum(recent) / len(recent)


def entropy_bits(logits: Tensor) -> float:
    """Entropy in bits of the distribution of float32 logits [V].

    >>> entropy_bits(torch.zeros(8))
    3.0
    """
    logprobs = logits.log_softmax(dim=-1)
    return round(float(-(logprobs.exp() * logprobs).nan_to_num().sum()) / log(2), 6)
