"""A server under load: what depth gains where HTTP, streams, arrivals at random and reading prompts are all in it.

    python benchmarks/serve.py --save --gates                      (quarter of an hour)
    python benchmarks/serve.py --save --loads saturated            (the gates alone)

One server process (`serve_process.py`: what `shoal serve` runs), asked by an asyncio client on the same cores (`http_load.py`): 32
prompt + 128 new tokens, greedy, streamed, no token ends a request; each request says its depth. Random weights: depth and lengths
decide the time. *Saturated*: a closed loop of twice as many clients as slots, which begin evenly staggered, the worst case for
depth; counted are whole fillings of the slots after as many that are not. Other loads are Poisson arrivals, in shares of what the
step-time model forecasts that the server can do with every layer.

A request is good if it keeps to the target: its TTFT is at most 5 and its TPOT at most 2 times those of a request alone with every
layer (medians). *Goodput* is good requests per second of arrivals.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gates import print_gates
from http_load import Answer, Target, arrivals, closed_loop, open_loop
from machine import conditions
from models import MODELS, random_checkpoint, random_prompts
from peers.servers import SERVERS, PeerServer
from report import interleaved, paired, parser, print_json, rounded, save, spread
from samples import workplace
from serve_process import MODEL, ServerProcess
from serve_tables import describe

SATURATED = "saturated"
LOADS = ("0.3", "0.6", "0.9", "1.2", "1.6", SATURATED)
PROMPT_TOKENS = 32
NEW_TOKENS = 128
SLOTS = 8
TTFT_FACTOR, TPOT_FACTOR = 5, 2
"""The target, in times of a dense request alone."""
ALONE = 3
"""Requests that are asked alone."""
NUM_PROMPTS = 1024
console = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How requests are asked."""

    depths: tuple[float, ...]
    """By turns."""
    waves: bool = True
    """Whether the scheduler may let requests wait for a wave."""
    peer: PeerServer | None = None
    """Who is asked instead of us: dense, as it does it."""


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

    def target(self, variant: Variant) -> Target:
        """Requests at the variant's depths by turns, or a peer's."""
        peer = variant.peer

        def body(number: int) -> bytes:
            asked = {
                "model": peer.model if peer else MODEL,
                "prompt": self.prompts[number % NUM_PROMPTS],
                "max_tokens": self.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if not peer:
                asked["depth"] = variant.depths[number % len(variant.depths)]
            return json.dumps(asked).encode()

        return Target(port=peer.port if peer else self.server.port, body=body, new_tokens=self.new_tokens)

    def alone(self) -> dict[str, float]:
        """What a dense request takes alone, and the target that follows."""
        target = self.target(VARIANTS["dense"])
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
        depths = (1,) if variant.peer else variant.depths
        expected = self.server.ask(forecast={"depths": depths, "waves": variant.waves, **sizes})
        # Dense requests are served every so often when all slots are full: that is the stagger.
        spacing_s = (expected["seconds"] or 1) / slots
        began = time.perf_counter()
        answers, seconds = asyncio.run(
            closed_loop(
                self.target(variant),
                begins_s=[spacing_s * min(place, slots) for place in range(2 * slots)],
                warm_up=2 * slots,
                measured=fillings * slots,
            )
        )
        whole_s = time.perf_counter() - began
        console.print(f"  {len(answers)} requests in {seconds:.1f} s, {whole_s:.1f} s in all; {variant}, {expected}")
        after = self.server.ask(waves=variant.waves)
        return Sample(
            answers=answers,
            seconds=seconds,
            arrivals_s=seconds,
            forecast=None if variant.peer else expected,
            pass_share=None if variant.peer else (after["pass_s"] - before["pass_s"]) / whole_s,
        )

    def loaded(self, variant: Variant, *, rate_per_s: float, requests: int, seeds: list[int]) -> Sample:
        """Poisson arrivals; the n-th round of every variant has the n-th seed."""
        self.server.ask(waves=variant.waves)
        times = arrivals(rate_per_s, requests, seeds.pop(0))
        began = time.perf_counter()
        answers = asyncio.run(open_loop(self.target(variant), times))
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
            "tokens_per_event": rounded(len(answers) * self.new_tokens / sum(len(one.token_s) for one in answers)),
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


def measure(benchmark: Benchmark, variants: dict[str, Variant], load: str, target: dict[str, float]) -> dict[str, Any]:
    """All variants under one load, by turns."""
    options, server = benchmark.options, benchmark.server
    runs: dict[str, Callable[[], Sample]] = {}
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
    samples: dict[str, list[Sample]] = {label: [] for label in runs}
    began = time.monotonic()
    for _ in range(rounds):
        for label, one_round in interleaved(runs, 1).items():
            samples[label] += one_round
        if time.monotonic() - began > options.most_s:
            break
    rows = [benchmark.row(label, samples[label], target) for label in variants]
    if load == SATURATED:
        dense = [one.seconds for one in samples["dense"]]
        for row in rows:
            ours = samples[row["variant"]]
            row["speedup"] = paired(dense, [one.seconds for one in ours])
            if variants[row["variant"]].peer:
                continue
            row["pass_share"] = spread([one.pass_share or 0 for one in ours])
            row |= beside_forecast(
                ours, fillings=options.fillings, slots=options.slots, new_tokens=benchmark.new_tokens
            )
    state = server.ask()
    run = {
        "case": {"model": options.model, "dtype": options.dtype, "load": load},
        "conditions": conditions() | {"threads": options.threads},
        "client": "shares the cores with the server",
        "executor": state["executor"],
        "slots": options.slots,
        "prompt_tokens": benchmark.prompt_tokens,
        "new_tokens": benchmark.new_tokens,
        "rounds": len(samples["dense"]),
        **about,
        "target": target,
        "pass_relative_error": rounded(state["relative_error"] or 0),
        "variants": rows,
        "peers": {
            one.peer.name: {"version": one.peer.version, "note": one.peer.note} for one in variants.values() if one.peer
        },
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
    options.add_argument("--peers", nargs="*", default=[], choices=SERVERS, help="servers of others (peers/servers.py)")
    options.add_argument("--fillings", type=int, default=3, help="times that all slots are served, per round")
    options.add_argument("--load-rounds", type=int, default=2, help="rounds of Poisson arrivals")
    options.add_argument("--load-s", type=float, default=12, help="seconds of arrivals in a round")
    options.add_argument("--most-s", type=float, default=math.inf, help="begin no round of a load after so long")
    options.add_argument("--keep", type=Path, help="keep the checkpoint in this directory")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.model, chosen.slots, chosen.fillings, chosen.loads = "Llama-quick", 2, 2, ("0.5", SATURATED)
    runs = []
    with workplace(chosen.keep) as directory, ExitStack() as stack:
        checkpoint = random_checkpoint(chosen.model, directory, words=True)
        sizes = {"slots": chosen.slots, "threads": chosen.threads}
        variants = {label: VARIANTS[label] for label in chosen.variants}
        for name in chosen.peers:
            peer = stack.enter_context(SERVERS[name](checkpoint, chosen.dtype, **sizes))
            variants[name] = Variant(depths=(), peer=peer)
        server = stack.enter_context(ServerProcess(checkpoint, chosen.dtype, **sizes))
        benchmark = Benchmark(server, MODELS[chosen.model].vocab_size, chosen)
        target = benchmark.alone()
        for variant in variants.values():  # what passes cost is learnt here
            benchmark.saturated(variant, fillings=1)
        for load in chosen.loads:
            run = measure(benchmark, variants, load, target)
            print(describe(run), end="\n\n", flush=True)
            if chosen.save:
                save("serve", [run])
            runs.append(run)
    if chosen.gates:
        print_gates("serve", runs)
    print_json("serve", runs)


if __name__ == "__main__":
    main()
