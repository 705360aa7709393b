"""`shoal report`: a frontier as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.evaluate.frontier_result import FrontierResult


def report(
    frontier: Annotated[Path, typer.Argument(help="A frontier.json, or the directory that holds one.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Default: report.html beside it.")
    ] = None,
) -> None:
    """Write a frontier as one HTML page that needs no server and no network.

    shoal report runs/frontier
    """
    from shoal.evaluate.report import FILE_NAME, write_report

    result = FrontierResult.load(frontier)
    beside = frontier if frontier.is_dir() else frontier.parent
    path = write_report(result, out or beside / FILE_NAME)
    Console().print(f"{path} is ready", highlight=False, soft_wrap=True)
