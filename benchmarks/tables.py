"""Put the tables of `results/*.json` into README.md, so that no number there is typed.

python benchmarks/tables.py            (rewrites the README)
python benchmarks/tables.py --check    (exit status 1 if it is out of date)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import agreement
import clocks
import short_requests
from report import RESULTS, load, table

README = Path(__file__).parent / "README.md"
SECTION = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def decode_summary(runs: list[dict[str, Any]]) -> str:
    """One row per run: dense beside transformers, and each depth's speedup with its share of the bound."""
    depths = [row["variant"] for row in runs[0]["variants"] if row["variant"].startswith("depth")]
    header = ["model", "dtype", "batch", "dense tokens/s", "over transformers", "whole request", "time over floor"]
    rows = []
    for run in runs:
        variants = {row["variant"]: row for row in run["variants"]}
        dense, over = variants["dense"], run["dense_over_transformers"]
        rows.append(
            [
                *(str(value) for value in run["case"].values()),
                f"{dense['decode_tokens_per_s']:.0f}",
                f"{over['decode']['median']:.2f}",
                f"{over['total']['median']:.2f}",
                f"{dense['time_over_floor']:.2f}",
                *(
                    f"{variants[depth]['decode_speedup']['median']:.2f} ({variants[depth]['gain_over_bound']:.2f})"
                    for depth in depths
                ),
            ]
        )
    return table([*header, *depths], rows)


def each(describe: Any) -> Any:
    """Every run's own table."""
    return lambda runs: "\n\n".join(describe(run) for run in runs)


SUMMARIES = {
    "decode": decode_summary,
    "clocks": each(clocks.describe),
    "short_requests": each(short_requests.describe),
    "agreement": each(agreement.describe),
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
