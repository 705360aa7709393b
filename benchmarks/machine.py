"""The machine under the benchmark: what it is, how fast it reads, how fast it multiplies, and the floor that follows."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from report import rounded
from shoal.depth.cost import PassCost
from shoal.models.decoder import Decoder

BUFFER_VALUES = 2**27
"""float32 values read to measure the bandwidth: 512 MiB, far more than any cache."""
SQUARE_SIDE = 1024
"""Rows and columns of the square product."""
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
"""What decides how fast small products are."""


def conditions() -> dict[str, Any]:
    """What a reader needs to judge a number: processor, threads, versions, date. Nothing that names the host."""
    cpu, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text(encoding="utf-8")
        cpu = _first(r"^model name\s*: (.+)$", text) or cpu
        flags = _first(r"^flags\s*: (.+)$", text) or ""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "features": [feature for feature in FEATURES if feature in flags.split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("shoal", "torch", "transformers")},
    }


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else None


class Limits:
    """The machine's speed at its best in a run: measured again in every round, the best kept.

    Attributes: `bandwidth`, bytes/s of reading a large buffer; `peak`, FLOP/s of the fastest of three products: a square float32
    one, a float32 one with as many rows as the pass, and the model's head with as many rows.
    """

    def __init__(self, decoder: Decoder, *, rows: int, quick: bool = False) -> None:
        """`rows`: tokens of the pass that is measured."""
        shape = decoder.config.shape
        side, width = (64, 64) if quick else (SQUARE_SIDE, shape.hidden_size)
        self.buffer = torch.ones(BUFFER_VALUES // (256 if quick else 1))
        self.products: list[tuple[int, Callable[[], object]]] = []
        square, wide = torch.randn(side, side), torch.randn(width, 4 * width)
        self._add(square, lambda x: x.mm(square), side)
        self._add(torch.randn(rows, width), lambda x: x.mm(wide), 4 * width)
        head = getattr(decoder, "head", None)  # where the whole pass is one call, there is none to call alone
        if callable(head):
            self._add(torch.randn(rows, shape.hidden_size).to(decoder.dtype), head, shape.vocab_size)
        self.bandwidth = self.peak = 0.0

    def _add(self, x: Tensor, product: Callable[[Tensor], object], width_out: int) -> None:
        self.products.append((2 * x.numel() * width_out, partial(product, x)))

    def measure(self) -> None:
        """A few more readings of each."""
        with torch.inference_mode():
            for _ in range(5):
                self.bandwidth = max(self.bandwidth, self.buffer.nbytes / seconds(self.buffer.sum))
                for flops, product in self.products:
                    self.peak = max(self.peak, flops / seconds(product))

    def floor_s(self, cost: PassCost) -> float:
        """The least time that it can take: its bytes at the bandwidth or its operations at the peak, the longer."""
        return max(cost.bytes_moved / self.bandwidth, cost.flops / self.peak)

    def to_dict(self) -> dict[str, float]:
        """Both, in GB/s and GFLOP/s."""
        return {"bandwidth_gb_per_s": rounded(self.bandwidth / 1e9), "peak_gflop_per_s": rounded(self.peak / 1e9)}


def seconds(call: Callable[[], object]) -> float:
    """Wall clock of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
