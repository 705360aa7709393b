"""`depth_plan.json`: what a tuned checkpoint says about the depths that it is good at."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from shoal.depth.skipdecode import SkipDecode
from shoal.errors import CheckpointError, InvalidInput, nearest

FILE_NAME = "depth_plan.json"


@dataclass(frozen=True, kw_only=True)
class TunedDepth:
    """Defaults that a tuned checkpoint gives to `SkipDecode`."""

    policy: str = "skipdecode"
    """Policy that the checkpoint was tuned with."""
    horizon: int
    """Clocks over which depth fell during tuning."""
    warmup_layers: int = 1
    """Bottom layers that always ran during tuning."""
    depths: tuple[float, ...] = (1.0,)
    """Depths that the checkpoint was tuned for, 1.0 being dense."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(float(d) for d in self.depths))
        rules = {
            "policy": (self.policy == "skipdecode", "'skipdecode'"),
            "horizon": (isinstance(self.horizon, int) and self.horizon >= 1, "1 or more clocks"),
            "warmup_layers": (isinstance(self.warmup_layers, int) and self.warmup_layers >= 0, "0 or more layers"),
            "depths": (all(0 < depth <= 1 for depth in self.depths), "shares of the layers, above 0 and at most 1"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def fill(self, policy: SkipDecode) -> SkipDecode:
        """`policy` with its open fields (horizon, warm-up layers) taken from the checkpoint.

        The checkpoint's horizon counts generated tokens, so it says nothing of the column clock.
        """
        horizon = self.horizon if policy.clock == "generated" else None
        return replace(
            policy,
            horizon=policy.horizon or horizon,
            warmup_layers=self.warmup_layers if policy.warmup_layers is None else policy.warmup_layers,
        )

    def save(self, directory: Path) -> None:
        """Write `depth_plan.json` into `directory`."""
        (directory / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> TunedDepth | None:
        """Read `depth_plan.json`; None where there is none. Raises `CheckpointError` where it is malformed."""
        path = directory / FILE_NAME
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            unknown = sorted(set(data) - known)
            if unknown:
                raise ValueError(f"unknown field {unknown[0]!r}, {nearest(unknown[0], known)}")
            return cls(**data)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def fit_horizon(lengths: Iterable[int]) -> int:
    """A horizon for completions of these lengths in tokens: their median (the paper's choice, see `SkipDecode`).

    >>> fit_horizon([20, 48, 90])
    48
    """
    lengths = list(lengths)
    if not lengths or min(lengths) < 1:
        raise InvalidInput("fitting a horizon needs at least one length, each 1 token or more")
    return round(statistics.median(lengths))
