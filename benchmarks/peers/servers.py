"""Other engines' HTTP servers with OpenAI's completions, each a process from an environment of its own."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from .client import PEERS, START_TIMEOUT_S, Absent

SERVERS = ("vllm",)
CACHE_GIB = 2


class PeerServer:
    """A server that is stopped while it is nobody's turn: engines that wait for work may spin."""

    def __init__(self, name: str, version: str, process: subprocess.Popen[bytes], port: int) -> None:
        """Use `started`."""
        self.name, self.version, self.port = name, version, port
        self._process = process
        os.killpg(process.pid, signal.SIGSTOP)

    def __enter__(self) -> PeerServer:
        """It is its turn."""
        os.killpg(self._process.pid, signal.SIGCONT)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Its turn is over."""
        os.killpg(self._process.pid, signal.SIGSTOP)


def command(name: str, python: Path, checkpoint: Path, dtype: str, *, model: str, port: int, slots: int) -> list[str]:
    """How a server is started."""
    assert name == "vllm"
    return [
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(checkpoint), "--served-model-name", model, "--dtype", dtype,
        "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(slots), "--max-model-len", "512",
        "--no-enable-prefix-caching", "--disable-uvicorn-access-log",
    ]  # fmt: skip


@contextmanager
def started(
    name: str, checkpoint: Path, dtype: str, *, model: str, slots: int, threads: int, cache: Path
) -> Iterator[PeerServer | Absent]:
    """The server while it is needed, its model loaded and compiled; `Absent` where it cannot run."""
    variable = PEERS[name]
    python = shutil.which(os.environ.get(variable or "", ""))
    if python is None:
        yield Absent(name, f"{variable} does not name the Python of its environment")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    library = Path(python).parents[1] / "lib" / "libiomp5.so"  # its manual asks for it
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        **({"LD_PRELOAD": str(library)} if library.exists() else {}),
    }
    line = command(name, Path(os.path.abspath(python)), checkpoint, dtype, model=model, port=port, slots=slots)
    with tempfile.NamedTemporaryFile() as said:
        process = subprocess.Popen(line, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            if (version := wait_until_ready(process, port)) is not None:
                yield PeerServer(name, version, process, port)
            else:
                last = [text for text in Path(said.name).read_text(errors="replace").split("\n") if text.strip()]
                yield Absent(name, f"it did not start: {last[-1] if last else 'it said nothing'}")
        finally:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> str | None:
    """Its version once it answers; None where it ended or took too long."""
    ends_at = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < ends_at:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/version")
            if (answer := connection.getresponse()).status == 200:
                return str(json.load(answer)["version"])
        except (OSError, http.client.HTTPException):
            time.sleep(0.5)
        finally:
            connection.close()
    return None
