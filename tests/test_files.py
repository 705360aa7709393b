"""Files that are whole or as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import InvalidInput, ShoalError
from shoal.files import check_writable, replaced, write_json


def test_a_file_is_replaced_at_the_end_alone(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("before")
    with replaced(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"loss": 1.5})

    def fail_halfway() -> None:
        with replaced(path) as partial:
            partial.write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == '{\n "loss": 1.5\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json")
    long = tmp_path / ("a" * 254)  # which a file may be named, but not the one that is written beside it
    for path in (tmp_path, tmp_path / "missing" / "new.json", long):
        with pytest.raises(InvalidInput, match=f"{path.name} cannot be written"):
            check_writable(path)
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=r"new\.json could not be written: No such file"):
        write_json(tmp_path / "missing" / "new.json", {})
