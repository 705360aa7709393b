"""The same random requests through two engines, and their logits compared token by token."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from random_plans import random_plan, random_policy
from shoal import Engine, Generation, Sampling
from shoal.engine.intake import Plan
from shoal.models.decoder import Decoder

NUM_SLOTS = 7
Job = tuple[list[int], Sampling, Plan | None]


@dataclass(frozen=True)
class Run:
    """What came of some jobs."""

    generations: list[Generation]
    logits: dict[tuple[int, ...], Tensor]
    """[V] on the CPU, what each token was chosen from: by the job's number and the tokens before."""


def engine_over(decoder: Decoder) -> Engine:
    """Seven slots and a queue, prompts in chunks: passes of decode rows at many clocks, and of decode rows beside prompts."""
    return Engine(decoder, max_batch=NUM_SLOTS, max_pass_tokens=40, cache_gib=0.1)


def random_jobs(num_layers: int, *, count: int = 20) -> list[Job]:
    """Greedy; prompts and completions of all lengths, plans that form no chain among plans that do."""
    rng = random.Random("graphs")
    jobs: list[Job] = []
    for number in range(count):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 17, 50, 90]))]
        sampling = Sampling(max_new_tokens=rng.choice([2, 5, 16]), ignore_eos=True)
        plan: Plan = random_policy(rng, num_layers)
        if number % 2:
            plan = random_plan(rng, num_layers, prompt_tokens=len(prompt), max_new_tokens=sampling.max_new_tokens)
        jobs.append((prompt, sampling, plan))
    return jobs


def run(engine: Engine, jobs: list[Job]) -> Run:
    """All jobs in one call."""
    seen: dict[tuple[int, ...], Tensor] = {}

    def recorder(job: int) -> Callable[[list[int], Tensor], Tensor]:
        def record(token_ids: list[int], logits: Tensor) -> Tensor:
            seen[job, *token_ids] = logits.float().cpu()
            return logits

        return record

    prompts, samplings, plans = (list(column) for column in zip(*jobs, strict=True))
    recorded = [replace(sampling, processor=recorder(job)) for job, sampling in enumerate(samplings)]
    return Run(engine.generate(prompts, recorded, plans), seen)


def assert_same(got: Run, expected: Run, *, bound: float = 1e-5, near_ties: int = 0) -> None:
    """The same tokens and ledgers, from logits within `bound` of their standard deviation; completions may part at near-ties."""
    pairs = list(zip(got.generations, expected.generations, strict=True))
    assert sum(a.token_ids != b.token_ids for a, b in pairs) <= near_ties
    assert [a.ledger for a, _ in pairs] == [b.ledger for _, b in pairs]
    both = got.logits.keys() & expected.logits.keys()
    assert near_ties or len(both) == len(got.logits) == len(expected.logits)
    assert len(both) >= len(pairs), "all first tokens, at least"
    for tokens in both:
        one, other = got.logits[tokens], expected.logits[tokens]
        assert (one - other).abs().max() <= bound * other.std()
