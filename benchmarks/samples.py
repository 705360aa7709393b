"""One batch through our engine or a peer's, timed alike: until every row has its first token, and until every row has its last."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peers.client import PEERS, Absent, Peer
from report import paired, rounded, spread
from shoal import DepthPlan, Engine, Sampling
from shoal.engine.entropy import TopK


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one variant."""

    prompt_s: float
    """Seconds until every row has its first token."""
    total_s: float
    """Seconds until every row has its last."""
    tokens: list[list[int]] = field(default_factory=list)
    """New tokens per row, of our engine only."""
    variant: str | None = None
    """Which of its ways to run a batch a peer took, if it has several."""

    @property
    def decode_s(self) -> float:
        """Seconds between the two."""
        return self.total_s - self.prompt_s


def run_shoal(
    engine: Engine, prompts: Sequence[list[int]], plan: DepthPlan, new_tokens: int, *, entropy_top_k: TopK | None = None
) -> Sample:
    """One batch through our engine: greedy, nothing ends a row early; with the entropy trace where one is asked for."""
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True, entropy_top_k=entropy_top_k)
    tokens: list[list[int]] = [[] for _ in prompts]
    prompt_s = 0.0
    began = time.perf_counter()
    waiting = {
        request_id
        for row, prompt in enumerate(prompts)
        for request_id in engine.add(prompt, sampling, plan, index=row, streaming=False)
    }
    while engine.has_work:
        chunks = engine.step()
        if waiting:
            waiting.difference_update(chunk.request_id for chunk in chunks)
            prompt_s = time.perf_counter() - began
        for chunk in chunks:
            if chunk.generation is not None:
                tokens[chunk.index] = list(chunk.generation.token_ids)
    return Sample(prompt_s=prompt_s, total_s=time.perf_counter() - began, tokens=tokens)


def run_peer(peer: Peer, batch: int, prompt_tokens: int, new_tokens: int) -> Sample | Absent:
    """One batch through a peer; `Absent` once it has failed."""
    timing = peer.decode(batch, prompt_tokens, new_tokens)
    if isinstance(timing, Absent):
        return timing
    return Sample(prompt_s=timing.prefill_seconds, total_s=timing.seconds, variant=timing.variant)


def peer_variants(
    peers: Iterable[Peer], *, batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Callable[[], Sample | Absent]]:
    """A run of each, by name."""
    return {peer.name: partial(run_peer, peer, batch, prompt_tokens, new_tokens) for peer in peers}


def without_failed(
    samples: Mapping[str, Sequence[Sample | Absent]],
) -> tuple[dict[str, list[Sample]], list[Absent]]:
    """The samples of those that never failed, and each that did."""
    failed = {one.name: one for timed in samples.values() for one in timed if isinstance(one, Absent)}
    whole = {
        name: [one for one in timed if isinstance(one, Sample)] for name, timed in samples.items() if name not in failed
    }
    return whole, list(failed.values())


def peer_row(
    peer: Peer, timed: Sequence[Sample], ours: Mapping[str, Sequence[Sample]], parts: Sequence[str]
) -> dict[str, Any]:
    """A peer's seconds, and per variant of ours how many times faster it was, round by round.

    Args: `parts`: the seconds that count, of `"prompt"`, `"decode"` and `"total"`.
    """

    def of(samples: Sequence[Sample], part: str) -> list[float]:
        return [getattr(sample, f"{part}_s") for sample in samples]

    return {
        "peer": peer.name,
        "version": peer.version,
        "note": peer.note,
        "variant": timed[-1].variant,
        **{f"{part}_s": spread(of(timed, part)) for part in parts},
        "over": {
            label: {part: paired(of(timed, part), of(samples, part)) for part in parts}
            for label, samples in ours.items()
        },
    }


def absences(absent: Iterable[Absent]) -> list[dict[str, str]]:
    """Who is missing and why, for the results."""
    return [{"peer": one.name, "reason": one.reason} for one in absent]


def tokens_per_s(count: int, seconds: Mapping[str, float]) -> float:
    """`count` tokens in the median of `seconds`."""
    return rounded(count / seconds["median"])


def add_peer_options(options: argparse.ArgumentParser) -> None:
    """The options of benchmarks that have peers."""
    options.add_argument("--peers", nargs="+", choices=[*PEERS, "all", "none"], default=["all"], help="beside whom")
    options.add_argument(
        "--keep", type=Path, help="keep checkpoints, and what peers convert them to, in this directory"
    )


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """Where checkpoints go: `keep`, or a directory that is removed afterwards."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@contextmanager
def started(
    chosen: Sequence[str], checkpoint: Path, dtype: str, *, threads: int
) -> Iterator[tuple[list[Peer], list[Absent]]]:
    """The chosen peers, ready and waiting, and those that cannot run; ended with the context."""
    names = [name for name in PEERS if name in chosen or "all" in chosen]
    with ExitStack() as stack:
        peers, absent = [], []
        for name in names:
            peer = Peer.start(name, checkpoint, dtype, checkpoint.parent / "converted", threads=threads)
            if isinstance(peer, Absent):
                absent.append(peer)
            else:
                stack.callback(peer.close)
                peers.append(peer)
        yield peers, absent
