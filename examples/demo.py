"""The model that ships with Shoal at four depths: completions side by side, what each depth saved, and a figure.

python examples/demo.py            (or: make demo)
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from shoal import Dense, Engine, SkipDecode
from shoal.cli.format import quantity, share
from shoal.depth.plan import DepthPolicy
from shoal.engine.run_cost import RunCost
from shoal.models.directory import resolve

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DEPTHS = (Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 5))
COLORS = ("#0b3c5d", "#1f77a4", "#3fa796", "#e08e0b")
ROUNDS = 3
COPIES = 5

PROMPTS = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()
"""Written for the demo; none of them is in the E2E data."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shoal-e2e", help="a checkpoint; the default ships with Shoal")
    parser.add_argument("--figure", type=Path, default=Path("demo/depth.png"), help="where the figure goes")
    options = parser.parse_args()
    console = Console()
    console = Console(width=max(console.width, 128))
    engine = Engine.from_pretrained(options.model)
    policies: dict[Fraction, DepthPolicy] = {
        depth: Dense() if depth == 1 else SkipDecode(depth=float(depth)) for depth in DEPTHS
    }

    console.rule(f"{options.model}: {engine.shape.num_layers} layers, one checkpoint, four depths")
    console.print(completions(engine, policies))
    runs = measure(engine, policies)
    rows = len(PROMPTS) * COPIES
    console.rule(f"what each depth spent on these prompts {COPIES} times over ({rows} rows in one batch)")
    console.print(savings(runs))
    console.print(
        f"Counted as the layers ran, but for time: medians of {ROUNDS} rounds, the depths taking turns in each round. "
        "A small model saves more\nlayers than seconds: what a step costs beside its layers (the head, sampling, bookkeeping) "
        "does not shrink with depth.",
        style="dim",
    )
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    card = resolve(options.model) / "card.json"
    evaluation = json.loads(card.read_text(encoding="utf-8")).get("evaluation") if card.exists() else None
    draw(engine, policies, evaluation, options.figure)
    console.print(f"\nFigure: {options.figure}")


def completions(engine: Engine, policies: dict[Fraction, DepthPolicy]) -> Table:
    """A row per prompt, a column per depth; text that is the same as at depth 1 is dim."""
    table = Table(show_lines=True, header_style="bold")
    table.add_column("meaning representation", ratio=3)
    for depth in policies:
        table.add_column(f"depth {depth}", ratio=4)
    texts = [[done.text for done in engine.generate(PROMPTS, plan=policy)] for policy in policies.values()]
    for prompt, *row in zip(PROMPTS, *texts, strict=True):
        cells = [row[0], *(f"[dim]{text}[/]" if text == row[0] else text for text in row[1:])]
        table.add_row(prompt.replace("[", r"\["), *cells)
    return table


def measure(engine: Engine, policies: dict[Fraction, DepthPolicy]) -> dict[Fraction, RunCost]:
    """What each policy costs; seconds are medians over rounds in which the policies take turns."""
    prompts = PROMPTS * COPIES
    rounds: list[dict[Fraction, RunCost]] = []
    for _ in range(ROUNDS + 1):
        costs = {}
        for depth, policy in policies.items():
            engine.stats.reset()
            cost = RunCost()
            for done in engine.generate(prompts, plan=policy):
                cost.add(done)
            cost.stats = replace(engine.stats)
            costs[depth] = cost
        rounds.append(costs)
    timed = rounds[1:]  # the first one warms up
    for depth, cost in timed[0].items():
        cost.stats.prompt_s = statistics.median(costs[depth].stats.prompt_s for costs in timed)
        cost.stats.decode_s = statistics.median(costs[depth].stats.decode_s for costs in timed)
    return timed[0]


def savings(runs: dict[Fraction, RunCost]) -> Table:
    """The four savings: the dense run as it is, the others as a share of it."""
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for part in ("decode", "whole"):
        for name in ("layers", "FLOPs", "bytes", "time/token"):
            table.add_column(f"{part}\n{name}", justify="right")
    table.add_column("speedup\ndecode", justify="right")
    table.add_column("\nwhole", justify="right")

    dense = runs[Fraction(1)]
    for depth, run in runs.items():
        if run is dense:
            cells = [quantity(value, unit) for value, unit in zip(figures(run), ["", "", "B", "s"] * 2, strict=True)]
        else:
            cells = [share(value, full) for value, full in zip(figures(run), figures(dense), strict=True)]
        decode, whole = (
            dense.decode_s_per_token / run.decode_s_per_token,
            dense.total_s_per_token / run.total_s_per_token,
        )
        table.add_row(f"depth {depth}", *cells, f"{decode:.2f}x", f"{whole:.2f}x")
    return table


