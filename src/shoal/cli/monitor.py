"""`shoal monitor`: how accurate a model is where nobody has labels, from the entropy traces of its answers."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoal.errors import InvalidInput
from shoal.files import check_writable, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shoal.signals.sentinel import Sentinel
    from shoal.signals.slices import Affine, SliceEstimate

monitor = typer.Typer(
    no_args_is_help=True,
    help="Estimate how accurate a model is on slices without labels, from the entropy traces of its answers.",
)

TracesFile = Annotated[
    Path,
    typer.Argument(
        metavar="TRACES.jsonl",
        help="Lines of `shoal generate --entropy`, or responses of any OpenAI-compatible server with top log-probabilities; "
        "'slice' names the slice, 'correct' (0 or 1) is the label.",
    ),
]
SentinelFile = Annotated[Path, typer.Argument(metavar="SENTINEL", help="Of `shoal monitor fit`.")]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k", help="Top log-probabilities that the server was asked for. Default: as many as every token has."
    ),
]
Recalibrate = Annotated[
    Path | None,
    typer.Option(
        "--recalibrate",
        metavar="LABELLED.jsonl",
        help="A few labelled slices: estimates are fitted to their accuracies, factor and offset.",
    ),
]


@monitor.command()
def fit(
    traces: TracesFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the sentinel, JSON.")],
    features: Annotated[
        Literal["17d", "11d", "10d", "3d", "1d"],
        typer.Option(help="Statistics that it reads; 10d is the paper's default."),
    ] = "10d",
    classifier: Annotated[Literal["forest", "logistic", "mlp"], typer.Option(help="Of scikit-learn.")] = "forest",
    balance: Annotated[bool, typer.Option(help="Weigh right and wrong answers the same while fitting.")] = True,
    seed: Annotated[int, typer.Option(help="Of the classifier and the folds of its calibration.")] = 0,
    top_k: TopK = None,
) -> None:
    """Fit a sentinel on labelled answers of one model, and show what to expect of it on slices that it has not seen.

    shoal monitor fit labelled.jsonl -o sentinel.json

    shoal monitor fit labelled.jsonl -o sentinel.json --classifier logistic --features 3d
    """
    from shoal.signals.sentinel import Sentinel, SentinelConfig
    from shoal.signals.slices import leave_one_out
    from shoal.signals.traces import read_traces

    check_writable(out)
    config = SentinelConfig(features=features, classifier=classifier, balance=balance, seed=seed)
    errors = Console(stderr=True)
    traced = read_traces(traces, top_k=top_k, warn=say(errors))
    with errors.status(f"fitting on {len(traced)} responses"):
        sentinel = Sentinel.fit(traced, config)
    sentinel.save(out)
    console = Console()
    names = list(dict.fromkeys(sentinel.slices))
    console.print(
        f"{len(traced)} responses of {len(names)} slices, {sentinel.correct.mean():.1%} right; entropies over the top "
        f"{sentinel.top_k}.",
        highlight=False,
    )
    if len(names) < 3:
        console.print("With three slices or more, each would be estimated by the others here.", highlight=False)
        return
    with errors.status("leaving out one slice after the other"):
        left_out = leave_one_out(sentinel)
    estimated = [one.name for one in left_out]
    if passed_over := [name for name in names if name not in estimated]:
        console.print(Text(f"Without {', '.join(passed_over)} too few right or wrong responses are left to fit on."))
    if left_out:
        console.print("Each slice, estimated by a sentinel fitted on the others:", highlight=False)
        console.print(estimates_table(left_out))
        console.print(errors_line(left_out), highlight=False)


@monitor.command()
def estimate(
    sentinel_file: SentinelFile,
    traces: TracesFile,
    recalibrate: Recalibrate = None,
    json_: Annotated[Path | None, typer.Option("--json", help="File for all numbers.")] = None,
    top_k: TopK = None,
) -> None:
    """Estimate the accuracy of every slice in a file of traces, labelled or not.

    shoal monitor estimate sentinel.json traces.jsonl

    shoal monitor estimate sentinel.json traces.jsonl --recalibrate labelled.jsonl --json slices.json
    """
    from shoal.signals.sentinel import Sentinel
    from shoal.signals.slices import estimate_slices, label_next
    from shoal.signals.traces import read_traces

    if json_ is not None:
        check_writable(json_)
    sentinel, warn = Sentinel.load(sentinel_file), say(Console(stderr=True))
    affine = affine_of(sentinel, recalibrate, top_k, warn)
    found = [affine.apply(one) for one in estimate_slices(sentinel, read_traces(traces, top_k=top_k, warn=warn))]
    if json_ is not None:
        slices = [{**asdict(one), "alarm": one.alarm} for one in found]
        write_json(json_, {"affine": asdict(affine), "slices": slices, "label_next": label_next(found)})
    console = Console()
    console.print(estimates_table(found))
    for one in found:
        if one.alarm:
            console.print(
                Text.assemble(
                    ("Drift: ", "bold red"),
                    f"{one.name}: {one.drift_said}; do not trust its estimate.",
                )
            )
    console.print(next_line(found))
    labelled = [one for one in found if one.accuracy is not None]
    if len(labelled) > 1:
        console.print(errors_line(labelled), highlight=False)


@monitor.command()
def watch(
    sentinel_file: SentinelFile,
    traces: TracesFile,
    window: Annotated[int, typer.Option(help="Responses of a slice per estimate.")] = 200,
    every_s: Annotated[float, typer.Option(help="Seconds between looks at the file.")] = 5.0,
    html: Annotated[Path | None, typer.Option(help="File for a page with every slice over time.")] = None,
    port: Annotated[int | None, typer.Option(help="Port on this machine for Prometheus, at /metrics.")] = None,
    recalibrate: Recalibrate = None,
    once: Annotated[bool, typer.Option("--once", help="Read what is there and stop.")] = False,
    top_k: TopK = None,
) -> None:
    """Follow a growing file of traces until Ctrl-C: an estimate per slice and window, a page, numbers for Prometheus.

    shoal monitor watch sentinel.json traces.jsonl --html slices.html --port 9464

    shoal monitor watch sentinel.json traces.jsonl --window 50 --html slices.html --once
    """
    from shoal.signals.dashboard import write_dashboard
    from shoal.signals.sentinel import Sentinel
    from shoal.signals.watch import Watch, WatchMetrics

    if html is not None:
        check_writable(html)
    if not 0 < every_s <= 86_400:
        raise InvalidInput(f"--every-s must be above 0 and at most a day, 86400, got {every_s}")
    errors = Console(stderr=True)
    sentinel = Sentinel.load(sentinel_file)
    watching = Watch(
        sentinel,
        traces,
        window=window,
        top_k=top_k,
        affine=affine_of(sentinel, recalibrate, top_k, say(errors)),
        warn=lambda message: errors.print(Text(f"No trace: {message}")),
    )
    metrics = None
    if port is not None:
        metrics = WatchMetrics(watching)
        metrics.serve(port)
    console = Console()
    with suppress(KeyboardInterrupt):  # the way to end it
        while True:
            for filled in watching.poll(final=once):
                one = filled.estimate
                console.print(
                    Text(
                        f"{one.name} window {filled.number}: {one.estimate:.1%} ({one.low:.1%} to {one.high:.1%})"
                        + (f", drifted: {one.drifted}" if one.alarm else "")
                    )
                )
            if metrics is not None:
                metrics.update()
            if html is not None:
                write_dashboard(watching, html, refresh_s=every_s)
            if once:
                break
            time.sleep(every_s)
    latest = watching.latest()
    console.print(next_line(latest) if latest else "No window is full yet.")


def say(console: Console) -> Callable[[str], None]:
    """Who prints notes."""
    return lambda message: console.print(Text(message), soft_wrap=True)


def next_line(found: Sequence[SliceEstimate]) -> Text:
    """Which slice to label next."""
    from shoal.signals.slices import label_next

    name = label_next(found)
    return Text("Every slice has labels." if name is None else f"Label next: {name}.")


def affine_of(sentinel: Sentinel, labelled: Path | None, top_k: int | None, warn: Callable[[str], None]) -> Affine:
    """The recalibration by a file of labelled slices; none without one."""
    from shoal.signals.slices import Affine, estimate_slices
    from shoal.signals.traces import read_traces

    if labelled is None:
        return Affine()
    return Affine.fit(estimate_slices(sentinel, read_traces(labelled, top_k=top_k, warn=warn)))


def estimates_table(found: Sequence[SliceEstimate]) -> Table:
    """A row per slice; the last column where there are labels."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("slice")
    headers = ["n", "estimate", "95% interval", "outside", "drift", "length\nalone", "ATC"]
    labelled = any(one.accuracy is not None for one in found)
    for header in (*headers, *(["by\nlabels"] if labelled else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for one in found:
        shares = [f"{one.low:.1%} to {one.high:.1%}", f"{one.outside:.1%}"]
        row = [str(one.count), f"{one.estimate:.1%}", *shares, f"{one.drift:.2f}" + ("!" if one.alarm else "")]
        row += [f"{one.length_only:.1%}", f"{one.atc:.1%}"]
        if labelled:
            row.append("" if one.accuracy is None else f"{one.accuracy:.1%}")
        table.add_row(Text(one.name), *row)
    return table


def errors_line(found: Sequence[SliceEstimate]) -> str:
    """Mean absolute errors and rank correlations of the estimates and of both baselines, over labelled slices."""
    from shoal.signals.slices import errors_of

    said = [
        f"{name} {one.mean_absolute_error:.3f} (rank correlation {one.rank_correlation:.2f})"
        for name, one in errors_of(found).items()
    ]
    return f"Mean absolute error over {len(found)} slices: {', '.join(said)}."
