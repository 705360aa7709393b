"""What a benchmark leaves behind: medians with their spread, a table, one JSON line, and a file of results."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

Sample = TypeVar("Sample")

RESULTS = Path(__file__).parent / "results"
"""One file per benchmark, each a list of runs."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="rounds that are measured, after one that is not")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of tensor operations")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its times mean nothing")
    options.add_argument("--save", action="store_true", help="merge the runs into results/")
    options.add_argument("--gates", action="store_true", help="say which of the bounds in gates.py the runs keep")
    return options


def interleaved(
    variants: Mapping[str, Callable[[], Sample]], rounds: int, *, between: Callable[[], None] = lambda: None
) -> dict[str, list[Sample]]:
    """Run every variant once per round, so that a machine that slows down slows all of them; `between` runs before a round.

    Returns per variant its sample of each round.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    for _ in range(rounds):
        between()
        for name, variant in variants.items():
            samples[name].append(variant())
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest, to four significant digits."""
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
    }


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios within each round, which a drift of the machine between rounds leaves alone."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def number(row: Mapping[str, Any], key: str, form: str = ".2f") -> str:
    """A number that not every row has, or nothing."""
    return f"{row[key]:{form}}" if key in row else ""


def extent(of: Mapping[str, float]) -> str:
    """The least and the greatest of a `spread`."""
    return f"{of['min']:.2f}..{of['max']:.2f}"


def save(benchmark: str, runs: Sequence[dict[str, Any]]) -> None:
    """Merge runs into `results/<benchmark>.json`; a run replaces the one with the same `case`."""
    path = RESULTS / f"{benchmark}.json"
    kept = load(benchmark)
    cases = [run["case"] for run in runs]
    merged = [*(run for run in kept if run["case"] not in cases), *runs]
    merged.sort(key=lambda run: list(run["case"].values()))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"benchmark": benchmark, "runs": merged}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load(benchmark: str) -> list[dict[str, Any]]:
    """The runs in `results/<benchmark>.json`; none where there is no such file."""
    path = RESULTS / f"{benchmark}.json"
    if not path.is_file():
        return []
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return runs


def print_json(benchmark: str, runs: Sequence[dict[str, Any]]) -> None:
    """The last line of every benchmark."""
    print(json.dumps({"benchmark": benchmark, "runs": list(runs)}), flush=True)