def figures(run: RunCost) -> list[float]:
    """Mean layers, FLOPs, bytes and seconds per token of the decode part, then of the whole request, per emitted token."""
    ledger, stats = run.ledger, run.stats
    emitted = ledger.new_tokens
    return [
        ledger.mean_layers,
        ledger.decode_flops / emitted,
        stats.decode_bytes / emitted,
        run.decode_s_per_token,
        ledger.layer_tokens / (ledger.prompt_tokens + ledger.decode_passes),
        (ledger.prompt_flops + ledger.decode_flops) / emitted,
        (stats.prompt_bytes + stats.decode_bytes) / emitted,
        run.total_s_per_token,
    ]


def draw(engine: Engine, policies: dict[Fraction, DepthPolicy], evaluation: dict[str, Any] | None, path: Path) -> None:
    """Left: layers that run at each position. Right: quality against mean layers, from the model card's numbers."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw_plans(left, engine, policies)
    if evaluation is None:
        right.set_axis_off()
    else:
        _draw_quality(right, evaluation)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _draw_plans(axes: Any, engine: Engine, policies: dict[Fraction, DepthPolicy]) -> None:
    num_layers, prompt_tokens, new_tokens = engine.shape.num_layers, 35, 48
    axes.axvspan(-prompt_tokens, 0, color="#eef1f4", lw=0)
    axes.text(-prompt_tokens / 2, 0.35, "prompt", ha="center", color="#66707a")
    axes.text(new_tokens / 2, 0.35, "generated tokens", ha="center", color="#66707a")
    for number, ((depth, policy), color) in enumerate(zip(policies.items(), COLORS, strict=True)):
        if engine.tuned is not None and isinstance(policy, SkipDecode):
            policy = engine.tuned.fill(policy)
        plan = policy.plan(num_layers, prompt_tokens=prompt_tokens, max_new_tokens=new_tokens)
        # A little apart, so that lines at one depth can be told from each other.
        run = [layers - 0.12 * number for layers in (num_layers, *map(plan.depth, range(new_tokens)))]
        axes.step([-prompt_tokens, *range(new_tokens)], run, where="post", color=color, lw=2)
        axes.text(0.8, run[1] + 0.2, f"depth {depth}" if depth == 1 else str(depth), color=color, weight="bold")
    axes.set(xlabel="position", ylabel="layers that run", ylim=(0, num_layers + 1), xlim=(-prompt_tokens, new_tokens))
    axes.set_title("A plan never gets deeper, so the cache stays exact", loc="left", fontsize=11)


def _draw_quality(axes: Any, evaluation: dict[str, Any]) -> None:
    systems = {"any-depth": ("this checkpoint", "#0b3c5d"), "dense": ("before any-depth tuning", "#9aa5ad")}
    for name, (label, color) in systems.items():
        rows = [row for row in evaluation["rows"] if row["system"] == name]
        layers, bleu = [row["mean_layers"] for row in rows], [row["bleu"]["value"] for row in rows]
        lows, highs = ([row["bleu"][end] for row in rows] for end in ("low", "high"))
        axes.fill_between(layers, lows, highs, color=color, alpha=0.15, lw=0)
        axes.plot(layers, bleu, "o-", color=color, lw=2, label=label)
        if name == "any-depth":
            for row, x, y in zip(rows, layers, highs, strict=True):
                side = "right" if row is rows[-1] else "center"
                axes.annotate(row["depth"], (x, y), xytext=(0, 4), textcoords="offset points", ha=side, color=color)
    for row in evaluation["rows"]:
        if row["system"] == "small":
            label = f"{row['num_layers']} layers, dense, same data"
            axes.plot(row["mean_layers"], row["bleu"]["value"], "D", ms=8, color="#e08e0b", zorder=5, label=label)
    scores = [row["bleu"] for row in evaluation["rows"]]
    lowest, highest = min(score["low"] for score in scores), max(score["high"] for score in scores)
    axes.set(xlabel="mean layers per generated token", ylabel="BLEU", xlim=(0, None), ylim=(lowest - 4, highest + 2))
    axes.grid(axis="y", color="#e6e9ec")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right", title=f"shaded: {evaluation['intervals']}")
    split, count = evaluation["split"], evaluation["num_inputs"]
    axes.set_title(f"Quality against depth, E2E {split} set, {count} inputs", loc="left", fontsize=11)


if __name__ == "__main__":
    main()
