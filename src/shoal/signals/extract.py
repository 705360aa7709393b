"""Prompts' states, extracted once by the engine into files that training maps into memory.

    DIRECTORY/states.json      what the files hold, and how many prompts are done
    DIRECTORY/pooled           float32 [prompts, 2, levels, d]: mean and largest of each value over a prompt's tokens
    DIRECTORY/tokens           [tokens, levels, d] in the engine's dtype, where gates or attention are trained
    DIRECTORY/logits           float16 [prompts, V] after each prompt, where a baseline reads them

Interrupted, the same call goes on after the last group of prompts that was whole; where a file is missing or cut, anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.engine.engine import Engine
from shoal.engine.intake import encode
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput, RequestFailed
from shoal.files import write_json
from shoal.models.passes import Ints

RECORD, FILES = "states.json", ("pooled", "tokens", "logits")
"""Names in a directory of states."""
GROUP = 64
"""Prompts between two notes of how far extraction has come."""
Report = Callable[[str, int, int], None]
"""(what is being done, how many of it are done, of how many)."""


@dataclass(frozen=True, eq=False)
class States:
    """Extracted states of prompts, in their order."""

    pooled: Tensor
    """float32 [prompts, 2, levels, d]."""
    tokens: Tensor | None
    """[tokens, levels, d], prompt after prompt."""
    logits: Tensor | None
    """float16 [prompts, V]."""
    lengths: Ints
    """[prompts], tokens that were read of each."""
    num_truncated: int
    """Prompts that were longer than what was read."""

    @cached_property
    def ends(self) -> Ints:
        """[prompts], where each prompt's tokens end."""
        return np.cumsum(self.lengths)

    def padded(self, places: Ints) -> tuple[Tensor, Tensor]:
        """States float32 [levels, B, T, d] of some prompts, padded to the longest, and which of them are tokens, bool [B, T]."""
        assert self.tokens is not None
        lengths, ends = self.lengths[places].tolist(), self.ends[places].tolist()
        _, levels, d = self.tokens.shape
        x = torch.empty(levels, len(places), max(lengths), d)
        for row, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            x[:, row, :length] = self.tokens[end - length : end].transpose(0, 1)
            x[:, row, length:] = 0
        return x, torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def extract(
    engine: Engine,
    texts: Sequence[str],
    directory: Path,
    *,
    max_tokens: int,
    tokens: bool,
    logits: bool = False,
    budget_gib: float = 4.0,
    replace: bool = False,
    report: Report = lambda what, done, total: None,
) -> States:
    """The states of prompts, from `directory` as far as they are there.

    Args: `max_tokens`: prompts are cut to their first ones; `tokens`, `logits`: whether to keep those; `budget_gib`: most that the
    files may take; `replace`: whether states of something else in `directory` give way. Raises `InvalidInput` where the files would
    take more or the directory holds something else, `RequestFailed` where the model fails on a prompt.
    """
    encoded = [encode(text, engine.tokenizer) for text in texts]
    prompts = [list(ids[:max_tokens]) for ids in encoded]
    lengths = np.array([len(ids) for ids in prompts])
    levels, d, vocab = engine.shape.num_layers + 1, engine.shape.hidden_size, engine.shape.vocab_size
    dtype = engine.runner.decoder.dtype
    sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"pooled": (torch.float32, (len(prompts), 2, levels, d))}
    if tokens:
        sizes["tokens"] = (dtype, (int(lengths.sum()), levels, d))
    if logits:
        sizes["logits"] = (torch.float16, (len(prompts), vocab))
    num_bytes = {name: of.itemsize * math.prod(shape) for name, (of, shape) in sizes.items()}
    check_budget(num_bytes, budget_gib, max_tokens=max_tokens, mean_tokens=float(lengths.mean()))
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    made_of = {"model": engine.config.fingerprint, "dtype": str(dtype), "prompts": digest, "files": sorted(sizes)}
    num_done = progress_of(directory, made_of, num_bytes, replace=replace)
    files = {name: mapped(directory / name, *size) for name, size in sizes.items()}
    num_truncated = sum(len(ids) > max_tokens for ids in encoded)
    states = States(files["pooled"], files.get("tokens"), files.get("logits"), lengths, num_truncated)
    for begin in range(num_done, len(prompts), GROUP):
        report("reading prompts", begin, len(prompts))
        group = range(begin, min(begin + GROUP, len(prompts)))
        samplings = [Sampling(max_new_tokens=1, processor=keep_logits(states, place)) for place in group]
        done = engine.generate([prompts[place] for place in group], samplings, probes=Recorder(states, begin))
        for place, one in zip(group, done, strict=True):
            if one.error is not None:
                raise RequestFailed(f"prompt {place + 1} of {len(prompts)}: {one.error}")
        write_json(directory / RECORD, {**made_of, "num_done": group.stop})
    report("reading prompts", len(prompts), len(prompts))
    return states


