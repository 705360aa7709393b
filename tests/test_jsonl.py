"""JSON Lines: what is let through can be written again, and what is not is named by its line."""

from __future__ import annotations

import json

import pytest

from shoal.errors import InvalidInput
from shoal.jsonl import parse_jsonl


def test_blank_lines_are_counted_and_separators_within_strings_end_no_line() -> None:
    text = '{"a": "x\u2028y"}\r\n\n \n{"b": "\\ud83d\\ude00"}'
    assert list(parse_jsonl(text, "p")) == [(1, {"a": "x\u2028y"}), (4, {"b": "😀"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": ', "p, line 2: not valid JSON: Expecting value at column"),
        ('["a"]', "p, line 2: expected a JSON object, got '\\[\"a\"\\]'"),
        (r'{"id": "\udc00"}', r"p, line 2: \\udc00 alone is half of a character"),
        (r'{"\ud800": 1}', r"p, line 2: \\ud800 alone"),
        ('{"id": NaN}', "p, line 2: not valid JSON"),
        ('{"id": -Infinity}', "p, line 2: not valid JSON"),
        ('{"id": 1e999}', "p, line 2: not valid JSON"),
        ('{"id": ' + "7" * 5000 + "}", r"p, line 2: not valid JSON: .* 5000 digits$"),
        ("[" * 100_000, "p, line 2: nested too deeply"),
        ('{"id": ' * 100_000, "p, line 2: nested too deeply"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        list(parse_jsonl(f"{json.dumps({'id': 1})}\n{line}\n", "p"))
