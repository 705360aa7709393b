"""`shoal tune`: train a checkpoint so that fewer layers are enough."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from shoal.errors import InvalidInput

DEFAULT_DEPTHS = "1,1,1/2,1/3,1/4,1/5"


def tune(
    model: Annotated[str, typer.Argument(help="Checkpoint to start from: a directory or a hub id.")],
    data: Annotated[Path, typer.Argument(help="JSONL file, each line with 'prompt' and 'completion'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the new checkpoint.")],
    depths: Annotated[
        str, typer.Option(help="Depths to tune for, one drawn per batch; name one twice to draw it twice as often.")
    ] = DEFAULT_DEPTHS,
    horizon: Annotated[
        int | None, typer.Option(help="Tokens over which depth falls. Default: the data's median completion length.")
    ] = None,
    warmup_layers: Annotated[int, typer.Option(help="Bottom layers that always run.")] = 1,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW (3% warm-up, then cosine).")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Examples per optimizer step.")] = 64,
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step, to save memory.")] = 1,
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA adapters of this rank, merged at the end.")] = None,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Matrix products in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Trade time for memory.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints of the run.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of data order, depths and dropout.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same settings.")
    ] = False,
) -> None:
    """Fine-tune a checkpoint for one depth, or for a set of depths at once.

    The result is an ordinary Hugging Face checkpoint with depth_plan.json beside it.

    Examples:

      shoal tune facebook/opt-125m pairs.jsonl -o tuned --lr 2e-5

      shoal tune facebook/opt-125m pairs.jsonl -o half-depth --depths 1/2 --horizon 64 --epochs 2

      shoal tune facebook/opt-125m pairs.jsonl -o tuned --lora-rank 16 --accumulate 8 --bfloat16
    """
    # Here, not above: transformers takes seconds to import, and other commands do not need it.
    from rich.console import Console

    from shoal.train.tune import TuneConfig
    from shoal.train.tune import tune as run

    console = Console(stderr=True)
    config = TuneConfig(
        depths=parse_depths(depths),
        horizon=horizon,
        warmup_layers=warmup_layers,
        epochs=epochs,
        learning_rate=lr,
        batch_size=batch_size,
        accumulate=accumulate,
        lora_rank=lora_rank,
        bfloat16=bfloat16,
        gradient_checkpointing=gradient_checkpointing,
        save_every=save_every,
        seed=seed,
    )

    def show(step: int, num_steps: int, loss: float) -> None:
        console.print(f"step {step}/{num_steps}  loss {loss:.3f}", highlight=False)

    result = run(model, data, output, config, resume=resume, report=show)
    console.print(
        f"{result.output}: {result.num_examples} examples, {result.steps} steps, loss {result.final_loss:.3f}, "
        f"horizon {result.horizon}, {result.seconds:.0f} s",
        highlight=False,
    )


def parse_depths(text: str) -> tuple[float, ...]:
    """`"1,1/2,0.25"` as numbers. Raises `InvalidInput` for anything else."""
    try:
        return tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise InvalidInput(f"--depths {text!r}: expected numbers or fractions with commas, such as 1,1/2,1/4") from None
