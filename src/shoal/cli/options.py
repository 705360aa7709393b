"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from shoal.depth.plan import Dense, DepthPolicy
from shoal.depth.policies import POLICIES
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


def names(listed: str) -> tuple[str, ...]:
    """The names in a list with commas; none of them twice.

    >>> names("skipdecode, unified,")
    ('skipdecode', 'unified')
    """
    return tuple(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))


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
Policy = Annotated[
    Literal["skipdecode", "early-termination", "unified", "hierarchical", "d3"],
    option("Depth", "Which layers run at a depth; some options below are SkipDecode's alone.", "--policy"),
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
    policy: str,
    depth: float | None,
    min_layers: int | None,
    max_layers: int | None,
    horizon: int | None,
    warmup_layers: int | None,
    clock: Literal["generated", "column"],
    prompt_layers: Literal["all", "max_layers"],
) -> DepthPolicy:
    """The policy that the options ask for: `Dense` where neither a depth nor bounds are given.

    Raises `InvalidPlan` where they contradict each other, or the policy has no such setting.
    """
    bounds = {"min_layers": min_layers, "max_layers": max_layers}
    shape = {
        "horizon": horizon,
        "warmup_layers": warmup_layers,
        "clock": None if clock == "generated" else clock,
        "prompt": None if prompt_layers == "all" else prompt_layers,
    }
    if depth is None and min_layers is None and max_layers is None:
        if policy != "skipdecode" or any(value is not None for value in shape.values()):
            raise InvalidPlan(
                "--policy, --horizon, --warmup-layers, --clock and --prompt-layers shape a plan: "
                "give it a depth with --depth, or with --min-layers and --max-layers"
            )
        return Dense()
    settings = {name: value for name, value in {**bounds, **shape}.items() if value is not None}
    for name in settings:
        if name not in POLICIES[policy].__dataclass_fields__:
            option_name = {"prompt": "prompt-layers"}.get(name, name.replace("_", "-"))
            raise InvalidPlan(f"--policy {policy} has no --{option_name}: leave it out, or use --policy skipdecode")
    made: DepthPolicy = POLICIES[policy](depth=depth, **settings)
    return made
