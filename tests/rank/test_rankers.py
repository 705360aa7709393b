"""Rankers against oracles that never err: exactness, counts, budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidInput
from shoal.rank import RANKERS, Oracle, Ranker, Reading, Task, plan, ranker_named, run
from shoal.rank.questions import Question, Standing, settle
from shoal.rank.rankers import Bubblesort, Heapsort, Mohajer, Quicksort
from shoal.rank.rankers.sliding import Sliding
from shoal.rank.simulate import MISMATCHED, PUBLISHED, Simulated

EXACT = [
    "all-pairs", "bubblesort", "bubblesort-uncached", "heapsort", "mohajer", "mohajer-bubble", "quicksort", "setwise", "sliding",
]  # fmt: skip
"""Under an oracle that never errs these return the true top k, by grade. Listwise does while k is at most its stride, 10."""
TABLE = {
    # n = 100, k = 10, first stage with noise of relevance's own size; comparisons in one direction
    "heapsort": (Heapsort(reuse=False), 10, 1, 248),
    "heapsort, full": (Heapsort(reuse=False), 100, 1, 998),
    "bubblesort, unique pairs": (Bubblesort(), 10, 1, 699),
    "quicksort, b=1": (Quicksort(pooled=False), 10, 1, 232),
    "quicksort, b=2": (Quicksort(pooled=False), 10, 2, 119),
    "quicksort, b=8": (Quicksort(pooled=False), 10, 8, 35),
    "quicksort, b=32": (Quicksort(pooled=False), 10, 32, 15),
    "quicksort, b=128": (Quicksort(pooled=False), 10, 128, 10.6),
    "quicksort full, b=1": (Quicksort(pooled=False), 100, 1, 626),
    "quicksort full, b=8": (Quicksort(pooled=False), 100, 8, 118),
    "quicksort full, b=128": (Quicksort(pooled=False), 100, 128, 66),
    "Mohajer, SELECT run again": (Mohajer(keep_tree=False, reuse=False), 10, 1, 229),
    # "memoised tree": the count is that of a tournament played again whose answers are kept; a tree that is kept takes 171.
    "Mohajer, memoised": (Mohajer(keep_tree=False), 10, 1, 197),
}


class Recording:
    """A comparator that counts how often it is asked."""

    def __init__(self, inner: Simulated) -> None:
        self.inner = inner
        self.shown: list[Question] = []

    def read(self, presentations: Sequence[Question]) -> list[Reading]:
        self.shown += presentations
        return self.inner.read(presentations)


def oracle_of(grades: Sequence[float], *, seed: int = 0, direction: str = "random", noise: object = None) -> Oracle:
    simulated = Simulated(grades, seed=seed) if noise is None else Simulated(grades, noise, seed)  # type: ignore[arg-type]
    return Oracle(comparator=Recording(simulated), direction=direction, seed=seed)  # type: ignore[arg-type]


def noisy_list(seed: int, n: int = 100) -> list[float]:
    """Relevance in the order of a first stage whose noise is as large as relevance."""
    generator = np.random.default_rng(seed)
    relevance = generator.standard_normal(n)
    return list(relevance[np.argsort(-(relevance + generator.standard_normal(n)))])


graded = st.lists(st.integers(0, 4).map(float), min_size=1, max_size=30)


@given(
    grades=graded,
    k=st.integers(1, 30),
    direction=st.sampled_from(["one", "both", "random"]),
    name=st.sampled_from(EXACT),
)
@settings(deadline=None, max_examples=300)
def test_exact_rankers_are_exact(grades: list[float], k: int, direction: str, name: str) -> None:
    """The true top k by grade, whatever ties there are."""
    k = min(k, len(grades))
    done = run(ranker_named(name), oracle_of(grades, direction=direction), Task(n=len(grades), k=k))
    assert done.finished
    assert sorted(done.order) == list(range(len(grades)))
    assert [grades[one] for one in done.order[:k]] == sorted(grades, reverse=True)[:k]


@given(grades=graded, k=st.integers(1, 10))
@settings(deadline=None, max_examples=50)
def test_listwise_is_exact_up_to_its_stride(grades: list[float], k: int) -> None:
    """What is best of a window of 20 moves up by 10 places."""
    k = min(k, len(grades))
    done = run(ranker_named("listwise"), oracle_of(grades, direction="one"), Task(n=len(grades), k=k))
    assert [grades[one] for one in done.order[:k]] == sorted(grades, reverse=True)[:k]


@given(
    grades=graded,
    k=st.integers(1, 12),
    budget=st.integers(0, 120),
    direction=st.sampled_from(["one", "both", "random"]),
    name=st.sampled_from(sorted(RANKERS)),
    noise=st.sampled_from([None, PUBLISHED, MISMATCHED]),
)
@settings(deadline=None, max_examples=400)
def test_no_budget_is_exceeded(
    grades: list[float], k: int, budget: int, direction: str, name: str, noise: object
) -> None:
    """Not by one call, counted where they are made; the order is always a permutation, and no pair is paid for twice."""
    oracle = oracle_of(grades, direction=direction, noise=noise)
    task = Task(
        n=len(grades), k=min(k, len(grades)), budget=budget, batch=4, calls_per_question=oracle.calls_per_question
    )
    ranker = ranker_named(name)
    done = run(ranker, oracle, task)
    shown = oracle.comparator.shown  # type: ignore[attr-defined]
    assert done.cost.calls == len(shown) <= budget
    assert done.cost.questions * oracle.calls_per_question == done.cost.calls
    assert math.ceil(done.cost.calls / 4) <= done.cost.rounds <= done.cost.calls
    assert sorted(done.order) == list(range(len(grades)))
    if ranker.reuse and direction != "one":
        pairs = [frozenset(one) for one in shown if len(one) == 2]
        assert len(pairs) == len(set(pairs)) * oracle.calls_per_question


@pytest.mark.parametrize("name", sorted(set(RANKERS) - {"adaptive", "bradley-terry", "spectral"}))
def test_snapshots_are_smaller_runs(name: str) -> None:
    """The order noted at a budget is that of a run with this budget, for rankers that do not look at theirs."""
    grades = noisy_list(3, 40)

    def made() -> Oracle:
        return oracle_of(grades, noise=PUBLISHED, seed=3)

    budgets = [0, 1, 7, 30, 31, 77]
    whole = run(ranker_named(name), made(), Task(n=40, k=5), budgets=budgets)
    for budget in budgets:
        assert run(ranker_named(name), made(), Task(n=40, k=5, budget=budget)).order == whole.snapshots[budget]


@pytest.mark.parametrize("row", TABLE)
def test_counts_of_the_table(row: str) -> None:
    """Within sampling error: four standard errors of the difference of two means of 30 lists, or 1%."""
    ranker, k, batch, wanted = TABLE[row]
    counts = [
        run(ranker, oracle_of(noisy_list(seed), seed=seed), Task(n=100, k=k, batch=batch)).cost.rounds
        for seed in range(30)
    ]
    error = np.std(counts) / math.sqrt(len(counts)) * math.sqrt(2)
    assert abs(np.mean(counts) - wanted) <= max(4 * error, 0.01 * wanted), (np.mean(counts), error)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (10, 3), (100, 10), (100, 100)])
def test_counts_with_a_formula(n: int, k: int) -> None:
    """Passes of bubblesort, all pairs, windows; twice as many calls where both directions are asked."""
    grades = noisy_list(0, n)
    for direction, price in (("random", 1), ("both", 2)):

        def calls(ranker: Ranker, direction: str = direction) -> int:
            return run(ranker, oracle_of(grades, direction=direction), Task(n=n, k=k)).cost.calls

        assert calls(Bubblesort(reuse=False)) == price * sum(n - 1 - done for done in range(min(k, n - 1)))
        assert calls(ranker_named("all-pairs")) == price * n * (n - 1) // 2
        assert calls(Sliding(reuse=False)) == price * k * (n - 1)
        assert calls(Quicksort()) <= calls(ranker_named("all-pairs"))


def test_first_quicksort_round_is_one_batch() -> None:
    """99 documents meet the pivot in one round: 4 batches of 32."""
    oracle = oracle_of(noisy_list(1))
    done = run(Quicksort(), oracle, Task(n=100, k=10, budget=99, batch=32))
    assert (done.cost.calls, done.cost.rounds) == (99, 4)


def test_known_winners_first_then_prior_order() -> None:
    """A budget that ends within a partition: those that beat the pivot so far, the rest as the first stage had them."""
    done = run(Quicksort(), oracle_of([0.0, 3.0, 1.0, 2.0, 4.0]), Task(n=5, k=2, budget=2))
    assert done.order == [1, 0, 2, 3, 4]  # 0 and 1 met the pivot 2, and 1 won
    heap = run(Heapsort(), oracle_of([0.0, 3.0, 1.0, 2.0, 4.0]), Task(n=5, k=2, budget=0))
    assert heap.order == [0, 1, 2, 3, 4]
    standing: Standing = [[2], [0, 1]]
    assert settle(4, standing, [(0, 1), (1, 3)], [(0.0, 1.0), (0.5, 0.5)]) == [2, 1, 0, 3]


@pytest.mark.parametrize("name", sorted(RANKERS))
def test_budget_0_and_odd_budgets(name: str) -> None:
    """Without a call the first stage's order stays, but for nothing; of an odd budget both directions use an even part."""
    grades = noisy_list(5, 20)
    assert run(ranker_named(name), oracle_of(grades), Task(n=20, k=5, budget=0)).order == list(range(20))
    oracle = oracle_of(grades, direction="both")
    assert run(ranker_named(name), oracle, Task(n=20, k=5, budget=7, calls_per_question=2)).cost.calls <= 6


