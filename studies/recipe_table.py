"""What the recipe study found: who wins at each budget, and CALM beside it. Everything comes from the arms' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from recipe_arms import BUDGETS, arms, name_of
from recipe_measure import CALM_BATCH
from shoal.evaluate.bootstrap import Score, Statistics, quotient
from shoal.evaluate.e2e import E2EInput
from shoal.evaluate.markdown import table
from shoal.evaluate.text import bleu_of
from study import conditions, read_json


def summarise(work: Path, split: str, inputs: list[E2EInput]) -> dict[str, Any]:
    """Everything that the table says, from the arms' files of one split; without texts and counts."""
    files = sorted((work / "arms").glob(f"*-{split}-seed*.json"))
    runs = [read_json(path) for path in files]
    pooled: dict[tuple[float, str], dict[str, Any]] = {}
    for one in runs:
        for row in one["rows"]:
            entry = pooled.setdefault((row["budget"], one["arm"]), {"runs": [], "rows": []})
            entry["runs"].append(one)
            entry["rows"].append(row)
    budgets = []
    for budget in BUDGETS:
        here = {name: entry for (at, name), entry in pooled.items() if at == budget}
        if here:
            budgets.append({"depth": budget, **compare(here)})
    order = [name for name in arms() if any(one["arm"] == name for one in runs)]
    spent = [read_json(work / f"budget-seed{seed}.json") for seed in sorted({one["seed"] for one in runs})]
    return {
        "settings": {**read_json(work / "study.json"), "split": split, "num_inputs": len(inputs)},
        "conditions": conditions(),
        "budget_of_an_arm": {unit: sorted({one[unit] for one in spent}) for unit in ("steps", "tokens")},
        "about": {name: arms()[name].about for name in order},
        "final_losses": {name: [one["final_losses"] for one in runs if one["arm"] == name] for name in order},
        "routers": {
            one["arm"]: {"seed": one["seed"], "tokens": one["tokens"], **one["router"]}
            for one in runs
            if "router" in one
        },
        "budgets": budgets,
        "claims": claims(pooled),
    }


