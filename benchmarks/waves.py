"""Requests that enter at once, as slots become free, against waves where the engine predicts that they are faster.

    python benchmarks/waves.py --save

Rows at one clock share what their layers cost; a row that enters alone runs its deep layers, and its prompt all layers, for itself.
While requests wait for others to end, slots idle. Which weighs more depends on the machine, the model and the lengths: requests of
one length that are all there keep in step by themselves, and there is nothing to decide. *Known*: `max_new_tokens` is the length
of each request; *bound*: it is the longest of all, and requests end earlier, as with an end-of-sequence token. Seconds are of the
whole queue, and the engine learns what its passes cost in a round that is not counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from machine import conditions
from models import random_checkpoint, random_prompts
from report import interleaved, paired, parser, print_json, rounded, save, spread
from shoal import Dense, DepthPlan, Engine, Sampling, SkipDecode
from shoal.evaluate.markdown import table

DEPTHS = (Fraction(1), Fraction(1, 2), Fraction(1, 4))
PROMPT_TOKENS = 64
HORIZON = 64
LENGTHS = {"equal": (64, 64), "near": (48, 80), "far": (16, 112)}
"""Least and most new tokens; 64 in the mean."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A queue of requests under one plan."""

    prompts: list[list[int]]
    lengths: list[int]
    """New tokens of each."""
    known: bool
    """Whether the engine is told the lengths."""
    plan: DepthPlan


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What serving a queue took."""

    seconds: float
    """Wall clock."""
    cpu_s: float
    """Processor time of all threads, which other processes disturb less."""
    wait_s: float
    """Mean seconds until a request's first token."""
    passes: int
    """Passes run."""
    bytes_moved: int
    """As the engine counts."""


def serve(engine: Engine, job: Job, *, waves: bool) -> Sample:
    """All requests wait at the start; one that ends before its `max_new_tokens` is cancelled, which frees its slot likewise."""
    engine.runner.scheduler.waves = waves
    engine.stats.reset()
    most = max(job.lengths)
    length_of = {}
    for prompt, length in zip(job.prompts, job.lengths, strict=True):
        sampling = Sampling(max_new_tokens=length if job.known else most, ignore_eos=True)
        (request,) = engine.add(prompt, sampling, job.plan, streaming=False)
        length_of[request] = length
    emitted = dict.fromkeys(length_of, 0)
    first_token_s = {}
    began, cpu_began = time.perf_counter(), time.process_time()
    while engine.has_work:
        for chunk in engine.step():
            request = chunk.request_id
            first_token_s.setdefault(request, time.perf_counter() - began)
            emitted[request] += len(chunk.token_ids)
            if chunk.generation is None and emitted[request] == length_of[request]:
                engine.cancel(request)
    return Sample(
        seconds=time.perf_counter() - began,
        cpu_s=time.process_time() - cpu_began,
        wait_s=statistics.mean(first_token_s.values()),
        passes=engine.stats.prompt_passes + engine.stats.decode_passes,
        bytes_moved=engine.stats.prompt_bytes + engine.stats.decode_bytes,
    )


def measure(engine: Engine, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every job both ways, in rounds."""
    requests, prompt_tokens, scale = (8, 8, 8) if options.quick else (options.requests, PROMPT_TOKENS, 1)
    prompts = random_prompts(engine.shape.vocab_size, num_prompts=requests, num_tokens=prompt_tokens)
    rows = []
    for depth in DEPTHS:
        policy = Dense() if depth == 1 else SkipDecode(depth=float(depth), horizon=HORIZON // scale)
        plan = policy.plan(engine.shape.num_layers)
        jobs = {}
        for label, (least, most) in LENGTHS.items():
            generator = random.Random(1)
            lengths = [generator.randint(least // scale, most // scale) for _ in prompts]
            for known in (True, False) if most > least else (True,):
                jobs[label, known] = Job(prompts=prompts, lengths=lengths, known=known, plan=plan)
        variants = {(*key, w): partial(serve, engine, job, waves=w) for key, job in jobs.items() for w in (False, True)}
        interleaved(variants, 1)
        samples = interleaved(variants, options.rounds)
        for label, known in jobs:
            once, waves = samples[label, known, False], samples[label, known, True]
            rows.append(
                {
                    "depth": str(depth),
                    "lengths": label,
                    "known": known,
                    "at_once_s": spread([s.seconds for s in once]),
                    "speedup": paired([s.seconds for s in once], [s.seconds for s in waves]),
                    "cpu_speedup": paired([s.cpu_s for s in once], [s.cpu_s for s in waves]),
                    "bytes_ratio": rounded(once[-1].bytes_moved / waves[-1].bytes_moved),
                    "passes": [once[-1].passes, waves[-1].passes],
                    "wait_s": [
                        rounded(statistics.median(s.wait_s for s in once)),
                        rounded(statistics.median(s.wait_s for s in waves)),
                    ],
                }
            )
    run = {
        "case": {"model": name, "dtype": options.dtype, "batch": engine.runner.cache.num_slots},
        "conditions": conditions(),
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "rounds": options.rounds,
        "step_time": {
            "prices_s": {kind: rounded(price) for kind, price in engine.step_time.prices.items()},
            "relative_error": rounded(engine.step_time.relative_error or 0),
        },
        "variants": rows,
    }
    print(describe(run), end="\n\n", flush=True)
    return run


HEADER = ("depth", "lengths", "at once s", "speedup", "min..max", "CPU time", "bytes", "passes", "first token s")


def describe(run: dict[str, Any]) -> str:
    """One run as a table. Speedup, CPU time, bytes: at once over waves, so that above 1 waves are better."""
    rows = [
        [
            row["depth"],
            row["lengths"] + ("" if row["known"] else ", bound"),
            f"{row['at_once_s']['median']:.2f}",
            f"{row['speedup']['median']:.3f}",
            f"{row['speedup']['min']:.3f}..{row['speedup']['max']:.3f}",
            f"{row['cpu_speedup']['median']:.3f}",
            f"{row['bytes_ratio']:.2f}",
            " → ".join(map(str, row["passes"])),
            " → ".join(f"{seconds:.2f}" for seconds in row["wait_s"]),
        ]
        for row in run["variants"]
    ]
    case, model = run["case"], run["step_time"]
    return (
        f"{case['model']}, {case['dtype']}: {run['requests']} requests of {run['prompt_tokens']} prompt tokens in {case['batch']} "
        f"slots, {run['rounds']} rounds; passes predicted to {100 * model['relative_error']:.0f}%\n\n"
        + table(HEADER, rows)
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-10M", "OPT-125M"])
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--batch", type=int, default=16, help="cache slots")
    options.add_argument("--requests", type=int, default=64)
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.rounds, chosen.batch = ["OPT-quick"], 1, 4
    torch.set_num_threads(chosen.threads)
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen.models:
            checkpoint = random_checkpoint(name, Path(directory))
            engine = Engine.from_pretrained(checkpoint, dtype=chosen.dtype, max_batch=chosen.batch, cache_gib=2)
            runs.append(measure(engine, name, chosen))
    if chosen.save:
        save("waves", runs)
    print_json("waves", runs)


if __name__ == "__main__":
    main()
