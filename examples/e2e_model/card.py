"""Render the shipped model's card: `card.json` in, `README.md` out. Every number of the card comes from the JSON.

python examples/e2e_model/card.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[2] / "src" / "shoal" / "data" / "shoal-e2e"

SYSTEMS = {
    "any-depth": "**shoal-e2e** (this model)",
    **{f"only-1_{n}": f"its last round at 1/{n} alone" for n in (2, 3, 4, 5)},
    "dense": "12 layers before any-depth tuning",
    "small": "3 layers, dense",
}

TEMPLATE = """\
---
language: en
license: cc-by-sa-4.0
library_name: shoal
tags: [data-to-text, layer-skipping]
---

# shoal-e2e

A small language model that turns a restaurant's meaning representation into an English description, at any depth from 1 to
1/5: one checkpoint, tuned so that skipping layers costs little quality. It ships with [Shoal](../../../../README.md) to show and
to test depth plans; it is good at nothing else.

    shoal generate shoal-e2e prompts.txt -o completions.jsonl --depth 1/3

A prompt is a meaning representation as it stands, such as `name[The Vaults], eatType[pub], priceRange[more than £30],
customer rating[5 out of 5], near[Café Adriatic]`; the tokenizer adds the separator itself.

## The model

{model}

## Quality

{evaluation}

{table}

BLEU: sacrebleu, lowercased, all references. ROUGE-L: F-measure, best reference. Slot errors: missing, wrong and added slots over
all slots, by the rules in `shoal.evaluate.e2e`; by the same rules the human references have {human} %. "Mean layers" is what the
generated tokens really ran, counted as layers ran. In brackets: {intervals}.

{paired}

{verdict}

## How it was made

Data: the E2E NLG challenge's training set (Novikova, Dušek, Rieser 2017), {num_examples} pairs. Everything was trained from
scratch with Shoal's own command on {machine}, seed {seed} (each round: its own number), in {minutes}
minutes; `examples/e2e_model/build.py` repeats it.

{stages}

A dense run ignores its horizon. `small` is three layers from random weights. `grown` is `small` with nine layers inserted above
its bottom layer whose output projections are zero, so that it computes the same function. `any-depth` draws a plan per batch; it
went on in rounds (from its weights in bfloat16) until the development set's mean BLEU over depths stopped improving{rounds}.
The last round was run over again at one depth alone; that is not a model tuned for one depth from the start. The horizon is 28,
with which the mean layers of the model's own descriptions on that set come close to what each depth says; the plans of "12 layers
before any-depth tuning" had a horizon of 26.
Software: {versions}. The numbers come from `examples/e2e_model/evaluate.py`, this page from `examples/e2e_model/card.py`.

## Limits and licence

It knows the words of restaurants in the E2E data and nothing more; it writes errors of fact at the rate shown above, and
English only. The data has the noise of crowd workers, which the model has learned.

