"""The arms of a frontier: which there are, and the file that keeps what one did.

An arm's file holds what it wrote and what each input adds to each metric, so that intervals and comparisons are made from files
alone. Times are kept apart: they mean something only where the arms of a model have taken turns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import Dense, DepthPlan
from shoal.depth.policies import policy_at
from shoal.engine.intake import resolve_plan
from shoal.errors import InvalidInput, InvalidPlan
from shoal.evaluate.frontier_result import Refused
from shoal.files import write_json


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """An arm that can run."""

    name: str
    """As in `frontier_result.Arm`."""
    model: str
    """Name of the model."""
    policy: str
    """`dense` or a policy's name."""
    depth: float
    """Nominal."""
    plan: DepthPlan
    """The same for every request."""

    @property
    def file_name(self) -> str:
        """Of its JSON: its name, with `-` for what is not a letter, a digit or a full stop."""
        return re.sub(r"[^\w.]+", "-", self.name) + ".json"


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """What one arm did: the content of its file."""

    settings: dict[str, Any]
    """What decided it; a rerun with others is refused."""
    outputs: list[str]
    """One per input; empty in language modelling, and where a request failed."""
    new_tokens: list[int]
    """Tokens emitted per request that ran."""
    num_failed: int
    """Requests that ended with an error."""
    ledger: dict[str, int]
    """`Ledger`, the sum over the requests."""
    stats: dict[str, float]
    """`EngineStats` of the run."""
    counts: dict[str, list[list[float]]]
    """By metric: [N, K], see `bootstrap.Statistics`."""
    loss_sums: list[float]
    """By position: sum of the losses in nats of the completions that reach it."""
    loss_counts: list[int]
    """By position: how many do."""
    seconds: float
    """Wall clock of making it."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: Path) -> ArmRecord:
        """Inverse of `asdict`. Raises `InvalidInput` with `path` where fields are missing or unknown."""
        try:
            return cls(**data)
        except TypeError as error:
            raise InvalidInput(
                f"{path} is not a whole arm of a frontier ({error}): remove it to make it anew"
            ) from error


def plan_arms(
    model: str,
    num_layers: int,
    tuned: TunedDepth | None,
    *,
    policies: Sequence[str],
    depths: Sequence[float],
    horizon: int,
    max_new_tokens: int,
    prefix: str = "",
) -> tuple[list[PlannedArm], list[Refused]]:
    """The dense arm, then each policy from deep to shallow; and those that model or task do not allow, with the reason.

    Args: `model` is its name, `prefix` stands before the names of its arms.
    """
    arms = [PlannedArm(name=f"{prefix}dense", model=model, policy="dense", depth=1.0, plan=Dense().plan(num_layers))]
    refused = []
    for policy in policies:
        for depth in sorted(set(depths) - {1.0}, reverse=True):
            name = f"{prefix}{policy} {depth:.3g}"
            try:
                made = policy_at(policy, depth, horizon=horizon)
                plan = resolve_plan(made, 1, max_new_tokens, num_layers, tuned)
                check_acts(plan, max_new_tokens)
            except InvalidPlan as error:
                refused.append(Refused(name=name, reason=str(error)))
            else:
                arms.append(PlannedArm(name=name, model=model, policy=policy, depth=depth, plan=plan))
    return arms, refused


def check_acts(plan: DepthPlan, max_new_tokens: int) -> None:
    """Raises `InvalidPlan` where the plan cannot change any request of at most `max_new_tokens`."""
    if not all(plan.runs_prompt) or any(cutoff < max_new_tokens - 1 for cutoff in plan.cutoffs):
        return
    if max_new_tokens == 1:
        raise InvalidPlan(
            "outputs are one token, which the prompt's pass predicts with every layer: no plan can act; allow more new tokens"
        )
    raise InvalidPlan(
        f"the plan runs every layer in all {max_new_tokens - 1} decode passes of {max_new_tokens} new tokens: it changes nothing"
    )


def weights_digest(directory: Path) -> str:
    """A digest of a checkpoint: names, sizes and samples of its files, so that one tuned anew is told from what it was."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*")):
        if path.suffix not in (".json", ".safetensors", ".model", ".txt") or path.name == "card.json":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for part in range(64):
                file.seek(part * size // 64)
                digest.update(file.read(16384))
    return digest.hexdigest()[:16]


def read_record(path: Path, settings: Mapping[str, Any]) -> Any:
    """The JSON at `path`, None where there is none. Raises `InvalidInput` where it was made with other settings."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        before = data["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is not an arm of a frontier ({error!r}): choose another --out") from error
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            digests = name in ("weights", "inputs", "plan")
            detail = f"other {name}" if digests else f"{name} {before.get(name)}, and it is {settings.get(name)} now"
            raise InvalidInput(
                f"{path} was made with {detail}: choose another --out, or remove the file to make it anew"
            )
    return data


def save_record(path: Path, record: ArmRecord) -> None:
    """Write an arm's file, whole or not at all."""
    write_json(path, asdict(record), indent=None)
