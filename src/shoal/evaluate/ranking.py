"""Rankers measured: quality against calls, on test collections, with an oracle made from judgements or a model.

An arm is a ranker with a direction of asking. Each arm runs once per topic and seed, up to the largest budget; smaller budgets are
noted on the way (`executor.run`), but for rankers that plan by their budget, which run once for each. Measures are ir-measures'.
Values of a topic are means over seeds; intervals are over topics, and two arms are compared on the same resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from shoal.errors import InvalidInput, MissingExtra
from shoal.evaluate.bootstrap import Score, Statistics, quotient
from shoal.evaluate.ranking_data import Collection, Topic
from shoal.lm.contract import LanguageModel
from shoal.rank.executor import run
from shoal.rank.oracle import Comparator, Direction, Oracle
from shoal.rank.prompted import Prompted
from shoal.rank.questions import Ranker, Task
from shoal.rank.rankers import KINDS, ranker_named
from shoal.rank.rankers.adaptive import Adaptive
from shoal.rank.rankers.sampled import SampledPairs
from shoal.rank.simulate import NOISE_MODELS, NoiseModel, Simulated
from shoal.rank.templates import load_template

MEASURES = ("nDCG@10", "AP", "RR")
"""Of ir-measures; the last two with documents from the collection's binary grade on."""
GRADE_SPAN, BINARY_SPAN = 3.0, 2.0
"""What the highest grade is for a simulated comparator; TREC DL's relevance begins at 2 of 3, so binary judgements are as 2."""
FIRST_STAGE = "first stage"
Orders = dict[int, list[list[int]]]
"""By budget, a topic's order each."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """A ranker and how it asks."""

    ranker: str
    direction: Direction = "random"

    @property
    def label(self) -> str:
        """As tables have it."""
        return f"{self.ranker} [{self.direction}]"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured. Raises `InvalidInput` for values outside what is allowed."""

    arms: tuple[ArmConfig, ...]
    budgets: tuple[int, ...] = (20, 50, 100, 150, 200)
    """Model calls per query, rising."""
    k: int = 10
    """Places that matter; all of a topic's documents where it has fewer."""
    batch: int = 32
    """Prompts that run together."""
    seeds: int = 1
    """Draws of a simulated comparator and of directions."""
    noise: str = "published"
    """A name of `NOISE_MODELS`, where no model is asked."""
    jobs: int = 1
    """Processes, where no model is asked."""

    def __post_init__(self) -> None:
        rules = {
            "arms": (len(self.arms) >= 1, "one or more"),
            "budgets": (
                list(self.budgets) == sorted(set(self.budgets)) and min(self.budgets, default=0) > 0,
                "rising, above 0",
            ),
            "k": (self.k >= 1, "1 or more"),
            "batch": (self.batch >= 1, "1 or more"),
            "seeds": (self.seeds >= 1, "1 or more"),
            "noise": (self.noise in NOISE_MODELS, f"one of {', '.join(NOISE_MODELS)}"),
            "jobs": (self.jobs >= 1, "1 or more"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} must be {allowed}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm at a budget."""

    budget: int
    values: Mapping[str, Sequence[float]]
    """By measure, per topic, means over seeds."""
    calls: float
    """Made per query."""
    rounds: float
    """Batches on the critical path, of the run up to the largest budget; elsewhere calls tell."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An arm over all budgets."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class RankingResult:
    """A collection's curves."""

    collection: str
    about: str
    topics: int
    settings: dict[str, Any]
    first_stage: Mapping[str, Sequence[float]]
    """Measures of the order before any call."""
    curves: tuple[Curve, ...] = field(default_factory=tuple)

    def score(self, label: str, budget: int, measure: str = MEASURES[0]) -> Score:
        """A mean with its interval over topics."""
        return statistics(self.values(label, budget, measure)).score()

    def difference(self, label: str, other: str, budget: int, measure: str = MEASURES[0]) -> Score:
        """Paired over topics."""
        ours, theirs = (statistics(self.values(one, budget, measure)) for one in (label, other))
        return ours.minus(theirs)

    def values(self, label: str, budget: int, measure: str = MEASURES[0]) -> Sequence[float]:
        """Per topic."""
        if label == FIRST_STAGE:
            return self.first_stage[measure]
        (curve,) = (one for one in self.curves if one.label == label)
        (point,) = (one for one in curve.points if one.budget == budget)
        return point.values[measure]


def statistics(values: Sequence[float]) -> Statistics:
    """Of a mean over topics."""
    return Statistics(np.stack([np.asarray(values, float), np.ones(len(values))], axis=1), quotient)


def evaluate_ranking(
    collection: Collection,
    config: EvaluateConfig,
    *,
    model: LanguageModel | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RankingResult:
    """Measure every arm on a collection, against judgements through a simulated comparator or by asking `model`."""
    measure = measurer(collection)
    jobs = [(arm, seed) for arm in config.arms for seed in range(config.seeds if model is None else 1)]
    told: dict[str, list[tuple[Orders, list[int], float]]] = {arm.label: [] for arm in config.arms}
    for done, found in enumerate(run_jobs(collection, config, jobs, model), start=1):
        told[jobs[done - 1][0].label].append(found)
        report(f"{collection.name}: rankings", done, len(jobs))
    curves = []
    for label, runs in told.items():
        points = []
        for budget in config.budgets:
            measured = [measure(orders[budget]) for orders, _, _ in runs]
            values = {name: tuple(np.mean([one[name] for one in measured], axis=0).tolist()) for name in MEASURES}
            calls = float(np.mean([np.minimum(budget, calls) for _, calls, _ in runs]))
            points.append(
                Point(budget=budget, values=values, calls=calls, rounds=float(np.mean([one[2] for one in runs])))
            )
        curves.append(Curve(label=label, points=tuple(points)))
    before = measure([list(range(len(topic.documents))) for topic in collection.topics])
    settings = {
        "k": config.k, "batch": config.batch, "seeds": config.seeds if model is None else 1,
        "oracle": config.noise if model is None else model.name, "budgets": list(config.budgets),
    }  # fmt: skip
    return RankingResult(
        collection=collection.name,
        about=collection.about,
        topics=len(collection.topics),
        settings=settings,
        first_stage=before,
        curves=tuple(curves),
    )


def run_jobs(
    collection: Collection,
    config: EvaluateConfig,
    jobs: Sequence[tuple[ArmConfig, int]],
    model: LanguageModel | None,
) -> Iterable[tuple[Orders, list[int], float]]:
    """Each arm's orders under each seed, calls and rounds; in several processes where no model is asked."""
    work = partial(run_arm, collection, config, model)
    if model is not None or config.jobs == 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(config.jobs) as pool:
        yield from pool.map(work, jobs)


def run_arm(
    collection: Collection, config: EvaluateConfig, model: LanguageModel | None, job: tuple[ArmConfig, int]
) -> tuple[Orders, list[int], float]:
    """All topics of an arm under one seed: orders by budget; of the longest run each topic's calls, and mean rounds."""
    arm, seed = job
    ranker = ranker_named(arm.ranker)
    by_budget = config.budgets if plans_by_budget(ranker, config.budgets, arm.direction) else config.budgets[-1:]
    orders: Orders = {budget: [] for budget in config.budgets}
    calls, rounds = [], []
    for number, topic in enumerate(collection.topics):
        draw = 100_003 * seed + number
        comparator = comparator_of(collection, topic, NOISE_MODELS[config.noise], draw, arm.ranker, model)
        oracle = Oracle(comparator=comparator, direction=arm.direction, seed=draw)
        for budget in by_budget:
            task = Task(
                n=len(topic.documents),
                k=min(config.k, len(topic.documents)),
                budget=budget,
                batch=config.batch,
                calls_per_question=oracle.calls_per_question,
                scores=topic.scores,
                seed=draw,
            )
            smaller = () if len(by_budget) > 1 else config.budgets
            done = run(ranker, oracle, task, budgets=smaller)
            orders[budget].append(done.order)
            for noted, order in done.snapshots.items():
                orders[noted].append(order)
        calls.append(done.cost.calls)
        rounds.append(done.cost.rounds)
    return orders, calls, float(np.mean(rounds))


def plans_by_budget(ranker: Ranker, budgets: Sequence[int], direction: Direction) -> bool:
    """Whether a smaller budget is another run, not the beginning of a longer one.

    The adaptive ranker cuts only its last round to the budget, so where budgets are whole rounds of it they are beginnings.
    """
    if isinstance(ranker, Adaptive):
        price = 2 if direction == "both" else 1
        return any(budget % (price * ranker.per_round) for budget in budgets)
    return isinstance(ranker, SampledPairs)


def comparator_of(
    collection: Collection, topic: Topic, noise: NoiseModel, seed: int, ranker: str, model: LanguageModel | None
) -> Comparator:
    """A simulated one, or the model asked about this topic."""
    if model is None:
        return Simulated(simulated_grades(collection, topic), noise, seed)
    return Prompted(
        model=model,
        template=load_template(KINDS.get(ranker, "pair")),
        query=model.cut(topic.query, 64).text,
        passages=[model.cut(text, 128).text for text in topic.texts],
    )


def simulated_grades(collection: Collection, topic: Topic) -> list[float]:
    """Grades on one scale for all collections."""
    span = BINARY_SPAN if collection.top_grade == 1 else GRADE_SPAN
    return [span * grade / collection.top_grade for grade in topic.grades]


def measurer(collection: Collection) -> Callable[[Sequence[Sequence[int]]], dict[str, tuple[float, ...]]]:
    """A function from an order per topic to `MEASURES` per topic."""
    try:
        import ir_measures
    except ModuleNotFoundError as error:
        raise MissingExtra("measures of rankings need ir-measures: pip install 'shoal[rank]'") from error
    rel = collection.binary_grade
    wanted = {
        "nDCG@10": ir_measures.nDCG @ 10,
        "AP": ir_measures.AP(rel=rel),
        "RR": ir_measures.RR(rel=rel),
    }
    # a grade below 0 is Cranfield's and others' word for not relevant
    qrels = {topic.query_id: collection.judgements[topic.query_id] for topic in collection.topics}
    evaluator = ir_measures.evaluator(list(wanted.values()), qrels)

    def measure(orders: Sequence[Sequence[int]]) -> dict[str, tuple[float, ...]]:
        ranked = {
            topic.query_id: {topic.documents[one]: float(len(order) - at) for at, one in enumerate(order)}
            for topic, order in zip(collection.topics, orders, strict=True)
        }
        found: dict[tuple[str, str], float] = {}
        for metric in evaluator.iter_calc(ranked):
            found[str(metric.measure), metric.query_id] = float(metric.value)
        return {
            name: tuple(found[str(measure), topic.query_id] for topic in collection.topics)
            for name, measure in wanted.items()
        }

    return measure
