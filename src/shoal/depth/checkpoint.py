"""`depth_plan.json`: what a tuned checkpoint says about the depths that it is good at."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from shoal.depth.policies import POLICIES
from shoal.errors import CheckpointError, InvalidInput, nearest

FILE_NAME = "depth_plan.json"
OPEN_FIELDS = ("horizon", "warmup_layers")
"""Fields that a policy leaves open with None."""
AnyPolicy = TypeVar("AnyPolicy")


@dataclass(frozen=True, kw_only=True)
class TunedDepth:
    """What a checkpoint was tuned for; its horizon and warm-up layers are defaults of the policies in `POLICIES`."""

    policy: str = "skipdecode"
    """Policy that the checkpoint was tuned with, a name in `shoal.depth.policies.POLICIES`."""
    horizon: int
    """Clocks over which depth fell during tuning."""
    warmup_layers: int = 1
    """Bottom layers that always ran during tuning; 1 with policies that have no such setting."""
    depths: tuple[float, ...] = (1.0,)
    """Depths that the checkpoint was tuned for, 1.0 being dense."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(float(d) for d in self.depths))
        rules = {
            "policy": (self.policy in POLICIES, f"one of {', '.join(POLICIES)}"),
            "horizon": (isinstance(self.horizon, int) and self.horizon >= 1, "1 or more clocks"),
            "warmup_layers": (isinstance(self.warmup_layers, int) and self.warmup_layers >= 0, "0 or more layers"),
            "depths": (all(0 < depth <= 1 for depth in self.depths), "shares of the layers, above 0 and at most 1"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def fill(self, policy: AnyPolicy) -> AnyPolicy:
        """`policy` with its open fields (horizon, warm-up layers) taken from the checkpoint, where it is one of `POLICIES`.

        What is not comes back as it is: in a plan, or in a policy of the user's own, a field of that name may mean anything.
        The checkpoint's horizon counts generated tokens, so it says nothing of the column clock.
        """
        if not isinstance(policy, tuple(POLICIES.values())):
            return policy
        known: Any = policy
        filled = {name: getattr(self, name) for name in OPEN_FIELDS if getattr(known, name, "absent") is None}
        if getattr(known, "clock", "generated") == "column":
            filled.pop("horizon", None)
        made: AnyPolicy = replace(known, **filled)
        return made

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
