"""The `shoal` command."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from shoal import __version__
from shoal.cli.convert import convert
from shoal.cli.defer import defer
from shoal.cli.draft_plan import draft_plan
from shoal.cli.evaluate import evaluate
from shoal.cli.frontier import frontier
from shoal.cli.generate import generate
from shoal.cli.info import info
from shoal.cli.monitor import monitor
from shoal.cli.plan import plan
from shoal.cli.probe import app as probe
from shoal.cli.rank import rank
from shoal.cli.report import report
from shoal.cli.reproduce import reproduce
from shoal.cli.route import route
from shoal.cli.serve import serve
from shoal.cli.suits import suits
from shoal.cli.tune import tune
from shoal.cli.voids import voids
from shoal.errors import CheckpointError, InvalidInput, MissingExtra, ShoalError


class Commands(TyperGroup):
    """Prints an error that was raised on purpose as its message alone; `shoal.errors` names the exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ShoalError as error:
            Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, InvalidInput | CheckpointError | MissingExtra) else 1) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("Interrupted.")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Generate with an open-weight language model at a fraction of its depth, and see what was spent.",
)


def show_version(wanted: bool) -> None:
    """The callback of --version: it comes before the check that there is a command."""
    if wanted:
        print(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


generating, measuring = (generate, serve, plan), (voids, frontier, route, suits, defer, draft_plan, report, reproduce)
for command in (*generating, rank, info, convert, tune, *measuring):
    app.command()(command)
app.add_typer(monitor, name="monitor")
app.add_typer(evaluate, name="evaluate")
app.add_typer(probe, name="probe")


if __name__ == "__main__":
    app()
