"""A server under load: what depth gains where HTTP, streams, arrivals at random and reading prompts are all in it.

    python benchmarks/serve.py --save --gates                      (quarter of an hour)
    python benchmarks/serve.py --save --loads saturated            (the gates alone)

One server process (`serve_process.py`: what `shoal serve` runs), asked by an asyncio client on the same cores (`http_load.py`): 32
prompt + 128 new tokens, greedy, streamed, no token ends a request; each request says its depth. Random weights: depth and lengths
decide the time. *Saturated*: a closed loop of twice as many clients as slots, beginning evenly staggered, which is the worst case for
depth; counted are whole fillings of the slots after as many that are not. Other loads are Poisson arrivals, in shares of what the
step-time model forecasts that the server can do with every layer.

A request is good if it keeps to the target: its TTFT is at most 5 and its TPOT at most 2 times those of a request alone with every
layer (medians). *Goodput* is good requests per second of arrivals.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gates import print_gates
from http_load import Answer, Target, arrivals, closed_loop, open_loop
from machine import conditions
from models import MODELS, random_checkpoint, random_prompts
from report import interleaved, paired, parser, print_json, rounded, save, spread
from samples import workplace
from serve_process import MODEL, ServerProcess
from serve_tables import describe

SATURATED = "saturated"
LOADS = ("0.3", "0.6", "0.9", "1.2", "1.6", SATURATED)
PROMPT_TOKENS = 32
NEW_TOKENS = 128
SLOTS = 16
TTFT_FACTOR, TPOT_FACTOR = 5, 2
"""The target, in times of a dense request alone."""
ALONE = 5
"""Requests that are asked alone."""
NUM_PROMPTS = 1024


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How requests are asked."""

    depths: tuple[float, ...]
    """By turns."""
    waves: bool = True
    """Whether the scheduler may let requests wait for a wave."""


