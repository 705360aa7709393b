"""What a ranking will cost, before it runs.

Where a ranker's questions depend on answers there is no formula, so it is run against simulated ones, a few times: documents of
drawn relevance, a first stage that sees it through noise of the same size, a comparator that never errs. Some counts have a
formula, which tests hold these against: n (n - 1) / 2 pairs, (n - 1) + ... + (n - k) comparisons of a bubblesort that keeps no
answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.errors import InvalidInput
from shoal.rank.executor import check_task, run
from shoal.rank.oracle import Direction, Oracle
from shoal.rank.questions import Ranker, Task
from shoal.rank.rankers import ranker_named
from shoal.rank.simulate import Simulated

SAMPLES = 10
"""Simulated queries."""
SAMPLED_DOCUMENTS = 3000
"""Of all simulated queries together: of many documents fewer are drawn, since a sample takes what ranking takes here."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Means over simulated queries."""

    calls: float
    """Prompts."""
    low_calls: int
    """The fewest that happened."""
    high_calls: int
    """The most that happened."""
    rounds: float
    """Batches on the critical path."""
    tokens: float
    """Of prompts: calls times what one takes, where that was given."""


def plan(
    n: int,
    k: int,
    ranker: str | Ranker,
    batch: int,
    *,
    budget: int | None = None,
    direction: Direction = "random",
    tokens_per_call: float = 0.0,
    prior_noise: float = 1.0,
    samples: int | None = None,
) -> Forecast:
    """Calls, rounds and tokens of ranking the best `k` of `n` documents.

    Args:
        ranker: a name, or a ranker.
        batch: prompts that run together.
        tokens_per_call: of a prompt, which only a model's tokenizer can tell.
        prior_noise: standard deviation of the first stage's error, where relevance has 1.
        samples: simulated queries, 1 or more; None for 10, and fewer of more than 300 documents.
    """
    check_task(Task(n=n, k=k, budget=budget, batch=batch))
    if samples is None:
        samples = min(SAMPLES, max(1, SAMPLED_DOCUMENTS // n))
    if samples < 1:
        raise InvalidInput(f"samples must be 1 or more, got {samples}")
    made = ranker_named(ranker) if isinstance(ranker, str) else ranker
    calls, rounds = [], []
    for seed in range(samples):
        generator = np.random.default_rng(seed)
        relevance = generator.standard_normal(n)
        seen = relevance + prior_noise * generator.standard_normal(n)
        order = np.argsort(-seen)
        oracle = Oracle(comparator=Simulated(list(relevance[order])), direction=direction, seed=seed)
        task = Task(
            n=n,
            k=k,
            budget=budget,
            batch=batch,
            calls_per_question=oracle.calls_per_question,
            scores=list(seen[order]),
            seed=seed,
        )
        cost = run(made, oracle, task).cost
        calls.append(cost.calls)
        rounds.append(cost.rounds)
    return Forecast(
        calls=float(np.mean(calls)),
        low_calls=min(calls),
        high_calls=max(calls),
        rounds=float(np.mean(rounds)),
        tokens=float(np.mean(calls)) * tokens_per_call,
    )
