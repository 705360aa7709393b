"""The README tells the truth: its Python session, its commands with their output, and the numbers of its quality table."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHIPPED = ROOT / "src" / "shoal" / "data" / "shoal-e2e"
COMMANDS = re.findall(r"^\$ (.+)\n((?:(?!\$ |```).*\n)*)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_python_session() -> None:
    (session,) = re.findall(
        r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    test = doctest.DocTestParser().get_doctest(session, {}, "README.md", str(README), 0)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted >= 5
    assert results.failed == 0


def test_the_commands_print_what_the_readme_shows(tmp_path: Path) -> None:
    """On standard output; `...` stands for anything, and lines may be broken. Standard error holds progress and seconds."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    assert len(COMMANDS) >= 3
    for command, output in COMMANDS:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(output, done.stdout, flags), f"{command} prints\n{done.stdout}"


def test_the_quality_table_is_the_model_cards() -> None:
    rows = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))["evaluation"]["rows"]
    table = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for row in rows:
        cells = [f" {row['mean_layers']:.1f} of {row['num_layers']} ", f" {row['bleu']['value']:.1f} "]
        assert any(all(cell in line for cell in cells) for line in table), row


def test_the_speed_table_is_the_benchmarks() -> None:
    """Rows of `benchmarks/results/decode.json`; a new run of the benchmark wants a new table."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text(encoding="utf-8"))["runs"]
    cases = {", ".join(str(value) for value in run["case"].values()): run for run in runs}
    rows = [line.strip("| ").split(" | ") for line in README.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row[0] in cases]
    assert len(rows) >= 4
    for name, tokens_per_s, over_transformers, decode, total in rows:
        variants = {variant["variant"]: variant for variant in cases[name]["variants"]}
        (peer,) = (peer for peer in cases[name]["peers"] if peer["peer"] == "transformers")
        over = peer["over"]["dense"]
        depths = [variants[f"depth {depth}"] for depth in ("1/2", "1/3", "1/5")]
        assert tokens_per_s == f"{variants['dense']['decode_tokens_per_s']:.0f}"
        assert over_transformers == f"{over['decode']['median']:.2f}x"
        assert decode == " · ".join(f"{depth['decode_speedup']['median']:.2f}x" for depth in depths)
        assert total == " · ".join(f"{depth['total_speedup']['median']:.2f}x" for depth in depths)


def test_what_is_said_of_deep_reading_is_what_was_measured() -> None:
    results = json.loads((ROOT / "studies" / "results" / "deep_reading.json").read_text(encoding="utf-8"))
    (verdict,) = [one for one in results["tasks"]["pointers"]["verdicts"] if one.startswith("depth 1/4: confirmed")]
    assert "3 seeds" in verdict
    text = " ".join(README.read_text(encoding="utf-8").split())
    said = text[text.index("Where depth pays") : text.index("reading deep pays")]
    assert re.findall(r"(\d+)%", said) == re.findall(r"(\d+)%", verdict)
