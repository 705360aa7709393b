"""Numbers as people read them."""

from __future__ import annotations


def quantity(value: float, unit: str = "") -> str:
    """Three digits and a prefix; bytes (`B`) count in 1024s, seconds (`s`) have prefixes below 1.

    >>> quantity(12), quantity(7.53), quantity(1_234_000), quantity(3 * 2**20, "B"), quantity(0.00123, "s")
    ('12', '7.53', '1.23 M', '3.00 MiB', '1.23 ms')
    """
    if unit == "s" and 0 < value < 1:
        return f"{quantity(value * 1e3)} ms" if value >= 1e-3 else f"{quantity(value * 1e6)} µs"
    base, suffix = (1024, "i") if unit == "B" else (1000, "")
    prefixes = ["", "K" if unit == "B" else "k", "M", "G", "T", "P", "E"]
    power = 0
    while abs(value) >= base * 0.9995 and power < len(prefixes) - 1:
        value /= base
        power += 1
    if (power == 0 and float(value).is_integer()) or abs(value) >= 99.95:
        digits = f"{value:.0f}"
    else:
        digits = f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
    return f"{digits} {prefixes[power]}{suffix if power else ''}{unit}".strip()


def share(value: float, dense: float) -> str:
    """`value` as a percentage of `dense`.

    >>> share(1, 4), share(0, 0)
    ('25%', '-')
    """
    return f"{100 * value / dense:.0f}%" if dense else "-"
