"""What was spent. `Ledger` is per request and adds up; `EngineStats` is per engine, for costs that requests share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shoal.depth.cost import causal_pairs, flops
from shoal.depth.shape import ModelShape


@dataclass(kw_only=True)
class Ledger:
    """One request's spending, counted as its layers ran; `a + b` adds two. `dense_*`: what running every layer would take."""

    prompt_tokens: int = 0
    """Tokens of the prompt."""
    new_tokens: int = 0
    """Tokens emitted."""
    decode_passes: int = 0
    """Generated tokens that were consumed, each in the pass of its clock: one fewer than emitted tokens."""
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
    draft_layer_tokens: int = 0
    """Layer x token products that drafting took beyond the plan's own: of layers that draft, and of tokens taken back."""
    draft_flops: int = 0
    """Floating-point operations of those and of their heads, and of a smaller model that drafts."""
    probe_flops: int = 0
    """Floating-point operations of probes that read the prompt; in none of the above."""
    shared_prompt_tokens: int = 0
    """Tokens of the prompt that were copied from a prefix which others have too; they are among `prompt_tokens`."""
    shared_layer_tokens: int = 0
    """Layer x token products that this spared: with them, `prompt_layer_tokens` are what the plan forecasts."""
    shared_flops: int = 0
    """Floating-point operations that it spared, likewise."""

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
        cls,
        shape: ModelShape,
        *,
        prompt_tokens: int,
        prompt_heads: int,
        new_tokens: int,
        decode_passes: int,
        prompt_layer_tokens: int,
        prompt_layer_pairs: int,
        decode_layer_tokens: int,
        decode_layer_pairs: int,
        draft_layer_tokens: int = 0,
        draft_layer_pairs: int = 0,
        draft_heads: int = 0,
        small_model_flops: int = 0,
        prompt_layers: int = 0,
        shared_prompt_tokens: int = 0,
    ) -> Ledger:
        """The ledger of a request that has read `prompt_tokens`, of which it found the first `shared_prompt_tokens` computed in
        `prompt_layers` layers, and whose head ran `prompt_heads` times after them; `*_pairs` are
        (query, key) pairs summed over layers that ran."""
        layers = shape.num_layers
        prompt_pairs, decode_pairs = causal_pairs(0, prompt_tokens), causal_pairs(prompt_tokens, decode_passes)
        return cls(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            decode_passes=decode_passes,
            prompt_layer_tokens=prompt_layer_tokens,
            decode_layer_tokens=decode_layer_tokens,
            dense_prompt_layer_tokens=layers * prompt_tokens,
            dense_decode_layer_tokens=layers * decode_passes,
            prompt_flops=flops(
                shape, layer_tokens=prompt_layer_tokens, layer_pairs=prompt_layer_pairs, heads=prompt_heads
            ),
            decode_flops=flops(
                shape, layer_tokens=decode_layer_tokens, layer_pairs=decode_layer_pairs, heads=decode_passes
            ),
            dense_prompt_flops=flops(
                shape, layer_tokens=layers * prompt_tokens, layer_pairs=layers * prompt_pairs, heads=prompt_heads
            ),
            dense_decode_flops=flops(
                shape, layer_tokens=layers * decode_passes, layer_pairs=layers * decode_pairs, heads=decode_passes
            ),
            shared_prompt_tokens=shared_prompt_tokens,
            shared_layer_tokens=prompt_layers * shared_prompt_tokens,
            shared_flops=flops(
                shape,
                layer_tokens=prompt_layers * shared_prompt_tokens,
                layer_pairs=prompt_layers * causal_pairs(0, shared_prompt_tokens),
                heads=0,
            ),
            draft_layer_tokens=draft_layer_tokens,
            draft_flops=small_model_flops
            + flops(shape, layer_tokens=draft_layer_tokens, layer_pairs=draft_layer_pairs, heads=draft_heads),
        )


@dataclass(kw_only=True)
class EngineStats:
    """Costs that the requests of an engine share, since the last `reset()`.

    A pass may carry prompts of some rows and generated tokens of others. Its weights and head count as decode where a row with a
    generated token needed them, its cache bytes by row, and its seconds in proportion to the layer-tokens of both.
    """

    prompt_passes: int = 0
    """Passes that carried prompt tokens only."""
    decode_passes: int = 0
    """Passes that carried generated tokens."""
    prompt_bytes: int = 0
    """Bytes moved for prompts: weights and head once per pass, cache read and written per row."""
    decode_bytes: int = 0
    """Bytes moved for generated tokens."""
    dense_prompt_bytes: int = 0
    """Bytes that the same passes would move with every layer."""
    dense_decode_bytes: int = 0
    """Bytes that the same passes would move with every layer."""
    prompt_s: float = 0.0
    """Seconds for prompts."""
    decode_s: float = 0.0
    """Seconds for generated tokens."""
    draft_passes: int = 0
    """Passes of the model itself, of a few layers, that drafted."""
    draft_bytes: int = 0
    """Bytes that those moved."""
    draft_s: float = 0.0
    """Seconds for drafting: proposing, and deciding how much."""
    copied_bytes: int = 0
    """Bytes that copying shared prefixes out of slots and into slots read and wrote; in none of the above."""
    peak_cache_bytes: int = 0
    """Most bytes of cache blocks in use at once."""

    def reset(self) -> None:
        """Start counting anew."""
        for f in fields(self):
            setattr(self, f.name, f.default)
