"""What a model takes in memory beyond its weights and cache, and how long it takes to load beside reading its bytes.

    python benchmarks/memory.py --save --gates

Each measurement has a fresh process (resident.py): import, note the resident memory, load, generate, note it again while the
cache is at its fullest, and the peak. Resident memory counts mapped files. *Weights* are the checkpoint's parameters at the bytes
of the dtype, *cache* the blocks that the plan names beforehand. What loading imports late is imported before, and timed apart.
Reading and loading both find the files in the page cache; reading puts them into fresh memory, as a loader has to. Peers say what
they hold after loading, and at most until then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from decode_tables import notes
from gates import print_gates
from machine import conditions
from models import random_checkpoint
from peers.client import PEERS, Absent
from report import extent, interleaved, paired, parser, print_json, save, spread
from samples import absences, add_peer_options, started, workplace
from shoal.evaluate.markdown import table

WORKER = Path(__file__).with_name("resident.py")
SIZES = (8, 64, 64)
"""Batch, prompt tokens, new tokens."""
QUICK_SIZES = (2, 8, 8)


def in_fresh_process(*arguments: object) -> dict[str, float]:
    """What resident.py measures, run with `arguments`. Raises `RuntimeError` with what it said if it failed."""
    done = subprocess.run(
        [sys.executable, str(WORKER), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def parameters(checkpoint: Path) -> int:
    """Values in the weight files."""
    total = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return total


def weight_bytes(checkpoint: Path, dtype: str, product_values: int) -> int:
    """Bytes of the parameters in `dtype`; int8 is for products, what else there is stays in bfloat16."""
    if dtype != "int8":
        return parameters(checkpoint) * getattr(torch, dtype).itemsize
    return product_values + 2 * (parameters(checkpoint) - product_values)


def measure(name: str, dtype: str, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """One model in one dtype."""
    checkpoint = random_checkpoint(name, directory)
    sizes = QUICK_SIZES if options.quick else SIZES
    variants: dict[str, Callable[[], dict[str, float]]] = {
        "read": partial(in_fresh_process, "read", checkpoint),
        "load": partial(in_fresh_process, "load", checkpoint, dtype, *sizes, options.threads),
    }
    interleaved(variants, 1)  # the files are in the page cache from here on
    samples = interleaved(variants, options.rounds)
    loads = samples["load"]
    read_s, load_s = [s["read_s"] for s in samples["read"]], [s["load_s"] for s in loads]
    weights = weight_bytes(checkpoint, dtype, int(loads[0]["product_values"]))
    cache = int(loads[0]["cache_bytes"])
    beside, absent = peers_memory(checkpoint, dtype, weights, options)
    return {
        "case": {"model": name, "dtype": dtype},
        "conditions": conditions(),
        "rounds": options.rounds,
        **dict(zip(("batch", "prompt_tokens", "new_tokens"), sizes, strict=True)),
        "file_bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
        "weight_bytes": weights,
        "cache_bytes": cache,
        **{
            key: spread([s[key] for s in loads])
            for key in ("idle_bytes", "loaded_bytes", "generating_bytes", "peak_bytes")
        },
        "loaded_over_weights": spread([s["loaded_bytes"] / weights for s in loads]),
        "generating_over_planned": spread([s["generating_bytes"] / (weights + cache) for s in loads]),
        "peak_over_planned": spread([s["peak_bytes"] / (weights + cache) for s in loads]),
        "read_s": spread(read_s),
        "load_s": spread(load_s),
        "load_over_read": paired(load_s, read_s),
        "late_imports_s": spread([s["late_imports_s"] for s in loads]),
        "peers": beside,
        "absent": absences(absent),
    }


def peers_memory(
    checkpoint: Path, dtype: str, weights: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[Absent]]:
    """What each peer holds after loading, one after the other."""
    rows: list[dict[str, Any]] = []
    missing: list[Absent] = []
    for name in PEERS:
        if name not in options.peers and "all" not in options.peers:
            continue
        with started([name], checkpoint, dtype, threads=options.threads) as (peers, absent):
            missing += absent
            for peer in peers:
                memory = peer.memory()
                if isinstance(memory, Absent):
                    missing.append(memory)
                    continue
                loaded = memory.rss_bytes - memory.imported_rss_bytes
                peak = memory.peak_rss_bytes - memory.imported_rss_bytes
                rows.append(
                    {
                        "peer": name,
                        "version": peer.version,
                        "note": peer.note,
                        "loaded_bytes": loaded,
                        "peak_bytes": peak,
                        "loaded_over_weights": loaded / weights,
                    }
                )
    return rows, missing


HEADER = (
    "model",
    "dtype",
    "engine",
    "weights MB",
    "idle MB",
    "loaded MB",
    "over weights",
    "generating",
    "over planned",
    "peak MB",
)
LOAD_HEADER = (
    *("model", "dtype", "reading s", "min..max", "loading s", "min..max"),
    *("loading / reading", "min..max", "late imports s"),
)


def describe(runs: Sequence[dict[str, Any]]) -> str:
    """Memory (growth over an imported, idle process), then loading."""

    def mb(value: float) -> str:
        return f"{value / 1e6:.0f}"

    rows = []
    for run in runs:
        case = [*run["case"].values()]
        medians = {key: run[f"{key}_bytes"]["median"] for key in ("idle", "loaded", "generating", "peak")}
        rows.append(
            [
                *case,
                "shoal",
                mb(run["weight_bytes"]),
                mb(medians["idle"]),
                mb(medians["loaded"]),
                f"{run['loaded_over_weights']['median']:.2f}",
                mb(medians["generating"]),
                f"{run['generating_over_planned']['median']:.2f}",
                mb(medians["peak"]),
            ]
        )
        for row in run["peers"]:
            held = [mb(row["loaded_bytes"]), f"{row['loaded_over_weights']:.2f}"]
            rows.append([*case, row["peer"], "", "", *held, "", "", mb(row["peak_bytes"])])
    loading = [
        [
            *run["case"].values(),
            *(
                cell
                for key in ("read_s", "load_s", "load_over_read")
                for cell in (f"{run[key]['median']:.2f}", extent(run[key]))
            ),
            f"{run['late_imports_s']['median']:.2f}",
        ]
        for run in runs
    ]
    return "\n\n".join([table(HEADER, rows), table(LOAD_HEADER, loading), *notes(runs)])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["Llama-500M"])
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8", "float32"])
    add_peer_options(options)
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.rounds = ["Llama-quick"], 2
    runs = []
    with workplace(chosen.keep) as directory:
        for name in chosen.models:
            for dtype in chosen.dtypes:
                run = measure(name, dtype, chosen, directory)
                print(describe([run]), end="\n\n", flush=True)
                if chosen.save:
                    save("memory", [run])
                runs.append(run)
    if chosen.gates:
        print_gates("memory", runs)
    print_json("memory", runs)


if __name__ == "__main__":
    main()
