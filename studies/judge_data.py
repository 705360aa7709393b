"""What the comparator of `judge.py` is trained on and asked about: pairs of documents of different grades, in the oracle's prompts.

Judgements are few: 95 topics. A model this small reads a query without looking back at the passages at all until it has been asked
far more often, so most training text is made: two passages and several queries about them, each with its answer,

    Passage A: ...    Passage B: ...    Query: ... Better passage: B    Query: ... Better passage: A

whose queries are words of a passage, or titles and sentences of the abstract that a passage begins. Where a prompt of the oracle
ends, its answer stands. Nothing of DL20, SciFact or Cranfield is read for training.
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

TEMPLATE = str(Path(__file__).with_name("judge_template.toml"))
TRAINED_ON = ("vaswani", "dl19")
HELD_BACK = 4
"""One topic of so many of the training collections is for the accuracy only."""
MAX_QUERY_TOKENS, MAX_PASSAGE_TOKENS = 64, 64
"""As in every prompt of the study, which then has 215 tokens at most."""
QUERIES = 8
"""Of a window of made text."""
Cut = Callable[[str, int], str]
"""The first so many tokens of a text, by the model's tokenizer."""


class Pair(NamedTuple):
    """Two documents of a topic, by place."""

    better: int
    worse: int


def arxiv(data: Path, part: str, most: int) -> Collection:
    """A collection that judges itself, the first papers of `train` or `dev`: a title is a query, its own abstract is relevant."""
    papers = read_papers(data, part, most)
    return retrieved(
        "arxiv",
        {paper["id"]: paper["title"] for paper in papers},
        {paper["id"]: paper["abstract"] for paper in papers},
        {paper["id"]: {paper["id"]: 1} for paper in papers},
        1,
        "a title's own abstract is relevant",
    )


def read_papers(data: Path, part: str, most: int) -> list[dict[str, str]]:
    """The first papers."""
    with gzip.open(data / "arxiv_abstract_title" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, most)]


def judged(data: Path, name: str) -> Collection:
    """A test collection without the topics that have a text twice, which `rank` does not take."""
    found = load_collection(name, data / DIRECTORIES[name])
    return replace(found, topics=tuple(one for one in found.topics if len(set(one.texts)) == len(one.texts)))


def split(collection: Collection) -> tuple[Collection, Collection]:
    """Topics to train on, and those held back."""
    topics = collection.topics
    kept = tuple(one for at, one in enumerate(topics) if at % HELD_BACK)
    return replace(collection, topics=kept), replace(collection, topics=topics[::HELD_BACK])


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


def window(passages: Sequence[str], asked: Sequence[tuple[str, int]]) -> dict[str, str]:
    """An example of `tune`: two passages and queries about them, each answered by the passage at its place."""
    template = load_template(TEMPLATE)
    answers = template.answers(2)
    (query, place), *rest = asked
    turn = template.text.partition("{passages}")[2]
    further = (turn.replace("{query}", query) + answers[place] for query, place in rest)
    return {"prompt": template.prompt(query, passages), "completion": answers[place] + "".join(further)}


def paper_windows(collection: Collection, count: int, *, near: bool, cut: Cut, seed: int) -> list[dict[str, str]]:
    """Beginnings of two abstracts, and queries about them in any order: titles, words that they show, and what follows there.

    The second abstract is any other, or one that BM25 found for the title of the first (`near`).
    """
    rng = random.Random(seed)
    by_text = {topic.texts[topic.grades.index(1)]: topic for topic in collection.topics if any(topic.grades)}
    texts = list(by_text)
    rng.shuffle(texts)
    found = []
    for text in itertools.islice(itertools.cycle(texts), count):
        others = [other for other in by_text[text].texts[:30] if other in by_text] if near else texts
        other = rng.choice([one for one in others if one != text] or texts)
        both = [text, other] if rng.random() < 0.5 else [other, text]
        passages = [cut(one, MAX_PASSAGE_TOKENS) for one in both]
        asked = [(by_text[one].query, place) for place, one in enumerate(both)]
        while len(asked) < QUERIES:
            place = rng.randrange(2)
            words = (
                passages[place] if rng.random() < 0.5 else both[place][len(passages[place]) :] or passages[place]
            ).split()
            start = rng.randint(0, max(0, len(words) - 8))
            asked.append((" ".join(words[start : start + rng.randint(3, 8)]), place))
        rng.shuffle(asked)
        asked = [(query.lower() if rng.random() < 0.5 else query, place) for query, place in asked]
        found.append(window(passages, [(cut(query, MAX_QUERY_TOKENS), place) for query, place in asked]))
    return found


def judged_windows(collections: Sequence[Collection], count: int, *, cut: Cut, seed: int) -> list[dict[str, str]]:
    """Up to `count` prompts of judged pairs, each pair in both orders, as many of each topic."""
    rng = random.Random(seed)
    topics = [topic for collection in collections for topic in collection.topics]
    found = []
    for topic in topics:
        query = cut(topic.query, MAX_QUERY_TOKENS)
        for pair in draw_pairs(topic, max(1, count // 2 // len(topics)), rng):
            better, worse = (cut(topic.texts[place], MAX_PASSAGE_TOKENS) for place in pair)
            found += [window([better, worse], [(query, 0)]), window([worse, better], [(query, 1)])]
    return found