VARIANTS = {
    "dense": Variant(depths=(1,)),
    "depth 1/2": Variant(depths=(1 / 2,)),
    "depth 1/2, at once": Variant(depths=(1 / 2,), waves=False),
    "depth 1/5": Variant(depths=(1 / 5,)),
    "mixed": Variant(depths=(1, 1 / 2, 1 / 5)),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One variant under one load in one round."""

    answers: list[Answer]
    seconds: float
    """Open loop: until the last answer's end. Closed loop: of the answers counted."""
    arrivals_s: float
    """In which the answered requests were sent."""
    forecast: dict[str, Any] | None = None
    """Of the step-time model, made before the round."""
    pass_share: float | None = None
    """Of the time, that the server spent in passes."""


class Benchmark:
    """A server that is running, and what it is asked."""

    def __init__(self, server: ServerProcess, vocab_size: int, options: argparse.Namespace) -> None:
        self.server, self.options = server, options
        self.prompt_tokens, self.new_tokens = (4, 8) if options.quick else (PROMPT_TOKENS, NEW_TOKENS)
        self.prompts = random_prompts(vocab_size, num_prompts=NUM_PROMPTS, num_tokens=self.prompt_tokens)
        self.num_asked = 0

    def target(self, depths: Sequence[float]) -> Target:
        """Requests at `depths` by turns."""

        def body(number: int) -> bytes:
            asked = {
                "model": MODEL,
                "prompt": self.prompts[number % NUM_PROMPTS],
                "max_tokens": self.new_tokens,
                "depth": depths[number % len(depths)],
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            return json.dumps(asked).encode()

        return Target(port=self.server.port, body=body, new_tokens=self.new_tokens)

    def alone(self) -> dict[str, float]:
        """What a dense request takes alone, and the target that follows."""
        target = self.target((1,))
        answers = [asyncio.run(target.ask(number)) for number in range(ALONE + 1)][1:]
        first_s = statistics.median(one.first_s for one in answers)
        per_token_s = statistics.median(one.per_token_s for one in answers)
        return {
            "alone_ttft_s": rounded(first_s),
            "alone_tpot_s": rounded(per_token_s),
            "ttft_at_most_s": rounded(TTFT_FACTOR * first_s),
            "tpot_at_most_s": rounded(TPOT_FACTOR * per_token_s),
        }

    def saturated(self, variant: Variant, *, fillings: int) -> Sample:
        """The closed loop."""
        slots = self.options.slots
        sizes = {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        before = self.server.ask(waves=variant.waves)
        expected = self.server.ask(forecast={"depths": variant.depths, "waves": variant.waves, **sizes})
        # Dense requests are served every so often when all slots are full: that is the stagger.
        spacing_s = (expected["seconds"] or 1) / slots
        began = time.perf_counter()
        answers, seconds = asyncio.run(
            closed_loop(
                self.target(variant.depths),
                clients=2 * slots,
                spacing_s=spacing_s,
                warm_up=2 * slots,
                measured=fillings * slots,
            )
        )
        whole_s = time.perf_counter() - began
        after = self.server.ask(waves=variant.waves)
        return Sample(
            answers=answers,
            seconds=seconds,
            arrivals_s=seconds,
            forecast=expected,
            pass_share=(after["pass_s"] - before["pass_s"]) / whole_s,
        )

    def loaded(self, variant: Variant, *, rate_per_s: float, requests: int, seeds: list[int]) -> Sample:
        """Poisson arrivals; the n-th round of every variant has the n-th seed."""
        self.server.ask(waves=variant.waves)
        times = arrivals(rate_per_s, requests, seeds.pop(0))
        began = time.perf_counter()
        answers = asyncio.run(open_loop(self.target(variant.depths), times))
        return Sample(answers=answers, seconds=time.perf_counter() - began, arrivals_s=times[-1])

    def capacity_per_s(self) -> float:
        """Dense requests per second that the step-time model expects of full slots."""
        sizes = {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        expected = self.server.ask(forecast={"depths": (1,), **sizes})
        seconds: float = expected["seconds"] or 1
        return self.options.slots / seconds

    def row(self, label: str, samples: Sequence[Sample], target: dict[str, float]) -> dict[str, Any]:
        """What one variant did under one load, all rounds together."""
        answers = [answer for sample in samples for answer in sample.answers]
        arrivals_s = sum(sample.arrivals_s for sample in samples)
        good = [
            answer
            for answer in answers
            if answer.first_s <= target["ttft_at_most_s"] and answer.per_token_s <= target["tpot_at_most_s"]
        ]
        return {
            "variant": label,
            "requests": len(answers),
            "offered_per_s": rounded(len(answers) / arrivals_s),
            "achieved_per_s": spread([len(sample.answers) / sample.seconds for sample in samples]),
            "tokens_per_s": spread([len(sample.answers) * self.new_tokens / sample.seconds for sample in samples]),
            "ttft_s": percentiles([answer.first_s for answer in answers]),
            "itl_s": percentiles([gap for answer in answers for gap in answer.gaps_s]),
            "tpot_s": percentiles([answer.per_token_s for answer in answers]),
            "good_share": rounded(len(good) / len(answers)),
            "goodput_per_s": rounded(len(good) / arrivals_s),
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of raw values."""
    return {f"p{share}": rounded(float(np.percentile(values, share))) for share in (50, 95, 99)}


def measure(benchmark: Benchmark, name: str, load: str) -> dict[str, Any]:
    """All variants under one load, by turns."""
    options, server = benchmark.options, benchmark.server
    target = benchmark.alone()
    runs: dict[str, Callable[[], Sample]] = {}
    variants = {label: VARIANTS[label] for label in options.variants}
    about: dict[str, Any] = {}
    if load == SATURATED:
        runs = {label: partial(benchmark.saturated, one, fillings=options.fillings) for label, one in variants.items()}
        rounds = options.rounds
    else:
        rate_per_s, rounds = float(load) * benchmark.capacity_per_s(), options.load_rounds
        requests = 4 if options.quick else max(options.slots, round(rate_per_s * options.load_s))
        runs = {
            label: partial(
                benchmark.loaded, one, rate_per_s=rate_per_s, requests=requests, seeds=list(range(1, rounds + 1))
            )
            for label, one in variants.items()
        }
        about = {"rate_per_s": rounded(rate_per_s)}
    samples = interleaved(runs, rounds)
    rows = [benchmark.row(label, samples[label], target) for label in variants]
    if load == SATURATED:
        dense = [one.seconds for one in samples["dense"]]
        for row in rows:
            ours = samples[row["variant"]]
            row["speedup"] = paired(dense, [one.seconds for one in ours])
            row["pass_share"] = spread([one.pass_share or 0 for one in ours])
            row |= beside_forecast(ours, fillings=options.fillings, slots=options.slots, new_tokens=benchmark.new_tokens)
    state = server.ask()
    run = {
        "case": {"model": name, "dtype": options.dtype, "load": load},
        "conditions": conditions() | {"threads": options.threads},
        "client": "shares the cores with the server",
        "executor": state["executor"],
        "slots": options.slots,
        "prompt_tokens": benchmark.prompt_tokens,
        "new_tokens": benchmark.new_tokens,
        "rounds": rounds,
        **about,
        "target": target,
        "pass_relative_error": rounded(state["relative_error"] or 0),
        "variants": rows,
    }
    return run


def beside_forecast(samples: Sequence[Sample], *, fillings: int, slots: int, new_tokens: int) -> dict[str, Any]:
    """Measured tokens/s, and those over what the step-time model had expected before each round."""
    expected = [sample.forecast["seconds"] for sample in samples if sample.forecast and sample.forecast["seconds"]]
    if len(expected) < len(samples):
        return {}
    return {
        "forecast_tokens_per_s": spread([slots * new_tokens / seconds for seconds in expected]),
        "over_forecast": paired([fillings * seconds for seconds in expected], [one.seconds for one in samples]),
        "forecast_level": [one.forecast["level"] for one in samples if one.forecast],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="Llama-300M", choices=MODELS)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--slots", type=int, default=SLOTS, help="requests that run together")
    options.add_argument("--loads", nargs="+", default=LOADS, help="shares of the dense capacity, or saturated")
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="dense among them")
    options.add_argument("--fillings", type=int, default=3, help="times that all slots are served, per round")
    options.add_argument("--load-rounds", type=int, default=2, help="rounds of Poisson arrivals")
    options.add_argument("--load-s", type=float, default=12, help="seconds of arrivals in a round")
    options.add_argument("--keep", help="keep the checkpoint in this directory")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.model, chosen.slots, chosen.fillings, chosen.loads = "Llama-quick", 2, 2, ("0.5", SATURATED)
    runs = []
    with workplace(chosen.keep) as directory:
        checkpoint = random_checkpoint(chosen.model, directory, words=True)
        with ServerProcess(checkpoint, chosen.dtype, slots=chosen.slots, threads=chosen.threads) as server:
            benchmark = Benchmark(server, MODELS[chosen.model].vocab_size, chosen)
            benchmark.alone()
            for label in chosen.variants:  # what passes cost is learnt here
                benchmark.saturated(VARIANTS[label], fillings=1)
            for load in chosen.loads:
                run = measure(benchmark, chosen.model, load)
                print(describe(run), end="\n\n", flush=True)
                if chosen.save:
                    save("serve", [run])
                runs.append(run)
    if chosen.gates:
        print_gates("serve", runs)
    print_json("serve", runs)


if __name__ == "__main__":
    main()
