"""`shoal report`."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from made_frontier import frontier
from shoal.cli.main import app


def test_the_page_stands_beside_its_numbers(tmp_path: Path):
    frontier().save(tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "skipdecode@0.5" in page
    done = CliRunner().invoke(app, ["report", str(tmp_path / "frontier.json"), "-o", str(tmp_path / "other.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == page


def test_what_is_not_a_frontier_is_named(tmp_path: Path):
    (tmp_path / "frontier.json").write_text('{"format": 0}')
    for path in (tmp_path, tmp_path / "none.json"):
        done = CliRunner().invoke(app, ["report", str(path)])
        assert done.exit_code == 2
        assert str(path) in done.stderr.replace("\n", "")
        assert "Traceback" not in done.stderr
