"""Test collections by path: queries, the first stage's 100 documents each, and judgements.

Known directories are read in their own formats: TREC Deep Learning 2019 and 2020 with BM25's passages, SciFact, Cranfield and
Vaswani. For the last three BM25 runs here (bm25s, its defaults). Grades are 0 for documents that nobody judged.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import InvalidInput, MissingExtra, nearest

DEPTH = 100
"""Documents per query."""
Judgements = dict[str, dict[str, int]]
"""Grades by query and document."""


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A query and what the first stage found for it."""

    query_id: str
    query: str
    documents: tuple[str, ...]
    """Ids, the best first."""
    texts: tuple[str, ...]
    """Of the documents; titles and abstracts joined."""
    scores: tuple[float, ...]
    """The first stage's."""
    grades: tuple[int, ...]
    """Judged relevance of the documents."""
    judged: tuple[int, ...]
    """All grades above 0 of this query, whether found or not, from the highest on: what NDCG divides by."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Topics with at least one relevant document."""

    name: str
    topics: tuple[Topic, ...]
    judgements: Judgements
    top_grade: int
    """The highest there is."""
    binary_grade: int
    """From which on a document counts as relevant for measures without grades."""
    about: str
    """How grades are read, and what the first stage is."""


def load_collection(name: str, path: Path) -> Collection:
    """`dl19`, `dl20`, `scifact`, `cranfield` or `vaswani` from its directory. Raises `InvalidInput`."""
    if name not in READERS:
        raise InvalidInput(f"there is no collection {name!r}, {nearest(name, READERS)}")
    try:
        return READERS[name](name, path)
    except FileNotFoundError as error:
        raise InvalidInput(
            f"{path} is not the directory of {name}: {Path(str(error.filename)).name} is missing"
        ) from None


def text_at(path: Path) -> str:
    """A file, or its gzip."""
    zipped = path.with_name(path.name + ".gz")
    if zipped.exists():
        with gzip.open(zipped, "rt", encoding="utf-8", errors="replace") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def read_deep_learning(name: str, path: Path) -> Collection:
    """TREC DL: grades 0 to 3, of which 2 and 3 count as relevant."""
    judgements = read_qrels(text_at(path / f"qrels.{name}-passage.txt"))
    topics = []
    for entry in json.loads(text_at(path / f"retrieve_results_{name}.json")):
        hits = entry["hits"][:DEPTH]
        topics.append(
            topic(
                str(hits[0]["qid"]),
                entry["query"],
                [str(hit["docid"]) for hit in hits],
                [hit["content"] for hit in hits],
                [float(hit["score"]) for hit in hits],
                judgements,
            )
        )
    return collection(name, topics, judgements, 3, 2, "grades 0 to 3, 2 and 3 relevant; BM25 by Anserini")


