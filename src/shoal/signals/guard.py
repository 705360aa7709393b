"""`Guard`: a probe that may end a request before its first token; and from what a user names to who reads the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.engine.engine import Engine
from shoal.errors import InvalidInput, nearest
from shoal.signals.probe import Probe
from shoal.signals.reading import ProbeSet


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Ends requests with `finish_reason="blocked"` where a probe finds something; no token is emitted."""

    probe: Probe | str | Path
    """A probe or its file."""
    stop_on: tuple[str, ...]
    """Classes that end a request."""
    threshold: float | None = None
    """Probability of these classes together from which on it ends; None: where one of them is the label."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_on", (self.stop_on,) if isinstance(self.stop_on, str) else tuple(self.stop_on))
        if self.threshold is not None and not (isinstance(self.threshold, int | float) and 0 <= self.threshold <= 1):
            raise InvalidInput(f"threshold of a guard must be 0 to 1, got {self.threshold!r}")
        if not isinstance(self.probe, Probe):
            object.__setattr__(self, "probe", Probe.load(Path(self.probe)))
        assert isinstance(self.probe, Probe)
        classes = self.probe.settings.classes
        for name in self.stop_on:
            if name not in classes:
                raise InvalidInput(
                    f"probe {self.probe.settings.name!r} has no class {name!r}: {nearest(name, classes)}"
                )
        if not self.stop_on:
            raise InvalidInput(f"stop_on of a guard names one class or more of {', '.join(classes)}")


def make_observer(engine: Engine, probes: Sequence[Any]) -> ProbeSet:
    """Who reads prompts for these probes, files and guards. Raises `InvalidInput` or `CheckpointError`."""
    named: dict[str, tuple[Probe, Guard | None]] = {}
    for one in probes:
        guard = one if isinstance(one, Guard) else None
        probe = guard.probe if guard else one
        if isinstance(probe, str | Path):
            probe = Probe.load(Path(probe))
        if not isinstance(probe, Probe):
            raise InvalidInput(f"probes are Probe objects, their files, or Guards, got {probe!r}")
        probe.check(engine.config)
        name = probe.settings.name
        if name in named:
            raise InvalidInput(f"two probes are named {name!r}: labels are told apart by name, so give one another")
        named[name] = probe.to(engine.runner.decoder.device), guard
    guards = {name: (guard.stop_on, guard.threshold) for name, (_, guard) in named.items() if guard}
    return ProbeSet([probe for probe, _ in named.values()], guards)
