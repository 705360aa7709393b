"""`shoal reproduce`: check a paper's claims on a model of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from shoal.cli import options
from shoal.cli.options import option
from shoal.cli.progress import stages


def reproduce(
    paper: Annotated[Literal["skipdecode"], typer.Argument(help="skipdecode: arXiv 2307.02628.")],
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="A checkpoint directory or a hub id.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIRECTORY", help="Checkpoints, frontiers and the result.")
    ],
    data: Annotated[
        str, typer.Option(help="Directory of the E2E NLG data; e2e stands for $SHOAL_DATA/e2e_nlg (../shared/data).")
    ] = "e2e",
    depths: Annotated[
        str, option("Depth", "Mean shares of the layers, separated by commas.", metavar="SHARES")
    ] = "1/2,1/3,1/4,1/5",
    epochs: Annotated[float, option("Training", "Passes over the data, dense first, then as many in each way.")] = 2.0,
    steps: Annotated[int | None, option("Training", "Optimizer steps, instead of --epochs.")] = None,
    lr: Annotated[float, option("Training", "Peak learning rate of AdamW; 3% warm-up, then a cosine.")] = 2e-5,
    batch_size: Annotated[int, option("Training", "Examples per optimizer step.")] = 128,
    accumulate: Annotated[int, option("Training", "Micro-batches per step; more of them need less memory.")] = 1,
    bfloat16: Annotated[bool, option("Training", "Matrix products in bfloat16.", "--bfloat16")] = False,
    gradient_checkpointing: Annotated[
        bool, option("Training", "Trade time for memory.", "--gradient-checkpointing")
    ] = False,
    limit: Annotated[int | None, option("Running", "First so many test inputs only.")] = None,
    device: Annotated[str | None, option("Running", "cpu or cuda. Default: the GPU where there is one.")] = None,
    threads: Annotated[int | None, option("Running", "CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, option("Running", "Of data order, depths, dropout, and of resamples.")] = 0,
) -> None:
    """Check the claims of a paper one by one: train what it takes, measure it, and print a verdict on each.

    Go on with an interrupted run by the same command: finished stages are kept.

    shoal reproduce skipdecode --model facebook/opt-1.3b --data e2e --out runs/skipdecode --bfloat16
    """
    # Here, not above: transformers takes seconds to import, and other commands do not need its Trainer.
    from transformers.utils import logging

    from shoal.evaluate import reproduce as reproduction
    from shoal.evaluate.reproduce_config import ReproduceConfig
    from shoal.evaluate.reproduce_tables import describe

    config = ReproduceConfig(
        model=model,
        data=data,
        depths=tuple(options.parse_depth(depth) for depth in options.names(depths)),
        epochs=epochs,
        steps=steps,
        learning_rate=lr,
        batch_size=batch_size,
        accumulate=accumulate,
        bfloat16=bfloat16,
        gradient_checkpointing=gradient_checkpointing,
        limit=limit,
        device=device,
        threads=threads,
        seed=seed,
    )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bar of loading weights
    console = Console(stderr=True)
    with stages(console) as show:
        result = reproduction.reproduce(config, out, report=show)
    print(describe(result))
    console.print(
        f"{out / reproduction.FILE_NAME}; frontiers with their reports in {out / 'frontiers'}",
        highlight=False,
        soft_wrap=True,
    )
