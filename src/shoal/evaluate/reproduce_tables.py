"""The tables of a reproduction, as Markdown: for the terminal and for `docs/reproduction.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.evaluate.markdown import table
from shoal.evaluate.winners import number, written

SAVINGS = ("mean_layers", "flops", "bytes", "seconds")
"""Fields of `frontier_result.Spending`."""


def describe(result: Mapping[str, Any]) -> str:
    """The content of a `reproduction.json` as Markdown: the verdicts, what each rests on, and what depth saved."""
    settings, label = result["settings"], result["metric"]["label"]
    *by_depth, exactness = result["claims"]
    depths = ", ".join(written(one["depth"]) for one in by_depth[0]["comparisons"])
    sections = [
        f"{result['model']['name']}, {result['model']['num_layers']} layers; E2E, {result['data']['test_inputs']} test inputs; "
        f"{budget(result)}, {settings['batch_size']} examples a step, learning rate {settings['learning_rate']:g}, "
        f"seed {settings['seed']}; horizon {result['horizon']}; depths {depths}.",
        table(
            ["claim", "verdict", "depth by depth"],
            [
                [
                    f"{place}. {claim['title']}",
                    f"**{claim['verdict']}**",
                    ", ".join(f"{written(one['depth'])} {one['verdict']}" for one in claim.get("comparisons", ())),
                ]
                for place, claim in enumerate(result["claims"], 1)
            ],
        ),
    ]
    for place, claim in enumerate(by_depth, 1):
        sections += [f"**{place}. {claim['title'].capitalize()}.** Holds if {claim['rule']}."]
        sections += [compared(claim["comparisons"], label)]
        if place == 1:
            sections += ["What depth saved, as a share of the same checkpoint with every layer:", saved(result["arms"])]
    sections += [f"**4. {exactness['title'].capitalize()}.** Holds if {exactness['rule']}."]
    sections += [found_exact(exactness["measured"])]
    return "\n\n".join(sections)


def budget(result: Mapping[str, Any]) -> str:
    """How long was trained: what each run did, or what was asked for where a record is missing."""
    first, *ways = result["training"].values()
    if first and all(way and way == {**ways[0], "final_loss": way["final_loss"]} for way in ways):
        return (
            f"{first['steps']} steps dense, then {ways[0]['steps']} steps over {ways[0]['tokens']:,} tokens in each way"
        )
    settings = result["settings"]
    length = f"{settings['steps']} steps" if settings["steps"] else f"{settings['epochs']:g} epochs"
    return f"{length} dense, then {length} in each way"


def compared(comparisons: Sequence[Mapping[str, Any]], label: str) -> str:
    """The table of one claim, and below it why depths have no verdict."""
    rows, reasons = [], []
    for one in comparisons:
        numbers = ["-"] * 4
        if one["difference"] is not None:
            layers = " / ".join(f"{mean:.2f}" for mean in one["mean_layers"])
            numbers = [layers, *map(interval, one["scores"]), interval(one["difference"], sign=True)]
        rows.append([written(one["depth"]), *numbers, one["verdict"]])
        if one["reason"]:
            reasons.append(f"Depth {written(one['depth'])} {one['reason']}.")
    ours, other = comparisons[0]["ours"], comparisons[0]["other"]
    shown = table(["depth", "mean layers", f"{label}, {ours}", f"{label}, {other}", "difference", "verdict"], rows)
    return "\n\n".join([shown, *([" ".join(reasons)] if reasons else [])])


def saved(arms: Sequence[Mapping[str, Any]]) -> str:
    """The four savings of SkipDecode's arms, of decode passes and of whole requests."""
    rows = []
    for arm in arms:
        if arm["checkpoint"] == "skipdecode" and arm["depth"] < 1:
            spent = [arm["savings"][part] for part in ("decode", "request")]
            rows.append([written(arm["depth"]), *(share(one[saving]) for one in spent for saving in SAVINGS)])
    names = ("layers", "FLOPs", "bytes", "seconds")
    return table(["depth", *(f"{part} {name}" for part in ("decode", "request") for name in names)], rows)


def found_exact(found: Mapping[str, Any]) -> str:
    """What the comparison of exactness found, in two sentences."""
    parted = f"{found['num_parted']} of them part" if found["num_parted"] else "none of them parts"
    ties = f", {found['num_near_ties']} at a near-tie" if found["num_parted"] else ""
    return (
        f"{found['num_requests']} requests at several depths, up to {found['most_clocks']} clocks in one pass, "
        f"{found['num_tokens']} tokens: {parted} from what it writes alone{ties}. Log-probabilities differ by at most "
        f"{found['company_nats']:.1e} nats between alone and in company, and by at most {found['uncached_nats']:.1e} from a pass "
        "without a cache."
    )


def interval(score: Mapping[str, float], *, sign: bool = False) -> str:
    """A score, or a difference with its sign, and the interval."""
    value, low, high = (number(score[end], 2, sign=sign) for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def share(spent: Mapping[str, float | None]) -> str:
    """A share of the dense model's, in percent."""
    of_dense = spent["of_dense"]
    return "-" if of_dense is None else f"{100 * of_dense:.0f}%"
