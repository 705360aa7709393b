"""Running a ranker's rounds: ask what is new, count it, and stop at the budget with the best answer so far.

Costs come in three units. A *call* is one prompt. A *round* is a step of the critical path: the prompts of a round, `batch` at a
time, so 99 prompts at batch 32 are 4. *Tokens* are what the comparator says they were.

Budgets count distinct questions, whoever pays for them: an answer from the disk counts like a fresh one, so that a ranking that is
resumed ends where it would have ended. `paid_calls` says what was spent now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from shoal.errors import InvalidInput
from shoal.lm.contract import Usage
from shoal.rank.oracle import Oracle
from shoal.rank.questions import Question, Ranker, Round, Shares, Task, settle


@dataclass(kw_only=True)
class Cost:
    """What a ranking took."""

    calls: int = 0
    """Prompts answered."""
    rounds: int = 0
    """Batches on the critical path."""
    questions: int = 0
    """Comparisons: one prompt each, or two."""
    reused: int = 0
    """Questions that had been answered before in this ranking."""
    unparsed: int = 0
    """Answers that could not be read."""
    usage: Usage = field(default_factory=Usage)
    """Tokens, and which of the calls were paid for."""

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.usage.prompt_tokens + self.usage.new_tokens


@dataclass(frozen=True, kw_only=True)
class Run:
    """A ranking."""

    order: list[int]
    """All documents, the best first."""
    cost: Cost
    """What it took."""
    finished: bool
    """Whether the ranker came to its end with calls to spare; one that plans for its budget does not."""
    snapshots: dict[int, list[int]]
    """The order at smaller budgets, where asked for: what a run with that budget returns."""


def run(
    ranker: Ranker,
    oracle: Oracle,
    task: Task,
    *,
    budgets: Iterable[int] = (),
    on_progress: Callable[[Cost], None] | None = None,
) -> Run:
    """Rank the documents of one query. Never makes more calls than `task.budget`.

    Args:
        budgets: smaller budgets to note the order at; exact for rankers that do not look at their budget.
        on_progress: told after each round.
    """
    check_task(task)
    answers: dict[Question, Shares] = {}
    cost = Cost()
    waiting = sorted(budget for budget in budgets if task.budget is None or budget < task.budget)
    snapshots: dict[int, list[int]] = {}
    price = oracle.calls_per_question
    rounds = ranker.rounds(task)
    reply: list[Shares] | None = None
    while True:
        try:
            asked = rounds.send(reply) if reply is not None else next(rounds)
        except StopIteration as end:
            order = settle(task.n, [[document] for document in end.value])
            snapshots.update(dict.fromkeys(waiting, order))
            finished = task.budget is None or cost.calls + price <= task.budget
            return Run(order=order, cost=cost, finished=finished, snapshots=snapshots)
        keys = [key_of(question, oracle) for question in asked.questions]
        new = list(dict.fromkeys(key for key in keys if key not in answers)) if ranker.reuse else keys
        affordable = len(new) if task.budget is None else min(len(new), (task.budget - cost.calls) // price)
        told = ask(oracle, new[:affordable], cost, batch=task.batch)
        known = dict(zip(new, told, strict=False)) if ranker.reuse else {}
        while waiting and waiting[0] < cost.calls + (len(new) - affordable) * price:
            before = cost.calls - affordable * price
            seen = max(0, (waiting[0] - before) // price)
            snapshots[waiting.pop(0)] = stopped(task, asked, new[:seen], told[:seen])
        if on_progress is not None:
            on_progress(cost)
        if affordable < len(new):
            order = stopped(task, asked, new[:affordable], told)
            snapshots.update(dict.fromkeys(waiting, order))
            return Run(order=order, cost=cost, finished=False, snapshots=snapshots)
        if ranker.reuse:
            answers.update(known)
            cost.reused += len(keys) - len(new)
            told = [answers[key] for key in keys]
        reply = [
            shares if key == question else shares[::-1]
            for key, question, shares in zip(keys, asked.questions, told, strict=True)
        ]


def stopped(task: Task, asked: Round, questions: Sequence[Question], told: Sequence[Shares]) -> list[int]:
    """The order where the budget ends within a round."""
    return settle(task.n, asked.standing(), questions, told)


def ask(oracle: Oracle, questions: Sequence[Question], cost: Cost, *, batch: int) -> list[Shares]:
    """Answers to questions, all at once, and what they took."""
    if not questions:
        return []
    shown = [oracle.presentations(question) for question in questions]
    readings = oracle.comparator.read([order for orders in shown for order in orders])
    cost.calls += len(readings)
    cost.questions += len(questions)
    cost.rounds += math.ceil(len(readings) / batch)
    cost.unparsed += sum(reading.logits is None for reading in readings)
    price = oracle.calls_per_question
    told = []
    for place, (question, orders) in enumerate(zip(questions, shown, strict=True)):
        told.append(oracle.combine(question, orders, readings[place * price : (place + 1) * price]))
    usages = [reading.usage for reading in readings if reading.usage.calls]
    if usages:
        cost.usage = sum(usages, cost.usage)
    return told


def key_of(question: Question, oracle: Oracle) -> Question:
    """A question under the name by which its answer is kept: a pair's order matters only where it decides who is shown first."""
    if len(question) == 2 and not oracle.ordered and question[0] > question[1]:
        return question[::-1]
    return question


def check_task(task: Task) -> None:
    """Raises `InvalidInput` for sizes that cannot be."""
    rules = {
        "n": (task.n >= 1, "1 or more"),
        "k": (1 <= task.k <= task.n, f"1 to {task.n}, the number of documents"),
        "budget": (task.budget is None or task.budget >= 0, "0 or more"),
        "batch": (task.batch >= 1, "1 or more"),
    }
    for name, (holds, allowed) in rules.items():
        if not holds:
            raise InvalidInput(f"{name} must be {allowed}, got {getattr(task, name)}")
    if task.scores is not None and len(task.scores) != task.n:
        raise InvalidInput(f"got {len(task.scores)} first-stage scores for {task.n} documents")
