"""`shoal frontier`: quality against what was spent, for several policies and depths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shoal.cli import options
from shoal.cli.options import option
from shoal.cli.progress import stages
from shoal.evaluate.frontier_result import FrontierResult, Spent


def frontier(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="A checkpoint directory, a hub id or shoal-e2e; may be given several times."
        ),
    ] = None,
    *,
    task: Annotated[
        str, typer.Option(help="e2e, scitldr, arxiv_abstract_title, gsm8k, lm, or a JSONL file of your own.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIRECTORY", help="A file per arm, the result, a figure.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Data of a built-in task: file, directory or dataset on the hub (owner/name).")
    ] = None,
    policies: Annotated[str, option("Depth", "Which layers run, separated by commas.", metavar="NAMES")] = "skipdecode",
    depths: Annotated[
        str, option("Depth", "Mean shares of the layers, separated by commas.", metavar="SHARES")
    ] = "2/3,1/2,1/3,1/4,1/5",
    dense_model: Annotated[
        list[str] | None,
        option("Depth", "A further model that runs dense only, such as a small one of equal decode cost.", "--dense"),
    ] = None,
    horizon: Annotated[
        int | None,
        option("Depth", "Tokens over which depth falls. Default: the checkpoint's, else the median reference."),
    ] = None,
    metric: Annotated[
        str | None, option("Task", "Metrics instead of the task's, separated by commas.", metavar="NAMES")
    ] = None,
    limit: Annotated[int | None, option("Task", "First so many inputs only.")] = None,
    max_new_tokens: Annotated[int | None, option("Task", "Most tokens of an output. Default: the task's.")] = None,
    seed: Annotated[int, option("Task", "Of the resamples behind the intervals.")] = 0,
    batch: Annotated[int, option("Running", "Most requests that run together.")] = 32,
    timing_rounds: Annotated[
        int, option("Running", "Rounds of wall clock, arms taking turns; 0 leaves seconds out.")
    ] = 3,
    dtype: options.Dtype = "auto",
    device: Annotated[str, option("Running", "cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[int | None, option("Running", "CPU threads. Default: PyTorch's choice.")] = None,
) -> None:
    """Measure quality against what was spent: every policy at every depth beside the dense model, with 95% intervals.

    Go on with an interrupted run by the same command: finished arms are kept.

    shoal frontier --model shoal-e2e --task e2e --data e2e_nlg --policies skipdecode,unified --out runs/frontier

    shoal frontier --model tuned --dense small --task mine.jsonl --depths 1/2,1/4 --out runs/mine
    """
    # Here, not above: transformers takes seconds to import, and other commands do not need its models.
    from transformers.utils import logging

    from shoal.evaluate.frontier import FrontierConfig, run_frontier
    from shoal.evaluate.frontier_plot import plot_frontier
    from shoal.evaluate.report import FILE_NAME as REPORT
    from shoal.evaluate.report import write_report

    config = FrontierConfig(
        models=tuple(model or ()),
        dense_models=tuple(dense_model or ()),
        task=task,
        data=data,
        metrics=None if metric is None else options.names(metric),
        policies=options.names(policies),
        depths=tuple(options.parse_depth(depth) for depth in options.names(depths)),
        limit=limit,
        max_new_tokens=max_new_tokens,
        horizon=horizon,
        batch=batch,
        seed=seed,
        timing_rounds=timing_rounds,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bar of loading weights
    console = Console(stderr=True)
    with stages(console) as show:
        result = run_frontier(config, out, report=show)
    figure = out / "frontier.png"
    plot_frontier(result, figure)
    write_report(result, out / REPORT)
    to_read = Console()
    # Where the width is not a terminal's, it is a guess: rather long lines in a file than broken columns.
    Console(width=to_read.width if to_read.is_terminal else 200).print(summary_table(result))
    for refused in result.refused:
        console.print(f"not run: {refused.name}: {refused.reason}", highlight=False, markup=False)
    console.print(f"{out / 'frontier.json'}, {figure}", highlight=False)


def summary_table(result: FrontierResult) -> Table:
    """A row per arm: layers, the main metric with its interval and its difference, the other metrics, and the savings."""
    main, *others = result.metrics
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm", no_wrap=True)
    table.add_column("mean\nlayers", justify="right")
    table.add_column(main.label, justify="right", no_wrap=True)
    table.add_column(f"{main.label}\nagainst dense", justify="right", no_wrap=True)
    for metric in others:
        table.add_column(metric.label, justify="right")
    for part in ("decode", "request"):
        for column in ("FLOPs", "bytes", "time"):
            table.add_column(f"{part}\n{column}", justify="right", style="green")
    for arm in result.arms:
        decode, request = arm.savings.decode, arm.savings.request
        spent = (decode.flops, decode.bytes, decode.seconds, request.flops, request.bytes, request.seconds)
        table.add_row(
            arm.name,
            f"{arm.realised_mean_layers:.2f}/{arm.num_layers}",
            f"{arm.scores[main.name]:.2f}",
            f"{arm.delta[main.name]:+.2f}" if arm.delta else "",
            *(f"{arm.scores[metric.name].value:.2f}" for metric in others),
            *map(of_dense, spent),
        )
    return table


def of_dense(spent: Spent) -> str:
    """A share of the dense model's, in percent."""
    return "-" if spent.of_dense is None else f"{100 * spent.of_dense:.0f}%"
