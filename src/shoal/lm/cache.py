"""Answers on the disk, by what was asked: a table in SQLite, and locks that keep two processes from paying for one question.

A key is a digest of the model, the template's version, the prompt and every parameter, so a change of any of them asks anew. Each
answer is committed as it comes (write-ahead log): a process that is killed leaves whole answers or none.

Whoever is about to ask *claims* its keys first: a lock on one byte per key of the file beside the table, at a place that the key
gives. A process that wants a claimed key waits, and then finds the answer. The kernel drops the locks of a process that dies. Keys
are claimed in one order everywhere, so nobody waits in a circle. The locks are those of open files (`F_OFD_SETLKW`, Linux), which
hold between threads, too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.errors import InvalidInput

VERSION = 1
"""Of the table; a file of another version is refused."""
BUSY_S = 120.0
"""Seconds to wait while another process writes."""
SET_AND_WAIT = getattr(fcntl, "F_OFD_SETLKW", 38)
READ_AT_ONCE = 500
"""Keys per query: SQLite limits how many one takes."""


class AnswerCache:
    """A file of answers that any number of threads and processes share."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or make the file; its directory has to exist. Raises `InvalidInput` where it is no cache."""
        self.path = Path(path)
        self._lock = threading.Lock()
        self._open: tuple[int, sqlite3.Connection] | None = None
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise InvalidInput(f"{self.path} cannot be a cache: give a file in a directory that exists")
        try:
            with self._lock:
                self._connection()
        except sqlite3.Error as error:
            raise InvalidInput(f"{self.path} is no cache of answers ({error}): choose another file") from None

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The answers that are there."""
        found: dict[str, dict[str, Any]] = {}
        with self._named(), self._lock:
            for start in range(0, len(keys), READ_AT_ONCE):
                some = keys[start : start + READ_AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = self._connection().execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", list(some))
                found.update((key, json.loads(answer)) for key, answer in rows)
        return found

    def write(self, key: str, answer: Mapping[str, Any]) -> None:
        """Commit an answer; one that is there already stays."""
        text = json.dumps(answer, ensure_ascii=False)  # NaN comes back as NaN, for whoever asked to judge
        with self._named(), self._lock:
            self._connection().execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, text))

    def __len__(self) -> int:
        with self._lock:
            (count,) = self._connection().execute("SELECT count(*) FROM answers").fetchone()
        return int(count)

    @contextmanager
    def claimed(self, keys: Sequence[str]) -> Iterator[None]:
        """Within the context nobody else asks for these keys; waits for those who do now."""
        with self._named():
            file = open(self.path.with_name(self.path.name + ".claims"), "ab")  # noqa: SIM115
        with file:
            for place in sorted({int(key[:14], 16) for key in keys}):
                # struct flock: type, whence, start, length, process
                fcntl.fcntl(file, SET_AND_WAIT, struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
            yield

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._open is not None:
                self._open[1].close()
                self._open = None

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the file by its name."""
        try:
            yield
        except (OSError, sqlite3.Error, json.JSONDecodeError) as error:
            raise InvalidInput(
                f"{self.path} cannot be used as a cache of answers ({error}): choose another file"
            ) from None

    def _connection(self) -> sqlite3.Connection:
        """Of this process: a connection must not cross a fork."""
        if self._open is None or self._open[0] != os.getpid():
            connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                connection.close()
                raise InvalidInput(
                    f"{self.path} is a cache of version {version}, this is {VERSION}: choose another file"
                )
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
            )
            connection.execute("SELECT key, answer FROM answers LIMIT 0")  # somebody else's table has other columns
            connection.execute(f"PRAGMA user_version={VERSION}")
            self._open = os.getpid(), connection
        return self._open[1]


def key_of(**parts: Any) -> str:
    """64 hexadecimal digits of what was asked.

    >>> key_of(model="m", prompt="p") == key_of(prompt="p", model="m") != key_of(model="m", prompt="q")
    True
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
