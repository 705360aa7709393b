"""Does a shallower pass still know when it is wrong, and does it pay to go deeper where it says so?

    python studies/sentinel_depth.py --data ../shared/data --save

The shipped model, tuned for any depth, describes restaurants of 3 to 8 slots, greedily, at depths 1 to 1/5 with the entropy trace
on. Per depth: how well a trace tells right from wrong answers, and how well a sentinel estimates slices that it has not seen.

*Catching up*, because a request cannot go deeper for free: write shallow; where the entropy of a token, or the mean over the tokens
so far, exceeds a threshold, stop before that token, run every layer over the tokens that skipped some, and go on with every
layer. Costs are layer-tokens of decoding, those of catching up among them: committed tokens times all layers. The simplest
implementation does it: a new request whose prompt is prompt and committed tokens. It reads the prompt again, which an engine
with the prompt's cache at hand would not: that part stands in a column of its own. *Anew*: write the whole answer shallow, and
again with every layer where its mean entropy exceeds a threshold. *Chance*: catching up at as many answers, drawn at random.
Thresholds are set on one half of the prompts and judged on the other, beside fixed plans.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from sentinel_tasks import Item, composed_mrs, describes
from shoal import Dense, Engine, Generation, Sampling, SkipDecode
from shoal.depth.plan import DepthPolicy
from shoal.errors import ShoalError
from shoal.evaluate.bootstrap import ratio
from shoal.evaluate.markdown import table
from shoal.files import replaced
from shoal.signals.sentinel import Sentinel
from shoal.signals.slices import errors_of, leave_one_out
from shoal.signals.statistics import STATISTICS, statistics
from shoal.signals.traces import Traced
from study import RESULTS, conditions, parser, save

DEPTHS = (1.0, 1 / 2, 1 / 3, 1 / 5)
FIXED = (1.0, 3 / 4, 2 / 3, 1 / 2, 2 / 5, 1 / 3, 1 / 4, 1 / 5)
STARTS = (1 / 3, 1 / 5)
"""Depths that catching up starts from."""
SLOTS = range(3, 9)
MOST_TOKENS = 80
SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of answers that should catch up: thresholds are quantiles of what the development half shows."""
SHOWN = ("mean", "max", "sea", "nll_sum", "nll_mean", "length")


@dataclass(frozen=True)
class Outcome:
    """One answer."""

    right: bool
    layer_tokens: int
    """Of decoding, catching up included."""
    prompt_layer_tokens: int
    """Beyond that: the prompt, where it was read a second time."""


def name_of(depth: float) -> str:
    """`1/3` of a third."""
    return {1.0: "1", 3 / 4: "3/4", 2 / 3: "2/3", 2 / 5: "2/5"}.get(depth, f"1/{round(1 / depth)}")


def plan_of(depth: float) -> DepthPolicy:
    """The model was tuned under this policy."""
    return Dense() if depth == 1 else SkipDecode(depth=depth)


def write(engine: Engine, prompts: Sequence[Any], most: Sequence[int], policy: DepthPolicy) -> list[Generation]:
    """Greedy, with traces."""
    samplings = [Sampling(max_new_tokens=count, entropy_top_k=20) for count in most]
    return engine.generate(prompts, samplings, policy)


def running(generation: Generation, rule: str) -> np.ndarray:
    """[n], what is compared with the threshold before each token: its entropy, or the mean up to it."""
    assert generation.trace is not None
    entropies = np.array(generation.trace.entropies)
    return entropies if rule == "token" else entropies.cumsum() / np.arange(1, len(entropies) + 1)


def shallow_cost(generation: Generation, passes: int, num_layers: int) -> int:
    """Layer-tokens of the first so many decode passes."""
    return sum(sum(cutoff > clock for cutoff in generation.plan.cutoffs) for clock in range(passes))


def catch_up(
    engine: Engine, items: Sequence[Item], shallow: Sequence[Generation], stops: Sequence[int | None]
) -> list[Outcome]:
    """Each answer as it was written, or from the token at `stops` on with every layer."""
    num_layers = engine.shape.num_layers
    places = [place for place, stop in enumerate(stops) if stop is not None]
    prompts = [tuple(engine.tokenizer(items[place].prompt).input_ids) for place in places]
    committed = [shallow[place].token_ids[: stops[place]] for place in places]
    deeper = dict(
        zip(
            places,
            write(
                engine,
                [[*prompt, *tokens] for prompt, tokens in zip(prompts, committed, strict=True)],
                [MOST_TOKENS - len(tokens) for tokens in committed],
                Dense(),
            )
            if places
            else (),
            strict=True,
        )
    )
    outcomes = []
    for place, (item, one) in enumerate(zip(items, shallow, strict=True)):
        if place not in deeper:
            outcomes.append(Outcome(item.is_right(one.text), shallow_cost(one, len(one.token_ids) - 1, num_layers), 0))
            continue
        kept, rest = list(one.token_ids[: stops[place]]), deeper[place]
        text = engine.tokenizer.decode([*kept, *rest.token_ids], skip_special_tokens=True)
        # Passes: one per committed token, which showed that the next is unsure; those again; then one per token but the last.
        cost = shallow_cost(one, len(kept), num_layers) + num_layers * (len(kept) + len(rest.token_ids) - 1)
        prompt_tokens = len(rest.plan.cutoffs) * len(prompts[places.index(place)])
        outcomes.append(Outcome(item.is_right(text), cost, prompt_tokens))
    return outcomes


