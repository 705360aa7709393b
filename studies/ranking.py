"""Rankers within a budget: does asking adaptively beat sorting, and which published claims hold?

    python studies/ranking.py --data ../shared/data --collections dl20 scifact cranfield --jobs 2 --save

Comparators are simulated from judgements, because no model that judges well runs on two cores: one is near published runs of
Flan-T5-XL, the other errs in ways that nothing here was tuned for. The adaptive ranker's settings were chosen on DL19 and Vaswani
with the first comparator; it is judged on DL20, SciFact and Cranfield with both. Each part is a file in `--work`, and is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ranking_figure import draw
from shoal.errors import ShoalError
from shoal.evaluate.markdown import table
from shoal.evaluate.ranking import (
    FIRST_STAGE,
    ArmConfig,
    EvaluateConfig,
    RankingResult,
    evaluate_ranking,
    simulated_grades,
)
from shoal.evaluate.ranking_data import DIRECTORIES, Collection, load_collection
from shoal.rank.executor import run
from shoal.rank.oracle import Oracle
from shoal.rank.questions import Ranker, Task
from shoal.rank.rankers import Bubblesort, Heapsort, Mohajer, Quicksort, ranker_named
from shoal.rank.simulate import NOISE_MODELS, Simulated
from study import CACHE, RESULTS, conditions, open_work, read_json, save, write_json

HELD_OUT = ("dl20", "scifact", "cranfield")
TUNED_ON = ("dl19", "vaswani")
BUDGETS = (20, 50, 100, 150, 200)
RANDOM = (
    "adaptive", "quicksort", "heapsort", "bubblesort", "sliding", "mohajer", "mohajer-bubble", "pac", "tournament", "all-pairs",
    "bradley-terry", "spectral",
)  # fmt: skip
"""All that ask pairs. What errors a model makes that sees more at once has not been published in a form to simulate."""
BOTH = ("quicksort", "tournament")
"""Asked in both directions as well: those that come far enough within 200 calls."""
TO_THE_END = (
    ("heapsort", "both"), ("heapsort", "random"), ("quicksort", "both"), ("quicksort", "random"),
    ("bubblesort-uncached", "both"), ("bubblesort", "both"), ("bubblesort", "random"), ("mohajer", "both"), ("mohajer", "random"),
    ("mohajer-bubble", "random"), ("pac", "both"), ("pac", "random"), ("tournament", "random"),
)  # fmt: skip
"""Rankers whose end is of interest, and directions."""
COUNTS: dict[str, tuple[Ranker, int, tuple[int, ...]]] = {
    "heapsort, stop at 10": (Heapsort(reuse=False), 10, (1,)),
    "heapsort, full": (Heapsort(reuse=False), 100, (1,)),
    "bubblesort, 10 passes, no cache": (Bubblesort(reuse=False), 10, (1,)),
    "bubblesort, 10 passes, unique pairs": (Bubblesort(), 10, (1,)),
    "quicksort, top 10, one partition at a time": (Quicksort(pooled=False), 10, (1, 2, 8, 32, 128)),
    "quicksort, top 10, pooled": (Quicksort(), 10, (1, 2, 8, 32, 128)),
    "quicksort, full, one partition at a time": (Quicksort(pooled=False), 100, (1, 2, 8, 32, 128)),
    "quicksort, full, pooled": (Quicksort(), 100, (1, 2, 8, 32, 128)),
    "Mohajer, SELECT run again": (Mohajer(keep_tree=False, reuse=False), 10, (1, 32)),
    "Mohajer, tree kept": (Mohajer(reuse=False), 10, (1, 32)),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="directory of the collections' directories")
    options.add_argument("--seeds", type=int, default=20)
    options.add_argument("--topics", type=int, help="first so many of each collection")
    options.add_argument(
        "--collections", nargs="+", default=[*HELD_OUT, *TUNED_ON], choices=DIRECTORIES, metavar="NAME"
    )
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--work", type=Path, default=CACHE / "ranking", help="parts that are done")
    options.add_argument("--quick", action="store_true", help="3 topics, 1 seed")
    options.add_argument("--save", action="store_true")
    chosen = options.parse_args()
    topics, seeds = (3, 1) if chosen.quick else (chosen.topics, chosen.seeds)
    try:
        loaded = {name: limited(load_collection(name, chosen.data / DIRECTORIES[name]), topics) for name in DIRECTORIES}
        deep = [loaded["dl19"], loaded["dl20"]]
        open_work(chosen.work, {"seeds": seeds, "topics": topics, "quick": chosen.quick})
        found = [
            part(chosen.work, f"{name}-{noise}", partial(curve, loaded[name], noise, seeds, chosen.jobs))
            for name in chosen.collections
            for noise in ("published", "mismatched")
        ]
        result: dict[str, Any] = {
            "conditions": conditions(),
            "seeds": seeds,
            "topics": {name: len(one.topics) for name, one in loaded.items()},
            "curves": found,
            "counts": part(chosen.work, "counts", lambda: counts(3 if chosen.quick else 60)),
            "oracles": part(chosen.work, "oracles", lambda: oracles(deep)),
            "claims": part(chosen.work, "claims", lambda: claims(deep, seeds=min(seeds, 2))),
        }
    except ShoalError as error:
        sys.exit(f"Error: {error}")
    print(describe(result))
    if chosen.save:
        save("ranking", result)
        draw(result, RESULTS / "ranking.svg", BUDGETS)
    print(json.dumps({"study": "ranking", **{key: result[key] for key in ("seeds", "topics", "oracles")}}))


def limited(collection: Collection, topics: int | None) -> Collection:
    """Its first topics."""
    return replace(collection, topics=collection.topics[:topics])


def counts(lists: int) -> dict[str, dict[str, list[float]]]:
    """Mean comparisons by batch, and their standard error. Relevance is drawn; the first stage has as much noise."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, (ranker, k, batches) in COUNTS.items():
        found[name] = {}
        for batch in batches:
            rounds = []
            for seed in range(lists):
                generator = np.random.default_rng(seed)
                relevance = generator.standard_normal(100)
                order = np.argsort(-(relevance + generator.standard_normal(100)))
                oracle = Oracle(comparator=Simulated(list(relevance[order])), direction="random", seed=seed)
                rounds.append(run(ranker, oracle, Task(n=100, k=k, batch=batch)).cost.rounds)
            found[name][str(batch)] = [float(np.mean(rounds)), float(np.std(rounds) / np.sqrt(lists))]
    return found