def test_adaptive_learns() -> None:
    """With an oracle that never errs it finds the top 10 of 100 within 250 calls, on most lists, and it never repeats a pair."""
    found = []
    for seed in range(10):
        grades = noisy_list(seed)
        done = run(ranker_named("adaptive"), oracle_of(grades, seed=seed), Task(n=100, k=10, budget=250))
        found.append(len(set(done.order[:10]) & set(np.argsort(grades)[-10:])))
    assert np.mean(found) >= 9


def test_forecasts() -> None:
    """Exact where counting is, and the budget holds."""
    made = plan(100, 10, "bubblesort-uncached", 32, tokens_per_call=300)
    assert (made.calls, made.low_calls, made.high_calls, made.rounds, made.tokens) == (945, 945, 945, 945, 945 * 300)
    both = plan(50, 5, "all-pairs", 64, direction="both")
    assert (both.calls, both.rounds) == (50 * 49, math.ceil(50 * 49 / 64))
    assert plan(100, 10, "quicksort", 32, budget=40).high_calls == 40


def test_bad_sizes() -> None:
    """Refused by name."""
    for task, said in (
        (Task(n=3, k=4), "k must be 1 to 3"),
        (Task(n=3, k=1, budget=-1), "budget"),
        (Task(n=3, k=1, batch=0), "batch"),
        (Task(n=3, k=1, scores=[1.0]), "1 first-stage scores for 3"),
    ):
        with pytest.raises(InvalidInput, match=said):
            run(ranker_named("quicksort"), oracle_of([1.0, 2.0, 3.0]), task)
    with pytest.raises(InvalidInput, match="did you mean 'quicksort'"):
        ranker_named("quiksort")
