"""What a decode step costs against active layers, rows and context: straight lines, their slopes, and how straight they are.

    python benchmarks/scaling.py --save

One sweep per line, the rest held fixed. Every point is an engine of its own over the same weights, whose rows have read their
prompts and decode at one clock; in each round every point runs a few steps, so that a machine that slows down slows all of them.
Layers have to be a line, since a plan's saving is what its layers cost. Rows need not: a step of few rows waits for weights, one of
many for arithmetic, and the line through both is only a summary. Context counts the positions that a row sees, in all layers.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from machine import conditions
from models import random_checkpoint, random_prompts
from report import interleaved, parser, print_json, rounded, save, spread
from shoal import DepthPlan, Engine, Sampling, SkipDecode
from shoal.evaluate.markdown import table
from shoal.models.decoder import Decoder

LEAST_R_SQUARED = 0.99
"""Of the lines against active layers."""
LAYERS = tuple(range(2, 13, 2))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (64, 128, 256, 512, 1024)
LAYER_SWEEP_ROWS = (1, 8, 32)
CONTEXT_SWEEP_ROWS = 8
STEPS = 8
"""Decode steps per point and round."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Sizes of a decode step."""

    layers: int
    """Layers that run."""
    rows: int
    """Rows, one token each."""
    context: int
    """Positions of the prompt; a step later in a round sees a few more."""


class Batch:
    """Rows that have read their prompts and go on decoding for as long as they are asked to."""

    def __init__(self, decoder: Decoder, point: Point, num_steps: int) -> None:
        """`num_steps`: most steps that will be asked for."""
        self.engine = Engine(decoder, max_batch=point.rows, cache_gib=8)
        shape = decoder.config.shape
        prompts = random_prompts(shape.vocab_size, num_prompts=point.rows, num_tokens=point.context)
        sampling = Sampling(max_new_tokens=num_steps + 2, ignore_eos=True)
        for prompt in prompts:
            self.engine.add(prompt, sampling, same_depth(point.layers, shape.num_layers), streaming=False)
        while self.engine.stats.decode_passes == 0 or self.reading:
            self.engine.step()

    @property
    def reading(self) -> bool:
        """Whether a row has not read its prompt yet."""
        slots = self.engine.runner.slots
        return bool((slots.num_computed[slots.running] < slots.prompt_tokens[slots.running]).any())

    def step_s(self, num_steps: int) -> float:
        """Median seconds of the next steps."""
        seconds = []
        for _ in range(num_steps):
            began = time.perf_counter()
            self.engine.step()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)


def same_depth(layers: int, num_layers: int) -> DepthPlan:
    """A plan that runs `layers` layers at every clock, for the prompt, too, which is read sooner so."""
    return SkipDecode(min_layers=layers, max_layers=layers, prompt="max_layers").plan(num_layers)


def sweep(decoder: Decoder, points: Sequence[Point], axis: str, *, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds per step at each point, and the line through their medians against the field `axis` of a point."""
    batches = {point: Batch(decoder, point, steps * (rounds + 1) + 8) for point in points}
    variants = {point: (lambda batch=batch: batch.step_s(steps)) for point, batch in batches.items()}
    interleaved(variants, 1)
    samples = interleaved(variants, rounds)
    xs = [getattr(point, axis) for point in points]
    fixed = {name: getattr(points[0], name) for name in ("layers", "rows", "context") if name != axis}
    return {"axis": axis, "fixed": fixed, **line(dict(zip(xs, samples.values(), strict=True)))}


def line(samples: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """The least-squares line through the medians of `samples`, by their x."""
    x = np.array(list(samples))
    y = np.array([statistics.median(seconds) for seconds in samples.values()])
    slope, start = np.polyfit(x, y, 1)
    unexplained = np.var(y - (start + slope * x))
    return {
        "step_s": {str(at): spread(seconds) for at, seconds in samples.items()},
        "start_s": rounded(start),
        "slope_s": rounded(slope),
        "r_squared": rounded(1 - unexplained / np.var(y)),
    }


def measure(decoder: Decoder, name: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every sweep."""
    quick, num_layers = options.quick, decoder.config.shape.num_layers
    depths = (2, 4, num_layers) if quick else [k for k in LAYERS if k <= num_layers]
    rows = (1, 2, 4) if quick else ROWS
    contexts = (8, 16, 32) if quick else CONTEXTS
    least, steps = contexts[0], 2 if quick else STEPS
    sweeps = {
        **{
            f"layers, {r} rows": ("layers", [Point(layers=k, rows=r, context=least) for k in depths])
            for r in (rows[:1] if quick else LAYER_SWEEP_ROWS)
        },
        "rows": ("rows", [Point(layers=num_layers, rows=r, context=least) for r in rows]),
        "context": (
            "context",
            [Point(layers=num_layers, rows=min(CONTEXT_SWEEP_ROWS, rows[-1]), context=c) for c in contexts],
        ),
    }
    lines = []
    for axis, points in sweeps.values():
        lines.append(sweep(decoder, points, axis, rounds=options.rounds, steps=steps))
        gc.collect()  # the caches of this sweep's engines
    run = {
        "case": {"model": name, "dtype": dtype},
        "conditions": conditions(),
        "rounds": options.rounds,
        "steps": steps,
        "layers_are_linear": all(one["r_squared"] >= LEAST_R_SQUARED for one in lines if one["axis"] == "layers"),
        "lines": lines,
    }
    print(describe(run), end="\n\n", flush=True)
    return run


HEADER = ("against", "at", "ms per step", "ms at 0", "µs more for each", "R²")


def describe(run: dict[str, Any]) -> str:
    """One run as a table, a line in each row."""
    rows = [
        [
            one["axis"],
            ", ".join(f"{value} {name}" for name, value in one["fixed"].items()),
            ", ".join(f"{x}: {1e3 * step['median']:.3g}" for x, step in one["step_s"].items()),
            f"{1e3 * one['start_s']:.3g}",
            f"{1e6 * one['slope_s']:.3g}",
            f"{one['r_squared']:.4f}",
        ]
        for one in run["lines"]
    ]
    case, kept = run["case"], "holds" if run["layers_are_linear"] else "does not hold"
    return (
        f"{case['model']}, {case['dtype']}: decode steps, medians of {run['rounds']} rounds of {run['steps']}. "
        f"R² of at least {LEAST_R_SQUARED} against layers {kept}.\n\n" + table(HEADER, rows)
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M"])
    options.add_argument("--dtype", default="bfloat16")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.rounds = ["OPT-quick"], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen.models:
            engine = Engine.from_pretrained(random_checkpoint(name, Path(directory)), dtype=chosen.dtype, cache_gib=1)
            runs.append(measure(engine.runner.decoder, name, chosen.dtype, chosen))
    if chosen.save:
        save("scaling", runs)
    print_json("scaling", runs)


if __name__ == "__main__":
    main()
