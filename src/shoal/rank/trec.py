"""TREC run files: query, Q0, document, rank, score and tag in columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shoal.errors import InvalidInput
from shoal.files import replaced

Run = dict[str, list[tuple[str, float]]]
"""By query its documents with their scores, the best first."""


def read_run(path: Path) -> Run:
    """A run file. Documents stand by falling score, as trec_eval reads them; of equal scores the lower rank comes first.

    Raises `InvalidInput` with the line's number for lines that are none, and for a document that a query has twice.
    """
    rows: dict[str, dict[str, tuple[float, int, int]]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        columns = line.split()
        try:
            query, _, document, rank, score, _ = columns
            row = (float(score), int(rank), number)
        except ValueError:
            raise InvalidInput(
                f"{where}: expected query, Q0, document, rank, score and tag, got {line[:60]!r}"
            ) from None
        if not math.isfinite(row[0]):
            raise InvalidInput(f"{where}: the score {score} is not finite")
        if document in rows.setdefault(query, {}):
            first = rows[query][document][2]
            raise InvalidInput(f"{where}: document {document!r} of query {query!r} stands in line {first} already")
        rows[query][document] = row
    if not rows:
        raise InvalidInput(f"{path} holds no line")
    return {
        query: [(document, row[0]) for document, row in sorted(of.items(), key=lambda one: (-one[1][0], *one[1][1:]))]
        for query, of in rows.items()
    }


def run_lines(query: str, documents: Sequence[str], tag: str) -> str:
    """A query's lines, the best document first. Scores fall by 1 from their number to 1, so that every reader keeps the order."""
    count = len(documents)
    rows = enumerate(documents, start=1)
    return "".join(f"{query} Q0 {document} {place} {count + 1 - place} {tag}\n" for place, document in rows)


def check_ids(ids: Iterable[str]) -> None:
    """Raises `InvalidInput` for ids that a run file, whose columns stand between spaces, cannot hold."""
    for one in ids:
        if len(one.split()) != 1:
            raise InvalidInput(
                f"the id {one!r} is empty or holds a space, which a run file cannot: write .jsonl, or rename it"
            )


def write_run(path: Path, orders: Mapping[str, Iterable[str]], tag: str) -> None:
    """A run file, whole or as it was."""
    text = "".join(run_lines(query, list(documents), tag) for query, documents in orders.items())
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """A text file, without a byte order mark. Raises `InvalidInput` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not text in UTF-8") from None
