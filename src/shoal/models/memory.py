"""Giving memory back while a checkpoint is loaded, so that its peak stays near what is kept."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

from torch import Tensor


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def drop_mapped(tensor: Tensor) -> None:
    """Let the system take back the pages of a mapped file that hold `tensor`, contiguous and not needed any more.

    They count as resident until the whole file is unmapped otherwise.
    """
    libc = _libc()
    if libc is None or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page  # whole pages only: neighbours may still be wanted
    stop = (tensor.data_ptr() + tensor.nbytes) // page * page
    if stop > start:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def drop_freed() -> None:
    """Return freed memory to the system. glibc keeps it: once a block of some size has been freed, later ones of up to 32 MB come
    from a heap that only shrinks at its end."""
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):  # glibc only
        libc.malloc_trim(0)