def oracles(collections: list[Collection]) -> dict[str, dict[str, float]]:
    """What the simulated comparators come to on TREC DL: how often two directions disagree, how many triples go in circles (random
    direction), and the NDCG@10 of a heapsort without a budget."""
    found = {}
    for name, noise in NOISE_MODELS.items():
        flips, circles, quality = [], [], []
        for collection in collections:
            for number, topic in enumerate(collection.topics):
                simulated = Simulated(simulated_grades(collection, topic), noise, number)
                logits = simulated.logits
                upper = np.triu_indices(len(logits), 1)
                flips.append(float(np.mean(logits[upper] * logits.T[upper] > 0)))
                circles.append(circular(logits, number))
                done = run(Heapsort(), Oracle(comparator=simulated, seed=number), Task(n=len(logits), k=10))
                quality.append(ndcg([topic.grades[one] for one in done.order], topic.judged))
        found[name] = {
            "flip_rate": float(np.mean(flips)),
            "circular_triples": float(np.mean(circles)),
            "heapsort_ndcg10": float(np.mean(quality)),
        }
    return found


def circular(logits: np.ndarray[Any, Any], seed: int) -> float:
    """Share of 2,000 drawn triples whose preferences go in a circle, each pair asked in a drawn direction."""
    generator = np.random.default_rng([seed, 2])
    n = len(logits)
    first = np.triu(generator.random((n, n)) < 0.5, 1)
    wins = np.where(first, logits > 0, logits.T < 0)
    wins = np.triu(wins, 1) | np.tril(~wins.T, -1)
    triples = np.sort(np.array([generator.choice(n, 3, replace=False) for _ in range(2000)]), axis=1)
    a, b, c = triples.T
    return float(np.mean((wins[a, b] == wins[b, c]) & (wins[a, b] == wins[c, a])))


def ndcg(gains: list[int], ideal: tuple[int, ...]) -> float:
    """NDCG@10 with linear gains."""
    discounts = 1 / np.log2(np.arange(2, 12))
    return float(np.dot(gains[:10], discounts[: len(gains[:10])]) / np.dot(ideal[:10], discounts[: len(ideal[:10])]))


def claims(collections: list[Collection], *, seeds: int) -> dict[str, dict[str, float]]:
    """Rankers without a budget on TREC DL, top 10, the published comparator: prompts, batches of 1, 2, 8 and 32, NDCG@10."""
    found = {}
    for name, direction in TO_THE_END:
        sums: dict[str, list[float]] = {
            "prompts": [],
            "ndcg10": [],
            **{f"batches_of_{batch}": [] for batch in (2, 8, 32)},
        }
        for collection in collections:
            for number, topic in enumerate(collection.topics):
                for seed in range(seeds):
                    draw = 100_003 * seed + number
                    simulated = Simulated(simulated_grades(collection, topic), NOISE_MODELS["published"], draw)
                    oracle = Oracle(comparator=simulated, direction=direction, seed=draw)  # type: ignore[arg-type]
                    batches = (2, 8, 32) if seed == 0 else (32,)
                    for batch in batches:
                        done = run(ranker_named(name), oracle, Task(n=len(topic.grades), k=10, batch=batch, seed=draw))
                        sums[f"batches_of_{batch}"].append(done.cost.rounds)
                    sums["prompts"].append(done.cost.calls)
                    sums["ndcg10"].append(ndcg([topic.grades[one] for one in done.order], topic.judged))
        found[f"{name} [{direction}]"] = {key: float(np.mean(values)) for key, values in sums.items()}
    return found


