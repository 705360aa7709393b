"""What the studies share: arms that resume one by one, files that are whole or absent, and tables."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import gzip
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shoal.errors import InvalidInput
from shoal.files import replaced

RESULTS = Path(__file__).parent / "results"
"""One JSON file per study."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shoal" / "studies"
"""Where work directories are by default: outside the repository."""


def parser(description: str, *, work: str) -> argparse.ArgumentParser:
    """The options that every study has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=CACHE / work, help="states, checkpoints and an arm's own results")
    options.add_argument("--arms", nargs="+", default=["*"], metavar="NAME", help="names, * standing for anything")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of tensor operations")
    options.add_argument("--list", action="store_true", help="print the arms and stop")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its scores mean nothing")
    options.add_argument("--save", action="store_true", help="write what the work directory holds into results/")
    return options


def chosen(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that match, in their own order. Raises `InvalidInput` for a pattern that matches none."""
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InvalidInput(f"no arm is called {pattern!r}; there are: {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def open_work(work: Path, settings: dict[str, Any]) -> None:
    """Make the work directory of a study with `settings`, or check that it is the directory of such a study.

    All arms in a directory have the same settings. Raises `InvalidInput` naming the setting that differs.
    """
    record = work / "study.json"
    settings = json.loads(json.dumps(settings))
    if record.is_file():
        before = read_json(record)
        for name in settings.keys() | before.keys():
            if settings.get(name) != before.get(name):
                raise InvalidInput(
                    f"{work} holds a study with {name} {before.get(name)!r}, not {settings.get(name)!r}: "
                    "choose another --work, or the same settings"
                )
    else:
        work.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)


def write_json(path: Path, data: Any) -> None:
    """Write JSON; the file is whole or as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def save(study: str, result: dict[str, Any]) -> None:
    """Write `results/<study>.json`."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{study}.json", {"study": study, **result})


def pack(study: str, work: Path, leave_out: Sequence[str] = ()) -> None:
    """Write what the arms of a work directory counted to `results/<study>_arms.json.gz`: further arms can be compared with them."""
    arms = {}
    for path in sorted((work / "arms").glob("*.json")):
        one = read_json(path)
        arms[path.stem] = {**one, "rows": [{k: v for k, v in row.items() if k not in leave_out} for row in one["rows"]]}
    budgets = {path.stem: read_json(path) for path in sorted(work.glob("budget-*.json"))}
    kept = {"settings": read_json(work / "study.json"), "budgets": budgets, "arms": arms}
    data = gzip.compress(json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode(), mtime=0)
    with replaced(RESULTS / f"{study}_arms.json.gz") as partial:
        partial.write_bytes(data)


def unpack(study: str, work: Path) -> None:
    """Put what `pack` kept of arms with the settings of `work` there, unless they have files."""
    path = RESULTS / f"{study}_arms.json.gz"
    if not path.is_file():
        return
    kept = json.loads(gzip.decompress(path.read_bytes()))
    if kept["settings"] != read_json(work / "study.json"):
        return
    (work / "arms").mkdir(exist_ok=True)
    files = {work / f"{name}.json": one for name, one in kept["budgets"].items()}
    files |= {work / "arms" / f"{name}.json": one for name, one in kept["arms"].items()}
    for file, one in files.items():
        if not file.is_file():
            write_json(file, one)


def conditions() -> dict[str, Any]:
    """What a reader needs to judge the seconds. Nothing that names the host."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("shoal", "torch", "transformers")},
    }


class Clock:
    """Seconds of work over all runs of a stage, kept in a file, so that an interruption loses what followed the last tick."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, time.perf_counter()
        self.seconds: float = read_json(path) if path.is_file() else 0.0

    def tick(self) -> None:
        """Add the time since the last tick."""
        now = time.perf_counter()
        self.seconds, self.last = self.seconds + now - self.last, now
        write_json(self.path, round(self.seconds, 3))
