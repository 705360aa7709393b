"""Does sharing a batch and a cache change anything? The same requests three times, each under its own plan.

    alone        one request at a time
    in company   a further request joins in every pass, so rows stand at other depths and other clocks
    uncached     one forward pass of transformers' model over what the request wrote, without a cache (`predictions.py`)

The first two have to write the same tokens, the last two to give them the same log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.depth.plan import Dense, DepthPolicy
from shoal.depth.skipdecode import SkipDecode
from shoal.engine.engine import Engine
from shoal.engine.request import Generation
from shoal.engine.sampling import Sampling
from shoal.errors import RequestFailed
from shoal.evaluate.predictions import predict
from shoal.train.data import Example
from shoal.train.start import load

TOLERANCE_NATS = 1e-3
"""Largest difference of log-probabilities that counts as rounding. The engine and transformers differ by 1e-5 in float32 on random
models of 24 layers and width 512; trained weights of a larger width may take some tens of that. One layer that runs for one token
too many is far beyond (`tests/evaluate/test_exactness.py`)."""
NEAR_TIE = 4
"""Tokens may differ where the two most probable ones are closer than this many times the largest difference measured."""


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """What the comparison found."""

    num_requests: int
    """Requests, each with a plan of its own."""
    num_tokens: int
    """Emitted by the requests alone, all together."""
    layers_skipped: int
    """Layer-tokens that the plans saved in decode passes; 0 would mean that nothing has been tested."""
    most_clocks: int
    """Most different clocks in one pass of the mixed batch, prompts left out."""
    num_parted: int
    """Requests whose tokens differ between alone and in company."""
    num_near_ties: int
    """Those among them that part at a near-tie, see `near_tie`."""
    company_nats: float
    """Largest difference of a token's log-probability, alone against in company, over the tokens that both wrote."""
    uncached_nats: float
    """The same, in company against without a cache."""

    @property
    def exact(self) -> bool:
        """Same tokens up to near-ties, same log-probabilities up to `TOLERANCE_NATS`."""
        differences = max(self.company_nats, self.uncached_nats)
        return self.num_parted == self.num_near_ties and differences <= TOLERANCE_NATS


def measure_exactness(
    checkpoint: Path, prompts: Sequence[str], *, depths: Sequence[float], max_new_tokens: int, device: str
) -> Exactness:
    """Run `prompts` in float32 under SkipDecode at `depths` and dense, in turn; open fields come from the checkpoint.

    Raises `RequestFailed` where a request's logits are not finite, and what loading raises.
    """
    engine = Engine.from_pretrained(checkpoint, dtype="float32", device=device)
    policies: list[DepthPolicy] = [*(SkipDecode(depth=depth) for depth in depths), Dense()]
    plans = [policies[number % len(policies)] for number in range(len(prompts))]
    sampling = Sampling(max_new_tokens=max_new_tokens, logprobs=2)
    alone = [engine.generate(prompt, sampling, plan)[0] for prompt, plan in zip(prompts, plans, strict=True)]
    company, most_clocks = join_one_by_one(engine, prompts, plans, sampling)
    for one in (*alone, *company):
        if one.finish_reason == "error":
            raise RequestFailed(f"prompt {one.index + 1} of the comparison failed: {one.error}")

    pairs = list(zip(alone, company, strict=True))
    company_nats = max(difference(one, other) for one, other in pairs)
    parted = [(one, other) for one, other in pairs if one.token_ids != other.token_ids]
    token_ids = [list(ids) for ids in engine.tokenizer(list(prompts)).input_ids]
    return Exactness(
        num_requests=len(prompts),
        num_tokens=sum(len(one.token_ids) for one in alone),
        layers_skipped=sum(one.ledger.dense_decode_layer_tokens - one.ledger.decode_layer_tokens for one in alone),
        most_clocks=most_clocks,
        num_parted=len(parted),
        num_near_ties=sum(near_tie(one, other, company_nats) for one, other in parted),
        company_nats=company_nats,
        uncached_nats=uncached_difference(checkpoint, token_ids, company, device),
    )


def join_one_by_one(
    engine: Engine, prompts: Sequence[str], plans: Sequence[DepthPolicy], sampling: Sampling
) -> tuple[list[Generation], int]:
    """Complete the prompts, one more joining before every pass; and the most different clocks that shared a pass."""
    waiting = list(enumerate(zip(prompts, plans, strict=True)))[::-1]
    done: dict[int, Generation] = {}
    emitted: dict[int, int] = {}
    most_clocks = 0
    while waiting or engine.has_work:
        if waiting:
            index, (prompt, plan) = waiting.pop()
            engine.add(prompt, sampling, plan, index=index, streaming=False)
        chunks = engine.step()
        most_clocks = max(most_clocks, len({emitted[chunk.index] for chunk in chunks if chunk.index in emitted}))
        for chunk in chunks:
            emitted[chunk.index] = emitted.get(chunk.index, 0) + len(chunk.token_ids)
            if chunk.generation is not None:
                done[chunk.index] = chunk.generation
    return [done[index] for index in range(len(prompts))], most_clocks


def difference(one: Generation, other: Generation) -> float:
    """Largest difference of a log-probability over the tokens that two runs of a request have in common, in nats."""
    assert one.logprobs is not None
    assert other.logprobs is not None
    pairs = zip(one.logprobs[: common(one, other)], other.logprobs, strict=False)
    return max((abs(a.logprob - b.logprob) for a, b in pairs), default=0.0)


def common(one: Generation, other: Generation) -> int:
    """Tokens until two completions part."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one.token_ids), len(other.token_ids)))


def near_tie(one: Generation, other: Generation, largest_difference: float) -> bool:
    """Whether two completions part where the two most probable tokens are as good as equally probable."""
    place = common(one, other)
    if place == min(len(one.token_ids), len(other.token_ids)):
        return False  # one ends where the other goes on, after the same tokens
    assert one.logprobs is not None
    best, second = list(one.logprobs[place].top.values())[:2]
    return other.token_ids[place] in one.logprobs[place].top and best - second < NEAR_TIE * largest_difference


def uncached_difference(
    checkpoint: Path, prompts: Sequence[list[int]], company: Sequence[Generation], device: str
) -> float:
    """Largest difference between a token's log-probability as it was decoded and in one pass without a cache, in nats."""
    network = load(str(checkpoint))[0].to(torch.device(device)).eval()  # type: ignore[arg-type]
    largest = 0.0
    for plan in dict.fromkeys(one.plan for one in company):
        rows = [(prompt, one) for prompt, one in zip(prompts, company, strict=True) if one.plan == plan]
        read = predict(network, [Example(prompt, list(one.token_ids)) for prompt, one in rows], plan)
        for predicted, (_, one) in zip(read, rows, strict=True):
            assert one.logprobs is not None
            decoded = [step.logprob for step in one.logprobs]
            largest = max(largest, *(abs(a + float(b)) for a, b in zip(decoded, predicted.losses, strict=True)))
    return largest
