"""What exits cost. Two kinds, as everywhere: what adds up over rows, and what the rows of a batch share.

A token that exits at layer l of L has run l layers; besides it pays for its checks and for the keys and values of the L - l layers
that it left out. Its batch pays for the layers of the slowest row, since a step ends when the last row exits. Example, L = 4, a
step of three rows that exit at 1, 1 and 3: 5 layer-tokens, 7 filled layer-tokens, 3 layers read, where dense has 12, 0 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shoal.depth.cost import bytes_moved, causal_pairs, flops
from shoal.depth.shape import ModelShape
from shoal.engine.ledger import Ledger
from shoal.models.passes import Ints


def fill_weights(shape: ModelShape) -> int:
    """Weights of one layer's key and value products: `fill` multiplies by these and by nothing else."""
    return shape.hidden_size * shape.cache_values_per_token


@dataclass(frozen=True, kw_only=True)
class ExitCost:
    """What one completion spent; `a + b` adds two."""

    ledger: Ledger
    """As the engine's. `decode_layer_tokens` are exit layers, so `mean_layers` is the mean exit layer of consumed generated tokens;
    `decode_flops` hold everything: layers, checks, filling and one head product per token."""
    checks: int = 0
    """Confidences computed."""
    check_flops: int = 0
    """FLOPs of the measure, and of head products beyond one per token."""
    filled_layer_tokens: int = 0
    """Layers x tokens whose keys and values were made of an exit state."""
    fill_flops: int = 0
    """FLOPs of those keys and values."""

    def __add__(self, other: ExitCost) -> ExitCost:
        return ExitCost(
            ledger=self.ledger + other.ledger,
            checks=self.checks + other.checks,
            check_flops=self.check_flops + other.check_flops,
            filled_layer_tokens=self.filled_layer_tokens + other.filled_layer_tokens,
            fill_flops=self.fill_flops + other.fill_flops,
        )


@dataclass(kw_only=True)
class BatchCost:
    """What the rows of all batches shared. A step is one decode pass of the rows that have not ended."""

    steps: int = 0
    """Decode steps."""
    layers: int = 0
    """Layers that any row of a step needed, summed over steps: the slowest row's."""
    decode_bytes: int = 0
    """Bytes that the decode steps moved: the weights of those layers; the head once for each layer after which it ran; key and
    value weights once for each layer that was filled in; cached positions read and written."""
    prompt_s: float = 0.0
    """Seconds for prompts."""
    decode_s: float = 0.0
    """Seconds for decode steps, checks and filling included."""

    @property
    def mean_layers(self) -> float:
        """Layers of a step, on average: no less than the mean exit layer (0.0 without a step)."""
        return self.layers / self.steps if self.steps else 0.0


class Tally:
    """Counts the rows of one batch where their products run."""

    def __init__(self, shape: ModelShape, num_rows: int, shared: BatchCost) -> None:
        self.shape, self.shared = shape, shared
        self.layers = np.zeros(num_rows, dtype=np.int64)
        self.pairs = np.zeros(num_rows, dtype=np.int64)  # (query, key) pairs of their attention
        self.heads = np.zeros(num_rows, dtype=np.int64)
        self.checks = np.zeros(num_rows, dtype=np.int64)
        self.fills = np.zeros(num_rows, dtype=np.int64)

    def layer(self, rows: Ints, positions: Ints) -> None:
        """A layer ran for `rows`, whose tokens stand at `positions` and see themselves and all before them."""
        self.layers[rows] += 1
        self.pairs[rows] += positions + 1
        self.shared.layers += 1
        self._moved(layers_read=1, cached_positions=int((positions + 1).sum()))

    def head(self, rows: Ints) -> None:
        """The head ran for `rows`."""
        self.heads[rows] += 1
        self._moved(head=True)

    def check(self, rows: Ints) -> None:
        """`rows` were asked how sure they are."""
        self.checks[rows] += 1

    def fill(self, rows: Ints) -> None:
        """One layer's keys and values were filled in for `rows`."""
        self.fills[rows] += 1
        self.shared.decode_bytes += fill_weights(self.shape) * self.shape.bytes_per_weight
        self._moved(cached_positions=len(rows))

    def cost(self, row: int, *, prompt_tokens: int, new_tokens: int, measure_flops: int) -> ExitCost:
        """What a row has spent. `measure_flops`: of one check, without the head."""
        shape, layers, passes = self.shape, self.shape.num_layers, new_tokens - 1
        ledger = Ledger.of(
            shape,
            prompt_tokens=prompt_tokens,
            prompt_heads=1,
            new_tokens=new_tokens,
            decode_passes=passes,
            prompt_layer_tokens=layers * prompt_tokens,
            prompt_layer_pairs=layers * causal_pairs(0, prompt_tokens),
            decode_layer_tokens=int(self.layers[row]),
            decode_layer_pairs=int(self.pairs[row]),
        )
        checks, fills = int(self.checks[row]), int(self.fills[row])
        more_heads = flops(shape, layer_tokens=0, layer_pairs=0, heads=int(self.heads[row]) - passes)
        check_flops = more_heads + checks * measure_flops
        fill_flops = 2 * fill_weights(shape) * fills
        return ExitCost(
            ledger=replace(ledger, decode_flops=ledger.decode_flops + check_flops + fill_flops),
            checks=checks,
            check_flops=check_flops,
            filled_layer_tokens=fills,
            fill_flops=fill_flops,
        )

    def _moved(self, *, layers_read: int = 0, cached_positions: int = 0, head: bool = False) -> None:
        self.shared.decode_bytes += bytes_moved(
            self.shape, layers_read=layers_read, cached_positions=cached_positions, head=head
        )
