"""The progress bar of commands that go through several stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """`show(what, done, total)` within the context: a bar on a terminal, elsewhere a line where a new stage begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("loading", total=None)
        shown = ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal shown
            progress.update(bar, description=what, completed=done, total=total)
            if what != shown and not console.is_terminal:
                console.print(f"{what} ({done}/{total})", highlight=False)
            shown = what

        yield show
