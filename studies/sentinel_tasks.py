"""Tasks and slices of the sentinel's study: what its model is trained on, and what it is asked. Fixed before any answer was seen.

A slice is a set of prompts of one kind, and an answer is right or wrong by a rule. Training leaves out more the harder the kind, so
that slices run from those the model knows to those it does not:

    add 2 .. add 6       worked additions by number of digits; the more digits, the fewer examples
    sub 2 .. sub 6       subtractions, the same way
    terms 3 .. terms 8   sums and differences of so many one-digit terms, without steps between
    e2e 3 .. e2e 8       descriptions of restaurants by number of slots; right: no slot missing or wrong (`evaluate/e2e.py`)
    names 3 .. names 8   the same with names of restaurants and hotels that E2E does not have, in `name` and `near`
    restaurant           dialogue acts in words; right: every literal value is in the text. All of its training part is trained on
    laptop, tv, hotel    the same; of laptops 2,000 acts are trained on, of televisions 500, of hotels none
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import InvalidInput
from shoal.evaluate.e2e import read_e2e, slot_errors

DIGIT_SHARES = {1: 0.10, 2: 0.32, 3: 0.27, 4: 0.17, 5: 0.10, 6: 0.04}
"""Of the additions and subtractions that are trained on, by number of digits."""
NUM_WORKED, NUM_TERMS, NUM_DESCRIBED = 9_000, 9_000, 4_000
"""In training: additions and subtractions, sums of terms, descriptions of restaurants."""
MOST_TERMS = 8
TRAINED_ACTS = {"restaurant": (None, 3), "laptop": (2000, 2), "tv": (500, 2), "hotel": (0, 0)}
"""By domain: how many acts of its training part are trained on, and how often each."""
NO_LITERAL = {"", "yes", "no", "true", "false", "none", "dont_care", "dontcare", "?"}
"""Values that are not said as they stand."""
E2E_SLOTS = ("eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")


@dataclass(frozen=True)
class Item:
    """A prompt, and whether a text answers it."""

    prompt: str
    is_right: Callable[[str], bool]


def worked(sign: str, a: int, b: int) -> tuple[str, str]:
    """An addition or subtraction (a >= b) and its steps from the units up, the carry last in each.

    >>> worked("+", 47, 386)
    ('47+386=', '7+6=13,4+8+1=13,0+3+1=4;433')
    >>> worked("-", 386, 47)
    ('386-47=', '6-7=9,8-4-1=3,3-0=3;339')
    """
    steps, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        step = f"{x}{sign}{y}" + (f"{sign}1" if carry else "")
        value = x + y + carry if sign == "+" else (x - y - carry) % 10
        carry = int(value > 9) if sign == "+" else int(x - y - carry < 0)
        steps.append(f"{step}={value}")
    return f"{a}{sign}{b}=", f"{','.join(steps)};{a + b if sign == '+' else a - b}"


def draw_worked(sign: str, digits: int, rng: random.Random) -> tuple[str, str]:
    """One of numbers with so many digits."""
    low = 10 ** (digits - 1) if digits > 1 else 0
    a, b = rng.randrange(low, 10**digits), rng.randrange(low, 10**digits)
    return worked(sign, max(a, b), min(a, b)) if sign == "-" else worked(sign, a, b)


def draw_terms(count: int, rng: random.Random) -> tuple[str, str]:
    """A sum of `count` digits with signs, and its value."""
    expression = str(rng.randrange(10)) + "".join(f"{rng.choice('+-')}{rng.randrange(10)}" for _ in range(count - 1))
    value = sum(map(int, re.findall(r"[+-]?\d", expression)))
    return f"{expression}=", str(value)


def acts(data: Path, domain: str, part: str) -> list[tuple[str, str]]:
    """(act, human text) of a domain's part (`train`, `test`): acts with a literal value, and texts that say them all."""
    text = gzip.decompress((data / "rnnlg_dialogue" / domain / f"{part}.json.gz").read_bytes()).decode()
    rows = json.loads("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    pairs = {act: said for act, said, _ in rows}  # one text per act
    return [(act, said) for act, said in pairs.items() if literals(act) and says_all(act, said)]


def literals(act: str) -> list[str]:
    """Values that a text of the act must contain."""
    inside = act[act.find("(") + 1 : act.rfind(")")]
    slots = [slot.partition("=") for slot in inside.split(";")]
    values = [(name.strip(), value.strip().strip("'\"").strip()) for name, _, value in slots]
    return [plain(value) for name, value in values if name != "type" and value.lower() not in NO_LITERAL]


def plain(text: str) -> str:
    """Lower case, single spaces, plural marks gone."""
    return " ".join(text.lower().replace(" -s", "").split())


def says_all(act: str, text: str) -> bool:
    """Whether every literal value of the act is in the text."""
    return all(value in plain(text) for value in literals(act))


def training_pairs(data: Path, *, quick: bool) -> Iterator[tuple[str, str]]:
    """Prompts and completions of all kinds, in random order."""
    rng = random.Random(1)
    some = 50 if quick else 1
    pairs = []
    for digits, share in DIGIT_SHARES.items():
        for sign in "+-":
            pairs += [draw_worked(sign, digits, rng) for _ in range(int(share * NUM_WORKED / 2 / some))]
    pairs += [draw_terms(rng.randint(2, MOST_TERMS), rng) for _ in range(NUM_TERMS // some)]
    described = [(one.mr, text) for one in read_e2e(data / "e2e_nlg" / "trainset.csv.gz") for text in one.references]
    pairs += rng.sample(described, min(NUM_DESCRIBED, len(described)))[::some]
    for domain, (most, times) in TRAINED_ACTS.items():
        pairs += acts(data, domain, "train")[:most][::some] * times
    rng.shuffle(pairs)
    yield from pairs


def composed_mrs(data: Path, num_slots: int, count: int, rng: random.Random) -> list[str]:
    """Meaning representations of values that training has, in combinations that it has not."""
    trained = [one.mr for one in read_e2e(data / "e2e_nlg" / "trainset.csv.gz")]
    values: dict[str, list[str]] = {}
    for mr in trained:
        for name, value in re.findall(r"([^,\[\]]+)\[([^\]]*)\]", mr):
            known = values.setdefault(name.strip(), [])
            if value not in known:
                known.append(value)
    found: dict[str, None] = {}
    while len(found) < count:
        names = {"name", *rng.sample(E2E_SLOTS, num_slots - 1)}
        mr = ", ".join(f"{name}[{rng.choice(values[name])}]" for name in ("name", *E2E_SLOTS) if name in names)
        if mr not in trained:
            found[mr] = None
    return list(found)


def other_names(data: Path) -> list[str]:
    """Names of restaurants and hotels in dialogue acts, written as E2E writes names."""
    names = {
        name.strip("'").title()
        for domain in ("restaurant", "hotel")
        for act, _ in acts(data, domain, "test")
        for name in re.findall(r"name=([^;)]*)", act)
    }
    return sorted(name for name in names if re.fullmatch(r"[A-Za-z ]{4,24}", name))


def with_other_names(mr: str, others: list[str], rng: random.Random) -> str:
    """The meaning representation with other names in `name` and `near`."""
    return re.sub(r"(?<!\w)(name|near)\[[^\]]*\]", lambda slot: f"{slot[1]}[{rng.choice(others)}]", mr)


def slices(data: Path, count: int, *, seed: int, tuned: bool = True) -> dict[str, list[Item]]:
    """Up to `count` items of each slice; other seeds draw other items (of dialogue acts: the same in another order).

    Without `tuned` only those that the shipped model was made for.
    """
    rng = random.Random(f"slices {seed}")
    others = other_names(data)
    found: dict[str, list[Item]] = {}
    for kind, sign in (("add", "+"), ("sub", "-")):
        for digits in range(2, 7):
            drawn = dict(draw_worked(sign, digits, rng) for _ in range(count))
            found[f"{kind} {digits}"] = [Item(prompt, ends_with(answer)) for prompt, answer in drawn.items()]
    for terms in (3, 4, 6, 8):
        drawn = dict(draw_terms(terms, rng) for _ in range(count))
        found[f"terms {terms}"] = [Item(prompt, equals(answer)) for prompt, answer in drawn.items()]
    for num_slots in range(3, 9):
        mrs = composed_mrs(data, num_slots, count, rng)
        found[f"e2e {num_slots}"] = [Item(mr, describes(mr)) for mr in mrs]
        renamed = [with_other_names(mr, others, rng) for mr in composed_mrs(data, num_slots, count, rng)]
        found[f"names {num_slots}"] = [Item(mr, describes(mr)) for mr in renamed]
    if not tuned:
        return {name: items for name, items in found.items() if name.startswith(("e2e", "names"))}
    for domain, (most, _) in TRAINED_ACTS.items():
        read = [act for act, _ in acts(data, domain, "train")]
        trained = set(read[:most])
        asked = [
            act for act in dict.fromkeys([*read, *(act for act, _ in acts(data, domain, "test"))]) if act not in trained
        ]
        rng.shuffle(asked)
        found[domain] = [Item(act, says(act)) for act in asked[:count]]
    for name, items in found.items():
        if not items:
            raise InvalidInput(f"{data} has no items for the slice {name!r}")
    return found


def ends_with(answer: str) -> Callable[[str], bool]:
    """Right where what follows the last step is that of `answer`."""
    return lambda text: text.rpartition(";")[2].strip() == answer.rpartition(";")[2]


def equals(answer: str) -> Callable[[str], bool]:
    """Right where it is the answer."""
    return lambda text: text.strip() == answer


def describes(mr: str) -> Callable[[str], bool]:
    """Right where no slot is missing or wrong."""

    def right(text: str) -> bool:
        errors = slot_errors(mr, text)
        return not errors.missing and not errors.wrong

    return right


def says(act: str) -> Callable[[str], bool]:
    """Right where all literal values are in the text."""
    return lambda text: says_all(act, text)
