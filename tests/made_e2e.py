"""A few restaurants in the format of the E2E NLG data."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

PLACES = ("Mill", "Vaults", "Eagle", "Punter", "Cricketers", "Rice Boat", "Blue Spice", "Waterman")
AREAS = ("riverside", "city centre")


def write_e2e(directory: Path, *, pairs: int = 24, inputs: int = 6) -> Path:
    """`trainset.csv`, plain, and `testset_w_refs.csv.gz` with two descriptions each and quoted headers, as the originals are."""
    directory.mkdir(parents=True, exist_ok=True)
    training, test = io.StringIO(), io.StringIO()
    rows = csv.writer(training)
    rows.writerow(["mr", "ref"])
    rows.writerows(
        [meaning(number), f"The {place(number)} is a pub{' by the river' * (number % 2)}."] for number in range(pairs)
    )
    rows = csv.writer(test, quoting=csv.QUOTE_ALL)
    rows.writerow(["MR", "ref"])
    for number in range(pairs, pairs + inputs):
        rows.writerow([meaning(number), f"The {place(number)} is a pub."])
        rows.writerow([meaning(number), f"There is a pub called The {place(number)}."])
    (directory / "trainset.csv").write_text(training.getvalue(), encoding="utf-8")
    (directory / "testset_w_refs.csv.gz").write_bytes(gzip.compress(test.getvalue().encode()))
    return directory


def place(number: int) -> str:
    """The name of a restaurant."""
    return f"{PLACES[number % len(PLACES)]} {number}"


def meaning(number: int) -> str:
    """Its meaning representation."""
    return f"name[The {place(number)}], eatType[pub], area[{AREAS[number % 2]}]"
