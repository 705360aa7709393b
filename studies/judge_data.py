"""What the comparator of `judge.py` is trained on and asked about: pairs of documents of different grades, in the oracle's prompts.

Judgements are few: 136 topics of the training collections. A model this small needs to see far more before it looks at both
passages at all, so arXiv stands in as a collection that judges itself: a title is a query, its own abstract is the one relevant
document, and the others are what BM25 finds for the title. Nothing of DL20, SciFact or Cranfield is read for training.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from shoal.evaluate.ranking_data import DIRECTORIES, Collection, Topic, load_collection, retrieved
from shoal.rank.templates import load_template

TRAINED_ON = ("vaswani", "dl19")
HELD_BACK = 4
"""One topic of so many of the training collections is for the accuracy only."""
MAX_QUERY_TOKENS, MAX_PASSAGE_TOKENS = 64, 64
"""As in every prompt of the study, which then has 256 tokens at most."""
Cut = Callable[[str, int], str]
"""The first so many tokens of a text, by the model's tokenizer."""


class Pair(NamedTuple):
    """Two documents of a topic, by place."""

    better: int
    worse: int


def arxiv(data: Path, part: str, most: int) -> Collection:
    """The first papers of `train` or `dev`, found by their titles among all of these."""
    with gzip.open(data / "arxiv_abstract_title" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        papers = [json.loads(line) for _, line in zip(range(most), file, strict=False)]
    return retrieved(
        "arxiv",
        {paper["id"]: paper["title"] for paper in papers},
        {paper["id"]: paper["abstract"] for paper in papers},
        {paper["id"]: {paper["id"]: 1} for paper in papers},
        1,
        "a title's own abstract is relevant",
    )


def split(collection: Collection) -> tuple[Collection, Collection]:
    """Topics to train on, and those held back."""
    topics = collection.topics
    kept = tuple(one for at, one in enumerate(topics) if at % HELD_BACK)
    return replace(collection, topics=kept), replace(collection, topics=topics[::HELD_BACK])


def judged(data: Path, name: str) -> Collection:
    """A test collection whose topics have no document twice: `rank` takes none."""
    found = load_collection(name, data / DIRECTORIES[name])
    return replace(found, topics=tuple(one for one in found.topics if len(set(one.texts)) == len(one.texts)))


def draw_pairs(topic: Topic, count: int, rng: random.Random) -> list[Pair]:
    """Up to `count` different pairs: a document with a grade, drawn evenly, and one with a lower one. Unjudged is 0, as in nDCG."""
    relevant = [place for place, grade in enumerate(topic.grades) if grade > 0]
    if not relevant:
        return []
    found: dict[Pair, None] = {}
    for _ in range(2 * count):
        better = rng.choice(relevant)
        lower = [place for place, grade in enumerate(topic.grades) if grade < topic.grades[better]]
        if lower and len(found) < count:
            found[Pair(better, rng.choice(lower))] = None
    return list(found)


def prompts_of(query: str, better: str, worse: str) -> list[dict[str, str]]:
    """Both orders, as the oracle's prompts have them, with the answers."""
    template = load_template("pair")
    right, wrong = template.answers(2)
    return [
        {"prompt": template.prompt(query, [better, worse]), "completion": right},
        {"prompt": template.prompt(query, [worse, better]), "completion": wrong},
    ]


def weak_prompts(
    collection: Collection, count: int, *, near: bool, tokens: int, cut: Cut, seed: int
) -> list[dict[str, str]]:
    """`count` prompts of titles with abstracts, each pair in both orders.

    Beside the right one stands another that BM25 found for the title (`near`), or any. Half of the titles are in lower case, as
    queries of most collections are.
    """
    rng = random.Random(seed)
    topics = [one for one in collection.topics if any(one.grades)]
    rng.shuffle(topics)
    rows: list[dict[str, str]] = []
    for topic in itertools.islice(itertools.cycle(topics), count // 2):
        better = topic.texts[topic.grades.index(1)]
        others = topic.texts[:30] if near else rng.choice(topics).texts
        worse = rng.choice([text for text in others if text != better])
        query = topic.query.lower() if rng.random() < 0.5 else topic.query
        rows += prompts_of(cut(query, MAX_QUERY_TOKENS), cut(better, tokens), cut(worse, tokens))
    return rows


def judged_prompts(collections: Sequence[Collection], count: int, *, cut: Cut, seed: int) -> list[dict[str, str]]:
    """Up to `count` prompts of judged pairs, as many of each topic."""
    rng = random.Random(seed)
    topics = [topic for collection in collections for topic in collection.topics]
    rows: list[dict[str, str]] = []
    for topic in topics:
        query = cut(topic.query, MAX_QUERY_TOKENS)
        for pair in draw_pairs(topic, count // 2 // len(topics), rng):
            better, worse = (cut(topic.texts[place], MAX_PASSAGE_TOKENS) for place in pair)
            rows += prompts_of(query, better, worse)
    return rows
