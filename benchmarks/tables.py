"""Put the tables of `results/*.json` into README.md, so that no number there is typed.

python benchmarks/tables.py            (rewrites the README)
python benchmarks/tables.py --check    (exit status 1 if it is out of date)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agreement
import clocks
import decode_tables
import drafting
import entropy
import gates
import memory
import prefill
import prefixes
import probes
import rank
import scaling
import serve_tables
import short_requests
from report import RESULTS, load

README = Path(__file__).parent / "README.md"
SECTION = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def each(describe: Callable[[dict[str, Any]], str]) -> Callable[[list[dict[str, Any]]], str]:
    """Every run's own table."""
    return lambda runs: "\n\n".join(describe(run) for run in runs)


SUMMARIES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "decode": decode_tables.summary,
    "clocks": each(clocks.describe),
    "prefill": prefill.describe,
    "memory": memory.describe,
    "scaling": each(scaling.describe),
    "short_requests": each(short_requests.describe),
    "agreement": each(agreement.describe),
    "drafting": each(drafting.describe),
    "entropy": entropy.describe,
    "probes": each(probes.describe),
    "prefixes": each(prefixes.describe),
    "rank": each(rank.describe),
    "serve": serve_tables.summary,
}


def where(runs: list[dict[str, Any]]) -> str:
    """The conditions of the runs in a line, once for each that differ."""
    lines = []
    for run in runs:
        c = run["conditions"]
        line = (
            f"*{c['cpu']} ({', '.join(c['features'])}), {c['threads']} threads on {c['cores']} cores; "
            f"PyTorch {c['torch']}, transformers {c['transformers']}, Python {c['python']}; {c['date']}.*"
        )
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def render(readme: str) -> str:
    """The README with every section made anew from its results."""

    def section(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name == "gates":
            return f"{start}{gates.as_table(gates.saved_gates())}\n{end}"
        if not (RESULTS / f"{name}.json").is_file():
            return f"{start}No results yet.\n{end}"
        runs = load(name)
        return f"{start}{where(runs)}\n\n{SUMMARIES[name](runs)}\n{end}"

    return SECTION.sub(section, readme)


def main() -> None:
    before = README.read_text(encoding="utf-8")
    after = render(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
