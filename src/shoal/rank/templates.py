"""Prompts of questions, as data with a version."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from shoal.errors import InvalidInput, nearest

Kind = Literal["pair", "set", "list"]
SLOTS = {"text": ("{query}", "{passages}"), "passage": ("{label}", "{text}"), "answer": ("{label}",)}
"""What each part has to hold, once."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a question is asked and how its answer is read. Raises `InvalidInput` where a slot is missing."""

    name: str
    """In its file."""
    version: str
    """Changes whenever the prompt does."""
    kind: Kind
    """Of two passages the better one, of several the best one, or their order."""
    labels: tuple[str, ...]
    """Of passages, in the order shown."""
    passage: str
    """One passage."""
    answer: str
    """What the model says for a label, the space before it included."""
    text: str
    """The whole."""

    def __post_init__(self) -> None:
        if self.kind not in ("pair", "set", "list"):
            raise InvalidInput(f"template {self.name!r}: kind must be pair, set or list, got {self.kind!r}")
        for part, slots in SLOTS.items():
            for slot in slots:
                if getattr(self, part).count(slot) != 1:
                    raise InvalidInput(f"template {self.name!r}: {part} must hold {slot} once")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2 or not all(self.labels):
            raise InvalidInput(f"template {self.name!r}: labels must be two or more different texts, got {self.labels}")

    @property
    def key(self) -> str:
        """Name and version, for the cache."""
        return f"{self.name} {self.version}"

    def prompt(self, query: str, passages: Sequence[str]) -> str:
        """The prompt of one presentation. What stands in braces in a query or passage stays what it is."""
        if len(passages) > len(self.labels):
            raise InvalidInput(f"template {self.name!r} has {len(self.labels)} labels for {len(passages)} passages")
        shown = "\n\n".join(
            filled(self.passage, {"{label}": label, "{text}": passage})
            for label, passage in zip(self.labels, passages, strict=False)
        )
        return filled(self.text, {"{query}": query, "{passages}": shown})

    def answers(self, count: int) -> tuple[str, ...]:
        """What the model may say, per passage."""
        return tuple(self.answer.replace("{label}", label) for label in self.labels[:count])

    def parse(self, text: str, count: int) -> tuple[float, ...] | None:
        """Preferences from an answer in text: 1 for the label named, falling along a list; None where it names none, or not one.

        A list may leave labels out: they share the last place. One that names a label twice is not read.
        """
        labels = self.labels[:count]
        alternatives = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
        if self.kind == "list":
            named = re.findall(rf"\[({alternatives})\]", text)
            if not named or len(set(named)) != len(named):
                return None
            place = {label: at for at, label in enumerate(named)}
            return tuple(float(count - place.get(label, count)) for label in labels)
        match = re.match(rf"\W*(?:passage\W*)?({alternatives})(?!\w)", text, flags=re.IGNORECASE)
        if match is None:
            return None
        chosen = match[1].upper()
        return tuple(float(label.upper() == chosen) for label in labels)


def filled(text: str, slots: dict[str, str]) -> str:
    """Put texts into slots, all at once, so that what is put in is not searched for slots.

    >>> filled("{query}: {passages}", {"{query}": "{passages}", "{passages}": "p"})
    '{passages}: p'
    """
    return re.sub("|".join(map(re.escape, slots)), lambda match: slots[match[0]], text)


def load_template(name: str) -> Template:
    """A template by its name, or the only one in a TOML file by its path. Raises `InvalidInput`."""
    own = name.endswith(".toml")
    if own and not Path(name).is_file():
        raise InvalidInput(f"there is no template file {name}")
    text = Path(name).read_text() if own else files("shoal.rank").joinpath("templates.toml").read_text()
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{name} is not valid TOML: {error}") from None
    if own and len(found) != 1:
        raise InvalidInput(f"{name} must hold one template as a table, got {', '.join(found) or 'none'}")
    key = next(iter(found)) if own else name
    if key not in found:
        raise InvalidInput(f"there is no template {name!r}, {nearest(name, found)}; or give a .toml file")
    return template_of(key, found[key])


def template_of(name: str, given: Any) -> Template:
    """From a TOML table."""
    wanted = {field.name for field in fields(Template)} - {"name"}
    if not isinstance(given, dict) or set(given) != wanted:
        raise InvalidInput(f"template {name!r} must be a table with {', '.join(sorted(wanted))}")
    return Template(**{**given, "name": name, "labels": tuple(given["labels"])})
