"""`shoal info`: what a checkpoint is, and what a decode step costs at each depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shoal.cli import options
from shoal.cli.format import quantity, share
from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import Dense, DepthPolicy
from shoal.depth.shape import ModelShape
from shoal.depth.skipdecode import SkipDecode
from shoal.errors import CheckpointError, InvalidPlan
from shoal.models.checkpoint import Checkpoint, load_tokenizer, read_sizes
from shoal.models.directory import resolve
from shoal.models.families import Family
from shoal.models.weights import DecoderConfig

DEPTHS = (1, 2, 3, 4, 5)
"""The depths shown are 1 over these."""


def info(
    model: options.Model,
    *,
    batch: Annotated[int, typer.Option(min=1, help="Rows that share a decode step.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of their prompts.")] = 128,
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Show a checkpoint's sizes, what it was tuned for, and the bytes that a decode step must move at each depth.

    Weights are checked by name and shape where they are on this machine; they are neither fetched nor read.

    shoal info shoal-e2e

    shoal info models/opt-1.3b --batch 32 --dtype bfloat16
    """
    directory = resolve(model, revision=revision, token=token, weights=None)
    tuned = TunedDepth.load(directory)
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        checkpoint = Checkpoint.open(directory, dtype=dtype)
        config, family, stored = checkpoint.config, checkpoint.family, checkpoint.dtype
        parameters = quantity(checkpoint.check())
    else:
        config, family, stored = read_sizes(directory, dtype=dtype)
        shape = config.shape
        about = shape.num_layers * shape.layer_weights + shape.head_weights * (1 if family.tied else 2)
        parameters = f"about {quantity(about)} by config.json; the weights are not on this machine"
    facts = facts_of(config, family, directory, tuned) | {
        "parameters": parameters,
        "dtype": str(stored).removeprefix("torch."),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for fact in facts.items():
        table.add_row(*fact)
    console = Console()
    console.print(table)
    console.print("\n" + heading(config.shape, tuned, batch=batch, prompt_tokens=prompt_tokens), soft_wrap=True)
    console.print(depths_table(config.shape, tuned, batch=batch, prompt_tokens=prompt_tokens))


def facts_of(config: DecoderConfig, family: Family, directory: Path, tuned: TunedDepth | None) -> dict[str, str]:
    """Sizes and properties by name."""
    shape = config.shape
    heads = f"{shape.num_heads} heads of {shape.head_dim}"
    if shape.num_kv_heads != shape.num_heads:
        heads += f", {shape.num_kv_heads} for keys and values"
    positions = f"{config.max_positions} {'rotary' if config.rotary else 'learned'}"
    if config.sliding_window is not None:
        positions += f"; requests of at most {config.sliding_window} tokens (sliding window)"
    try:
        tokenizer = load_tokenizer(directory)
        tokens = f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"
    except CheckpointError as error:
        tokens = str(error)
    if tuned:
        depths = ", ".join(f"{depth:.3g}" for depth in tuned.depths)
        tuned_for = f"{tuned.policy} at depth {depths}; horizon {tuned.horizon}, {tuned.warmup_layers} warm-up"
    else:
        tuned_for = "nothing (no depth_plan.json): skipping layers will cost much quality, see `shoal tune`"
    return {
        "family": config.family,
        "layers": f"{shape.num_layers} of width {shape.hidden_size}",
        "attention": heads,
        "MLP": f"{shape.intermediate_size}{' gated' if shape.gated_mlp else ''}, {config.activation}",
        "vocabulary": f"{shape.vocab_size}, head {'tied to the embedding' if family.tied else 'of its own'}",
        "positions": positions,
        "tokenizer": tokens,
        "tuned for": tuned_for,
    }


def horizon_and_warmup(tuned: TunedDepth | None) -> tuple[int, int]:
    """What the checkpoint was tuned with, or 64 tokens and one layer."""
    return (tuned.horizon, tuned.warmup_layers) if tuned else (64, 1)


def heading(shape: ModelShape, tuned: TunedDepth | None, *, batch: int, prompt_tokens: int) -> str:
    """What the numbers of `depths_table` are for."""
    horizon, warmup = horizon_and_warmup(tuned)
    lowest = f"{warmup + 1}/{shape.num_layers}"
    return f"SkipDecode over {horizon} new tokens after {prompt_tokens}, batch {batch}; depths from {lowest} to 1 are possible"


def depths_table(shape: ModelShape, tuned: TunedDepth | None, *, batch: int, prompt_tokens: int) -> Table:
    """SkipDecode at depth 1 to 1/5: layers, and the least bytes that a decode step moves, averaged over the horizon."""
    horizon, warmup = horizon_and_warmup(tuned)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("depth")
    for column in ("layers, first to last", "mean", "bytes per step", "of dense"):
        table.add_column(column, justify="right")

    def bytes_per_step(policy: DepthPolicy) -> float:
        plan = policy.plan(shape.num_layers, prompt_tokens=prompt_tokens, max_new_tokens=horizon + 1)
        cost = plan.cost(shape, prompt_tokens=prompt_tokens, new_tokens=horizon + 1, batch=batch)
        return cost.decode_bytes / horizon

    dense = bytes_per_step(Dense())
    for part in DEPTHS:
        name = "1" if part == 1 else f"1/{part}"
        policy = SkipDecode(depth=1 / part, horizon=horizon, warmup_layers=warmup)
        try:
            last, first = policy.bounds(shape.num_layers)
        except InvalidPlan:
            table.add_row(name, f"not with {shape.num_layers} layers", "", "", "")
            continue
        plan = policy.plan(shape.num_layers, max_new_tokens=horizon + 1)
        mean = plan.mean_depth(horizon) * shape.num_layers
        step = bytes_per_step(policy)
        table.add_row(name, f"{first} to {last}", quantity(mean), quantity(step, "B"), share(step, dense))
    return table
