"""Put the tables of `results/*.json` into README.md, docs/reproduction.md and docs/ranking.md, so that no number there is typed.

python studies/study_tables.py            (rewrites them)
python studies/study_tables.py --check    (exit status 1 if one is out of date)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import deep_reading
import judge_table
import long_outputs
import probes
import ranking
import ranking_claims
import recipe_table
import self_drafting
import sentinel
import sentinel_depth
import suits_order
from shoal.evaluate import reproduce_tables
from study import RESULTS, read_json

HERE = Path(__file__).parent
DOCUMENTS = (HERE / "README.md", HERE.parent / "docs" / "reproduction.md", HERE.parent / "docs" / "ranking.md")
SECTION = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DESCRIBE = {
    "recipe": recipe_table.describe,
    "recipe_claims": recipe_table.describe_claims,
    "deep_reading": deep_reading.describe,
    "long_outputs": long_outputs.describe,
    "suits_order": suits_order.describe,
    "self_drafting": self_drafting.describe,
    "probes": probes.describe,
    "ranking": ranking.describe,
    "ranking_claims": ranking_claims.describe,
    "judge": judge_table.describe,
    "sentinel": sentinel.describe,
    "sentinel_shipped": sentinel.describe,
    "sentinel_arithmetic": sentinel.describe,
    "sentinel_arithmetic_longer": sentinel.describe,
    "sentinel_depth": sentinel_depth.describe,
    "reproduction": reproduce_tables.describe,
}


def render(document: str) -> str:
    """The document with every section made anew from its results."""

    def section(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        path = RESULTS / f"{name.removesuffix('_claims')}.json"
        if not path.is_file():
            return f"{start}No results yet.\n{end}"
        result = read_json(path)
        c = result["conditions"]
        where = (
            f"*{c['threads']} threads on {c['cores']} cores; PyTorch {c['torch']}, transformers {c['transformers']}, "
            f"Python {c['python']}; {c['date']}.*"
        )
        return f"{start}{where}\n\n{DESCRIBE[name](result)}\n{end}"

    return SECTION.sub(section, document)


def main() -> None:
    before = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    after = {path: render(text) for path, text in before.items()}
    if "--check" in sys.argv:
        sys.exit(before != after)
    for path, text in after.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
