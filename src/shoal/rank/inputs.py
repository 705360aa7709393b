"""Files of documents and queries, and the jobs they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import InvalidInput
from shoal.jsonl import parse_jsonl
from shoal.rank.trec import read_run, read_text


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """One query and its candidates, in the first stage's order."""

    query_id: str
    query: str
    ids: tuple[str, ...]
    """Of the documents."""
    texts: tuple[str, ...]
    scores: tuple[float, ...] | None
    """The first stage's; None where it tells none."""


def read_documents(path: Path) -> tuple[dict[str, str], tuple[float, ...] | None]:
    """Texts by id in the file's order, and their scores where all have one.

    A `.jsonl` file has an object per line with `text` and perhaps `id` and `score`; any other file has a document per line. Ids
    that are missing are line numbers. Raises `InvalidInput` with the line's number, and where some documents have scores and others
    none, or a later one a higher score.
    """
    texts: dict[str, str] = {}
    scores: list[float] = []
    rows = (
        parse_jsonl(read_text(path), str(path))
        if path.suffix == ".jsonl"
        else (
            (number, {"text": line}) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()
        )
    )
    for number, fields in rows:
        where, text = f"{path}, line {number}", fields.get("text")
        if not isinstance(text, str) or not text.strip():
            raise InvalidInput(f"{where}: 'text' must be a text that is not empty, got {text!r}")
        key = str(number if (given := fields.get("id")) is None else given)
        if key in texts:
            raise InvalidInput(f"{where}: the id {key!r} stands in the file already")
        texts[key] = text
        if (score := fields.get("score")) is not None:
            if not isinstance(score, int | float) or isinstance(score, bool):
                raise InvalidInput(f"{where}: 'score' must be a number, got {score!r}")
            if scores and score > scores[-1]:
                raise InvalidInput(
                    f"{where}: the score {score} is above the one before: the best document stands first"
                )
            scores.append(float(score))
        if scores and len(scores) < len(texts):
            raise InvalidInput(
                f"{where}: {len(scores)} of {len(texts)} documents have a 'score': give it for all, or none"
            )
    if not texts:
        raise InvalidInput(f"{path} holds no document")
    return texts, tuple(scores) or None


def read_queries(path: Path) -> dict[str, str]:
    """Queries by id: `.jsonl` with `id` and `text` (or `query`), or a tab between id and query. Raises `InvalidInput`."""
    queries: dict[str, str] = {}
    if path.suffix == ".jsonl":
        rows = (
            (number, str(one.get("id", "")), one.get("text", one.get("query")))
            for number, one in parse_jsonl(read_text(path), str(path))
        )
    else:
        lines = enumerate(read_text(path).split("\n"), start=1)
        rows = ((number, *line.partition("\t")[::2]) for number, line in lines if line.strip())
    for number, key, text in rows:
        if not key or not isinstance(text, str) or not text.strip():
            raise InvalidInput(f"{path}, line {number}: expected an id and a query")
        if key in queries:
            raise InvalidInput(f"{path}, line {number}: the id {key!r} stands in the file already")
        queries[key] = text
    return queries


def jobs_of_run(run_path: Path, queries: Mapping[str, str], texts: Mapping[str, str], *, depth: int) -> list[RankJob]:
    """A job per query of a run file: its best `depth` documents. Raises `InvalidInput` for ids without a text."""
    jobs = []
    for query_id, found in read_run(run_path).items():
        if query_id not in queries:
            raise InvalidInput(f"{run_path}: query {query_id!r} is not among the {len(queries)} queries given")
        head = found[:depth]
        for document, _ in head:
            if document not in texts:
                raise InvalidInput(
                    f"{run_path}: document {document!r} of query {query_id!r} is not among the documents given"
                )
        jobs.append(
            RankJob(
                query_id=query_id,
                query=queries[query_id],
                ids=tuple(document for document, _ in head),
                texts=tuple(texts[document] for document, _ in head),
                scores=tuple(score for _, score in head),
            )
        )
    return jobs
