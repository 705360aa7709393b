"""Reading prompts: JSONL, CSV or plain text, from a file or from standard input."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shoal.errors import InvalidInput, InvalidPrompt, nearest
from shoal.jsonl import parse_jsonl

Format = Literal["jsonl", "csv", "text"]
SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".txt": "text"}
TOKEN_FIELD = "prompt_token_ids"


@dataclass(frozen=True)
class PromptLine:
    """One prompt and where it came from."""

    line: int
    """Line of the file, counted from 1, for error messages."""
    prompt: str | list[int]
    """Text, or token ids where the line has `prompt_token_ids`."""
    fields: dict[str, Any]
    """All fields of the line, the prompt's own included: they are repeated in the output."""


def read_prompts(path: str, *, format: Format | None = None, column: str | None = None) -> list[PromptLine]:
    """Read all prompts of a file; `-` is standard input.

    Args:
        path: the file, or `-`.
        format: None takes it from the suffix (`-` is text).
        column: field or column that holds the prompt. None: `prompt`, or the only column of a CSV file.

    Raises `InvalidInput` where the file or, with its number, a line cannot be read, `InvalidPrompt` where a line has no prompt.
    """
    name = "standard input" if path == "-" else path
    text = _read_text(path, name)
    if format is None:
        format = "text" if path == "-" else _format_of(path)
    lines = {"jsonl": _jsonl, "csv": _csv, "text": _text}[format](text, name, column)
    prompts = list(lines)
    if not prompts:
        raise InvalidInput(f"{name} holds no prompts")
    return prompts


def _read_text(path: str, name: str) -> str:
    if path != "-" and Path(path).is_dir():
        raise InvalidInput(f"{path} is a directory; give a file of prompts, or - for standard input")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except FileNotFoundError:
        raise InvalidInput(f"no such prompts file: {path}") from None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(
            f"{name}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file first, e.g. with iconv"
        ) from None


def _format_of(path: str) -> Format:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInput(
            f"the format of {path} is not clear from its suffix {suffix!r} (known: {', '.join(SUFFIXES)}); "
            "say --format jsonl, csv or text"
        )
    return SUFFIXES[suffix]


def _jsonl(text: str, name: str, column: str | None) -> Iterator[PromptLine]:
    column = column or "prompt"
    for number, fields in parse_jsonl(text, name):
        where = f"{name}, line {number}"
        if TOKEN_FIELD in fields:
            yield PromptLine(number, _token_ids(fields[TOKEN_FIELD], where), fields)
        elif column in fields:
            yield PromptLine(number, _prompt_text(fields[column], where), fields)
        else:
            raise InvalidPrompt(f"{where}: no field {column!r}, {nearest(column, fields)}")


def _csv(text: str, name: str, column: str | None) -> Iterator[PromptLine]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if column is None:
            column = columns[0] if len(columns) == 1 else "prompt"
        if columns and column not in columns:
            raise InvalidInput(
                f"{name} has no column {column!r}, {nearest(column, columns)}; choose with --prompt-column"
            )
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise InvalidPrompt(f"{where}: this row does not have the {len(columns)} fields of the header")
            yield PromptLine(reader.line_num, _prompt_text(row[column], where), dict(row))
    except csv.Error as error:
        raise InvalidPrompt(f"{name}, line {reader.line_num}: not valid CSV: {error}") from None


def _text(text: str, name: str, column: str | None) -> Iterator[PromptLine]:
    if column is not None:
        raise InvalidInput("--prompt-column is for JSONL and CSV; in a text file the whole line is the prompt")
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        prompt = _prompt_text(line.removesuffix("\r"), f"{name}, line {number}")
        yield PromptLine(number, prompt, {"prompt": prompt})


def _prompt_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidPrompt(f"{where}: the prompt must be text, got {type(value).__name__}")
    if not value:
        raise InvalidPrompt(f"{where}: empty prompt")
    return value


def _token_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise InvalidPrompt(f"{where}: {TOKEN_FIELD} must be a list of whole numbers")
    if not value:
        raise InvalidPrompt(f"{where}: empty prompt ({TOKEN_FIELD} is [])")
    return value
