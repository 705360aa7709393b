"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from shoal.depth.plan import Dense, DepthPolicy
from shoal.depth.skipdecode import SkipDecode


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
    typer.Argument(
        metavar="MODEL", help="A checkpoint directory, a hub id, or shoal-e2e, the model that ships with Shoal."
    ),
]
Depth = Annotated[
    float | None,
    typer.Option(
        parser=parse_depth,
        metavar="SHARE",
        help="Mean share of the layers that a generated token runs, e.g. 1/2. Default: all.",
    ),
]
MinLayers = Annotated[
    int | None, typer.Option(help="Instead of --depth: layers that run from the horizon on, warm-up included.")
]
MaxLayers = Annotated[
    int | None, typer.Option(help="Instead of --depth: layers that the first generated token runs, warm-up included.")
]
Horizon = Annotated[
    int | None,
    typer.Option(
        help="Tokens over which the depth falls. Default: the one the checkpoint was tuned with, else --max-new-tokens."
    ),
]
WarmupLayers = Annotated[
    int | None, typer.Option(help="Bottom layers that always run. Default: the checkpoint's, else 1.")
]
Clock = Annotated[
    Literal["generated", "column"],
    typer.Option(
        help="What the depth falls with: generated tokens, or all columns, so that the prompt uses up the decay."
    ),
]
PromptLayers = Annotated[
    Literal["all", "max_layers"],
    typer.Option(help="Layers that the prompt runs: all, or only those of the first generated token."),
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the checkpoint says.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Token = Annotated[
    str | None, typer.Option(envvar="HF_TOKEN", show_envvar=True, help="Access token for the hub.", show_default=False)
]


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
