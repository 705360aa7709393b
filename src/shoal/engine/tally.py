"""What passes have cost in sum, and what they teach about their time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.depth.cost import bytes_moved
from shoal.depth.shape import ModelShape
from shoal.engine.batch import Rows
from shoal.engine.drafting import DraftStats
from shoal.engine.ledger import EngineStats
from shoal.engine.step_time import StepTime, pass_work
from shoal.models.passes import Ints

TOGETHER = 32
"""Passes that are counted in one go. Right after a pass the processor's caches are full of weights and the same code takes several
times as long, so counting waits until there is more of it, or until somebody asks."""


class Tally:
    """Notes passes; whoever reads `stats` or `step_time` sees all of them."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.drafting = DraftStats()
        self._stats, self._step_time = EngineStats(), StepTime()
        self._noted: list[tuple[Rows, NDArray[np.bool_] | None, int, float]] = []

    @property
    def stats(self) -> EngineStats:
        """Costs that requests share."""
        self._count()
        return self._stats

    @property
    def step_time(self) -> StepTime:
        """What passes take on this machine."""
        self._count()
        return self._step_time

    def note_blocks(self, num_bytes: int) -> None:
        """Bytes of cache in use during a pass."""
        self._stats.peak_cache_bytes = max(self._stats.peak_cache_bytes, num_bytes)

    def note_drafting(self, seconds: float) -> None:
        """Proposing, and deciding how much to verify, took so long."""
        self._stats.draft_s += seconds

    def note_copy(self, num_positions: int) -> None:
        """So many positions of a layer were read and written elsewhere."""
        self._stats.copied_bytes += bytes_moved(
            self.shape, layers_read=0, cached_positions=2 * num_positions, head=False
        )

    def note(self, rows: Rows, decodes: NDArray[np.bool_], num_logits: int, seconds: float) -> None:
        """A pass has run these rows. `decodes` [R]: those that consumed generated tokens."""
        self._noted.append((rows, decodes, num_logits, seconds))
        if len(self._noted) == TOGETHER:
            self._count()

    def note_draft(self, rows: Rows, seconds: float) -> None:
        """A pass has drafted for these rows, with the logits of every token."""
        self._noted.append((rows, None, int(rows.num_tokens.sum()), seconds))
        if len(self._noted) == TOGETHER:
            self._count()

    def _count(self) -> None:
        noted, self._noted = self._noted, []
        for rows, decodes, num_logits, seconds in noted:
            if decodes is None:
                self._add_draft(rows)
            else:
                self._add(rows, decodes, num_logits > 0, seconds)
            # The rows' own starts stand for those of tokens that run no layer anew: they read the same keys.
            self._step_time.observe(pass_work(rows.ran, rows.starts, rows.num_tokens, num_logits), seconds)

    def _add_draft(self, rows: Rows) -> None:
        """Add a pass that drafted; its seconds are among those that the engine takes for drafting."""
        ran = rows.served > 0
        cached = int((rows.starts * ran.sum(axis=1) + rows.served.sum(axis=1)).sum())
        layers = int(ran.any(axis=0).sum())
        self._stats.draft_passes += 1
        self._stats.draft_bytes += bytes_moved(self.shape, layers_read=layers, cached_positions=cached, head=True)

    def _add(self, rows: Rows, decodes: NDArray[np.bool_], emits: bool, seconds: float) -> None:
        """Add a pass to the shared costs; see `EngineStats` for how one is shared between prompts and generated tokens."""
        shape, stats = self.shape, self._stats
        ran = rows.ran > 0
        layer_tokens = rows.ran.sum(axis=1)
        cached = rows.starts * ran.sum(axis=1) + layer_tokens
        dense_cached = shape.num_layers * (rows.starts + rows.num_tokens)
        layers = int(ran.any(axis=0).sum())
        any_decode, all_decode = bool(decodes.any()), bool(decodes.all())
        layers_for_decode = layers if all_decode else int(ran[decodes].any(axis=0).sum())
        head_for_prompts = emits and not any_decode

        def parts(values: Ints) -> tuple[int, int]:
            """Sums over the rows that generate and over the others."""
            total = int(values.sum())
            decode = total if all_decode else int(values[decodes].sum())
            return decode, total - decode

        def moved(layers_read: int, cached_positions: int, head: bool) -> int:
            return bytes_moved(shape, layers_read=layers_read, cached_positions=cached_positions, head=head)

        decode_cached, prompt_cached = parts(cached)
        dense_decode_cached, dense_prompt_cached = parts(dense_cached)
        decode_tokens, prompt_tokens = parts(layer_tokens)
        stats.decode_passes += any_decode
        stats.prompt_passes += not any_decode
        stats.decode_bytes += moved(layers_for_decode, decode_cached, any_decode)
        stats.prompt_bytes += moved(layers - layers_for_decode, prompt_cached, head_for_prompts)
        stats.dense_decode_bytes += moved(shape.num_layers * any_decode, dense_decode_cached, any_decode)
        stats.dense_prompt_bytes += moved(shape.num_layers * (not any_decode), dense_prompt_cached, head_for_prompts)
        decode_s = seconds * decode_tokens / (decode_tokens + prompt_tokens)
        stats.decode_s += decode_s
        stats.prompt_s += seconds - decode_s
