"""Files that hold either what they held or all that is new, whenever a process ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.errors import InvalidInput


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end, or goes where an error is raised."""
    partial = path.with_name(f".{path.name}.part")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write an object as JSON. Raises `ValueError` for NaN."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Raises `InvalidInput` where `path` is a directory or lies in none: known before hours of work, not after."""
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidInput(f"{path} cannot be written: give a file in a directory that exists")
