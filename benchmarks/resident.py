"""One measurement of memory.py, in the process that it is about: prints one JSON line.

python benchmarks/resident.py load CHECKPOINT DTYPE BATCH PROMPT_TOKENS NEW_TOKENS THREADS
python benchmarks/resident.py read CHECKPOINT
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path


def resident_bytes() -> int:
    """Resident memory of this process now, mapped files included."""
    return _kib("/proc/self/smaps_rollup", "Rss") * 1024


def peak_bytes() -> int:
    """The most that it ever was."""
    return _kib("/proc/self/status", "VmHWM") * 1024


def _kib(file: str, field: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def read(checkpoint: Path) -> dict[str, float]:
    """Seconds to read the weight files, each into fresh memory."""
    began = time.perf_counter()
    for file in sorted(checkpoint.glob("*.safetensors")):
        file.read_bytes()
    return {"read_s": time.perf_counter() - began}


def load(
    checkpoint: Path, dtype: str, batch: int, prompt_tokens: int, new_tokens: int, threads: int
) -> dict[str, float]:
    """Import, load, and generate up to the last pass, when the cache is at its fullest."""
    from shoal import Dense, Engine, Sampling
    from shoal.depth.cost import BLOCK_TOKENS
    from shoal.models.checkpoint import load_tokenizer

    began = time.perf_counter()
    load_tokenizer(checkpoint)  # imports most of a library when it is first called
    late_imports_s = time.perf_counter() - began

    idle = resident_bytes()
    began = time.perf_counter()
    engine = Engine.from_pretrained(checkpoint, dtype=dtype, threads=threads, max_batch=batch, cache_gib=2)
    load_s = time.perf_counter() - began
    loaded = resident_bytes()

    shape, draw = engine.shape, random.Random(1)
    for _ in range(batch):
        prompt = [draw.randrange(shape.vocab_size) for _ in range(prompt_tokens)]
        engine.add(prompt, Sampling(max_new_tokens=new_tokens, ignore_eos=True), streaming=False)
    for _ in range(new_tokens - 1):
        engine.step()
    generating = resident_bytes()
    while engine.has_work:
        engine.step()

    plan = Dense().plan(shape.num_layers)
    cost = plan.cost(shape, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    layer_values, head_values = shape.num_layers * shape.layer_weights, shape.head_weights
    return {
        "late_imports_s": late_imports_s,
        "load_s": load_s,
        "idle_bytes": idle,
        "loaded_bytes": loaded - idle,
        "generating_bytes": generating - idle,
        "peak_bytes": peak_bytes() - idle,
        "product_values": layer_values + head_values,
        "cache_bytes": cost.peak_cache_blocks
        * BLOCK_TOKENS
        * shape.cache_values_per_token
        * engine.runner.cache.dtype.itemsize,
    }


if __name__ == "__main__":
    what, checkpoint, *rest = sys.argv[1:]
    if what == "read":
        print(json.dumps(read(Path(checkpoint))))
    else:
        dtype, *sizes = rest
        print(json.dumps(load(Path(checkpoint), dtype, *map(int, sizes))))
