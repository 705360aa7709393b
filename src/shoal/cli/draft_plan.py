"""`shoal draft-plan`: which layers of a model should draft for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from shoal.cli import options
from shoal.cli.job import complete
from shoal.cli.options import option
from shoal.cli.prompts import Format, read_prompts
from shoal.draft.plan_search import PlanSearch, Promise, SearchConfig, SearchResult
from shoal.engine.engine import Engine
from shoal.engine.intake import encode
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput
from shoal.files import check_writable


def draft_plan(
    model: options.Model,
    prompts: Annotated[str, typer.Argument(help="JSONL, CSV or text, a prompt per line; - is standard input.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the plan, JSON; always the best one so far.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted OUT, or with more --trials.")
    ] = False,
    layers: Annotated[int | None, typer.Option(help="Layers that draft. Default: as many as promise most.")] = None,
    trials: Annotated[int, typer.Option(help="Sets of layers to measure.")] = 300,
    limit: Annotated[int | None, typer.Option(help="Use the first so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens that the model writes per prompt, greedily.")] = 48,
    format: Annotated[Format | None, typer.Option(help="Of PROMPTS. Default: by its suffix, text for -.")] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Field or column that holds the prompt. Default: prompt, or the only column.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    dtype: options.Dtype = "auto",
    device: Annotated[str, option("Model", "cpu, cuda or cuda:1.")] = "cpu",
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Search the layers that draft best for a model, on what it writes itself: for `shoal generate --draft-plan`.

    shoal draft-plan shoal-e2e prompts.txt -o draft_plan.json

    shoal draft-plan Qwen/Qwen3-0.6B prompts.jsonl -o draft_plan.json --layers 8 --limit 32
    """
    check_writable(out)
    if limit is not None and limit < 1:
        raise InvalidInput(f"--limit must be 1 or more, got {limit}")
    if out.is_file() != resume:
        raise InvalidInput(
            f"{out} does not exist: leave --resume out"
            if resume
            else f"{out} exists: go on with --resume, or choose another name"
        )
    config = SearchConfig(num_layers=layers, trials=trials, seed=seed)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    lines = read_prompts(prompts, format=format, column=prompt_column)[:limit]
    console = Console(stderr=True)
    engine = Engine.from_pretrained(model, dtype=dtype, device=device, revision=revision, token=token)
    done = complete(engine, lines, sampling, console=console, label="writing")
    texts = [(encode(line.prompt, engine.tokenizer), one.token_ids) for line, one in zip(lines, done, strict=True)]
    search = PlanSearch(engine, texts, config, model=model)
    if resume:
        search.resume(out)
    columns = (
        TextColumn("searching"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
            bar = progress.add_task("searching", total=trials, best="")

            def show(num_tried: int, best: Promise) -> None:
                told = f"agreement {best.agreement:.1%}, gain {best.gain:.2f}"
                progress.update(bar, completed=num_tried, best=told)

            result = search.run(out, report=show)
    except KeyboardInterrupt:
        kept = (
            f"{out} has the best plan so far; the same command with --resume goes on"
            if out.is_file()
            else "nothing was kept"
        )
        console.print(f"Interrupted: {kept}.", soft_wrap=True, highlight=False)
        raise typer.Exit(130) from None
    to_read = Console()
    to_read.print(promises_table(result))
    to_read.print(
        f"\n{result.num_tokens[0]} tokens searched on, {result.num_tokens[1]} held out; cost: FLOPs of a drafted token over one at "
        f"full depth; gain: predicted tokens for the cost of one, at the draft length beside it. {out}: the plan, for "
        "shoal generate --draft-plan.",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def promises_table(result: SearchResult) -> Table:
    """A row for what was found, one for what would draft without it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("layers", no_wrap=True)
    for column in (
        "cost",
        "agreement\nsearched",
        "agreement\nheld out",
        "draft\ntokens",
        "tokens per\npass",
        "gain\nheld out",
    ):
        table.add_column(column, justify="right")
    for name, one in (("found", result.found), ("draft=self", result.usual)):
        first, last = one.plan.active(0), one.plan.active(one.plan.horizon or 0)
        numbers = " ".join(map(str, first)) + ("" if first == last else f", in the end {' '.join(map(str, last))}")
        promise = one.held_out
        table.add_row(
            name,
            numbers,
            f"{promise.cost:.2f}",
            f"{one.searched.agreement:.1%}",
            f"{promise.agreement:.1%}",
            str(promise.draft_tokens),
            f"{promise.tokens_per_pass:.2f}",
            f"{promise.gain:.2f}",
        )
    return table
