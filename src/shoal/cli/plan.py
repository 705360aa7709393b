"""`shoal plan`: which layers run for which token, and what that costs, before anything runs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoal.cli import options
from shoal.cli.format import quantity, share
from shoal.depth.checkpoint import TunedDepth
from shoal.depth.cost import BLOCK_TOKENS, PlanCost
from shoal.depth.plan import Dense, DepthPlan, DepthPolicy
from shoal.depth.shape import ModelShape
from shoal.depth.skipdecode import SkipDecode
from shoal.errors import InvalidInput
from shoal.models.checkpoint import read_sizes
from shoal.models.directory import resolve

PARTIAL = "·▏▎▍▌▋▊▉█"
"""A column that stands for several passes is filled from the left, as far as the layer serves them."""


def draw_plan(plan: DepthPlan, *, prompt_tokens: int, new_tokens: int, width: int = 80) -> Text:
    """The plan as a grid, top layer first: the prompt, then one column per decode pass, or per several if it is wide.

    A layer serves a prefix of the passes, so a column that stands for several is filled from the left without loss:

        layer  prompt · 2 decode passes
            2  ███ ██
            1  ███ █·
            0  ███ ██
    """
    passes = new_tokens - 1
    prompt_columns = min(prompt_tokens, max(4, width // 6))
    room = max(1, width - prompt_columns - 8)
    passes_per_column = max(1, -(-passes // room))
    each = "" if passes_per_column == 1 else f", {passes_per_column} to a column"
    text = Text(f"layer  prompt · {passes} decode passes{each}\n", style="dim")
    for layer in reversed(range(plan.num_layers)):
        text.append(f"{layer:5}  ", style="dim")
        runs = plan.runs_prompt[layer]
        text.append(("█" if runs else "·") * prompt_columns + " ", style="blue" if runs else "dim")
        for first in range(0, passes, passes_per_column):
            stands_for = min(passes_per_column, passes - first)
            served = min(max(plan.cutoffs[layer] - first, 0), stands_for)
            if served:
                text.append(PARTIAL[-(-served * 8 // stands_for)], style="green")
            else:
                text.append("·", style="dim")
        text.append("\n")
    return text


def cost_table(costs: dict[str, PlanCost], dense: PlanCost, shape: ModelShape | None) -> Table:
    """Costs of plans by name beside the dense one; without `shape` only those that layers alone decide."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("dense", justify="right")
    for name in costs:
        table.add_column(name, justify="right")
        table.add_column("of dense", justify="right", style="green")

    def row(label: str, values: list[float], unit: str, **style: Any) -> None:
        cells = [quantity(values[0], unit)]
        for value in values[1:]:
            cells += [quantity(value, unit), share(value, values[0])]
        table.add_row(label, *cells, **style)

    everything = [dense, *costs.values()]
    table.add_row("[bold]decode[/]")
    row("  mean layers", [cost.mean_layers for cost in everything], "")
    row("  layer-tokens", [cost.decode_layer_tokens for cost in everything], "")
    if shape:
        row("  FLOPs", [cost.decode_flops for cost in everything], "")
        row("  bytes moved", [cost.decode_bytes for cost in everything], "B")
    table.add_row("[bold]whole request[/]")
    row("  layer-tokens", [cost.layer_tokens for cost in everything], "")
    if shape:
        row("  FLOPs", [cost.flops for cost in everything], "")
        row("  bytes moved", [cost.bytes_moved for cost in everything], "B")
        block = BLOCK_TOKENS * shape.cache_values_per_token * shape.bytes_per_value
        row("  peak cache", [cost.peak_cache_blocks * block for cost in everything], "B")
    else:
        row("  peak blocks", [cost.peak_cache_blocks for cost in everything], "")
    return table


def plan(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Model whose sizes to use; its weights are neither fetched nor read."),
    ] = None,
    *,
    layers: Annotated[int | None, typer.Option(min=1, help="Instead of MODEL: a number of layers.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 35,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the completion.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Such requests that run together.")] = 1,
    depth: options.Depth = None,
    policy_name: options.Policy = "skipdecode",
    min_layers: options.MinLayers = None,
    max_layers: options.MaxLayers = None,
    horizon: options.Horizon = None,
    warmup_layers: options.WarmupLayers = None,
    clock: options.Clock = "generated",
    prompt_layers: options.PromptLayers = "all",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    token: options.Token = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan and its costs as JSON.")] = False,
) -> None:
    """Draw which layers run for which token, and what that costs.

    shoal plan shoal-e2e --depth 1/2 --prompt-tokens 35 --new-tokens 30

    shoal plan --layers 24 --min-layers 6 --max-layers 18 --horizon 64
    """
    policy = options.depth_policy(
        policy=policy_name,
        depth=depth,
        min_layers=min_layers,
        max_layers=max_layers,
        horizon=horizon,
        warmup_layers=warmup_layers,
        clock=clock,
        prompt_layers=prompt_layers,
    )
    if (model is None) == (layers is None):
        raise InvalidInput("give either MODEL or --layers")
    if model is None and (dtype != "auto" or revision is not None):
        raise InvalidInput("--dtype and --revision are of a MODEL; with --layers there is none")
    shape: ModelShape | None = None
    if model is not None:
        directory = resolve(model, revision=revision, token=token, weights=None)
        shape, tuned = read_sizes(directory, dtype=dtype)[0].shape, TunedDepth.load(directory)
        if tuned is not None:
            policy = tuned.fill(policy)
    # Costs that layers alone decide do not depend on the widths.
    shape_or_units = shape or ModelShape(
        num_layers=layers or 0, hidden_size=1, num_heads=1, num_kv_heads=1, head_dim=1, intermediate_size=1,
        gated_mlp=False, vocab_size=1,
    )  # fmt: skip
    num_layers = shape_or_units.num_layers

    def make(policy: DepthPolicy) -> DepthPlan:
        return policy.plan(num_layers, prompt_tokens=prompt_tokens, max_new_tokens=new_tokens)

    def cost(plan: DepthPlan) -> PlanCost:
        return plan.cost(shape_or_units, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)

    drawn = make(policy)
    dense = cost(make(Dense()))
    costs: dict[str, PlanCost] = {}
    if not isinstance(policy, Dense):
        costs["plan"] = cost(drawn)
    if isinstance(policy, SkipDecode):
        names: dict[Literal["all", "max_layers"], str] = {"all": "plan", "max_layers": "shallow prompt"}
        costs |= {name: cost(make(replace(policy, prompt=prompt))) for prompt, name in names.items()}
    if json_:
        table = {"dense": dense, **costs}
        print(json.dumps({"plan": drawn.to_dict(), "costs": {name: asdict(c) for name, c in table.items()}}))
        return
    console = Console()
    console.print(draw_plan(drawn, prompt_tokens=prompt_tokens, new_tokens=new_tokens, width=console.width))
    console.print(cost_table(costs, dense, shape))
