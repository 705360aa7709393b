"""What was spent. `Ledger` is per request and adds up; `EngineStats` is per engine, for costs that requests share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shoal.depth.cost import attention_flops
from shoal.depth.shape import ModelShape


@dataclass(kw_only=True)
class LayerCounts:
    """Sums over the layers that ran, for one request."""

    prompt_tokens: int = 0
    """Layer x prompt-token products."""
    prompt_pairs: int = 0
    """(query, key) pairs in the attention of those."""
    decode_tokens: int = 0
    """Layer x generated-token products."""
    decode_pairs: int = 0
    """(query, key) pairs in the attention of those."""


@dataclass(kw_only=True)
class Ledger:
    """One request's spending, counted as its layers ran; `a + b` adds two. `dense_*`: what running every layer would take."""

    prompt_tokens: int = 0
    """Tokens of the prompt."""
    new_tokens: int = 0
    """Tokens emitted."""
    decode_passes: int = 0
    """Passes that consumed a generated token: one fewer than emitted tokens."""
    prompt_layer_tokens: int = 0
    """Layer x token products of the prompt."""
    decode_layer_tokens: int = 0
    """Layer x token products of generated tokens."""
    dense_prompt_layer_tokens: int = 0
    """L x prompt tokens."""
    dense_decode_layer_tokens: int = 0
    """L x decode passes."""
    prompt_flops: int = 0
    """Floating-point operations of the prompt, the head included."""
    decode_flops: int = 0
    """Floating-point operations of the decode passes, the head included."""
    dense_prompt_flops: int = 0
    """The same with every layer."""
    dense_decode_flops: int = 0
    """The same with every layer."""

    @property
    def mean_layers(self) -> float:
        """Mean layers per consumed generated token (0.0 where there was none)."""
        return self.decode_layer_tokens / self.decode_passes if self.decode_passes else 0.0

    @property
    def layer_tokens(self) -> int:
        """Layer-tokens of the whole request."""
        return self.prompt_layer_tokens + self.decode_layer_tokens

    @property
    def layer_tokens_saved(self) -> int:
        """Layer-tokens that a dense run would have added."""
        return self.dense_prompt_layer_tokens + self.dense_decode_layer_tokens - self.layer_tokens

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @classmethod
    def of(
        cls, shape: ModelShape, counts: LayerCounts, *, prompt_tokens: int, new_tokens: int, decode_passes: int
    ) -> Ledger:
        """The ledger of a request whose layers ran `counts`, after `prompt_tokens` of prompt were read."""
        emitted_by_prompt = int(new_tokens > 0)
        head = 2 * shape.head_weights
        prompt_pairs = causal_pairs(0, prompt_tokens)
        decode_pairs = causal_pairs(prompt_tokens, decode_passes)

        def flops(layer_tokens: int, layer_pairs: int, heads: int) -> int:
            return 2 * shape.layer_weights * layer_tokens + attention_flops(shape, layer_pairs) + head * heads

        return cls(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            decode_passes=decode_passes,
            prompt_layer_tokens=counts.prompt_tokens,
            decode_layer_tokens=counts.decode_tokens,
            dense_prompt_layer_tokens=shape.num_layers * prompt_tokens,
            dense_decode_layer_tokens=shape.num_layers * decode_passes,
            prompt_flops=flops(counts.prompt_tokens, counts.prompt_pairs, emitted_by_prompt),
            decode_flops=flops(counts.decode_tokens, counts.decode_pairs, decode_passes),
            dense_prompt_flops=flops(
                shape.num_layers * prompt_tokens, shape.num_layers * prompt_pairs, emitted_by_prompt
            ),
            dense_decode_flops=flops(shape.num_layers * decode_passes, shape.num_layers * decode_pairs, decode_passes),
        )


def causal_pairs(start: int, num_tokens: int) -> int:
    """(query, key) pairs when `num_tokens` follow `start` cached ones: `causal_pairs(2, 2) == 3 + 4`."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


@dataclass(kw_only=True)
class EngineStats:
    """Costs that the requests of an engine share, since the last `reset()`. A pass that carries any generated token counts as
    decode, any other as prompt."""

    prompt_passes: int = 0
    """Passes that carried prompt tokens only."""
    decode_passes: int = 0
    """Passes that carried generated tokens."""
    prompt_bytes: int = 0
    """Bytes moved by prompt passes: weights of the layers that ran and the head once, cache read and written per row."""
    decode_bytes: int = 0
    """Bytes moved by decode passes."""
    dense_prompt_bytes: int = 0
    """Bytes that the same passes would move with every layer."""
    dense_decode_bytes: int = 0
    """Bytes that the same passes would move with every layer."""
    prompt_s: float = 0.0
    """Seconds in prompt passes."""
    decode_s: float = 0.0
    """Seconds in decode passes."""
    peak_cache_bytes: int = 0
    """Most bytes of cache blocks in use at once."""

    def reset(self) -> None:
        """Start counting anew."""
        for f in fields(self):
            setattr(self, f.name, f.default)
