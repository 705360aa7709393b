"""`shoal tune`: train a checkpoint so that fewer layers are enough."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.cli import options
from shoal.cli.options import option


def tune(
    model: options.Model,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL, each line with 'prompt' and 'completion'.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIRECTORY", help="The new checkpoint.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of these settings.")] = False,
    depths: Annotated[
        str, option("Depth", "One is drawn per batch; name one twice to draw it twice as often.", metavar="SHARES")
    ] = "1,1,1/2,1/3,1/4,1/5",
    policy: options.Policy = "skipdecode",
    depth_sampling: Annotated[
        Literal["even", "need"],
        option("Depth", "need: depths whose loss exceeds the dense one by more come more often."),
    ] = "even",
    horizon: Annotated[
        int | None, option("Depth", "Tokens over which depth falls. Default: the median completion of DATA.")
    ] = None,
    warmup_layers: Annotated[int, option("Depth", "Bottom layers that always run.")] = 1,
    from_scratch: Annotated[
        bool, option("Start", "Random weights: of MODEL, config and tokenizer alone are read.", "--from-scratch")
    ] = False,
    num_layers: Annotated[
        int | None, option("Start", "With --from-scratch: fewer layers than the config of MODEL says.")
    ] = None,
    distill: Annotated[
        float,
        option(
            "Training",
            "Share of the loss that dense predictions of MODEL, or --teacher, teach, 0 to 1.",
            metavar="SHARE",
        ),
    ] = 0.0,
    teacher: Annotated[
        str | None,
        option(
            "Training",
            "Checkpoint that teaches, of the same tokenizer: what the result is to draft for.",
            metavar="MODEL",
        ),
    ] = None,
    epochs: Annotated[float, option("Training", "Passes over DATA.")] = 1.0,
    steps: Annotated[int | None, option("Training", "Optimizer steps, instead of --epochs.")] = None,
    lr: Annotated[float, option("Training", "Peak learning rate of AdamW; 3% warm-up, then a cosine.")] = 3e-4,
    batch_size: Annotated[int, option("Training", "Examples per optimizer step.")] = 64,
    accumulate: Annotated[int, option("Training", "Micro-batches per step; more of them need less memory.")] = 1,
    lora_rank: Annotated[
        int | None, option("Training", "Train LoRA adapters of this rank and merge them. Default: train all weights.")
    ] = None,
    bfloat16: Annotated[bool, option("Training", "Matrix products in bfloat16.", "--bfloat16")] = False,
    gradient_checkpointing: Annotated[
        bool, option("Training", "Trade time for memory.", "--gradient-checkpointing")
    ] = False,
    save_every: Annotated[int, option("Training", "Steps between states that --resume can go on from.")] = 200,
    seed: Annotated[int, option("Training", "Of data order, depths, dropout and random weights.")] = 0,
) -> None:
    """Fine-tune a checkpoint for one depth, or for a set of depths at once.

    The result is an ordinary Hugging Face checkpoint with depth_plan.json beside it.

    shoal tune Qwen/Qwen3-0.6B pairs.jsonl -o tuned --lr 2e-5 --bfloat16

    shoal tune EleutherAI/pythia-160m pairs.jsonl -o half --depths 1/2 --horizon 64 --epochs 2 --lr 2e-5

    shoal tune Qwen/Qwen3-0.6B pairs.jsonl -o tuned --lora-rank 16 --accumulate 8 --lr 1e-4

    shoal tune Qwen/Qwen3-0.6B pairs.jsonl -o tuned --policy unified --distill 0.5 --lr 2e-5

    shoal tune Qwen/Qwen3-0.6B written.jsonl -o drafter --depths 1 --distill 1 --teacher Qwen/Qwen3-8B --lr 2e-5
    """
    # Here, not above: transformers takes seconds to import, and other commands do not need its Trainer.
    from transformers.utils import logging

    from shoal.train import tune as training
    from shoal.train.config import TuneConfig

    config = TuneConfig(
        policy=policy,
        depths=tuple(options.parse_depth(depth.strip()) for depth in depths.split(",")),
        depth_sampling=depth_sampling,
        horizon=horizon,
        warmup_layers=warmup_layers,
        from_scratch=from_scratch,
        num_layers=num_layers,
        distill=distill,
        teacher=teacher,
        epochs=epochs,
        steps=steps,
        learning_rate=lr,
        batch_size=batch_size,
        accumulate=accumulate,
        lora_rank=lora_rank,
        bfloat16=bfloat16,
        gradient_checkpointing=gradient_checkpointing,
        save_every=save_every,
        seed=seed,
    )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bar of loading weights
    console = Console(stderr=True)
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        loss_column,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task("tuning", total=None, loss=float("nan"))

        def show(step: int, num_steps: int, loss: float) -> None:
            progress.update(bar, completed=step, total=num_steps, loss=loss)
            if not console.is_terminal:
                console.print(f"step {step}/{num_steps}  loss {loss:.3f}", highlight=False)

        result = training.tune(model, data, out, config, resume=resume, report=show)
    console.print(
        f"{result.output}: {result.num_examples} examples, {result.steps} steps, loss {result.final_loss:.3f}, "
        f"horizon {result.horizon}, {result.seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
