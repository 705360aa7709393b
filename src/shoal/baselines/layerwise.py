"""A decoder that may stop after any layer, and fill the cache of the layers that it left out.

    embed -> layer 1 -> state after 1 -> layer 2 -> state after 2 -> ... -> logits of any of these states

Layers are counted from 1 here, as a token that exits at layer l has run l of them; Python's index of that layer is l - 1.
Letters: R rows, N tokens of a pass, L layers, d hidden size, H_q and H_kv heads of width D, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.engine.batch import Rows, build_pass
from shoal.engine.cache import KVCache
from shoal.engine.intake import Prompt, check_length, encode, prompts_of
from shoal.errors import InvalidInput, InvalidPrompt
from shoal.models.checkpoint import load_checkpoint, load_tokenizer
from shoal.models.decoder import Decoder, rotate
from shoal.models.directory import resolve
from shoal.models.executor import attention_kernel
from shoal.models.layout import on
from shoal.models.linear import Linear
from shoal.models.native.library import Library
from shoal.models.passes import Ints, LayerCaches, Pass
from shoal.models.weights import DecoderConfig, DecoderWeights, LayerWeights, LinearWeights


class LayerwiseDecoder:
    """The PyTorch decoder, with what exits need beside it: products of keys and values alone, and a name for the weights."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, tokenizer: Any = None, *, library: Library | None = None
    ) -> None:
        """Usually made by `from_pretrained`. Takes the weights over.

        Args: `tokenizer`: transformers'; None works with token ids only. `library`: the kernel for the attention of decode passes.
        """
        self.config, self.tokenizer = config, tokenizer
        self._keys_and_values: list[Linear] = []
        digest = hashlib.sha256(_bytes(weights.final_norm.weight))

        def watched() -> Iterator[LayerWeights]:  # layers are read once, as the decoder packs them
            for layer in weights.layers:
                self._keys_and_values.append(self._without_queries(layer.qkv))
                for product in (layer.qkv, layer.out, layer.down):
                    digest.update(_bytes(product.weight[0]))
                yield layer

        self.decoder = Decoder(config, replace(weights, layers=watched()), library)
        self.fingerprint = digest.hexdigest()
        """Names the weights: the same in float32 and bfloat16, another one after any tuning."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: str = "cpu",
        revision: str | None = None,
        token: str | None = None,
    ) -> LayerwiseDecoder:
        """Load a checkpoint directory or a hub id; arguments and errors as of `Engine.from_pretrained`."""
        directory = resolve(os.fspath(path), revision=revision, token=token)
        config, weights = load_checkpoint(directory, dtype=dtype, device=device)
        embedding = weights.embedding
        on_cpu = embedding.device.type == "cpu"
        library = attention_kernel(config.shape, embedding.dtype) if on_cpu else None
        return cls(config, weights, load_tokenizer(directory), library=library)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.shape.num_layers

    def encode(self, prompts: Prompt | Iterable[Prompt], *, max_new_tokens: int) -> list[list[int]]:
        """Token ids of one prompt or several, checked as the engine checks them.

        Raises `InvalidPrompt` (which one, and why) for none, an empty one, or one that leaves no room; `InvalidInput` for token ids
        outside the vocabulary or a bad `max_new_tokens`.
        """
        if max_new_tokens < 1:
            raise InvalidInput(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        listed = prompts_of(prompts)
        if not listed:
            raise InvalidPrompt("there is no prompt: give at least one")
        encoded = []
        for index, prompt in enumerate(listed):
            try:
                encoded.append(self.encode_one(prompt))
                check_length(len(encoded[-1]), max_new_tokens, self.config)
            except InvalidInput as error:
                raise type(error)(f"prompt {index}: {error}") from error
        return encoded

    def encode_one(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, inside the vocabulary. Raises as `encode` does."""
        token_ids, vocab_size = encode(prompt, self.tokenizer), self.config.shape.vocab_size
        outside = [token for token in token_ids if not 0 <= token < vocab_size]
        if outside:
            raise InvalidInput(f"token id {outside[0]} is outside the vocabulary (0 to {vocab_size - 1})")
        return list(token_ids)

    def encode_completion(self, completion: Prompt) -> list[int]:
        """Token ids of a given completion: text without special tokens. Raises as `encode` does."""
        if not isinstance(completion, str):
            return self.encode_one(completion)
        if self.tokenizer is None:
            raise InvalidPrompt("this checkpoint has no tokenizer: give completions as lists of token ids")
        token_ids = list(self.tokenizer(completion, add_special_tokens=False).input_ids)
        if not token_ids:
            raise InvalidPrompt("the completion is empty: give at least one token")
        return token_ids

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of a completion without special tokens; empty without a tokenizer."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def new_cache(self, num_rows: int, num_positions: int) -> KVCache:
        """A cache of `num_rows` slots that hold `num_positions` each. Raises `CacheBudgetExceeded` where memory is short."""
        cache = KVCache(
            self.config.shape,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            num_slots=num_rows,
            budget_bytes=0,  # nothing is admitted here: the slots of a batch are all taken at once
        )
        cache.reserve(num_positions)
        return cache

    def work(self, token_ids: Sequence[Sequence[int]], slots: Ints, starts: Ints) -> Pass:
        """A pass in which every layer serves all tokens: row r brings `token_ids[r]`, from `starts[r]` on, in `slots[r]`."""
        num_tokens = np.array([len(row) for row in token_ids], dtype=np.int64)
        served = np.repeat(num_tokens[:, None], self.num_layers, axis=1)
        rows = Rows(slots=slots, starts=starts, num_tokens=num_tokens, served=served)
        return build_pass(rows, [token for row in token_ids for token in row], np.ones(len(slots), dtype=np.int64))

    def states(self, work: Pass, cache: LayerCaches) -> Iterator[Tensor]:
        """The states [N, d] of a pass before the first layer and after each: L + 1 times the same tensor, changed in place.

        To be read in inference mode, each before the next.
        """
        x = self.decoder.embed(work)
        attention = self.decoder.attention(work, cache)
        yield x
        for index, layer in enumerate(self.decoder.layers):
            layer(x, attention(index))
            yield x

    def fill(self, index: int, states: Tensor, slots: Ints, positions: Ints, cache: LayerCaches) -> None:
        """Write the keys and values that layer `index` makes of `states` [n, d], without running it.

        The token of row r stands at `positions[r]` in `slots[r]`.
        """
        shape, layer, device = self.config.shape, self.decoder.layers[index], self.decoder.device
        product = self._keys_and_values[index](layer.attention_norm(states))
        keys, values = product.view(len(states), 2 * shape.num_kv_heads, shape.head_dim).chunk(2, dim=1)
        at = on(device, positions)
        if layer.k_norm:
            keys = layer.k_norm(keys)
        if self.decoder.rotary:
            keys = rotate(keys, *self.decoder.rotary(at, self.decoder.dtype))
        where = on(device, slots)
        cache.keys[index][where, :, at] = keys
        cache.values[index][where, :, at] = values

    def _without_queries(self, qkv: LinearWeights) -> Linear:
        """The product [d] -> [2 H_kv D] of keys and values; packed products cannot be cut, so it has weights of its own."""
        first = self.config.shape.num_heads * self.config.shape.head_dim
        bias = None if qkv.bias is None else qkv.bias[first:].clone()
        return Linear(LinearWeights(qkv.weight[first:].clone(), bias), quantized=self.config.shape.quantized)


def _bytes(values: Tensor) -> bytes:
    return bytes(values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().tobytes())
