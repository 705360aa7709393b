"""Servers of others with OpenAI's API, each in its own environment: started on the benchmark's checkpoint, asked over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 600
"""Compilation included."""


@dataclass(frozen=True, kw_only=True)
class PeerServer:
    """A server that answers."""

    name: str
    version: str
    note: str
    """How it really computes."""
    port: int
    model: str
    """What requests call the model."""


@contextmanager
def vllm_server(checkpoint: Path, dtype: str, *, slots: int, threads: int) -> Iterator[PeerServer]:
    """vLLM's, CPU build, if `SHOAL_PEER_VLLM` names its Python. Raises `RuntimeError` where it does not start."""
    python = os.environ["SHOAL_PEER_VLLM"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--dtype", dtype]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    command += ["--max-num-seqs", str(slots), "--no-enable-prefix-caching", "--disable-log-stats"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CACHE_ROOT": str(checkpoint.parent / "converted" / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    asked = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    version = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.NamedTemporaryFile() as said:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=said, stderr=said, start_new_session=True)
        try:
            wait_until_ready(process, port, Path(said.name))
            yield PeerServer(
                name="vllm",
                version=version,
                note=f"weights, cache and products in {dtype}, compiled, {slots} sequences at most, no prefix caching",
                port=port,
                model="served",
            )
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


SERVERS = {"vllm": vllm_server}
"""By name."""


def wait_until_ready(process: subprocess.Popen[bytes], port: int, said: Path) -> None:
    """Until `/health` answers. Raises `RuntimeError` with the server's last line where it ends or takes too long."""
    ends_at = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < ends_at and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
    raise RuntimeError(f"no server: {lines[-1] if lines else 'it said nothing'}")
