"""A small comparator, trained on some collections and asked about others: is a model of 12.5 million parameters a judge?

    python studies/judge.py --data ../shared/data --model ~/.cache/shoal/studies/general_model/general --save

The general model learns to answer the prompt of `judge_template.toml` in two stages, with `tune`: beginnings of arXiv abstracts,
and their titles, words and further sentences as queries; then judged pairs of Vaswani and TREC DL 2019. DL20, SciFact and Cranfield
are never read for it.

Then it is asked through the engine. Pairs of topics that were held back and of the test collections, in both directions, say how
often it is right. Rankings under budgets say what that is worth: margins of both directions, two calls per question. Answers are
kept in a cache, so that a pair is paid for once, whichever ranker asks. The yardstick is BM25's order, which costs nothing.

Training takes about 15 minutes on one core with bfloat16 units, asking about 15. Each part is a file in --work, and is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from judge_data import (
    MAX_PASSAGE_TOKENS,
    MAX_QUERY_TOKENS,
    TEMPLATE,
    TRAINED_ON,
    Cut,
    arxiv,
    draw_pairs,
    judged,
    judged_windows,
    paper_windows,
    split,
)
from judge_table import BUDGETS, PAIR_COLUMNS, describe
from ranking import HELD_OUT, interval, part
from shoal import Engine
from shoal.errors import ShoalError
from shoal.evaluate.bootstrap import Floats, ratio
from shoal.evaluate.ranking import measurer, statistics
from shoal.evaluate.ranking_data import Collection
from shoal.files import replaced
from shoal.lm import AnswerCache, CachedModel, LanguageModel, LocalModel
from shoal.rank import RankConfig
from shoal.rank.prompted import Prompted
from shoal.rank.ranking import rank_with
from shoal.rank.templates import load_template
from shoal.train.config import TuneConfig
from shoal.train.tune import tune
from study import CACHE, conditions, open_work, save

STAGES = {"papers": (16, 1e-3), "judged": (24, 5e-4)}
"""Examples per step, and the learning rate."""
PAPERS = 8000
"""Of arXiv, to find each other."""
MEASURE = "nDCG@10"
ARMS = ("adaptive", "quicksort", "heapsort", "bubblesort", "sliding")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="the directory of all data sets")
    options.add_argument("--model", required=True, help="checkpoint to start from, such as that of general_model.py")
    options.add_argument("--steps", type=int, nargs=2, default=[350, 250], help="of the two stages of training")
    options.add_argument("--topics", type=int, default=12, help="of each test collection, for rankings")
    options.add_argument(
        "--rank", nargs="*", default=HELD_OUT, choices=HELD_OUT, help="collections to rank; none: pairs only"
    )
    options.add_argument("--pairs", type=int, default=300, help="of each collection, for accuracy")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of tensor operations")
    options.add_argument("--work", type=Path, default=CACHE / "judge", help="parts that are done")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its scores mean nothing")
    options.add_argument("--save", action="store_true", help="write results/judge.json")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.steps, chosen.topics, chosen.pairs = [2, 2], 2, 8
    try:
        torch.set_num_threads(chosen.threads)
        result = run(chosen)
    except ShoalError as error:
        sys.exit(f"Error: {error}")
    print(describe(result))
    if chosen.save:
        save("judge", result)
    print(json.dumps({"study": "judge", **result}))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Two stages of training, then questions."""
    start = load(options.model)
    settings = {
        "start": start.name, "stages": STAGES, "steps": options.steps, "papers": PAPERS,
        "topics": options.topics, "pairs": options.pairs, "quick": options.quick,
    }  # fmt: skip
    open_work(options.work, settings)
    collections = {name: judged(options.data, name) for name in (*TRAINED_ON, *HELD_OUT)}
    before, training = options.model, []
    for name in STAGES:
        training.append(part(options.work, f"stage-{name}", partial(train, name, options, before, start, collections)))
        before = str(options.work / name)
    judge = load(before)
    models = {"start": start, "judge": judge}
    asked = {
        "arxiv": arxiv(options.data, "dev", 1000),
        **{name: split(collections[name])[1] for name in TRAINED_ON},
        **{name: collections[name] for name in HELD_OUT},
    }
    pairs = {
        name: {
            who: part(
                options.work,
                f"pairs-{name}-{who}",
                partial(ask_pairs, model, collection, options.pairs),
            )
            for who, model in models.items()
        }
        for name, collection in asked.items()
    }
    cached = CachedModel(judge, AnswerCache(options.work / "answers"))
    rankings = [
        part(options.work, f"rankings-{name}", partial(ask_rankings, cached, sample(collections[name], options.topics)))
        for name in options.rank
    ]
    return {
        "settings": settings, "conditions": conditions(), "training": training, "pairs": pairs, "rankings": rankings,
    }  # fmt: skip


def load(path: str | Path) -> LocalModel:
    """In the engine, named after its weights, so that kept answers are never those of another.

    In float32: in bfloat16 logits of this size come in steps of 1/16, and half of the margins of a comparator that is unsure are 0.
    """
    engine = Engine.from_pretrained(path, dtype="float32", max_batch=32, cache_gib=1)
    return LocalModel(engine, name=f"{engine.config.fingerprint} float32")