def curve(collection: Collection, noise: str, seeds: int, jobs: int) -> dict[str, Any]:
    """Quality at every budget, and the adaptive ranker against the best other of each, paired over topics."""
    arms = (*(ArmConfig(ranker=one) for one in RANDOM), *(ArmConfig(ranker=one, direction="both") for one in BOTH))
    config = EvaluateConfig(arms=arms, budgets=BUDGETS, seeds=seeds, noise=noise, jobs=jobs)
    result = evaluate_ranking(collection, config)
    return {"noise": noise, "held_out": collection.name in HELD_OUT, **summary(result)}


def part(work: Path, name: str, make: Callable[[], Any]) -> Any:
    """What a file in the work directory holds, or what it will."""
    path = work / f"{name}.json"
    if not path.is_file():
        write_json(path, make())
        print(f"{name} is done", file=sys.stderr, flush=True)
    return read_json(path)


def summary(result: RankingResult) -> dict[str, Any]:
    """Means and intervals, in points."""
    labels = [FIRST_STAGE, *(curve.label for curve in result.curves)]
    scores = {label: [interval(result.score(label, budget).times(100)) for budget in BUDGETS] for label in labels}
    against = []
    for at, budget in enumerate(BUDGETS):
        best = max(
            (label for label in labels if not label.startswith("adaptive")), key=lambda label: scores[label][at][0]
        )
        against.append([best, *interval(result.difference("adaptive [random]", best, budget).times(100))])
    return {"collection": result.collection, "topics": result.topics, "scores": scores, "against": against}


def interval(score: Any) -> list[float]:
    return [round(value, 2) for value in (score.value, score.low, score.high)]


def describe(result: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    parts = []
    rows = [
        [
            name,
            *(
                f"{by[str(batch)][0]:.1f} ± {by[str(batch)][1]:.1f}" if str(batch) in by else ""
                for batch in (1, 2, 8, 32, 128)
            ),
        ]
        for name, by in result["counts"].items()
    ]
    parts.append(table(["batches of", "1", "2", "8", "32", "128"], rows))
    rows = [
        [
            name,
            f"{100 * one['flip_rate']:.1f}",
            f"{100 * one['circular_triples']:.1f}",
            f"{100 * one['heapsort_ndcg10']:.1f}",
        ]
        for name, one in result["oracles"].items()
    ]
    parts.append(table(["comparator", "directions disagree, %", "triples in circles, %", "heapsort's nDCG@10"], rows))
    rows = [
        [
            name,
            *(f"{one[key]:.0f}" for key in ("prompts", "batches_of_2", "batches_of_8", "batches_of_32")),
            f"{100 * one['ndcg10']:.1f}",
        ]
        for name, one in result["claims"].items()
    ]
    parts.append(table(["to the end, top 10", "prompts", "batches of 2", "of 8", "of 32", "nDCG@10"], rows))
    for one in result["curves"]:
        rows = [[label, *(f"{score[0]:.1f}" for score in line)] for label, line in one["scores"].items()]
        versus = [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" for _, value, low, high in one["against"]]
        rows.append(["**adaptive less the best other**", *versus])
        rows.append(["best other", *(best for best, *_ in one["against"])])
        where = "held out" if one["held_out"] else "tuned on, with the published comparator"
        parts.append(f"{one['collection']}, {one['topics']} topics, {one['noise']} comparator ({where}), nDCG@10:")
        parts.append(table(["calls", *map(str, BUDGETS)], rows))
    parts.append(verdict(result["curves"]))
    return "\n\n".join(parts)


def verdict(found: list[dict[str, Any]]) -> str:
    """The claim in one line: nowhere significantly below the best other, above it at half or more of the budgets."""
    held_out = [(one, row) for one in found if one["held_out"] for row in one["against"]]
    below = [f"{one['collection']}/{one['noise']}" for one, (_, _, _, high) in held_out if high < 0]
    above = sum(low > 0 for _, (_, _, low, _) in held_out)
    higher = sum(value > 0 for _, (_, value, _, _) in held_out)
    return (
        f"Of {len(held_out)} held-out budgets the adaptive ranker is above the best other at {higher}, significantly at {above}, "
        f"and significantly below at {len(below)}{': ' + ', '.join(below) if below else ''}."
    )


if __name__ == "__main__":
    main()
