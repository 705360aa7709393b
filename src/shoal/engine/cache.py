"""The KV cache: a slot per request, counted in blocks of 16 positions per layer and slot, handed back layer by layer.

Layout: per layer one tensor of keys and one of values, each [slots, H_kv, S, D], so that neighbouring slots are read by one
attention call without a copy. On CPUs the memory behind it is mapped but untouched until written, and goes back to the operating
system when a layer retires or a request ends: resident memory follows the blocks in use. On other devices the tensors are
allocated whole and blocks are a count.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.depth.cost import BLOCK_TOKENS
from shoal.depth.shape import ModelShape
from shoal.errors import CacheBudgetExceeded

CAPACITY_STEP = 64
"""Positions by which slots grow, a multiple of the block size."""


class KVCache:
    """Keys and values of every running request.

    Only the engine changes it. Between passes: a free slot holds no block, `blocks_in_use <= budget_blocks`, and every position
    that a running layer may read has been written.
    """

    def __init__(
        self, shape: ModelShape, *, dtype: torch.dtype, device: torch.device, num_slots: int, budget_bytes: int
    ) -> None:
        """`budget_bytes`: most memory of blocks in use at any time, over all layers and slots."""
        self.shape, self.dtype, self.device = shape, dtype, device
        self.num_slots = num_slots
        self.budget_blocks = budget_bytes // self.bytes_per_block
        self.free_slots = list(range(num_slots))
        self.num_blocks = np.zeros((num_slots, shape.num_layers), dtype=np.int64)
        self.kept_blocks = 0
        """Blocks' worth of keys and values that stand beside the slots (`prefixes.py`)."""
        self.max_positions = 0
        self.lazy = device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED")  # Windows has no madvise
        self._arenas: dict[int, mmap.mmap] = {}
        # One slot more than requests can have: CUDA graphs write there for rows that a layer does not serve.
        nothing = torch.empty(num_slots + 1, shape.num_kv_heads, 0, shape.head_dim, dtype=dtype, device=device)
        self.keys: list[Tensor] = [nothing] * shape.num_layers
        self.values: list[Tensor] = [nothing] * shape.num_layers

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block: 16 positions of one layer."""
        return BLOCK_TOKENS * self.shape.cache_values_per_token * self.dtype.itemsize

    @property
    def blocks_in_use(self) -> int:
        """Blocks held by all slots in all layers, and beside them."""
        return int(self.num_blocks.sum()) + self.kept_blocks

    @property
    def bytes_in_use(self) -> int:
        """Bytes of those blocks."""
        return self.blocks_in_use * self.bytes_per_block

    def reserve(self, num_positions: int) -> None:
        """Make every slot able to hold `num_positions`; what is cached is kept.

        Capacity follows the longest request, since attention may read slots to their end, and shrinks when the cache is idle.
        """
        capacity = BLOCK_TOKENS * self._blocks_per_slot(num_positions)
        idle = len(self.free_slots) == self.num_slots
        if capacity <= self.max_positions and not (idle and 2 * capacity < self.max_positions):
            return
        try:
            for layer, held in enumerate(self.num_blocks.T):
                self.keys[layer] = self._grown(self.keys[layer], capacity, held)
                self.values[layer] = self._grown(self.values[layer], capacity, held)
        except (OSError, RuntimeError) as error:
            # What has grown is as good as what has not: `max_positions` still holds.
            raise CacheBudgetExceeded(
                f"no memory for {self.num_slots} cache slots of {capacity} positions ({error}): lower max_batch or the lengths"
            ) from error
        self.max_positions = capacity

    def fits_slots(self, num_positions: int) -> bool:
        """Whether slots of `num_positions` stay within the budget where they are allocated whole (not on CPUs)."""
        return self.committed_blocks(0, num_positions) <= self.budget_blocks

    def committed_blocks(self, reserved: int, num_positions: int) -> int:
        """Blocks of the budget that requests take: those `reserved` for them, or slots of `num_positions` where they are allocated
        whole (not on CPUs)."""
        whole = (self.num_slots + 1) * self.shape.num_layers * self._blocks_per_slot(num_positions)
        return reserved if self.lazy else max(reserved, whole)

    def acquire(self) -> int:
        """Take a free slot, the lowest, so that rows which run together lie together."""
        slot = min(self.free_slots)
        self.free_slots.remove(slot)
        return slot

    def hold(self, slots: NDArray[np.int64], num_positions: NDArray[np.int64]) -> None:
        """Record that layer `l` of `slots[r]` holds `num_positions[r, l]` positions; 0 hands the layer's memory back.

        Called before a pass with what the pass will write, and after it with what has to be kept.
        """
        before, now = self.num_blocks[slots], -(-num_positions // BLOCK_TOKENS)
        self.num_blocks[slots] = now
        gone = before > now * before  # held before, and nothing now
        if gone.any():
            for row, layer in np.argwhere(gone).tolist():
                self._hand_back(int(slots[row]), layer)

    def move(self, slot: int, start: int, path: Sequence[int], num_written: NDArray[np.int64]) -> None:
        """Bring what was written to `start + path[i]` to `start + i + 1`, in the layers where it was.

        Args: `path`: rising, none below its place; `num_written` [L]: positions that the layer's last pass wrote from `start` on.
        """
        if not path or path[-1] == len(path):
            return
        moving = np.searchsorted(path, num_written).tolist()  # leading ones of the path
        source = torch.tensor(path, device=self.device) + start
        for layer, count in enumerate(moving):
            to = slice(start + 1, start + 1 + count)
            for tensor in (self.keys[layer], self.values[layer]):
                tensor[slot, :, to] = tensor[slot, :, source[:count]]

    def release(self, slot: int, *, poisoned: bool = False) -> None:
        """End a slot's use. `poisoned`: its values may be NaN, which would leak through masked products, so wipe them."""
        if poisoned:
            for layer in np.flatnonzero(self.num_blocks[slot]).tolist():
                filled = int(self.num_blocks[slot, layer]) * BLOCK_TOKENS
                self.keys[layer][slot, :, :filled] = 0
                self.values[layer][slot, :, :filled] = 0
        self.hold(np.array([slot]), np.zeros((1, self.shape.num_layers), dtype=np.int64))
        self.free_slots.append(slot)

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if the books do not add up. Cheap enough to run whenever the engine is idle."""
        if len(set(self.free_slots)) < len(self.free_slots):
            raise RuntimeError(f"a cache slot is free twice: {sorted(self.free_slots)}")
        if self.num_blocks[self.free_slots].any():
            raise RuntimeError("a free cache slot holds blocks")
        if self.blocks_in_use > self.budget_blocks:
            raise RuntimeError(f"{self.blocks_in_use} cache blocks are in use, {self.budget_blocks} is the budget")

    def _blocks_per_slot(self, num_positions: int) -> int:
        """Blocks in one layer of a slot that can hold `num_positions`."""
        return CAPACITY_STEP // BLOCK_TOKENS * -(-num_positions // CAPACITY_STEP)

    def _grown(self, old: Tensor, capacity: int, held: NDArray[np.int64]) -> Tensor:
        """A tensor of `capacity` positions with the blocks that each slot holds in `old`."""
        new = self._allocate(capacity)
        for slot in np.flatnonzero(held).tolist():
            filled = int(held[slot]) * BLOCK_TOKENS
            new[slot, :, :filled] = old[slot, :, :filled]
        self._arenas.pop(old.data_ptr(), None)
        return new

    def _allocate(self, capacity: int) -> Tensor:
        size = (self.num_slots + 1, self.shape.num_kv_heads, capacity, self.shape.head_dim)
        if not self.lazy:
            return torch.zeros(size, dtype=self.dtype, device=self.device)
        arena = mmap.mmap(-1, int(np.prod(size)) * self.dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(arena, dtype=self.dtype).view(size)
        self._arenas[tensor.data_ptr()] = arena
        return tensor

    def _hand_back(self, slot: int, layer: int) -> None:
        """Give the pages of one slot in one layer back to the operating system; they read as zeros afterwards."""
        for tensor in (self.keys[layer], self.values[layer]):
            arena = self._arenas.get(tensor.data_ptr())
            if arena is None:
                return
            stride = tensor.stride(0) * self.dtype.itemsize
            start = -(-slot * stride // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages inside the slot only
            stop = (slot + 1) * stride // mmap.PAGESIZE * mmap.PAGESIZE
            if stop > start:
                arena.madvise(mmap.MADV_DONTNEED, start, stop - start)