def check_budget(num_bytes: Mapping[str, int], budget_gib: float, *, max_tokens: int, mean_tokens: float) -> None:
    """Raises `InvalidInput` where files of these sizes would take more."""
    gib = {name: size / 2**30 for name, size in num_bytes.items()}
    if not sum(gib.values()) <= budget_gib:
        parts = ", ".join(f"{name} {size:.2f}" for name, size in gib.items())
        raise InvalidInput(
            f"the prompts' states would take {sum(gib.values()):.2f} GiB ({parts}; {mean_tokens:.0f} tokens per prompt), and the "
            f"cache may take {budget_gib:g}: raise it, cut prompts below {max_tokens} tokens, give fewer of them, or train a "
            "probe that pools, which needs no states of single tokens"
        )


def progress_of(directory: Path, made_of: dict[str, Any], num_bytes: Mapping[str, int], *, replace: bool) -> int:
    """How many prompts are done in a directory, which is made where it is missing; 0 where a file is not as long as it must be.

    Raises `InvalidInput` where the directory holds a user's files, or states of something else that may not be replaced.
    """
    record = directory / RECORD
    try:
        directory.mkdir(parents=True, exist_ok=True)
        strange = not record.exists() and any(directory.iterdir())
    except OSError as error:
        raise InvalidInput(f"{directory} cannot hold states: {error.strerror}") from error
    if strange:
        raise InvalidInput(
            f"{directory} holds files that are no states of prompts: name another directory with --states"
        )
    before = read_record(record)
    other = [name for name, value in made_of.items() if before and before.get(name) != value]
    if other and not replace:
        raise InvalidInput(
            f"{directory} holds states that were made with another choice of {', '.join(other)}: remove it, or name another"
        )
    whole = all(
        (directory / name).is_file() and (directory / name).stat().st_size == size for name, size in num_bytes.items()
    )
    if before and whole and not other:
        return int(before["num_done"])
    write_json(record, {**made_of, "num_done": 0})
    return 0


def read_record(path: Path) -> dict[str, Any]:
    """What a directory's states are and how far they go; empty where that is not known."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) and isinstance(data.get("num_done"), int) else {}


def remove_states(directory: Path) -> None:
    """Remove what `extract` wrote, and the directory where nothing else is in it."""
    for name in (*FILES, RECORD):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's files are in it
        directory.rmdir()


def mapped(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor that lives in a file; new values are 0."""
    size = math.prod(shape)
    with open(path, "ab") as file:
        file.truncate(size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def keep_logits(states: States, place: int) -> Callable[[list[int], Tensor], Tensor] | None:
    """A logits processor that keeps what the model says after a prompt."""
    if states.logits is None:
        return None
    kept = states.logits[place]

    def keep(token_ids: list[int], logits: Tensor) -> Tensor:
        kept.copy_(logits)
        return logits

    return keep


class Recorder:
    """An `Observer` that keeps the states of prompts, which begin in the order in which they stand in `States`."""

    shares = None

    def __init__(self, states: States, first: int) -> None:
        self.states, self.next = states, first

    def begin(self, prompt_tokens: int) -> Recording:
        """As in `Observer`."""
        self.next += 1
        return Recording(self, self.next - 1, prompt_tokens)

    def watch(self, readings: Sequence[Recording], counts: Sequence[int]) -> RecordingWatch:
        """As in `Observer`."""
        return RecordingWatch(self.states, readings, counts)


class Recording:
    """How far a prompt has been recorded."""

    flops = 0
    findings = None

    def __init__(self, observer: Recorder, place: int, prompt_tokens: int) -> None:
        self.observer, self.place, self.prompt_tokens = observer, place, prompt_tokens
        self.num_read = 0
        levels, d = observer.states.pooled.shape[2:]
        self.sums, self.maxima = torch.zeros(levels, d), torch.full((levels, d), -torch.inf)


class RecordingWatch:
    """A `Recorder` at work in one pass."""

    def __init__(self, states: States, readings: Sequence[Recording], counts: Sequence[int]) -> None:
        self.states, self.readings, self.counts = states, readings, list(counts)
        levels, d = states.pooled.shape[2:]
        self.sums, self.maxima = torch.zeros(2, len(counts), levels, d)

    @torch.inference_mode()
    def see(self, level: int, states: Tensor) -> None:
        """As in `WatchedStates`."""
        ends = self.states.ends
        for row, (reading, part) in enumerate(zip(self.readings, torch.split(states, self.counts), strict=True)):
            part = part.cpu()
            self.sums[row, level], self.maxima[row, level] = part.float().sum(dim=0), part.amax(dim=0)
            if self.states.tokens is not None:
                begin = int(ends[reading.place]) - reading.prompt_tokens + reading.num_read
                self.states.tokens[begin : begin + len(part), level] = part

    def keep(self) -> None:
        """As in `Watch`."""
        for row, (reading, count) in enumerate(zip(self.readings, self.counts, strict=True)):
            reading.num_read += count
            reading.sums += self.sums[row]
            reading.maxima = torch.maximum(reading.maxima, self.maxima[row])
            if reading.num_read == reading.prompt_tokens:
                self.states.pooled[reading.place, 0] = reading.sums / reading.prompt_tokens
                self.states.pooled[reading.place, 1] = reading.maxima
