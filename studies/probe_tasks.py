"""The classification tasks that probes are judged on: texts with their classes, to learn from and to be tried on."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shoal.signals.labelled import Labelled


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task."""

    train: list[Labelled]
    """In an order that has nothing to do with the classes."""
    test: list[Labelled]
    """The same."""
    positive: str | None = None
    """Of two classes, the one to find."""


def read(path: Path) -> str:
    """A gzipped text."""
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a gzipped CSV file with a header."""
    yield from csv.DictReader(io.StringIO(read(path)))


def shuffled(labelled: list[Labelled]) -> list[Labelled]:
    """In the order of digests of the texts, each text once."""
    by_text = {one.text: one for one in labelled}
    return sorted(by_text.values(), key=lambda one: hashlib.sha256(one.text.encode()).digest())


def sst2(data: Path) -> Task:
    """Sentiment of sentences from film reviews, official split."""

    def part(name: str) -> list[Labelled]:
        lines = read(data / "cls_sst2" / f"{name}.tsv.gz").splitlines()
        pairs = (line.split("\t", 1) for line in lines)
        return shuffled([Labelled(text, {"0": "negative", "1": "positive"}[label]) for label, text in pairs])

    return Task(train=part("train") + part("dev"), test=part("test"), positive="positive")


def banking77(data: Path) -> Task:
    """77 intents of bank customers, official split."""

    def part(name: str) -> list[Labelled]:
        return shuffled(
            [Labelled(row["text"], row["category"]) for row in rows_of(data / "cls_banking77" / f"{name}.csv.gz")]
        )

    return Task(train=part("train"), test=part("test"))


def hate_offensive(data: Path) -> Task:
    """Tweets: hate, offensive or neither. There is no official split: a quarter is the test."""
    names = ("hate", "offensive", "neither")
    rows = rows_of(data / "cls_hate_offensive" / "labeled_data.csv.gz")
    tweets = shuffled([Labelled(row["tweet"], names[int(row["class"])]) for row in rows])
    return Task(train=tweets[len(tweets) // 4 :], test=tweets[: len(tweets) // 4])


def safety(data: Path) -> Task:
    """Harmful or benign: the three sets that label both in one style (OpenAI moderation, Aegis, XSTest with its safe look-alikes).

    Sets of harmful requests alone are left out: a classifier would learn which set a prompt is from. A quarter is the test.
    """
    directory, found = data / "cls_safety_prompts", []
    for name in ("openai_moderation", "aegis_safety_test"):
        for line in read(directory / f"{name}.jsonl.gz").splitlines():
            row = json.loads(line)
            found.append(Labelled(row["prompt"], {"harmful": "harmful", "unharmful": "benign"}[row["label"]]))
    for row in rows_of(directory / "xstest_prompts.csv.gz"):
        found.append(Labelled(row["prompt"], {"unsafe": "harmful", "safe": "benign"}[row["label"]]))
    prompts = shuffled([one for one in found if one.text.strip()])
    return Task(train=prompts[len(prompts) // 4 :], test=prompts[: len(prompts) // 4], positive="harmful")


TASKS: dict[str, Callable[[Path], Task]] = {
    "SST-2": sst2,
    "Banking77": banking77,
    "hate-offensive": hate_offensive,
    "safety": safety,
}
