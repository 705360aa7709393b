"""`shoal defer`: what a small model can answer alone, and which answers a larger one should give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from shoal.cli import options
from shoal.cli.format import quantity
from shoal.cli.options import option
from shoal.cli.progress import stages
from shoal.engine.engine import Engine
from shoal.errors import InvalidInput
from shoal.files import check_writable, write_json

if TYPE_CHECKING:
    from shoal.evaluate.cascade import Answers, Deferral


def defer(
    small: Annotated[str, typer.Argument(help="Checkpoint directory or hub id of the model that answers first.")],
    large: Annotated[str, typer.Argument(help="Of the model that answers instead where the first is unsure.")],
    *,
    task: Annotated[str, typer.Option(help="A task, or a JSONL file with 'prompt', 'answer' and 'metric'.")],
    data: Annotated[str | None, typer.Option(help="File, directory or hub dataset of a built-in task.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for all curves, JSON.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many inputs.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Instead of the task's own.")] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Also let both write each answer, token by token. Takes long.")
    ] = False,
    dtype: options.Dtype = "auto",
    device: Annotated[str, option("Model", "cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Draw deferral curves: quality against the share of inputs that the large model answers, for every rule. Lossy.

    shoal defer models/small models/large --task e2e --data e2e_nlg -o deferral.json

    shoal defer models/small models/large --task questions.jsonl --limit 200 --adaptive
    """
    from shoal.evaluate.adaptive_curve import adaptive_curve
    from shoal.evaluate.cascade import answers, deferral_curves
    from shoal.evaluate.tasks import load_task

    if out is not None:
        check_writable(out)
    if limit is not None and limit < 1:
        raise InvalidInput(f"--limit must be 1 or more, got {limit}")
    loaded, inputs = load_task(task, data, max_new_tokens=max_new_tokens)
    if loaded.prefix_tokens is not None:
        raise InvalidInput(f"the task {task!r} has no answers to defer: it is scored by the loss of a given text")
    inputs, metric = inputs[:limit], loaded.metrics[0]
    errors = Console(stderr=True)

    def load(model: str) -> Engine:
        return Engine.from_pretrained(model, dtype=dtype, device=device)

    def ask(model: str) -> Answers:
        with errors.status(f"{model} answers {len(inputs)} inputs"):
            return answers(load(model), loaded, inputs, metric)

    deferral = deferral_curves(ask(small), ask(large), metric)
    if adaptive:
        with stages(errors) as show:
            points = adaptive_curve(load(small), load(large), loaded, inputs, metric, report=show)
        deferral = replace(deferral, adaptive=points)
    if out is not None:
        settings = {"small": small, "large": large, "task": task, "inputs": len(inputs)}
        write_json(out, {**settings, **deferral.to_dict()})
    console = Console()
    console.print(curves_table(deferral))
    console.print(advice(deferral), highlight=False)


def curves_table(deferral: Deferral) -> Table:
    """A row per share, a column per rule; of the adaptive curve its points where they belong, with columns of their own."""
    from shoal.evaluate.metrics import METRICS

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("deferred", justify="right", no_wrap=True)
    table.add_column("FLOPs\nper input", justify="right")
    for name in deferral.curves:
        table.add_column(f"{METRICS[deferral.metric].label}\n{name}", justify="right", no_wrap=True)
    label = METRICS[deferral.metric].label
    beside = {point.share: point for point in deferral.adaptive}
    if beside:
        for column in ("FLOPs\nper input", "tokens by\nthe large", "above\nbits", f"{label}\nadaptive"):
            table.add_column(column, justify="right", no_wrap=True)
    for points in zip(*deferral.curves.values(), strict=True):
        row = [
            f"{points[0].share:.0%}",
            quantity(points[0].flops, ""),
            *(f"{point.score.value:.1f}" for point in points),
        ]
        if one := beside.get(points[0].share):
            row += [
                quantity(one.flops, ""),
                f"{one.by_large:.0%}",
                f"{one.threshold_bits:.2f}",
                f"{one.score.value:.1f}",
            ]
        table.add_row(*row)
    return table


def advice(deferral: Deferral) -> str:
    """Which rule is best, and whether the large model is any better."""
    from shoal.evaluate.metrics import METRICS

    ends = deferral.curves["chance"]
    best = max(deferral.areas, key=lambda name: deferral.areas[name])
    said = (
        f"\nThe small model alone: {ends[0].score:.1f}; the large one alone: {ends[-1].score:.1f} (95% intervals over inputs). "
        f"Best on average over the curve: {best}, {deferral.areas[best]:+.2f} against deferring by chance."
    )
    if deferral.adaptive:
        sign = 1 if METRICS[deferral.metric].higher_is_better else -1
        top = max(deferral.adaptive, key=lambda point: sign * point.score.value)
        said += (
            f"\nEntropy Adaptive Decoding at its best: {top.score:.1f}, with {top.by_large:.0%} of the tokens by the large model "
            f"and {quantity(top.flops)} FLOPs per input; the large one alone takes {quantity(ends[-1].flops - ends[0].flops)}."
        )
    return said
