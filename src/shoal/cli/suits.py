"""`shoal suits`: how much a model has to skip, as it is."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from shoal.cli import options
from shoal.cli.options import option
from shoal.errors import InvalidInput
from shoal.files import check_writable, write_json

if TYPE_CHECKING:
    from shoal.evaluate.layer_change import LayerChange
    from shoal.evaluate.suits import Outcome


def suits(
    model: options.Model,
    *,
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL, each line with 'prompt' and 'completion'; without completions the model writes them, greedily."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Picture, a PNG file.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="File for all numbers and the advice.")] = None,
    depths: Annotated[
        str, typer.Option(help="Mean shares of the layers, separated by commas.", metavar="SHARES")
    ] = "0.9,0.8,2/3,1/2,1/3",
    max_examples: Annotated[int, typer.Option(help="Examples to measure on, taken evenly from DATA.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a completion that the model writes.")] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], option("Model", "Of weights and activations.")
    ] = "float32",
    device: Annotated[str, option("Model", "cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Measure how much each layer does, and what every policy costs at every depth without tuning. Minutes, not hours.

    shoal suits shoal-e2e --data pairs.jsonl --out suits.png

    shoal suits Qwen/Qwen3-0.6B --data pairs.jsonl --max-examples 16 --json suits.json
    """
    # Here, not above: transformers and matplotlib take seconds to import, and other commands do not need them.
    from transformers.utils import logging

    from shoal.evaluate import suits as measuring
    from shoal.evaluate.suits_advice import advice
    from shoal.evaluate.suits_figure import draw, require_matplotlib

    for path in (out, json_):
        if path is not None:
            check_writable(path)
    if out is not None:
        if out.suffix.lower() != ".png":
            raise InvalidInput(f"--out {out}: the picture is a PNG, so the suffix must be .png")
        require_matplotlib()
    config = measuring.SuitsConfig(
        depths=tuple(options.parse_depth(depth.strip()) for depth in depths.split(",")),
        max_examples=max_examples,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
    )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bar of loading weights
    errors = Console(stderr=True)
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as progress:
        bar = progress.add_task("measuring", total=None)
        found = measuring.suits(
            model, data, config, report=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    if out is not None:
        draw(found, out)
    if json_ is not None:
        write_json(json_, {**found.to_dict(), "data": str(data), "advice": advice(found)})
    console = Console()
    console.print(layers_table(found.layers))
    console.print()
    console.print(outcomes_table(found.outcomes))
    for refused in found.refused:
        console.print(
            f"not measured: {refused.policy} at {refused.depth:.3g}: {refused.reason}", style="dim", highlight=False
        )
    source = "its own completions" if found.self_written else "given completions"
    console.print(
        f"\n{found.num_examples} examples, {found.num_tokens} tokens predicted by decode passes over {source}; horizon "
        f"{found.horizon}; loss at full depth {found.dense_loss:.3f}; 95% intervals over examples",
        style="dim", highlight=False,
    )  # fmt: skip
    console.print("\n" + advice(found), highlight=False, markup=False)


def layers_table(layers: tuple[LayerChange, ...]) -> Table:
    """A row per layer, the top one first: relative change and cosine, for prompt and generated tokens."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right")
    for part in ("prompt", "generated"):
        table.add_column(f"{part}\nchange", justify="right")
        table.add_column("\ncosine", justify="right")
    for number, layer in reversed(list(enumerate(layers))):
        table.add_row(
            str(number),
            f"{layer.prompt_change:.0%}",
            f"{layer.prompt_cosine:.3f}",
            f"{layer.completion_change:.0%}",
            f"{layer.completion_cosine:.3f}",
        )
    return table


def outcomes_table(outcomes: tuple[Outcome, ...]) -> Table:
    """A row per policy and depth, the best policy of a depth first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("depth", justify="right")
    table.add_column("policy", no_wrap=True)
    for column in ("layers\nrun", "agreement, %", "loss increase, nats"):
        table.add_column(column, justify="right", no_wrap=True)

    for depth, group in groupby(outcomes, key=lambda outcome: outcome.depth):
        for number, outcome in enumerate(group):
            table.add_row(
                "" if number else f"{depth:.3g}",
                outcome.policy,
                f"{outcome.realised_depth:.1%}",
                f"{outcome.agreement.times(100):.1f}",
                f"{outcome.loss_increase:.3f}",
            )
        table.add_section()
    return table