def read_scifact(name: str, path: Path) -> Collection:
    """SciFact's claims, abstracts behind their titles; binary."""
    corpus = [json.loads(line) for line in text_at(path / "corpus.jsonl").splitlines() if line.strip()]
    documents = {str(one["doc_id"]): f"{one['title']} {' '.join(one['abstract'])}" for one in corpus}
    rows = csv.reader(text_at(path / "topics.test.tsv").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    queries = {row[0]: row[1] for row in rows if row}
    return retrieved(name, queries, documents, read_qrels(text_at(path / "qrels.test.txt")), 1, "binary")


def read_cranfield(name: str, path: Path) -> Collection:
    """Cranfield. Codes 1 (complete answer) to 4 (minimum interest), as its readme has them, become grades 4 to 1; -1 is 0."""
    documents = {}
    for number, part in entries(text_at(path / "cran.all.1400")):
        fields = dict(re.findall(r"^\.([TABW])\n(.*?)(?=^\.[TABW]\n|\Z)", part, flags=re.DOTALL | re.MULTILINE))
        title, text = (" ".join(fields.get(field, "").split()) for field in "TW")
        documents[number] = text if text.startswith(title) else f"{title} {text}"
    asked = [part.split(".W", 1)[1] for _, part in entries(text_at(path / "cran.qry"))]
    queries = {
        str(at): " ".join(text.split()) for at, text in enumerate(asked, start=1)
    }  # judged by place, not by number
    judgements: Judgements = {}
    for line in text_at(path / "cranqrel").splitlines():
        query, document, code = line.split()
        judgements.setdefault(query, {})[document] = 0 if int(code) < 0 else 5 - int(code)
    return retrieved(name, queries, documents, judgements, 4, "codes 1 to 4 read as grades 4 to 1, as its readme says")


def entries(text: str) -> list[tuple[str, str]]:
    """Number and content of each entry of a SMART file."""
    parts = re.split(r"^\.I\s+(\d+)\s*$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def read_vaswani(name: str, path: Path) -> Collection:
    """Vaswani (NPL), binary."""
    found = re.findall(r"<DOCNO>(\d+)</DOCNO>\s*(.*?)\s*</DOC>", text_at(path / "doc-text.trec"), flags=re.DOTALL)
    documents = {number: " ".join(text.split()) for number, text in found}
    asked = re.findall(
        r"<num>(\d+)</num><title>\s*(.*?)\s*</title>", text_at(path / "query-text.trec"), flags=re.DOTALL
    )
    queries = {number: " ".join(text.split()).lower() for number, text in asked}
    return retrieved(name, queries, documents, read_qrels(text_at(path / "qrels")), 1, "binary")


READERS = {
    "dl19": read_deep_learning,
    "dl20": read_deep_learning,
    "scifact": read_scifact,
    "cranfield": read_cranfield,
    "vaswani": read_vaswani,
}
DIRECTORIES = {
    "dl19": "ir_trec_dl_2019_2020_bm25",
    "dl20": "ir_trec_dl_2019_2020_bm25",
    "scifact": "ir_scifact",
    "cranfield": "ir_cranfield",
    "vaswani": "ir_vaswani",
}
"""Where collections lie in a directory of all of them."""


def retrieved(
    name: str,
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    judgements: Judgements,
    top_grade: int,
    about: str,
) -> Collection:
    """BM25's best 100 documents for each judged query."""
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise MissingExtra("the first stage of this collection needs bm25s: pip install 'shoal[rank]'") from error
    ids = list(documents)
    quiet: dict[str, Any] = {"show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(documents.values()), **quiet), **quiet)
    judged = [query for query in queries if any(judgements.get(query, {}).values())]
    tokens = bm25s.tokenize([queries[query] for query in judged], **quiet)
    places, scores = index.retrieve(tokens, k=min(DEPTH, len(ids)), **quiet)
    topics = [
        topic(
            query,
            queries[query],
            [ids[place] for place in found],
            [documents[ids[place]] for place in found],
            [float(score) for score in its_scores],
            judgements,
        )
        for query, found, its_scores in zip(judged, places, scores, strict=True)
    ]
    return collection(name, topics, judgements, top_grade, 1, f"{about}; BM25 by bm25s {bm25s.__version__}")


def topic(
    query_id: str,
    query: str,
    documents: Sequence[str],
    texts: Sequence[str],
    scores: Sequence[float],
    judgements: Judgements,
) -> Topic:
    """A topic with its grades."""
    grades = judgements.get(query_id, {})
    return Topic(
        query_id=query_id,
        query=query,
        documents=tuple(documents),
        texts=tuple(texts),
        scores=tuple(scores),
        grades=tuple(max(0, grades.get(document, 0)) for document in documents),
        judged=tuple(sorted((grade for grade in grades.values() if grade > 0), reverse=True)),
    )


def collection(
    name: str, topics: Sequence[Topic], judgements: Judgements, top_grade: int, binary_grade: int, about: str
) -> Collection:
    """Of topics that have a relevant document."""
    kept = tuple(one for one in topics if one.judged)
    return Collection(
        name=name, topics=kept, judgements=judgements, top_grade=top_grade, binary_grade=binary_grade, about=about
    )


def read_qrels(text: str, name: str = "qrels") -> Judgements:
    """TREC's four columns: query, anything, document, grade. Raises `InvalidInput` with the line's number."""
    judgements: Judgements = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        columns = line.split()
        try:
            query, _, document, grade = columns
            judgements.setdefault(query, {})[document] = int(grade)
        except ValueError:
            raise InvalidInput(
                f"{name}, line {number}: expected query, 0, document and grade, got {line[:60]!r}"
            ) from None
    return judgements
