"""How long rankers take to think: 1,000 queries of 100 documents, budget 200, batch 32, without the oracle's time.

    python benchmarks/rank.py --save --gates

Answers are read from a matrix that is made beforehand, so what is timed is the rankers and the executor, in one process on one
core; queries do not depend on each other, so more cores take less.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gates import print_gates
from machine import conditions
from report import parser, print_json, rounded, save
from shoal.evaluate.markdown import table
from shoal.rank.executor import run
from shoal.rank.oracle import Oracle
from shoal.rank.questions import Task
from shoal.rank.rankers import RANKERS
from shoal.rank.simulate import PUBLISHED, Simulated

QUERIES, DOCUMENTS, BUDGET, BATCH = 1000, 100, 200, 32


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--queries", type=int, default=QUERIES, help="timed; seconds are scaled to 1,000")
    chosen = options.parse_args()
    queries = 2 if chosen.quick else chosen.queries
    run_of_all = {
        "case": {"queries": queries},
        "conditions": conditions(),
        "documents": DOCUMENTS,
        "budget": BUDGET,
        "batch": BATCH,
        "seconds_per_1000_queries": {name: rounded(timed(name, queries) * QUERIES / queries) for name in RANKERS},
    }
    print(describe(run_of_all))
    if chosen.gates:
        print_gates("rank", [run_of_all])
    if chosen.save:
        save("rank", [run_of_all])
    print_json("rank", [run_of_all])


def describe(one: dict[str, Any]) -> str:
    """A table, the fastest first."""
    seconds = sorted(one["seconds_per_1000_queries"].items(), key=lambda pair: pair[1])
    return table(["ranker", "1,000 queries, s"], [[name, f"{value:.1f}"] for name, value in seconds])


def timed(name: str, queries: int) -> float:
    """Seconds of one ranker, its answers ready in memory."""
    total = 0.0
    for seed in range(queries):
        generator = np.random.default_rng(seed)
        grades = generator.choice(4, DOCUMENTS, p=(0.7, 0.15, 0.1, 0.05)).astype(float)
        scores = np.sort(generator.gamma(2.0, 2.0, DOCUMENTS))[::-1]
        comparator = Simulated(list(grades), PUBLISHED, seed)
        _ = comparator.logits
        task = Task(n=DOCUMENTS, k=10, budget=BUDGET, batch=BATCH, scores=list(scores), seed=seed)
        began = time.perf_counter()
        run(RANKERS[name](), Oracle(comparator=comparator, seed=seed), task)
        total += time.perf_counter() - began
    return total


if __name__ == "__main__":
    main()
