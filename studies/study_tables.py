"""Put the tables of `results/*.json` into README.md, so that no number there is typed.

python studies/study_tables.py            (rewrites the README)
python studies/study_tables.py --check    (exit status 1 if it is out of date)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import deep_reading
import long_outputs
import recipe
from study import RESULTS, read_json

README = Path(__file__).parent / "README.md"
SECTION = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DESCRIBE = {"recipe": recipe.describe, "deep_reading": deep_reading.describe, "long_outputs": long_outputs.describe}


def render(readme: str) -> str:
    """The README with every section made anew from its results."""

    def section(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            return f"{start}No results yet.\n{end}"
        result = read_json(path)
        c = result["conditions"]
        where = (
            f"*{c['threads']} threads on {c['cores']} cores; PyTorch {c['torch']}, transformers {c['transformers']}, "
            f"Python {c['python']}; {c['date']}.*"
        )
        return f"{start}{where}\n\n{DESCRIBE[name](result)}\n{end}"

    return SECTION.sub(section, readme)


def main() -> None:
    before = README.read_text(encoding="utf-8")
    after = render(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