def train(
    stage: str, options: argparse.Namespace, before: str, start: LocalModel, collections: dict[str, Collection]
) -> dict[str, Any]:
    """One stage, from the checkpoint `before`; where it was interrupted it goes on."""
    steps, (batch, rate) = options.steps[list(STAGES).index(stage)], STAGES[stage]
    output: Path = options.work / stage
    state, file = output.with_name(f"{stage}.tuning"), output.with_suffix(".jsonl")
    if not state.is_dir():
        shutil.rmtree(output, ignore_errors=True)  # of a run that ended before its report was written
        rows = windows(stage, options.data, steps * batch, collections, lambda text, most: start.cut(text, most).text)
        with replaced(file) as partial_file:
            partial_file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = TuneConfig(depths=(1.0,), steps=steps, batch_size=batch, learning_rate=rate, bfloat16=True, save_every=100)

    def tell(step: int, num_steps: int, loss: float) -> None:
        print(f"{stage}: step {step} of {num_steps}, loss {loss:.4f}", file=sys.stderr, flush=True)

    told = asdict(tune(before, file, output, config, resume=state.is_dir(), report=tell))
    return {
        "stage": stage,
        **{name: told[name] for name in ("num_examples", "steps", "tokens", "final_loss", "seconds")},
    }


def windows(stage: str, data: Path, count: int, collections: dict[str, Collection], cut: Cut) -> list[dict[str, str]]:
    """`count` examples of a stage, so that each is read once."""
    if stage == "judged":
        return judged_windows([split(collections[name])[0] for name in TRAINED_ON], count, cut=cut, seed=3)
    papers = arxiv(data, "train", PAPERS)
    apart = paper_windows(papers, count // 2, near=False, cut=cut, seed=1)
    return apart + paper_windows(papers, count - len(apart), near=True, cut=cut, seed=2)


def sample(collection: Collection, count: int) -> Collection:
    """So many of its topics, evenly spread."""
    places = np.linspace(0, len(collection.topics) - 1, min(count, len(collection.topics))).astype(int)
    return replace(collection, topics=tuple(collection.topics[place] for place in places))


def ask_pairs(model: LanguageModel, collection: Collection, count: int) -> dict[str, list[float]]:
    """Shares of judged pairs, in percent with intervals over topics: what the model says of each in both directions."""
    rng, template = random.Random(0), load_template(TEMPLATE)
    topics = sample(collection, count).topics
    told: dict[str, list[float]] = {name: [] for name in PAIR_COLUMNS}
    sizes: list[int] = []
    for topic in topics:
        pairs = draw_pairs(topic, math.ceil(count / len(topics)), rng)
        if not pairs:
            continue
        asked = {place for pair in pairs for place in pair}
        comparator = Prompted(
            model=model,
            template=template,
            query=model.cut(topic.query, MAX_QUERY_TOKENS).text,
            passages=[
                model.cut(text, MAX_PASSAGE_TOKENS).text if at in asked else "" for at, text in enumerate(topic.texts)
            ],
        )
        readings = comparator.read([order for pair in pairs for order in (tuple(pair), tuple(pair)[::-1])])
        first, second = (np.array([one.logits for one in readings[at::2]]) for at in (0, 1))
        shown_first = first[:, 0] - first[:, 1]  # how much the better one is preferred where it is A
        shown_second = second[:, 1] - second[:, 0]
        right = {
            "one way": (sides(shown_first) + sides(shown_second)) / 2,
            "says A": (sides(shown_first) + sides(-shown_second)) / 2,
            "disagree": shown_first * shown_second <= 0,
            "both right": (shown_first > 0) & (shown_second > 0),
            "margin": sides(shown_first + shown_second),
            "first stage": np.array([pair.better < pair.worse for pair in pairs]),
        }
        sizes.append(len(pairs))
        for name, values in right.items():
            told[name].append(float(values.sum()))
    return {"pairs": [sum(sizes)], **{name: interval(ratio(values, sizes).times(100)) for name, values in told.items()}}


def sides(margins: Floats) -> Floats:
    """[pairs]: 1 above 0, 1/2 at it."""
    return (np.sign(margins) + 1) / 2


def ask_rankings(model: LanguageModel, collection: Collection) -> dict[str, Any]:
    """nDCG@10 of every ranker at every budget, in points, and what the last cost per query."""
    measure = measurer(collection)
    before = measure([list(range(len(topic.texts))) for topic in collection.topics])[MEASURE]
    arms = {}
    for ranker in ARMS:
        rows = []
        for budget in BUDGETS:
            config = RankConfig(
                budget=budget, ranker=ranker, direction="both", soft=True, template=TEMPLATE, max_query_tokens=MAX_QUERY_TOKENS,
                max_passage_tokens=MAX_PASSAGE_TOKENS,
            )  # fmt: skip
            done = [rank_with(model, config, one.query, one.texts, scores=one.scores) for one in collection.topics]
            after = measure([ranking.order for ranking in done])[MEASURE]
            costs = [ranking.cost for ranking in done]
            rows.append(
                {
                    "budget": budget,
                    "score": interval(statistics(after).score().times(100)),
                    "gain": interval(statistics(after).minus(statistics(before)).times(100)),
                    **{
                        name: float(np.mean([getattr(cost, name) for cost in costs]))
                        for name in ("calls", "rounds", "tokens")
                    },
                }
            )
        arms[ranker] = rows
        print(f"{collection.name}: {ranker}", file=sys.stderr, flush=True)
    return {
        "collection": collection.name, "topics": len(collection.topics),
        "first_stage": interval(statistics(before).score().times(100)), "arms": arms,
    }  # fmt: skip


if __name__ == "__main__":
    main()
