"""Files that hold either what they held or all that is new, whenever a process ends."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.errors import InvalidInput, ShoalError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end, or goes where an error is raised.

    Raises `ShoalError` where the system cannot write it.
    """
    partial = beside(path)
    try:
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ShoalError(f"{path} could not be written: {error.strerror or error}") from error


def beside(path: Path) -> Path:
    """Where what is to become `path` is written."""
    return path.with_name(f".{path.name}.part")


def write_json(path: Path, data: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write an object as JSON. Raises `ValueError` for NaN."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Raises `InvalidInput` where `path` is a directory, or no file can be made beside it: known before hours of work."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        beside(path).touch()
        beside(path).unlink()
    except (OSError, ValueError) as error:  # of values: a path without a name, or with a null character
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"{path} cannot be written ({why}): give a file in a directory that exists") from error