The weights and the tokenizer are derived from the E2E NLG data (Jekaterina Novikova, Ondřej Dušek, Verena Rieser, CC BY-SA 4.0)
and are offered under **CC BY-SA 4.0**. Shoal's code is under Apache-2.0.
"""


def main() -> None:
    card = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))
    (SHIPPED / "README.md").write_text(render(card), encoding="utf-8")


def render(card: dict[str, Any]) -> str:
    """The model card in Markdown."""
    model, training, evaluation = card["model"], card["training"], card["evaluation"]
    return TEMPLATE.format(
        model=(
            f"{model['architecture']}, {model['num_layers']} layers of width {model['hidden_size']}, {model['num_heads']} heads, "
            f"{model['num_parameters'] / 1e6:.1f} million parameters in {model['dtype']} ({model['megabytes']:.1f} MB), its own "
            f"byte-level BPE of {model['vocab_size']} pieces, {model['max_positions']} positions. Tuned for depths "
            f"{', '.join(card['tuned']['depths'])} with horizon {card['tuned']['horizon']} and {card['tuned']['warmup_layers']} "
            "warm-up layer (`depth_plan.json`)."
        ),
        evaluation=(
            f"E2E {evaluation['split']} set, {evaluation['num_inputs']} inputs, {evaluation['decoding']}. One run on the test "
            "set; all choices were made on the development set."
        ),
        table=table(evaluation["rows"]),
        human=f"{evaluation['human_slot_error_rate']['value']:.1f}",
        intervals=evaluation["intervals"],
        verdict=verdict(evaluation["rows"]),
        paired=paired(evaluation.get("paired", [])),
        rounds=": " + ", ".join(f"{bleu:.2f}" for bleu in tried)
        if (tried := training.get("dev_bleu_by_round"))
        else "",
        num_examples=f"{training['num_examples']:,}",
        machine=training["machine"],
        seed=training["seed"],
        minutes=round(sum(stage["seconds"] for stage in training["stages"]) / 60),
        stages="\n".join(f"    {s['command']}    # {s['seconds']} s" for s in training["stages"]),
        versions=", ".join(
            f"{name} {number}" for name, number in (training["versions"] | evaluation["versions"]).items()
        ),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The quality table."""
    lines = ["| model | depth | mean layers | BLEU | ROUGE-L | slot errors, % |", "|---|---|---:|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: list(SYSTEMS).index(row["system"])):
        cells = [cell(row[metric]) for metric in ("bleu", "rouge_l", "slot_error_rate")]
        layers = f"{row['mean_layers']:.2f} of {row['num_layers']}"
        lines.append(f"| {SYSTEMS[row['system']]} | {row['depth']} | {layers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paired(differences: list[dict[str, Any]]) -> str:
    """A table of paired differences."""
    if not differences:
        return ""
    kinds = list(dict.fromkeys(one["minus"] for one in differences))
    lines = [f"| this model at | {' | '.join(f'minus {kind}' for kind in kinds)} |"]
    lines.append("|---|" + "---:|" * len(kinds))
    for depth in dict.fromkeys(one["depth"] for one in differences):
        cells = [
            cell(one["bleu"], "+")
            for kind in kinds
            for one in differences
            if (one["depth"], one["minus"]) == (depth, kind)
        ]
        lines.append(f"| {depth} | {' | '.join(cells)} |")
    return "Differences in BLEU on the same inputs (paired bootstrap):\n\n" + "\n".join(lines)


def cell(score: dict[str, float], sign: str = "") -> str:
    """A score, or a difference with its sign, and its interval."""
    return f"{score['value']:{sign}.1f} [{score['low']:{sign}.1f}, {score['high']:{sign}.1f}]"


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the table says, in words that follow its numbers."""
    of = {name: [row for row in rows if row["system"] == name] for name in SYSTEMS}

    def bleu(row: dict[str, Any]) -> float:
        return float(row["bleu"]["value"])

    def slots(row: dict[str, Any]) -> str:
        return f"{row['slot_error_rate']['value']:.1f} %"

    own, untuned, small = of["any-depth"], of["dense"], of["small"][0]
    loss = bleu(own[0]) - min(map(bleu, own))
    untuned_loss = bleu(untuned[0]) - min(map(bleu, untuned))
    best = max(own, key=bleu)
    text = (
        f"Read it with care. From depth 1 to its worst depth the model loses {loss:.1f} BLEU; before tuning it lost "
        f"{untuned_loss:.1f}. Slot errors at depth 1 went from {slots(untuned[0])} to {slots(own[0])} by tuning. "
    )
    if untuned_loss < 5:
        text += (
            "Tuning had little left to do, because of how the model was grown: its inserted layers began as nothing, so the layers "
            "that every plan runs had already learned to do without them. A checkpoint that was trained deep from the start loses "
            "far more when it is skipped without tuning (AdaSkip, arXiv 2501.02336). "
        )
    numbers = f"its 3 layers reach {bleu(small):.1f} BLEU, this model {bleu(best):.1f} at its best. "
    if bleu(small) >= bleu(best):
        text += f"But **the small dense model wins**: {numbers}"
    elif bleu(small) >= bleu(best) - 1:
        text += f"But **the small dense model does as well**: {numbers}"
    else:
        text += f"The small dense model is worse: {numbers}"
    return text + (
        "E2E can be learned from scratch without depth, so this model shows that one checkpoint can serve every depth, not that "
        "a deep model run shallow beats a shallow one. Whoever starts from scratch on such a task should train the small one."
    )


if __name__ == "__main__":
    main()
