"""One round of one variant under one load, and what its answers say."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from http_load import Answer, Target, arrivals, closed_loop, open_loop
from models import random_prompts
from peers.servers import PeerServer
from report import paired, rounded, spread
from serve_process import MODEL, ServerProcess

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
    staggered: bool = False
    """Where saturated, whether the first requests come evenly spread over the time that one takes, not all at once. Requests of one
    length that begin together stay in step; spread evenly is the worst case for depth, which waves are there to mend."""


DENSE = Variant(depths=(1,))


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


class Rounds:
    """A server that is running, and what it is asked."""

    def __init__(
        self, server: ServerProcess, *, vocab_size: int, slots: int, prompt_tokens: int, new_tokens: int
    ) -> None:
        self.server, self.slots = server, slots
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self.prompts = random_prompts(vocab_size, num_prompts=NUM_PROMPTS, num_tokens=prompt_tokens)

    def target(self, variant: Variant) -> Target:
        """Requests at the variant's depths by turns."""

        def body(number: int) -> bytes:
            return self._body(number, depth=variant.depths[number % len(variant.depths)])

        return Target(port=self.server.port, body=body, new_tokens=self.new_tokens)

    def _body(self, number: int, **ours: Any) -> bytes:
        """JSON of a request."""
        asked = {
            "model": MODEL,
            "prompt": self.prompts[number % NUM_PROMPTS],
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(asked | ours).encode()

    def peer_target(self, server: PeerServer) -> Target:
        """The same requests of another engine's server, which knows every layer only."""
        return Target(port=server.port, body=self._body, new_tokens=self.new_tokens)

    def alone(self) -> dict[str, float]:
        """What a dense request takes alone, and the target that follows."""
        target = self.target(DENSE)
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
        slots = self.slots
        before = self.server.ask(waves=variant.waves)
        expected = self.forecast(variant)
        spacing_s = (expected["seconds"] or 1) / slots if variant.staggered else 0
        began = time.perf_counter()
        answers, seconds = asyncio.run(
            closed_loop(
                self.target(variant),
                begins_s=[spacing_s * min(place, slots) for place in range(2 * slots)],
                warm_up=2 * slots if variant.staggered else slots,
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
            forecast=expected,
            pass_share=(after["pass_s"] - before["pass_s"]) / whole_s,
        )

    def loaded(self, variant: Variant, *, rate_per_s: float, requests: int, seeds: list[int]) -> Sample:
        """Poisson arrivals; the n-th round of every variant has the n-th seed."""
        self.server.ask(waves=variant.waves)
        return sent_at_random(self.target(variant), arrivals(rate_per_s, requests, seeds.pop(0)))

    def peer_saturated(self, server: PeerServer, *, fillings: int) -> Sample:
        """The closed loop on another engine's server."""
        slots = self.slots
        with server:
            answers, seconds = asyncio.run(
                closed_loop(
                    self.peer_target(server), begins_s=[0] * (2 * slots), warm_up=slots, measured=fillings * slots
                )
            )
        return Sample(answers=answers, seconds=seconds, arrivals_s=seconds)

    def peer_loaded(self, server: PeerServer, *, rate_per_s: float, requests: int, seeds: list[int]) -> Sample:
        """Poisson arrivals on another engine's server."""
        with server:
            return sent_at_random(self.peer_target(server), arrivals(rate_per_s, requests, seeds.pop(0)))

    def forecast(self, variant: Variant) -> dict[str, Any]:
        """What the step-time model expects of full slots, as of now."""
        sizes = {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        how = {"depths": variant.depths, "waves": variant.waves, "staggered": variant.staggered}
        return self.server.ask(forecast={**how, **sizes})

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


def sent_at_random(target: Target, times: Sequence[float]) -> Sample:
    """Requests at these seconds, until all are answered."""
    began = time.perf_counter()
    answers = asyncio.run(open_loop(target, times))
    return Sample(answers=answers, seconds=time.perf_counter() - began, arrivals_s=times[-1])


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of raw values."""
    return {f"p{share}": rounded(float(np.percentile(values, share))) for share in (50, 95, 99)}


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
