"""The arms of the recipe study: two stages of training each, and the plans that they are evaluated under.

Every arm starts from random weights and takes two stages of equally many steps on the same batches with the same learning rates:
what differs is in the stages' fields. Most arms share their first stage, 12 layers trained dense. Arms with a router or with
confidence exits are trained and run by `recipe_routers.py` and `recipe_measure.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from shoal.depth.policies import POLICIES

NUM_LAYERS = 12
BUDGETS = (1.0, 1 / 2, 1 / 3, 1 / 5)
"""Depths at which arms are compared."""
ANY = (1.0, 1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
"""Depths of any-depth training, `shoal tune`'s default."""
SMALL = {6: 1 / 2, 4: 1 / 3, 3: 1 / 5, 2: 1 / 5}
"""Layers of the small dense models, and the budget that they compete at. 1/5 of 12 layers is 2.4, so two sizes stand around it."""
ROUTER_SHARE = 1 / 4
"""Share of its stage that FiRST spends on its router. The router has width + 1 weights a layer and settles within some hundred
steps, while the adapters have to do in the rest what other arms do in the whole stage."""
CALM_ON = ("dense", "any-early-termination")
"""Arms whose checkpoints also run under CALM: one that was never trained to end early, one trained for it at every depth."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage of training does, beside what all have in common; fields as in `TuneConfig`."""

    num_layers: int = NUM_LAYERS
    policy: str = "skipdecode"
    depths: tuple[float, ...] = (1.0,)
    depth_sampling: str = "even"
    warmup_layers: int = 1
    distill: float = 0.0
    lora_rank: int | None = None
    rate: float = 1.0
    """Learning rate as a multiple of the stage's own; adapters want a larger one."""
    router_share: float = 0.0
    """Share of the steps that train a FiRST router on the frozen network, at the one depth of `depths`; LoRA adapters recover in
    the rest."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Two stages, and where they are measured."""

    about: str
    first: Stage = Stage()
    second: Stage
    evaluate: tuple[tuple[str, float, float], ...]
    """(policy, depth, budget): what is run, and the budget that it competes at. `first` is the router that the second stage has
    trained; `dr-llm` one that is searched for after both stages; `calm` exits by confidence, in a table of its own."""


def at(policy: str, *depths: float) -> tuple[tuple[str, float, float], ...]:
    """A policy at depths that are their own budgets."""
    return tuple((policy, depth, depth) for depth in depths)


def name_of(depth: float) -> str:
    """`1/3` as people write it."""
    return str(Fraction(depth).limit_denominator(NUM_LAYERS))


def arms() -> dict[str, Arm]:
    """All arms by name."""
    any_depth = Stage(depths=ANY)
    everywhere = at("skipdecode", *BUDGETS)
    found = {
        "dense": Arm(about="12 layers, dense; skipped without tuning", second=Stage(), evaluate=everywhere),
        "any": Arm(about="dense, then any depth", second=any_depth, evaluate=everywhere),
        "any-scratch": Arm(
            about="any depth from the start", first=any_depth, second=any_depth, evaluate=everywhere
        ),
        "any-no-warmup": Arm(
            about="any depth, no layer warms up", second=replace(any_depth, warmup_layers=0), evaluate=everywhere
        ),
        "any-lora": Arm(
            about="any depth, LoRA of rank 16", second=replace(any_depth, lora_rank=16, rate=3.0), evaluate=everywhere
        ),
        "any-distill": Arm(
            about="any depth, half the loss from the dense model", second=replace(any_depth, distill=0.5),
            evaluate=everywhere,
        ),
        "any-need": Arm(
            about="any depth, drawn by need", second=replace(any_depth, depth_sampling="need"), evaluate=everywhere
        ),
        "any-distill-need": Arm(
            about="any depth, distilled and drawn by need",
            second=replace(any_depth, distill=0.5, depth_sampling="need"), evaluate=everywhere,
        ),
    }  # fmt: skip
    for policy in POLICIES:
        if policy != "skipdecode":
            found[f"any-{policy}"] = Arm(
                about=f"dense, then any depth of {policy}",
                second=replace(any_depth, policy=policy),
                evaluate=at(policy, *BUDGETS),
            )
    for policy in POLICIES:
        for depth in BUDGETS[1:]:
            found[f"one-{policy}-{name_of(depth).replace('/', '_')}"] = Arm(
                about=f"dense, then {policy} at {name_of(depth)} alone",
                second=Stage(policy=policy, depths=(depth,)),
                evaluate=at(policy, depth),
            )
    for depth in BUDGETS[1:]:
        found[f"first-{name_of(depth).replace('/', '_')}"] = Arm(
            about=f"dense, then a FiRST router at {name_of(depth)} and LoRA of rank 16 under it",
            second=Stage(depths=(depth,), lora_rank=16, rate=3.0, router_share=ROUTER_SHARE),
            evaluate=at("first", depth),
        )
    for depth in BUDGETS[1:]:
        found[f"dr-llm-{name_of(depth).replace('/', '_')}"] = Arm(
            about=f"the network of `dense`, a Dr.LLM router at {name_of(depth)}",
            second=Stage(),
            evaluate=at("dr-llm", depth),
        )
    for name in CALM_ON:
        found[f"calm-{name}"] = replace(
            found[name], about=f"the network of `{name}` under CALM", evaluate=at("calm", *BUDGETS[1:])
        )
    for layers, budget in SMALL.items():
        stage = Stage(num_layers=layers)
        found[f"small-{layers}"] = Arm(
            about=f"{layers} layers, dense", first=stage, second=stage, evaluate=(("skipdecode", 1.0, budget),)
        )
    return found
