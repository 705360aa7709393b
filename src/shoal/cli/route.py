"""`shoal route`: train a router that picks a request's layers from its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.cli import options
from shoal.cli.options import option


def route(
    model: options.Model,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL, each line with 'prompt' and 'completion'.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIRECTORY", help="Where the router goes.")],
    depth: Annotated[
        float,
        typer.Option(
            parser=options.parse_depth, metavar="SHARE", help="Mean share of the layers that DATA's prompts get."
        ),
    ],
    kind: Annotated[
        Literal["first", "dr-llm"],
        typer.Option(
            help="first: gates on the frozen model; dr-llm: labels by tree search, for answers that it gets right."
        ),
    ] = "first",
    recover: Annotated[
        Path | None,
        option(
            "Recovery",
            "first: also train LoRA adapters under the router; the checkpoint goes here.",
            metavar="DIRECTORY",
        ),
    ] = None,
    lora_rank: Annotated[int, option("Recovery", "Rank of the adapters.")] = 16,
    epochs: Annotated[float, option("Recovery", "Passes over DATA.")] = 1.0,
    lr: Annotated[float, option("Recovery", "Peak learning rate.")] = 3e-4,
    steps: Annotated[int, option("Training", "Optimizer steps of the router.")] = 200,
    simulations: Annotated[int, option("Training", "dr-llm: layer sets tried per example.")] = 50,
    batch_size: Annotated[int, option("Training", "Examples per step, and per search.")] = 64,
    seed: Annotated[int, option("Training", "Of data order, search and random weights.")] = 0,
) -> None:
    """Train a router: it reads the prompt's states and fixes which layers the completion runs.

    shoal route Qwen/Qwen3-0.6B pairs.jsonl -o router --depth 1/2

    shoal generate Qwen/Qwen3-0.6B prompts.jsonl -o out.jsonl --router router
    """
    # Here, not above: transformers takes seconds to import, and other commands do not need its Trainer.
    from transformers.utils import logging

    from shoal.depth.first import FirstRouter
    from shoal.errors import InvalidInput
    from shoal.train.config import TuneConfig
    from shoal.train.recover import recover as train_adapters
    from shoal.train.route import RouteConfig, train_router

    if recover is not None and kind != "first":
        raise InvalidInput("--recover is FiRST's second step: use it with --kind first")
    config = RouteConfig(kind=kind, depth=depth, steps=steps, simulations=simulations, batch_size=batch_size, seed=seed)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bar of loading weights
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        router = train_router(model, data, out, config, report=show)
        console.print(f"{out}: a {kind} router, mean depth {depth:.3g} on {data}", highlight=False, soft_wrap=True)
        if recover is not None:
            assert isinstance(router, FirstRouter)
            tuning = TuneConfig(lora_rank=lora_rank, epochs=epochs, learning_rate=lr, batch_size=batch_size, seed=seed)
            train_adapters(
                model,
                router,
                data,
                recover,
                tuning,
                depth=depth,
                report=lambda step, total, loss: show("recovering", step, total),
            )
            console.print(
                f"{recover}: the checkpoint with merged adapters and the router", highlight=False, soft_wrap=True
            )