def anew(
    items: Sequence[Item], shallow: Sequence[Generation], dense: Sequence[Generation], redo: Sequence[bool]
) -> list[Outcome]:
    """Each answer as it was written, or the dense one, which comes on top."""
    outcomes = []
    for item, one, other, again in zip(items, shallow, dense, redo, strict=True):
        num_layers = len(one.plan.cutoffs)
        cost = shallow_cost(one, len(one.token_ids) - 1, num_layers) + again * num_layers * (len(other.token_ids) - 1)
        outcomes.append(Outcome(item.is_right(other.text if again else one.text), cost, 0))
    return outcomes


def point(name: str, start: str, share: float | None, outcomes: Sequence[Outcome], dense_cost: float) -> dict[str, Any]:
    """A point of the curve."""
    right = ratio([float(one.right) for one in outcomes], [1.0] * len(outcomes))
    cost = float(np.mean([one.layer_tokens for one in outcomes]))
    again = float(np.mean([one.prompt_layer_tokens for one in outcomes]))
    return {
        "rule": name,
        "start": start,
        "share": share,
        "accuracy": right.value,
        "low": right.low,
        "high": right.high,
        "cost": cost / dense_cost,
        "with_prompt_read_again": (cost + again) / dense_cost,
    }


def at_equal_cost(fixed: Sequence[dict[str, Any]], cost: float) -> float:
    """Accuracy of fixed plans at a cost, on straight lines between them."""
    ordered = sorted(fixed, key=lambda one: one["cost"])
    return float(np.interp(cost, [one["cost"] for one in ordered], [one["accuracy"] for one in ordered]))


def knows(items: Sequence[Item], names: Sequence[str], done: Sequence[Generation]) -> dict[str, Any]:
    """What traces at one depth tell."""
    from sklearn.metrics import roc_auc_score

    right = np.array([item.is_right(one.text) for item, one in zip(items, done, strict=True)])
    traces = [one.trace for one in done if one.trace is not None]
    values = statistics(traces)
    found: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "mean_layers": float(np.mean([one.ledger.mean_layers for one in done])),
        "auroc": {
            name: float(roc_auc_score(~right, values[:, STATISTICS.index(name)]))
            if 0 < right.sum() < len(right)
            else None
            for name in SHOWN
        },
        "accuracies": {name: float(right[np.array(names) == name].mean()) for name in dict.fromkeys(names)},
    }
    traced = [
        Traced(trace=trace, slice=name, correct=bool(label))
        for trace, name, label in zip(traces, names, right, strict=True)
    ]
    left_out = leave_one_out(Sentinel.fit(traced))
    found["errors"] = {
        name: {"mean_absolute_error": one.mean_absolute_error, "rank_correlation": one.rank_correlation}
        for name, one in errors_of(left_out).items()
    }
    return found