def compare(whole: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arms that compete at one budget, best first, and CALM, which does not: its rows exit early, its batches do not.

    Arms are ranked on the seeds that all of them have, on all of each where there is none.
    """
    common = set.intersection(*(seeds_of(entry) for entry in whole.values()))
    entries = {name: of_seeds(entry, common) if common else entry for name, entry in whole.items()}
    score = {name: Statistics(summed(entry, "bleu_counts"), bleu_of).score().value for name, entry in entries.items()}
    order = sorted(entries, key=lambda name: -score[name])
    calm = [name for name in order if name.startswith("calm-")]
    plans = [name for name in order if name not in calm]
    best = entries[plans[0]] if plans else None
    return {
        "seeds": sorted(common),
        "arms": [standing(name, entries[name], best, whole[name]) for name in plans],
        "calm": [standing(name, entries[name], best, whole[name]) for name in calm],
    }


def seeds_of(entry: dict[str, Any]) -> set[int]:
    """The seeds that an arm has at a budget."""
    return {one["seed"] for one in entry["runs"]}


def of_seeds(entry: dict[str, Any], seeds: set[int]) -> dict[str, Any]:
    """What an arm did with some seeds only."""
    kept = [at for at, one in enumerate(entry["runs"]) if one["seed"] in seeds]
    return {part: [entry[part][at] for at in kept] for part in ("runs", "rows")}


def claims(pooled: dict[tuple[float, str], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the SkipDecode paper claims: BLEU of `any` minus that of another arm, paired, on the seeds that both have.

    Against `dense` at depth 1 (what is lost), and at its own depth against no warm-up layer and against early termination.
    """
    found = {}
    for other in ("dense", "any-no-warmup", "any-early-termination"):
        found[other] = [
            {
                "depth": budget,
                "bleu": rounded(statistics_of(of_seeds(one, both)).minus(statistics_of(of_seeds(against, both)))),
            }
            for budget in BUDGETS
            if (one := pooled.get((budget, "any")))
            and (against := pooled.get((1.0 if other == "dense" else budget, other)))
            and (both := seeds_of(one) & seeds_of(against))
        ]
    return {other: differences for other, differences in found.items() if differences}


def statistics_of(entry: dict[str, Any]) -> Statistics:
    """BLEU of an arm at a budget, seeds pooled."""
    return Statistics(summed(entry, "bleu_counts"), bleu_of)


def standing(name: str, entry: dict[str, Any], best: dict[str, Any] | None, whole: dict[str, Any]) -> dict[str, Any]:
    """An arm's scores at a budget, with its paired difference to the best one; `whole` has the seeds beyond those in `entry`, too.

    Seeds are pooled: what an input adds is summed over them, so that resamples are of inputs. Arms with different seeds are not
    compared in pairs.
    """
    rows, runs = entry["rows"], entry["runs"]
    seeds = [one["seed"] for one in runs]
    bleu = statistics_of(entry)
    by_seed = [Statistics(np.array(row["bleu_counts"], float), bleu_of).score().value for row in whole["rows"]]
    behind = None
    if best is not None and best is not entry and seeds == [one["seed"] for one in best["runs"]]:
        behind = rounded(statistics_of(best).minus(bleu))
    of_calm = [key for key in ("threshold", "batch_layers", "flops_percent") if key in rows[0]]
    return {
        "arm": name,
        "seeds": seeds,
        "mean_layers": round(float(np.mean([row["mean_layers"] for row in rows])), 2),
        **{key: [row[key] for row in rows] for key in of_calm},
        "bleu": rounded(bleu.score()),
        "bleu_by_seed": [round(value, 2) for value in by_seed],
        "behind_best": behind,
        "slot_error_rate": rounded(Statistics(summed(entry, "slot_counts"), quotient).score()),
        "train_s": [one["train_s"] for one in whole["runs"]],
    }


def summed(entry: dict[str, Any], counts: str) -> Any:
    """[N, K]: what each input adds, over the seeds."""
    return np.sum([np.array(row[counts], float) for row in entry["rows"]], axis=0)


def rounded(score: Score) -> dict[str, float]:
    """A score as JSON."""
    return {name: round(getattr(score, name), 2) for name in ("value", "low", "high")}


def shown(score: dict[str, float] | None) -> str:
    """A score in a table."""
    return "" if score is None else f"{Score(**score):.1f}"


def verdict(budget: dict[str, Any]) -> str:
    """Who wins at a budget, in sentences that follow the numbers."""
    best, *others = budget["arms"]
    at = f"At depth {name_of(budget['depth'])}"
    score = f"{best['bleu']['value']:.1f} BLEU at {best['mean_layers']:.1f} layers"
    if not others:
        return f"{at} only `{best['arm']}` has run ({score})."
    compared = [one for one in others if one["behind_best"] is not None]
    close = [one for one in compared if one["behind_best"]["low"] <= 0]
    if close:
        text = f"{at} `{best['arm']}` is best with {score}, but within chance of {listed(close)}."
        small = [one for one in compared if one["arm"].startswith("small-")]
        if small and not best["arm"].startswith("small-") and small[0] not in close:
            text += f" The small dense model `{small[0]['arm']}` is behind beyond chance."
    elif compared:
        text = f"{at} `{best['arm']}` wins with {score}; every other arm is behind it beyond chance."
        if len(compared) < len(others):
            text = text.replace("every other arm", "every other arm with its seeds")
    else:
        text = f"{at} `{best['arm']}` has the highest score, {score}."
    if apart := [one for one in others if one["behind_best"] is None]:
        text += f" With other seeds, and so not compared: {listed(apart)}."
    return text


def calm_verdict(budget: dict[str, Any]) -> str:
    """Where the better CALM stands at a budget, and what its batches wait for."""
    best, *_ = budget["calm"]
    behind = best["behind_best"]
    text = (
        f"At depth {name_of(budget['depth'])} `{best['arm']}` has {best['bleu']['value']:.1f} BLEU: rows exit after "
        f"{best['mean_layers']:.1f} layers on average, a step of {CALM_BATCH} rows runs {np.mean(best['batch_layers']):.1f}."
    )
    if behind is None:
        return text
    if behind["low"] > 0:
        return f"{text} That is behind the best plan or router beyond chance."
    if behind["high"] < 0:
        return f"{text} That is ahead of the best plan or router beyond chance."
    return f"{text} That is within chance of the best plan or router."


CLAIMS = {
    "dense": "the dense arm at depth 1",
    "any-no-warmup": "no warm-up layer",
    "any-early-termination": "early termination",
}
"""What SkipDecode is compared with."""


def claims_said(found: dict[str, list[dict[str, Any]]]) -> str:
    """The comparisons in a sentence."""
    parts = [
        f"{CLAIMS[other]}: "
        + ", ".join(f"{Score(**one['bleu']):+.1f} at {name_of(one['depth'])}" for one in differences)
        for other, differences in found.items()
    ]
    return f"SkipDecode (`any`), BLEU minus that of {'; of '.join(parts)} (paired)."


NEGLIGIBLE = 1.0
"""BLEU that may be lost where "negligible" is claimed; as in `shoal reproduce`."""
CLAIMED = {
    "dense": "1. negligible loss against dense",
    "any-no-warmup": "2. a warm-up layer helps",
    "any-early-termination": "3. skipping beats early termination",
}
"""What the SkipDecode paper says, by the arm that tells."""


def describe_claims(result: dict[str, Any]) -> str:
    """The paper's claims on the recipe study's networks, a row each, with verdicts by the rule of `docs/reproduction.md`."""
    rows = []
    for other, claim in CLAIMED.items():
        found = result["claims"].get(other, [])
        below, above = (-NEGLIGIBLE, -NEGLIGIBLE) if other == "dense" else (0.0, 0.0)
        plans = [one for one in found if one["depth"] < 1]  # at depth 1 nothing is skipped
        if (
            other == "any-no-warmup"
        ):  # 12 layers at 1/5: 3 to 2 layers with the warm-up, 4 to 1 without, so more than it differs
            plans = [one for one in plans if one["depth"] > 1 / 4]
        if not plans:
            continue
        measured = " · ".join(f"{Score(**one['bleu']):+.1f} at {name_of(one['depth'])}" for one in plans)
        if any(one["bleu"]["high"] < below for one in plans):
            judged = "does not hold"
        elif all(one["bleu"]["low"] > above for one in plans):
            judged = "holds"
        else:
            judged = "not shown"
        rows.append([claim, measured, judged])
    return table(["claim", "BLEU of SkipDecode, tuned for any depth, minus the other's", "here"], rows)


def listed(some: list[dict[str, Any]]) -> str:
    """Names of arms in a sentence."""
    return ", ".join(f"`{one['arm']}`" for one in some)


def notes(result: dict[str, Any]) -> list[str]:
    """How the arms with routers spent their budget, and what they took beside it; numbers of one seed."""
    found: dict[str, str] = {}
    for name, one in result["routers"].items():
        kind = name.rpartition("-")[0]
        if kind == "first":
            found[kind] = (
                f"`first-*`: {one['router_steps']} of the {result['settings']['steps']} steps train the router, on the batches "
                "that other arms read in these steps; recovery reads the examples of their other batches, grouped anew "
                f"(seed {one['seed']}: {one['tokens']:,} tokens in all)."
            )
        else:
            found[kind] = (
                "`dr-llm-*`: the network had all the training of `dense` and stays as it is. On top, shared by its depths, come "
                f"a search for the layers that its own answers to {one['prompts']} training prompts can do without "
                f"({one['simulations']} tries each) and {one['router_steps']} router steps (seed {one['seed']}: "
                f"{one['search_s']:.0f} and {one['router_s']:.0f} s; {one['mean_layers_of_labels']:.1f} layers left on average)."
            )
    if any(budget["calm"] for budget in result["budgets"]):
        found["calm"] = (
            f"CALM: softmax gap, thresholds chosen on the dev set by mean exit, batches of {CALM_BATCH} rows; FLOPs of "
            "decoding hold its checks and the filling of the cache, in percent of dense decoding."
        )
    return list(found.values())


HEADER = ("arm", "mean layers", "BLEU", "behind the best", "slot errors, %", "BLEU by seed", "training, s")
CALM_HEADER = (
    "exits", "threshold", "mean exit", "layers of a step", "decode FLOPs, %", "BLEU", "behind the best above", "slot errors, %",
)  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """The tables, and who wins."""
    rows: list[list[str]] = []
    calm_rows: list[list[str]] = []
    for budget in result["budgets"]:
        title = f"**depth {name_of(budget['depth'])}**"
        if budget["arms"]:
            rows.append([title, *[""] * (len(HEADER) - 1)])
        for one in budget["arms"]:
            rows.append(
                [
                    one["arm"],
                    f"{one['mean_layers']:.2f}",
                    shown(one["bleu"]),
                    shown(one["behind_best"]),
                    shown(one["slot_error_rate"]),
                    " ".join(f"{value:.1f}" for value in one["bleu_by_seed"]),
                    " ".join(f"{seconds:.0f}" for seconds in one["train_s"]),
                ]
            )
        if budget["calm"]:
            calm_rows.append([title, *[""] * (len(CALM_HEADER) - 1)])
        for one in budget["calm"]:
            calm_rows.append(
                [
                    one["arm"],
                    " ".join(f"{value:.3g}" for value in one["threshold"]),
                    f"{one['mean_layers']:.2f}",
                    f"{np.mean(one['batch_layers']):.2f}",
                    f"{np.mean(one['flops_percent']):.0f}",
                    shown(one["bleu"]),
                    shown(one["behind_best"]),
                    shown(one["slot_error_rate"]),
                ]
            )
    settings = result["settings"]
    tokens = ", ".join(f"{count:,}" for count in result["budget_of_an_arm"]["tokens"])
    intro = (
        f"E2E {settings['split']} set, {settings['num_inputs']} inputs; 12 layers of width {settings['width']}, "
        f"{settings['steps']} steps of {settings['batch_size']} examples, {tokens} tokens for every arm of a seed."
    )
    common = sorted({seed for budget in result["budgets"] for seed in budget["seeds"]})
    if any(len(one["bleu_by_seed"]) > len(one["seeds"]) for budget in result["budgets"] for one in budget["arms"]):
        seeds = ", ".join(map(str, common))
        intro += f" Arms are ranked on seed {seeds}, which all of a depth have; further seeds stand in their column."
    verdicts = [verdict(budget) for budget in result["budgets"] if budget["arms"]]
    verdicts += [calm_verdict(budget) for budget in result["budgets"] if budget["calm"]]
    if result["claims"]:
        verdicts.append(claims_said(result["claims"]))
    tables = [table(HEADER, rows), *([table(CALM_HEADER, calm_rows)] if calm_rows else [])]
    said = ["\n".join(f"- {line}" for line in lines) for lines in (verdicts, notes(result)) if lines]
    return "\n\n".join([intro, *tables, *said])
