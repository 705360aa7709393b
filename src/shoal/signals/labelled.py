"""Labelled prompts: reading them, and splitting them so that the same text is never on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import InvalidInput
from shoal.jsonl import parse_jsonl


@dataclass(frozen=True)
class Labelled:
    """A prompt and its class."""

    text: str
    label: str


def read_labelled(path: Path) -> list[Labelled]:
    """Lines of JSON with `prompt` (or `text`) and `label`, a string or a number. Raises `InvalidInput` naming file and line."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error
    found = []
    for number, fields in parse_jsonl(content, str(path)):
        text = fields.get("prompt", fields.get("text"))
        label = fields.get("label")
        if not isinstance(text, str) or not text.strip():
            raise InvalidInput(f"{path}, line {number}: needs a 'prompt' (or 'text') that is not empty")
        if not isinstance(label, str | int) or label == "":
            raise InvalidInput(f"{path}, line {number}: needs a 'label', a string or a whole number, got {label!r}")
        found.append(Labelled(text, str(label).lower() if isinstance(label, bool) else str(label)))
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


def split(labelled: Sequence[Any], *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of training and of validation examples: of each text its digest with the seed decides, so that order and company do
    not matter, and equal texts stay together."""
    validation = []
    for place, one in enumerate(labelled):
        digest = hashlib.sha256(f"{seed}:{one.text}".encode()).digest()
        if int.from_bytes(digest[:8], "big") < share * 2**64:
            validation.append(place)
    chosen = set(validation)
    return [place for place in range(len(labelled)) if place not in chosen], validation
