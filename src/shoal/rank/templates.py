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
from shoal.rank.trec import read_text

Kind = Literal["pair", "set", "list"]
SLOTS = {"text": ("{query}", "{passages}"), "passage": ("{label}", "{text}"), "answer": ("{label}",)}
"""What each part has to hold, once, and no other slot."""


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
            if sorted(re.findall(r"\{\w+\}", getattr(self, part))) != sorted(slots):
                raise InvalidInput(
                    f"template {self.name!r}: {part} must hold {' and '.join(slots)} once, and no other slot"
                )
        if self.kind == "list" and not all(self._around()):
            raise InvalidInput(
                f"template {self.name!r}: a list's answer needs something on both sides of a label, such as [{{label}}]"
            )
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

    def parted(self, count: int) -> tuple[str, tuple[str, ...]]:
        """What all answers begin with, and a label for each: what follows the label is the same for all, and tells nothing.

        Example: of answers " Passage A" and " Passage B", " Passage" and (" A", " B").
        """
        before, _ = self.answer.split("{label}")
        lead = before.rstrip()
        return lead, tuple(before[len(lead) :] + label for label in self.labels[:count])

    def _around(self) -> tuple[str, str]:
        """What stands before and behind a label in an answer."""
        before, after = self.answer.split("{label}")
        return before.strip(), after.strip()

    def parse(self, text: str, count: int) -> tuple[float, ...] | None:
        """Preferences from an answer in text: 1 for the label named, falling along a list; None where it cannot be read.

        A label is an answer, with or without the words that stand before it in the prompt; a text that goes on, or names another
        label as well, is not: "A better one is B" would be taken for A. A list may leave labels out, which share the last place;
        one that names a label twice, or what is no label, is not read.
        """
        labels = self.labels[:count]
        if self.kind == "list":
            before, after = map(re.escape, self._around())
            named = re.findall(f"{before}(.*?){after}", text)
            if not named or len(set(named)) != len(named) or not set(named) <= set(labels):
                return None
            place = {label: at for at, label in enumerate(named)}
            return tuple(float(count - place.get(label, count)) for label in labels)
        any_label = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
        words = "|".join(re.escape(part.split("{label}")[0].strip()) for part in (self.answer, self.passage))
        match = re.match(rf"\W*(?:(?:{words})\W+)?({any_label})(?=\W*$|[.,;:!*)\]\"'\n])", text, flags=re.IGNORECASE)
        if match is None or re.search(rf"\b({any_label})\b", text[match.end() :]):
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
    text = read_text(Path(name)) if own else files("shoal.rank").joinpath("templates.toml").read_text(encoding="utf-8")
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
    labels = given["labels"]
    texts = [*labels, *(given[part] for part in wanted - {"labels"})] if isinstance(labels, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidInput(f"template {name!r}: labels must be a list of texts, everything else a text")
    return Template(**{**given, "name": name, "labels": tuple(given["labels"])})
