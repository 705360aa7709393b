"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from shoal.depth.plan import Dense, DepthPolicy
from shoal.depth.skipdecode import SkipDecode
from shoal.errors import InvalidPlan


def parse_depth(text: str) -> float:
    """A share of the layers, written as `0.5` or `1/2`."""
    try:
        numerator, _, denominator = text.partition("/")
        depth = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r} is not a share of the layers: write it as 0.5 or 1/2") from None
    if not 0 < depth <= 1:
        raise typer.BadParameter(f"{text} is outside the allowed range: above 0, at most 1")
    return depth


Model = Annotated[
    str,
    typer.Argument(help="A checkpoint directory, a hub id, or shoal-e2e, the model that ships with Shoal."),
]


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """A typer option in a panel of the help page; `names` where they are not those of the parameter."""
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


Depth = Annotated[
    float | None,
    option(
        "Depth",
        "Mean share of the layers that a generated token runs, e.g. 1/2. Default: all.",
        parser=parse_depth,
        metavar="SHARE",
    ),
]
MinLayers = Annotated[
    int | None, option("Depth", "Instead of --depth: layers that run from the horizon on, warm-up included.")
]
MaxLayers = Annotated[
    int | None, option("Depth", "Instead of --depth: layers that the first generated token runs, warm-up included.")
]
Horizon = Annotated[
    int | None,
    option(
        "Depth", "Tokens over which depth falls. Default: what the checkpoint was tuned with, else the most new tokens."
    ),
]
WarmupLayers = Annotated[
    int | None, option("Depth", "Bottom layers that always run. Default: the checkpoint's, else 1.")
]
Clock = Annotated[
    Literal["generated", "column"],
    option("Depth", "What depth falls with: generated tokens, or all columns, so that the prompt uses up the decay."),
]
PromptLayers = Annotated[
    Literal["all", "max_layers"],
    option("Depth", "Layers that the prompt runs: all, or only those of the first generated token."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "int8"],
    option("Model", "Of the weights; auto: the checkpoint's; int8: 8-bit products, on CPUs."),
]
Revision = Annotated[str | None, option("Model", "Branch, tag or commit of a hub id.")]
Token = Annotated[str | None, option("Model", "Access token for the hub.", envvar="HF_TOKEN", show_default=False)]


def depth_policy(
    *,
    depth: float | None,
    min_layers: int | None,
    max_layers: int | None,
    horizon: int | None,
    warmup_layers: int | None,
    clock: Literal["generated", "column"],
    prompt_layers: Literal["all", "max_layers"],
) -> DepthPolicy:
    """The policy that the options ask for: `Dense` where neither a depth nor bounds are given.

    Raises `InvalidPlan` where they contradict each other.
    """
    if depth is None and min_layers is None and max_layers is None:
        if (horizon, warmup_layers, clock, prompt_layers) != (None, None, "generated", "all"):
            raise InvalidPlan(
                "--horizon, --warmup-layers, --clock and --prompt-layers shape a plan: "
                "give it a depth with --depth, or with --min-layers and --max-layers"
            )
        return Dense()
    return SkipDecode(
        depth=depth,
        min_layers=min_layers,
        max_layers=max_layers,
        horizon=horizon,
        warmup_layers=warmup_layers,
        clock=clock,
        prompt=prompt_layers,
    )
