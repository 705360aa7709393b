"""Numbers as people read them."""

from __future__ import annotations

import pytest

from shoal.cli.format import quantity, share
from shoal.cli.options import parse_depth


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (12, "", "12"),
        (7.53, "", "7.53"),
        (999.96, "", "1.00 k"),
        (1_234_000, "", "1.23 M"),
        (1023, "B", "1023 B"),
        (3 * 2**20, "B", "3.00 MiB"),
        (0.00123, "s", "1.23 ms"),
        (2.53e-5, "s", "25.3 µs"),
        (12.345, "s", "12.3 s"),
    ],
)
def test_quantity(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_share() -> None:
    assert share(1, 4) == "25%"
    assert share(1, 0) == "-"


@pytest.mark.parametrize(("text", "depth"), [("0.5", 0.5), ("1/2", 0.5), ("1", 1.0), ("1/3", 1 / 3), (".25", 0.25)])
def test_depth_is_a_decimal_or_a_fraction(text: str, depth: float) -> None:
    assert parse_depth(text) == depth
