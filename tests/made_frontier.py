"""A frontier made by hand, as `shoal frontier` would write it."""

from __future__ import annotations

from dataclasses import replace

from shoal.evaluate.bootstrap import Score
from shoal.evaluate.frontier_result import (
    Arm,
    Example,
    FrontierResult,
    LengthBand,
    MetricInfo,
    PositionLoss,
    Refused,
    Savings,
    Spending,
    Spent,
)

BLEU = MetricInfo(name="bleu", label="BLEU", higher_is_better=True)
SER = MetricInfo(name="slot_error_rate", label="Slot error rate", higher_is_better=False)
LAYERS = 12
FLOPS = 3.1e8
"""Of the dense arm's decode passes."""


def spending(depth: float, flops: float, num_layers: int, scale: float) -> Spending:
    """Costs at a depth: the head, a tenth, costs the same at any."""
    share = 0.1 + 0.9 * depth
    return Spending(
        mean_layers=Spent(value=num_layers * depth, of_dense=depth),
        flops=Spent(value=flops * share * scale, of_dense=share),
        bytes=Spent(value=4 * flops * share * scale, of_dense=share),
        seconds=Spent(value=0.004 * share * scale, of_dense=share),
    )


def arm(
    policy: str,
    depth: float,
    bleu: float,
    *,
    half_width: float = 1.0,
    model: str = "shoal-e2e",
    flops: float = FLOPS,
    num_layers: int = LAYERS,
    dense_bleu: float = 65.0,
) -> Arm:
    """An arm with a BLEU score and, a tenth of what is missing to 100, a slot error rate."""

    def scores(bleu: float) -> dict[str, Score]:
        errors = (100 - bleu) / 10
        return {
            "bleu": Score(bleu, bleu - half_width, bleu + half_width),
            "slot_error_rate": Score(errors, errors - half_width / 10, errors + half_width / 10),
        }

    gap = bleu - dense_bleu
    dense = policy == "dense"
    delta = {
        "bleu": Score(gap, gap - 0.4, gap + 0.4),
        "slot_error_rate": Score(-gap / 10, -gap / 10 - 0.04, -gap / 10 + 0.04),
    }
    return Arm(
        name=f"{model} {policy}" if dense else f"{model} {policy}@{depth:g}",
        model=model,
        policy=policy,
        depth=depth,
        plan=None,
        realised_mean_layers=num_layers * depth,
        num_layers=num_layers,
        mean_new_tokens=29.4,
        num_failed=0,
        scores=scores(bleu),
        delta={} if dense else delta,
        savings=Savings(
            decode=spending(depth, flops, num_layers, 1.0), request=spending((1 + depth) / 2, flops, num_layers, 2.0)
        ),
        by_length=tuple(
            LengthBand(label=label, count=210, scores=scores(bleu - loss))
            for label, loss in (
                ("up to 18 words", 0.0),
                ("19 to 24 words", 1 - depth),
                ("25 words and more", 3 - 3 * depth),
            )
        ),
        loss_by_position=tuple(
            PositionLoss(position=i, loss=0.4 + 2 / (i + 2) - gap * i / 600, count=630 - 10 * i) for i in range(48)
        ),
        seconds=12.0,
    )


def frontier() -> FrontierResult:
    """Two models, three policies at three depths; at 1/2 nobody wins, at 1/5 the small dense model does."""
    arms = [arm("dense", 1.0, 65.0)]
    for policy, fall in (("skipdecode", 0.6), ("unified", 4.0), ("early-termination", 9.0)):
        arms += [arm(policy, depth, 65.0 - fall * (1 / depth - 1)) for depth in (0.5, 1 / 3, 0.2)]
    # 3 layers, fewer FLOPs than any plan at 1/3.
    arms += [arm("dense", 1.0, 64.9, model="small-3", flops=0.25 * FLOPS, num_layers=3)]
    return FrontierResult(
        task="e2e",
        model=("shoal-e2e", "small-3"),
        settings={"policies": ["skipdecode", "unified", "early-termination"], "depths": [0.5, 1 / 3, 0.2], "limit": None},
        metrics=(BLEU, SER),
        arms=tuple(arms),
        refused=(Refused(name="shoal-e2e first@0.5", reason="the router needs training: shoal tune --policy first"),),
        examples=tuple(
            Example(
                prompt=f"name[The Mill {i}], eatType[pub], food[French]",
                references=("The Mill is a French pub.", "A French pub is The Mill."),
                outputs={a.name: f"The Mill {i} is a pub that serves French food." for a in arms},
            )
            for i in range(3)
        ),
        conditions={
            "processor": "a processor with 2 cores", "threads": 2, "torch": "2.13.0", "inputs": 630,
            "intervals": "95%, 1000 resamples of the inputs",
        },
    )  # fmt: skip


def language_modelling() -> FrontierResult:
    """One model, no dense arm, no texts, and costs that were not measured."""
    unmeasured = Spent(value=None, of_dense=None)
    result = frontier()
    arms = []
    for one in result.arms[1:3]:
        halves = [
            replace(part, seconds=unmeasured, bytes=unmeasured) for part in (one.savings.decode, one.savings.request)
        ]
        loss = {"bleu": Score(2.3, 2.29, 2.31)}
        savings = Savings(decode=halves[0], request=halves[1])
        arms.append(replace(one, scores=loss, delta={}, savings=savings, by_length=()))
    loss_metric = MetricInfo(name="bleu", label="Loss", higher_is_better=False)
    return replace(
        result, model=("shoal-e2e",), metrics=(loss_metric,), arms=tuple(arms), refused=(), examples=(), conditions={}
    )
