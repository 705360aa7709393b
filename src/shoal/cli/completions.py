"""Writing completions: JSON lines in the order of the prompts, whole lines only, so that a file can be continued.

A prompt has one line, or n lines with n > 1, which are written together. Results finish out of order; a line waits
until those before it are in the file. Example, two prompts finish as 1, 0: nothing is written after the first, both
lines after the second.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from shoal.cli.prompts import PromptLine
from shoal.errors import InvalidInput

OWN_FIELDS = {
    "index", "sample", "completion", "token_ids", "logprobs", "trace", "finish_reason", "past_horizon", "error", "usage",
    "labels", "settings",
}  # fmt: skip


def echoed(line: PromptLine) -> dict[str, Any]:
    """The input's fields as they appear in the output: a field with the name of one of ours gets the prefix `input_`.

    >>> echoed(PromptLine(1, "a", {"prompt": "a", "completion": "b", "id": 7}))
    {'prompt': 'a', 'input_completion': 'b', 'id': 7}
    """
    return {f"input_{name}" if name in OWN_FIELDS else name: value for name, value in line.fields.items()}


class CompletionsFile:
    """The output of `shoal generate`: `-` (standard output), a new file, or one to continue.

    Between calls the file holds whole lines of whole prompts, those of `prompts[:num_written]`, on the disk.
    """

    num_written: int
    """Prompts whose lines are in the file."""

    def __init__(
        self,
        path: str,
        prompts: Sequence[PromptLine],
        *,
        samples: int = 1,
        settings: dict[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        """Open `path` for the completions of `prompts`, `samples` of each, made with `settings` (as they come out of JSON).

        Raises `InvalidInput` if the file holds anything and `resume` is False, or if its lines are not those of `prompts` or
        were made with other settings.
        """
        self._settings = settings or {}
        self._prompts = prompts
        self._samples = samples
        self._waiting: dict[int, dict[int, dict[str, Any]]] = {}
        self._on_disk = False
        self.num_written = 0
        if path == "-":
            if resume:
                raise InvalidInput("--resume needs a file to continue: give one with -o")
            self._file = sys.stdout.buffer
            return
        if not resume and Path(path).is_file() and Path(path).stat().st_size:
            raise InvalidInput(f"{path} exists: continue it with --resume, or choose another name")
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 closed by __exit__
        except OSError as error:
            raise InvalidInput(f"{path} cannot be written: {error.strerror}") from None
        self._on_disk = Path(path).is_file()  # and not a device such as /dev/null
        try:
            self._continue(path)
        except InvalidInput:
            self._file.close()
            raise

    def _continue(self, path: str) -> None:
        """Count the prompts that the file holds whole and cut off what follows: a torn line of ours, or part of n samples."""
        end = offset = 0
        self._file.seek(0)
        for number, line in enumerate(self._file):
            index, sample = divmod(number, self._samples)
            begin = f'{{"index": {index},'.encode()
            ours = index < len(self._prompts) and begin.startswith(line[: len(begin)])
            torn = not line.endswith(b"\n")
            try:
                record = json.loads(line) if ours and not torn else {}
            except (ValueError, RecursionError):
                ours = False
            if not ours or (not torn and record.get("sample", 0) != sample):
                raise InvalidInput(
                    f"{path}, line {number + 1}: expected the completion of prompt {index}"
                    f"{f', sample {sample}' if self._samples > 1 else ''} of {len(self._prompts)}; "
                    "was this file written for the same prompts and options?"
                )
            if torn:
                break
            if any(record.get(name) != value for name, value in echoed(self._prompts[index]).items()):
                raise InvalidInput(
                    f"{path}, line {number + 1} answers another prompt than line {self._prompts[index].line} of the "
                    "prompts file: resume with the prompts that the file was started with"
                )
            before = record.get("settings") or {}
            changed = [name for name in {**before, **self._settings} if before.get(name) != self._settings.get(name)]
            if changed:
                was, now = (json.dumps(of.get(changed[0], "the default")) for of in (before, self._settings))
                raise InvalidInput(
                    f"{path}, line {number + 1} was made with another {changed[0]}: {was} there, {now} now; "
                    "resume with the settings that the file was started with"
                )
            offset += len(line)
            if sample == self._samples - 1:
                end = offset
                self.num_written = index + 1
        if self._on_disk:
            self._file.truncate(end)

    def add(self, index: int, sample: int, record: dict[str, Any]) -> None:
        """Take one completion of prompt `index`; write it, and those that waited, once all before it are there."""
        self._waiting.setdefault(index, {})[sample] = record
        while len(self._waiting.get(self.num_written, ())) == self._samples:
            records = self._waiting.pop(self.num_written)
            start: dict[str, Any] = {"index": self.num_written}
            fields = echoed(self._prompts[self.num_written])
            made = {"settings": self._settings}
            lines = [
                {**start, **({"sample": n} if self._samples > 1 else {}), **fields, **records[n], **made}
                for n in sorted(records)
            ]
            # One write of whole lines: what an interrupt or a kill leaves behind is at worst one torn line at the end.
            self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            self._file.flush()
            self.num_written += 1
            if self._on_disk:
                os.fsync(self._file.fileno())

    def __enter__(self) -> CompletionsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not sys.stdout.buffer:
            self._file.close()
