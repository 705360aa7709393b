"""The machine under the benchmark: what it is, how fast it reads, how fast it multiplies, and the floor that follows."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shoal.depth.cost import PassCost
from shoal.models.linear import Linear

BUFFER_VALUES = 2**27
"""float32 values read to measure the bandwidth: 512 MiB, far more than any cache."""
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

    Attributes: `bandwidth`, bytes/s of reading a large buffer; `peak`, FLOP/s of a product with as many rows as the batch.
    """

    def __init__(self, product: Linear, *, rows: int, dtype: torch.dtype, quick: bool = False) -> None:
        """`product`: the model's largest packed product, its head."""
        self.product = product
        self.x = torch.randn(rows, product.in_features).to(dtype)
        self.buffer = torch.ones(BUFFER_VALUES // (256 if quick else 1))
        self.bandwidth = self.peak = 0.0

    def measure(self) -> None:
        """A few more readings of both."""
        flops = 2 * self.product.out_features * self.product.in_features * self.x.shape[0]
        with torch.inference_mode():
            for _ in range(5):
                read_s = seconds(self.buffer.sum)
                self.bandwidth = max(self.bandwidth, self.buffer.nbytes / read_s)
                product_s = seconds(lambda: self.product(self.x))
                self.peak = max(self.peak, flops / product_s)

    def floor_s(self, cost: PassCost) -> float:
        """The least time that a pass can take: its bytes at the bandwidth or its operations at the peak, the longer."""
        return max(cost.bytes_moved / self.bandwidth, cost.flops / self.peak)


def seconds(call: Callable[[], object]) -> float:
    """Wall clock of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
