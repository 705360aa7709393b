"""The E2E NLG task: a flat meaning representation (MR) of a restaurant in, an English description out (Novikova et al. 2017)."""

from __future__ import annotations

import csv
import gzip
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import InvalidInput
from shoal.evaluate.bootstrap import Score, ratio


@dataclass(frozen=True)
class E2EInput:
    """One meaning representation with all its human descriptions."""

    mr: str
    """Such as `name[The Vaults], eatType[pub], priceRange[more than £30]`; it is the prompt as it stands."""
    references: tuple[str, ...]
    """Descriptions, in file order, their white space collapsed."""


def read_e2e(path: Path) -> list[E2EInput]:
    """Read a part of the E2E data (`.csv` or `.csv.gz`, columns `mr` or `MR`, and `ref`), grouped by MR in order of appearance."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InvalidInput(f"{path} cannot be read as E2E data: {error}") from error
    groups: dict[str, list[str]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        fields = {name.lower(): value for name, value in row.items() if name}
        if not fields.get("mr") or not fields.get("ref"):
            raise InvalidInput(f"{path} is not E2E data: expected the columns 'mr' and 'ref', found {', '.join(row)}")
        groups.setdefault(" ".join(fields["mr"].split()), []).append(" ".join(fields["ref"].split()))
    return [E2EInput(mr, tuple(references)) for mr, references in groups.items()]


CLOSED_SLOTS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "eattype": (
        (("pub",), r"\bpubs?\b"),
        (("coffee shop",), r"coffee|\bcafes?\b"),
        (("restaurant",), r"restaurant|eatery|diner\b|bistro"),
    ),
    "food": (
        (("english",), r"english|british"),
        (("japanese",), r"japanese|sushi"),
        (("french",), r"french"),
        (("fast food",), r"fast[- ]?food|burgers?\b"),
        (("italian",), r"italian|pasta|pizza"),
        (("indian",), r"indian|curry"),
        (("chinese",), r"chinese"),
    ),
    "pricerange": (
        (
            ("cheap", "less than 20"),
            r"cheap|inexpensive|affordable|low(er)?[- ](cost|pric)|pric\w* (range )?(is |are |of )?low|"
            r"(less|under|below|lower|cheaper)( than)? 20",
        ),
        (
            ("moderate", "20-25"),
            r"moderate|mid[- ]?(range|pric)|medium|reasonabl|average[- ](pric|cost)|pric\w* (range )?(is |are )?average|"
            r"20 ?(-|to|and|through) ?25",
        ),
        (
            ("high", "more than 30"),
            r"expensive|pric(e)?y\b|high(er|ly)?[- ](end|pric|cost)|pric\w* (range )?(is |are |of )?(in the )?high|"
            r"(more|over|above|greater|higher|upwards?)( than| of)? 30|30 (and|or) (up|more|above|over)|start\w* (at|from) 30",
        ),
    ),
    "customer rating": (
        (
            ("low", "1 out of 5"),
            r"low(er)?[- ](customer |consumer )?(rat|review|scor)|rat\w* (it )?(is |are |of |as )?(a )?(low|poor|1\b|one\b)|"
            r"poor|\b(1|one)[- ](out of|/|of|stars?)|\b1/5|low customer",
        ),
        (
            ("average", "3 out of 5"),
            r"average[- ](customer |consumer )?(rat|review|scor)|rat\w* (it )?(is |are |of |as )?(an? )?(average|3\b|three\b)|"
            r"\b(3|three)[- ](out of|/|of|stars?)|\b3/5|average customer|averagely|mediocre|decent",
        ),
        (
            ("high", "5 out of 5"),
            r"high(er|ly)?[- ](customer |consumer )?(rat|review|scor|recommend)|"
            r"rat\w* (it )?(is |are |of |as )?(a )?(high|excellent|5\b|five\b)|"
            r"\b(5|five)[- ](out of|/|of|stars?)|\b5/5|high customer|excellent",
        ),
    ),
    "area": (
        (("riverside",), r"river|\bthames\b|waterfront|by the water"),
        (("city centre",), r"\bcity\b|cent(re|er)|central|downtown|\btown\b"),
    ),
    "familyfriendly": (
        (
            ("no",),
            r"(\bno[nt]?\b|n't|never|without|unsuitable)[^.]{0,30}(famil|kid|child)|"
            r"(famil|kid|child)[^.]{0,12}(\bnot\b|n't|unfriendly)|adults?\b|unfriendly",
        ),
        (("yes",), r"famil|\bkids?\b|child"),
    ),
}
"""Values of the slots with few values, each with a pattern of its wordings. Values in one tuple are said in each other's words
by the data's authors ("cheap" for less than £20), so they count as one. The first pattern that matches wins for
`familyFriendly`, whose "no" contains the words of "yes"."""


@dataclass(frozen=True)
class SlotErrors:
    """Slots of one MR that a text gets wrong."""

    num_slots: int
    """Slots of the MR."""
    missing: tuple[str, ...]
    """In the MR, but neither its value nor another one is in the text."""
    wrong: tuple[str, ...]
    """In the MR, but the text has another value instead."""
    added: tuple[str, ...]
    """Not in the MR, but the text has a value. A restaurant called a restaurant is not an addition."""

    @property
    def count(self) -> int:
        """All errors."""
        return len(self.missing) + len(self.wrong) + len(self.added)


def fold(text: str) -> str:
    """Lowercase without accents and pound signs: `Café Rouge, £20` becomes `cafe rouge, 20`."""
    plain = unicodedata.normalize("NFKD", text.lower())
    return re.sub(r"[£$]|pounds? ", "", "".join(c for c in plain if not unicodedata.combining(c)))


def parse_mr(mr: str) -> dict[str, str]:
    """Slots of an MR, folded: `name[The Vaults], eatType[pub]` gives `{"name": "the vaults", "eattype": "pub"}`."""
    slots = {name.strip(): value.strip() for name, value in re.findall(r"([^,\[\]]+)\[([^\]]*)\]", fold(mr))}
    if not slots:
        raise InvalidInput(
            f"not a meaning representation: {mr!r}; expected slots such as name[The Vaults], eatType[pub]"
        )
    return slots


def slot_errors(mr: str, text: str) -> SlotErrors:
    """Compare a text with its MR by rules: names literally (accents and case aside), other slots by `CLOSED_SLOTS`.

    Names are taken out before the other slots are looked for, so that `Raja Indian Cuisine` is not Indian food. The rules are
    simple: human references have errors by them too (see the model card), so only differences between systems mean much.
    """
    slots, rest = parse_mr(mr), fold(text)
    missing: list[str] = []
    wrong: list[str] = []
    added: list[str] = []
    for name in ("name", "near"):
        if name in slots:
            rest, found_times = re.subn(rf"(?<!\w){re.escape(slots[name])}(?!\w)", "_", rest)
            if not found_times:
                missing.append(name)
    for slot, options in CLOSED_SLOTS.items():
        found = [values for values, pattern in options if re.search(pattern, rest)]
        if slot == "familyfriendly":
            found = found[:1]
        if slot not in slots:
            if [values for values in found if values != ("restaurant",)]:
                added.append(slot)
        elif not any(slots[slot] in values for values in found):
            (wrong if found else missing).append(slot)
    return SlotErrors(len(slots), tuple(missing), tuple(wrong), tuple(added))


def slot_error_rate(mrs: Sequence[str], texts: Sequence[str]) -> Score:
    """Missing, wrong and added slots over the slots of the MRs, in percent, with a bootstrap interval over inputs."""
    errors = [slot_errors(mr, text) for mr, text in zip(mrs, texts, strict=True)]
    return ratio([100 * e.count for e in errors], [e.num_slots for e in errors])
