"""Rows at different clocks and under different plans in one batch, against one clock and one plan.

    python benchmarks/clocks.py --save --gates

Two questions. *Staggered*: a new request enters every `new_tokens / batch` passes as an old one leaves, so that all rows stand at
different clocks; what does that cost against a batch that starts together? Both serve the same requests, prompts included: one
full period of the staggered batch, after it has filled, is exactly one batch's work. *Mixed*: four plans side by side in one
batch, against a batch for each.

The bound of a gain is floor(dense) / floor(plans), both admitted the same way, from the rows that each layer really served in each
pass (served.py); for whole requests, and for the passes that carried no prompt.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gates import print_gates
from machine import Limits, conditions
from models import random_checkpoint, random_prompts
from report import extent, interleaved, number, paired, parser, print_json, rounded, save, spread
from served import Recorded, Served, recording
from shoal import Dense, DepthPlan, Engine, Sampling, SkipDecode
from shoal.evaluate.markdown import table

DEPTHS = (Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 5))
PROMPT_TOKENS = 64
NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What serving one batch's requests took."""

    seconds: float
    """Prompts and decoding."""
    decode_s: float
    """Of that, passes that carried no prompt."""
    bytes_moved: int
    """As the engine counts: weights once per pass, the cache per row."""
    passes: tuple[Served, ...]
    """What each pass served."""

    def floor_s(self, limits: Limits, *, decode: bool) -> float:
        """Least seconds of all passes, or of those that carried no prompt."""
        return sum(one.floor_s(limits) for one in self.passes if not (decode and one.has_prompt))


@dataclass(frozen=True, kw_only=True)
class Job:
    """Requests: a prompt and a plan each, equally long."""

    prompts: Sequence[list[int]]
    plans: Sequence[DepthPlan]
    sampling: Sampling

    def part(self, rows: slice) -> Job:
        """Some of the requests."""
        return Job(prompts=self.prompts[rows], plans=self.plans[rows], sampling=self.sampling)

    def add(self, engine: Engine, row: int) -> None:
        """Queue one of them."""
        engine.add(self.prompts[row], self.sampling, self.plans[row], streaming=False)


class Period:
    """Passes that are timed and recorded, from its making to `sample`."""

    def __init__(self, engine: Engine) -> None:
        engine.stats.reset()
        self.engine = engine
        self.pass_s: list[float] = []
        self.began = time.perf_counter()

    def step(self) -> None:
        """One pass."""
        began = time.perf_counter()
        self.engine.step()
        self.pass_s.append(time.perf_counter() - began)

    def sample(self, recorded: Sequence[Recorded]) -> Sample:
        """What has been spent; `recorded`: its passes."""
        seconds, stats = time.perf_counter() - self.began, self.engine.stats
        passes = tuple(one.served(self.engine.shape) for one in recorded)
        return Sample(
            seconds=seconds,
            decode_s=sum(s for s, one in zip(self.pass_s, passes, strict=True) if not one.has_prompt),
            bytes_moved=stats.prompt_bytes + stats.decode_bytes,
            passes=passes,
        )


def together(engine: Engine, *jobs: Job) -> Sample:
    """Serve one job after the other; the requests of a job enter together."""
    with recording(engine) as recorded:
        period = Period(engine)
        for job in jobs:
            for row in range(len(job.prompts)):
                job.add(engine, row)
            while engine.has_work:
                period.step()
        return period.sample(recorded)


def staggered(engine: Engine, job: Job) -> Sample:
    """Serve the job with a request entering every few passes, in a batch that the same requests have filled before.

    Example, 4 rows and 8 new tokens, so a request lives for 8 passes and one enters every 2: after 8 passes the first is done
    and three stand at clocks 6, 4 and 2; the next 8 passes serve 4 requests' worth of passes, and are measured.
    """
    batch = len(job.prompts)
    gap = job.sampling.max_new_tokens // batch
    for row in range(batch):
        job.add(engine, row)
        for _ in range(gap):
            engine.step()
    with recording(engine) as recorded:
        period = Period(engine)
        for row in range(batch):
            job.add(engine, row)
            for _ in range(gap):
                period.step()
        result = period.sample(recorded)
    while engine.has_work:
        engine.step()
    return result


