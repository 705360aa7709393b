"""JSON Lines: an object per line, and the number of the line that is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from shoal.errors import InvalidInput


def parse_jsonl(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, counted from 1, object) of each line of `text`; blank lines are skipped.

    An object that is let through can be written again as JSON in UTF-8: NaN and infinite numbers (which JSON does not have) and
    halves of surrogate pairs (which are no characters) are refused, although Python's parser takes them.

    Raises `InvalidInput` with `name`, the file's, and the line's number.
    """
    # Not `splitlines`: JSON strings may hold U+2028 and its like, which end no line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            fields = json.loads(line)
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise InvalidInput(f"{where}: {half} alone is half of a character (a surrogate pair)") from None
        except ValueError as error:  # of numbers: NaN, infinite, or with thousands of digits
            raise InvalidInput(f"{where}: not valid JSON: {str(error).split(';')[0]}") from None
        except RecursionError:
            raise InvalidInput(f"{where}: nested too deeply") from None
        if not isinstance(fields, dict):
            raise InvalidInput(f"{where}: expected a JSON object, got {line.strip()[:40]!r}")
        yield number, fields
