"""What the cost of a forward pass depends on: the sizes of a decoder, without its weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    `layer_weights` and `head_weights` count the parameters that take part in matrix products (biases and norms are left out, they
    are below 0.1%); embeddings are looked up, not multiplied, and cost nothing here.
    """

    num_layers: int
    """Decoder layers, L."""
    hidden_size: int
    """Width of the residual stream, d."""
    num_heads: int
    """Query heads, H_q."""
    num_kv_heads: int
    """Key/value heads, H_kv (equal to `num_heads` without grouped-query attention)."""
    head_dim: int
    """Width of one head, d_h."""
    intermediate_size: int
    """Width of the MLP."""
    gated_mlp: bool
    """Whether the MLP has a gate product beside the up product (SwiGLU)."""
    vocab_size: int
    """Rows of the language-model head."""
    bytes_per_value: int = 4
    """Bytes of one cached value, and of one weight unless it is quantised (4 for float32, 2 for bfloat16 and float16)."""
    quantized: bool = False
    """Whether the weights of products are held in int8."""

    @property
    def bytes_per_weight(self) -> int:
        """Bytes of one weight that takes part in products; the scales of quantised rows are left out, they are below 0.3%."""
        return 1 if self.quantized else self.bytes_per_value

    @property
    def layer_weights(self) -> int:
        """Parameters in the matrix products of one layer: query, key, value, output, and the MLP's two or three."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.gated_mlp else 2)
        return attention + mlp

    @property
    def head_weights(self) -> int:
        """Parameters of the language-model head."""
        return self.hidden_size * self.vocab_size

    @property
    def cache_values_per_token(self) -> int:
        """Keys and values that one layer caches for one token."""
        return 2 * self.num_kv_heads * self.head_dim