def run(options: argparse.Namespace) -> None:
    """Depths, then the curve."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    count = 12 if options.quick else options.per_slice
    rng = random.Random("sentinel depth")
    engine = Engine.from_pretrained("shoal-e2e", dtype="float32", cache_gib=1)
    names = [f"e2e {slots}" for slots in SLOTS for _ in range(count)]
    items = [Item(mr, describes(mr)) for slots in SLOTS for mr in composed_mrs(options.data, slots, count, rng)]
    most = [MOST_TOKENS] * len(items)
    written = {depth: write(engine, [item.prompt for item in items], most, plan_of(depth)) for depth in FIXED}
    by_depth = {name_of(depth): knows(items, names, written[depth]) for depth in DEPTHS}
    print(json.dumps(by_depth), flush=True)

    halves = [list(range(start, len(items), 2)) for start in (0, 1)]
    develop, test = halves
    asked = [items[place] for place in test]
    dense_cost = float(np.mean([engine.shape.num_layers * (len(written[1.0][p].token_ids) - 1) for p in test]))
    curve = [
        point("fixed", name_of(depth), None, anew(asked, some, some, [False] * len(test)), dense_cost)
        for depth in FIXED
        for some in [[written[depth][place] for place in test]]
    ]
    fixed = list(curve)
    for start in STARTS:
        shallow = [written[start][place] for place in test]
        dense = [written[1.0][place] for place in test]
        for rule in ("token", "running mean"):
            peaks = [peak(written[start][place], rule) for place in develop]
            for share in SHARES:
                threshold = float(np.quantile(peaks, 1 - share))
                stops = [first_above(one, rule, threshold) for one in shallow]
                curve.append(point(rule, name_of(start), share, catch_up(engine, asked, shallow, stops), dense_cost))
                if rule == "token":  # as many, anywhere
                    drawn = shuffled(stops, shallow, rng)
                    curve.append(
                        point("chance", name_of(start), share, catch_up(engine, asked, shallow, drawn), dense_cost)
                    )
        means = [float(np.mean(running(written[start][place], "token"))) for place in develop]
        for share in SHARES:
            threshold = float(np.quantile(means, 1 - share))
            redo = [float(np.mean(running(one, "token"))) > threshold for one in shallow]
            curve.append(point("anew", name_of(start), share, anew(asked, shallow, dense, redo), dense_cost))
    for one in curve:
        one["over_fixed"] = one["accuracy"] - at_equal_cost(fixed, one["cost"])
    result = {"conditions": conditions(), "answers": len(items), "depths": by_depth, "curve": curve}
    print(describe(result))
    if options.save:
        save("sentinel_depth", result)
        draw(result, RESULTS / "sentinel_depth.svg")
    print(json.dumps({"study": "sentinel_depth", **result}))


def peak(generation: Generation, rule: str) -> float:
    """The highest that a threshold may be for the answer to catch up."""
    values = running(generation, rule)[1:]  # the first token comes from the prompt's pass, which runs every layer
    return float(values.max()) if len(values) else 0.0


def first_above(generation: Generation, rule: str, threshold: float) -> int | None:
    """The first token, not the very first, whose value exceeds the threshold."""
    above = np.flatnonzero(running(generation, rule)[1:] > threshold)
    return int(above[0]) + 1 if len(above) else None


def shuffled(stops: Sequence[int | None], shallow: Sequence[Generation], rng: random.Random) -> list[int | None]:
    """As many answers that catch up, others of them, each at a token drawn at random."""
    chosen = set(rng.sample(range(len(stops)), sum(stop is not None for stop in stops)))
    return [
        rng.randrange(1, len(one.token_ids)) if place in chosen and len(one.token_ids) > 1 else None
        for place, one in enumerate(shallow)
    ]


def describe(result: dict[str, Any]) -> str:
    """Tables in Markdown."""
    rows = [
        [depth, f"{one['mean_layers']:.1f}", f"{one['accuracy']:.3f}",
         *("-" if one["auroc"][name] is None else f"{one['auroc'][name]:.3f}" for name in SHOWN),
         *(f"{one['errors'][name]['mean_absolute_error']:.3f}" for name in ("sentinel", "length alone", "ATC"))]
        for depth, one in result["depths"].items()
    ]  # fmt: skip
    header = ["depth", "layers", "accuracy", *(f"AUROC {name}" for name in SHOWN), "MAE", "MAE length", "MAE ATC"]
    points = [
        [one["rule"], one["start"], "" if one["share"] is None else f"{one['share']:.0%}", f"{one['cost']:.3f}",
         f"{one['accuracy']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}", f"{one['over_fixed']:+.3f}",
         f"{one['with_prompt_read_again']:.3f}"]
        for one in result["curve"]
    ]  # fmt: skip
    labels = [
        "rule",
        "from depth",
        "share",
        "cost",
        "accuracy",
        "interval",
        "over fixed at equal cost",
        "prompt read again",
    ]
    return "\n\n".join([table(header, rows), table(labels, points)])


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "shoal"})
    figure, axes = plt.subplots(1, len(STARTS), figsize=(8, 3), sharey=True, layout="constrained")
    colors = {"fixed": "#0b3c5d", "token": "#e08e0b", "running mean": "#3fa796", "anew": "#b23a48", "chance": "#9aa3ab"}
    for panel, start in zip(axes, STARTS, strict=True):
        for rule, color in colors.items():
            some = [
                one
                for one in result["curve"]
                if one["rule"] == rule and (rule == "fixed" or one["start"] == name_of(start))
            ]
            some.sort(key=lambda one: one["cost"])
            panel.plot(
                [one["cost"] for one in some], [one["accuracy"] for one in some], "o-", ms=3.5, color=color, label=rule
            )
        panel.set(title=f"from depth {name_of(start)}", xlabel="layer-tokens, share of dense")
        panel.grid(axis="y", color="#e6e9ec")
    axes[0].set_ylabel("answers without slot errors")
    axes[0].legend(frameon=False, fontsize=8)
    with replaced(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    options = parser(__doc__, work="sentinel_depth")
    options.add_argument("--data", type=Path, required=True, help="the directory of all data sets")
    options.add_argument("--per-slice", type=int, default=200, help="prompts per number of slots")
    try:
        run(options.parse_args())
    except ShoalError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