def measure(engine: Engine, name: str, dtype: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every variant, in rounds."""
    prompt_tokens, new_tokens = (8, 8) if options.quick else (PROMPT_TOKENS, NEW_TOKENS)
    shape = engine.shape
    prompts = random_prompts(shape.vocab_size, num_prompts=batch, num_tokens=prompt_tokens)
    plans = {
        f"depth {depth}": (Dense() if depth == 1 else SkipDecode(depth=float(depth), horizon=new_tokens - 1)).plan(
            shape.num_layers
        )
        for depth in DEPTHS
    }
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    each = len(plans)
    jobs = {label: Job(prompts=prompts, plans=[plan] * batch, sampling=sampling) for label, plan in plans.items()}
    mixed = Job(prompts=prompts, plans=list(plans.values()) * (batch // each), sampling=sampling)
    jobs["four plans"] = mixed
    variants: dict[str, Callable[[], Sample]] = {}
    for label, job in jobs.items():
        variants[f"{label}, together"] = partial(together, engine, job)
        variants[f"{label}, staggered"] = partial(staggered, engine, job)
    # The same requests, those of one plan in a batch of their own.
    variants["four plans, a small batch each"] = partial(
        together, engine, *(mixed.part(slice(start, None, each)) for start in range(each))
    )
    limits = Limits(engine.runner.decoder, rows=batch, quick=options.quick)
    limits.measure()
    interleaved(variants, 1)
    samples = interleaved(variants, options.rounds, between=limits.measure)

    seconds = {label: [s.seconds for s in timed] for label, timed in samples.items()}
    decode_s = {label: [s.decode_s for s in timed] for label, timed in samples.items()}
    dense = "depth 1"
    flops = {
        label: sum(plan.cost(shape, prompt_tokens=prompt_tokens, new_tokens=new_tokens).flops for plan in job.plans)
        for label, job in jobs.items()
    }
    rows = []
    for label, timed in samples.items():
        plan, admission = label.split(", ")
        beside = f"{dense}, {'staggered' if admission == 'staggered' else 'together'}"
        speedup, decode_speedup = paired(seconds[beside], seconds[label]), paired(decode_s[beside], decode_s[label])
        bound, decode_bound = (
            samples[beside][0].floor_s(limits, decode=decode) / timed[0].floor_s(limits, decode=decode)
            for decode in (False, True)
        )
        rows.append(
            {
                "plans": plan,
                "admission": admission,
                "seconds": spread(seconds[label]),
                "tokens_per_s": rounded(batch * new_tokens / statistics.median(seconds[label])),
                "bytes_moved": timed[0].bytes_moved,
                "flops_ratio": rounded(flops[dense] / flops[plan]),
                "bytes_ratio": rounded(samples[beside][0].bytes_moved / timed[0].bytes_moved),
                "speedup": speedup,
                "bound": rounded(bound),
                "gain_over_bound": rounded(speedup["median"] / bound),
                "decode_speedup": decode_speedup,
                "decode_bound": rounded(decode_bound),
                "decode_gain_over_bound": rounded(decode_speedup["median"] / decode_bound),
                "time_over_together": paired(seconds[label], seconds[f"{plan}, together"]),
                "bytes_over_together": rounded(timed[0].bytes_moved / samples[f"{plan}, together"][0].bytes_moved),
            }
        )
    run = {
        "case": {"model": name, "dtype": dtype, "batch": batch},
        "conditions": conditions(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": options.rounds,
        **limits.to_dict(),
        "variants": rows,
    }
    print(describe(run), end="\n\n", flush=True)
    return run


HEADER = (
    *("plans", "admission", "FLOPs", "bytes", "speedup", "min..max", "bound", "of bound"),
    *("decode speedup", "bound", "of bound"),
    *("seconds", "tokens/s", "time / together", "bytes / together"),
)


def describe(run: dict[str, Any]) -> str:
    """One run as a table. FLOPs, bytes and speedups: dense admitted the same way, over the variant."""
    rows = [
        [
            row["plans"],
            row["admission"],
            f"{row['flops_ratio']:.2f}",
            f"{row['bytes_ratio']:.2f}",
            f"{row['speedup']['median']:.2f}",
            extent(row["speedup"]),
            number(row, "bound"),
            number(row, "gain_over_bound"),
            f"{row['decode_speedup']['median']:.2f}" if "decode_speedup" in row else "",
            number(row, "decode_bound"),
            number(row, "decode_gain_over_bound"),
            f"{row['seconds']['median']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['time_over_together']['median']:.2f}",
            f"{row['bytes_over_together']:.2f}",
        ]
        for row in run["variants"]
    ]
    case = run["case"]
    return (
        f"{case['model']}, {case['dtype']}: {case['batch']} requests of {run['prompt_tokens']} prompt + {run['new_tokens']} new "
        f"tokens, {run['rounds']} rounds; whole requests\n\n" + table(HEADER, rows)
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M", "Llama-300M"])
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--batches", nargs="+", type=int, default=[8, 32], help="rows; multiples of 4 that divide 32")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.batches, chosen.rounds = ["OPT-quick"], [4], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen.models:
            checkpoint = random_checkpoint(name, Path(directory))
            engine = Engine.from_pretrained(checkpoint, dtype=chosen.dtype, max_batch=max(chosen.batches), cache_gib=2)
            for batch in chosen.batches:
                runs.append(measure(engine, name, chosen.dtype, batch, chosen))
                if chosen.save:
                    save("clocks", runs[-1:])
    if chosen.gates:
        print_gates("clocks", runs)
    print_json("clocks", runs)


if __name__ == "__main__":
    main()
