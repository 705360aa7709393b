"""Labelled prompts: reading them, and splitting them so that the same text is never on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import InvalidInput
from shoal.jsonl import parse_jsonl
from shoal.models.passes import Ints


@dataclass(frozen=True)
class Labelled:
    """A prompt and its class."""

    text: str
    label: str
    where: str = "a prompt"
    """File and line, for messages."""


def read_labelled(path: Path) -> list[Labelled]:
    """Lines of JSON with `prompt` (or `text`) and `label`, a string or a whole number; spaces around labels do not count.

    Raises `InvalidInput` naming file and line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error
    found = []
    for number, fields in parse_jsonl(content, str(path)):
        text = fields.get("prompt", fields.get("text"))
        label, where = fields.get("label"), f"{path}, line {number}"
        if not isinstance(text, str) or not text.strip():
            raise InvalidInput(f"{where}: needs a 'prompt' (or 'text') that is not empty")
        if not isinstance(label, str | int) or not str(label).strip():
            raise InvalidInput(f"{where}: needs a 'label', a string or a whole number, got {label!r}")
        found.append(Labelled(text, str(label).lower() if isinstance(label, bool) else str(label).strip(), where))
    if not found:
        raise InvalidInput(f"{path} holds no labelled prompt")
    return found


def classes_of(labelled: Sequence[Labelled], positive: str | None = None) -> tuple[str, ...]:
    """The classes, in order. Of two, `positive` is the second; where nobody says which, the rarer one, as a guard's would be.

    Raises `InvalidInput` for fewer than two classes, or a `positive` that is none of two.
    """
    counts = Counter(one.label for one in labelled)
    if len(counts) < 2:
        raise InvalidInput(f"labels must name two classes or more, got only {', '.join(counts)}")
    if len(counts) == 2:
        if positive is None:
            positive = min(counts, key=lambda name: (counts[name], name))
        if positive not in counts:
            raise InvalidInput(f"positive must be one of {', '.join(sorted(counts))}, got {positive!r}")
        return tuple(sorted(counts, key=lambda name: name == positive))
    if positive is not None:
        raise InvalidInput(f"positive is for two classes, and there are {len(counts)}")
    return tuple(sorted(counts))


def split(labelled: Sequence[Any], *, share: float, seed: int) -> tuple[Ints, Ints]:
    """Places of training and of validation examples: of each text its digest with the seed decides, so that order and company do
    not matter, and equal texts stay together."""
    digests = (hashlib.sha256(f"{seed}:{one.text}".encode()).digest() for one in labelled)
    chosen = np.array([int.from_bytes(digest[:8], "big") < share * 2**64 for digest in digests], dtype=bool)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def check_split(labels: Ints, train: Ints, validation: Ints, classes: Sequence[str]) -> None:
    """Raises `InvalidInput` where a class has no prompt to train on, or there is nothing to validate with; of two classes both.

    Args: `labels` [prompts]: places in `classes`; `train`, `validation`: places of prompts, as `split` has them.
    """
    untrained = set(range(len(classes))) - set(labels[train].tolist())
    unseen = set(range(len(classes))) - set(labels[validation].tolist())
    if len(classes) > 2 and len(validation):
        unseen = set()
    for part, missing in (("train on", untrained), ("validate with", unseen)):
        if missing:
            raise InvalidInput(
                f"class {classes[min(missing)]!r} has no prompt to {part}: give more of them (a digest of each text decides "
                "which it is for, so repeated texts count once)"
            )
