"""What every worker shares: one process per engine, JSON lines on standard input and output. Standard library only.

A worker is started as `python -m peers.<name> CHECKPOINT DTYPE CACHE THREADS` in `benchmarks/`. Its first line says whether it is
ready; then each line it reads is a request and each line it writes the answer:

    {"batch": 8, "prompt_tokens": 64, "new_tokens": 64, "seed": 0}
        →  {"seconds", "prefill_seconds", "decode_tokens_per_s", "variant"}
    {"memory": true}
        →  {"rss_bytes", "peak_rss_bytes", "imported_rss_bytes"}

Prompts are random token ids of one length, decoding is greedy, and every row gets exactly `new_tokens`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TextIO

CALIBRATION_TOKENS = 12


class Unsupported(Exception):
    """The engine cannot run this checkpoint in this dtype; the message says why."""


class Engine(Protocol):
    """A loaded model."""

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """Run one batch; returns the seconds until every row has its first token, and until every row has its last."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a worker has after loading."""

    engine: Engine
    version: str
    """The version of the engine."""
    note: str
    """How it really computes, and the settings that matter."""


class Fastest:
    """An engine with several ways to run a batch, which keeps the fastest per batch size and kind of request.

    Ways that are the fastest of nothing are let go, so memory after the first batch is that of the way that ran it. Memory
    before it is that of the first way, and peaks count the others too.
    """

    def __init__(self, candidates: Mapping[str, Callable[[], Engine]]) -> None:
        """`candidates` loads each way, by name."""
        self._candidates = candidates
        self.variant = next(iter(candidates))
        """The way that the last batch ran."""
        self._engines = {self.variant: candidates[self.variant]()}
        self._chosen: dict[tuple[int, bool], str] = {}

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """As `Engine.time`; a batch size that was not seen before is tried out first."""
        case = len(prompts), new_tokens == 1
        if case not in self._chosen:
            self._chosen[case] = self._try_out(prompts, new_tokens)
        self.variant = self._chosen[case]
        return self._engines[self.variant].time(prompts, new_tokens)

    def _try_out(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> str:
        """Run every way; returns the fastest, and lets go of those that are not needed."""
        if len(self._candidates) == 1:
            return self.variant
        for name in self._candidates.keys() - self._engines.keys():
            self._engines[name] = self._candidates[name]()
        costs = {name: _cost(engine, prompts, new_tokens) for name, engine in self._engines.items()}
        fastest = min(costs, key=costs.__getitem__)
        needed = {fastest, *self._chosen.values()}
        self._engines = {name: engine for name, engine in self._engines.items() if name in needed}
        return fastest


def _cost(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Least seconds of two short runs after one that is not timed: of decoding, or of the prompt if nothing is decoded."""
    runs = [engine.time(prompts, min(new_tokens, CALIBRATION_TOKENS)) for _ in range(3)][1:]
    return min(whole - first if new_tokens > 1 else whole for first, whole in runs)


def serve(
    import_library: Callable[[], None],
    load: Callable[[Path, str, Path, int], Loaded],
    convert: Callable[[Path, str, Path], None] = lambda checkpoint, dtype, cache: None,
) -> None:
    """Run a worker until its standard input ends.

    `convert(checkpoint, dtype, cache)` writes the engine's own format under `cache`, in a child process so that its memory is not
    counted; `import_library` imports; `load(checkpoint, dtype, cache, threads)` loads. All may raise `Unsupported`.
    """
    checkpoint, dtype, cache, threads = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    replies = _claim_stdout()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        _in_child(convert, checkpoint, dtype, cache)
        import_library()
        imported = _memory("VmRSS")
        loaded = load(checkpoint, dtype, cache, threads)
    except Unsupported as reason:
        _reply(replies, {"ready": False, "reason": str(reason)})
        return
    _reply(replies, {"ready": True, "version": loaded.version, "note": loaded.note})
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("memory"):
            answer = {"rss_bytes": _memory("VmRSS"), "peak_rss_bytes": _memory("VmHWM"), "imported_rss_bytes": imported}
        else:
            answer = _timed(loaded.engine, vocab_size, **request)
        _reply(replies, answer)


def _timed(
    engine: Engine, vocab_size: int, *, batch: int, prompt_tokens: int, new_tokens: int, seed: int
) -> dict[str, Any]:
    """Time one batch and say so as the protocol does."""
    # Another seed, other prompts: an engine that keeps prompts it has seen gains nothing.
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]
    first, whole = engine.time(prompts, new_tokens)
    return {
        "seconds": whole,
        "prefill_seconds": first,
        "decode_tokens_per_s": batch * (new_tokens - 1) / (whole - first) if new_tokens > 1 else None,
        "variant": getattr(engine, "variant", None),
    }


def check_lengths(lengths: Sequence[int], new_tokens: int) -> None:
    """Raise `RuntimeError` if a row did not get exactly `new_tokens`: its time would be another request's."""
    if any(length != new_tokens for length in lengths):
        raise RuntimeError(f"rows of {sorted(set(lengths))} new tokens where {new_tokens} were asked for")


def converted(path: Path, write: Callable[[Path], object]) -> Path:
    """`path`, written once by `write`; what an interrupted run left is never taken for whole."""
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        if partial.is_dir():
            shutil.rmtree(partial)
        write(partial)
        partial.rename(path)
    return path


def _in_child(convert: Callable[[Path, str, Path], None], checkpoint: Path, dtype: str, cache: Path) -> None:
    """Run `convert` in a child process and hand on what it raises."""
    context = get_context("fork")
    reasons = context.SimpleQueue()

    def run() -> None:
        try:
            convert(checkpoint, dtype, cache)
        except Exception as error:
            if not isinstance(error, Unsupported):
                traceback.print_exc()
            reasons.put((isinstance(error, Unsupported), f"{error}"))

    child = context.Process(target=run)
    child.start()
    child.join()
    if not reasons.empty():
        unsupported, reason = reasons.get()
        raise Unsupported(reason) if unsupported else RuntimeError(f"the conversion failed: {reason}")
    if child.exitcode != 0:
        raise RuntimeError(f"the conversion ended with exit code {child.exitcode}")


def _claim_stdout() -> TextIO:
    """Keep standard output for replies: what libraries print there goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=replies, flush=True)


def _memory(field: str) -> int:
    """Bytes of `VmRSS` (resident now) or `VmHWM` (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
