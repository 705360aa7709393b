"""Starts a worker in its own environment and asks it for times. Standard library only."""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PEERS = {
    "openvino": "SHOAL_PEER_OPENVINO",
    "vllm": "SHOAL_PEER_VLLM",
    "llamacpp": "SHOAL_PEER_LLAMACPP",
    "ctranslate2": "SHOAL_PEER_CTRANSLATE2",
    "transformers": None,
}
"""The environment variable that names each peer's Python; transformers runs in ours."""

START_TIMEOUT_S = 600
"""Conversion and compilation included."""
ANSWER_TIMEOUT_S = 300
SETTLE_S = 0.3
"""Wait after an answer: thread pools of some engines spin for 0.2 s after their last work, which the next engine would feel."""


@dataclass(frozen=True)
class Absent:
    """A peer that was not measured."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One batch through a peer."""

    seconds: float
    """From the request to the last token of every row."""
    prefill_seconds: float
    """From the request until every row has its first token."""
    decode_tokens_per_s: float | None
    """batch * (new_tokens - 1) / (seconds - prefill_seconds); None where one token was asked for."""
    variant: str | None
    """Which of the engine's ways to run a batch this was, if it has several."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident memory of a worker, in bytes; `peak_rss_bytes` counts from its start, conversion excluded."""

    rss_bytes: int
    peak_rss_bytes: int
    imported_rss_bytes: int
    """After its library was imported, before the model was loaded."""


class Peer:
    """A worker that is ready. It does nothing between requests."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        """Use `Peer.start`."""
        self.name = name
        self.version = ""
        self.note = ""
        """How it really computes."""
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, stderr
        self._requests = 0
        atexit.register(self.close)

    @classmethod
    def start(cls, name: str, checkpoint: Path, dtype: str, cache_dir: Path, *, threads: int = 2) -> Peer | Absent:
        """Start the worker `name` on `checkpoint` (Hugging Face format) in `dtype` ("bfloat16", "float32", "int8").

        What it converts is kept under `cache_dir`. Returns `Absent` with the reason if it cannot run.
        """
        variable = PEERS[name]
        named = os.environ.get(variable) if variable else sys.executable
        if not named:
            return Absent(name, f"{variable} does not name the Python of its environment")
        python = shutil.which(named)
        if python is None:
            return Absent(name, f"{named} ({variable}) is not a program")
        arguments = [str(checkpoint.resolve()), dtype, str(cache_dir.resolve()), str(threads)]
        stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        process = subprocess.Popen(
            [os.path.abspath(python), "-m", f"peers.{name}", *arguments],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        peer = cls(name, process, stderr)
        ready = peer._answer(START_TIMEOUT_S)
        if isinstance(ready, Absent):
            return ready
        if not ready["ready"]:
            peer.close()
            return Absent(name, ready["reason"])
        peer.version, peer.note = ready["version"], ready["note"]
        return peer

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int) -> Timing | Absent:
        """Time one batch of random prompts, other ones at every call. A peer that fails or takes too long is ended."""
        self._requests += 1
        sizes = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        answer = self._ask({**sizes, "seed": self._requests})
        time.sleep(SETTLE_S)
        return answer if isinstance(answer, Absent) else Timing(**answer)

    def memory(self) -> Memory | Absent:
        """Memory of the worker. Ask after a batch: engines map their weights and read them when they are first needed."""
        answer = self._ask({"memory": True})
        return answer if isinstance(answer, Absent) else Memory(**answer)

    def close(self) -> None:
        """End the worker; a second time does nothing."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.wait()
        for stream in (self._stdin, self._stdout, self._stderr):
            with suppress(OSError):  # What was not yet sent to a worker that has ended.
                stream.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any] | Absent:
        if self._stderr.closed:
            return Absent(self.name, "closed")
        with suppress(OSError):  # It has ended; why, its answer says.
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        return self._answer(ANSWER_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> dict[str, Any] | Absent:
        """The next line that the worker writes; if none comes, why not, and the worker is ended."""
        if not select.select([self._stdout], [], [], timeout_s)[0]:
            reason = f"no answer within {timeout_s:g} s"
        elif line := self._stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        else:
            code = self._process.wait()
            said = Path(self._stderr.name).read_text(errors="replace").split("\n")
            last = next((text.strip() for text in reversed(said) if text.strip()), "it said nothing")
            reason = f"ended with exit code {code}: {last}"
        self.close()
        return Absent(self.name, reason)
