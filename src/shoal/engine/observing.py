"""Reading prompts as passes compute them: what the engine asks of those who do (`signals/`), and the book of one pass.

begin(prompt tokens) -> Reading        one per request
watch(readings, counts) -> Watch       one per pass and observer: it sees every level's states, then keeps what it made of them
Reading.findings                       there once the whole prompt has been read, before its first token is committed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from shoal.engine.batch import Rows
from shoal.errors import RequestFailed
from shoal.models.passes import WatchedStates


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a probe says of a prompt."""

    label: str
    """The class that it decides for."""
    probabilities: Mapping[str, float]
    """Of every class, calibrated; they add up to 1."""
    out_of_distribution: float
    """Share of the probe's training prompts that lie nearer to the classes it knows: above 0.99 the label is a guess."""
    probe: str
    """Version of the probe."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was read out of one prompt."""

    labels: Mapping[str, Label]
    """By the name of the probe."""
    blocked_by: str | None = None
    """Name of the probe that stops the request here, before its first token."""


class Reading(Protocol):
    """What has been read of one request's prompt; what is in it knows its observer alone."""

    @property
    def observer(self) -> Observer:
        """Who reads."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        ...

    @property
    def flops(self) -> int:
        """Floating-point operations that reading has taken."""
        ...

    @property
    def findings(self) -> Findings | RequestFailed | None:
        """None until the whole prompt has been read."""
        ...


class SharedReading(Reading, Protocol):
    """A reading whose observer `shares`."""

    def prefix(self) -> Any:
        """What has been read so far, for other prompts that begin with the same tokens."""
        ...

    def go_on(self, prefix: Any) -> None:
        """Nothing has been read yet: go on after the tokens of that prefix."""
        ...


class Watch(Protocol):
    """An observer at work in one pass."""

    def see(self, level: int, states: Tensor) -> None:
        """As in `WatchedStates`; levels come in turn, the rows' tokens row after row."""
        ...

    def keep(self) -> None:
        """The pass counts: add what was seen to the readings. Without it the pass may be run again."""
        ...


class Observer(Protocol):
    """Reads the states of prompts. One object serves all requests that ask for the same: a pass shows it each level once."""

    @property
    def shares(self) -> str | None:
        """Under which version a reading may go on from what another has read of the same tokens; None for not at all: then prompts
        are read whole."""
        ...

    def begin(self, prompt_tokens: int) -> Reading:
        """A reading for a prompt of so many tokens. Raises `InvalidInput` where it reads none of that length."""
        ...

    def watch(self, readings: Sequence[Any], counts: Sequence[int]) -> Watch:
        """Read the next `counts[r]` prompt tokens of each of these readings of its own."""
        ...


class Observation:
    """The prompts of one pass that are read, and by whom."""

    def __init__(self, rows: Rows, readings: Mapping[int, Reading]) -> None:
        """`readings`: by row."""
        first_tokens = np.cumsum(rows.num_tokens) - rows.num_tokens
        by_observer: dict[int, list[int]] = {}
        for row, reading in readings.items():
            by_observer.setdefault(id(reading.observer), []).append(row)
        self.watches: list[Watch] = []
        states = []
        for shared in by_observer.values():
            counts = rows.num_tokens[shared].tolist()
            tokens = [
                np.arange(first, first + count) for first, count in zip(first_tokens[shared], counts, strict=True)
            ]
            watch = readings[shared[0]].observer.watch([readings[row] for row in shared], counts)
            self.watches.append(watch)
            states.append(WatchedStates(np.concatenate(tokens), watch.see))
        self.states = tuple(states)

    def keep(self) -> None:
        """The pass counts."""
        for watch in self.watches:
            watch.keep()


def observe(rows: Rows, readings: Iterable[Reading | None]) -> Observation | None:
    """What to observe in a pass over rows with these `readings` [R]; None where nobody reads a prompt."""
    reading = {row: one for row, one in enumerate(readings) if one is not None and rows.starts[row] < one.prompt_tokens}
    return Observation(rows, reading) if reading else None
