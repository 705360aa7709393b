"""Does `shoal suits` predict which policy is best after tuning? Its order on the untuned model beside the order that tuning gave.

    python studies/suits_order.py --work ~/.cache/shoal/studies/recipe --data ../shared/data/e2e_nlg --save

Needs a work directory of `recipe.py` with the arms `any` and `any-POLICY`. The untuned model is what these arms were tuned from,
the shared first stage; what is compared is, at each depth, the token agreement that `suits` measures and the BLEU after tuning.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipe import SPLITS
from recipe_arms import BUDGETS, arms, name_of
from shoal.depth.policies import POLICIES
from shoal.errors import InvalidInput, ShoalError
from shoal.evaluate.bootstrap import Statistics
from shoal.evaluate.e2e import read_e2e
from shoal.evaluate.markdown import table
from shoal.evaluate.rank_correlation import rank_correlation
from shoal.evaluate.suits import SuitsConfig, suits
from shoal.evaluate.text import bleu_of
from study import conditions, parser, read_json, save

EXAMPLES = 64
"""That `suits` measures on."""


def main() -> None:
    options = parser(__doc__, work="recipe")
    options.add_argument("--data", type=Path, required=True, help="directory of the E2E files")
    chosen = options.parse_args()
    try:
        torch.set_num_threads(chosen.threads)
        result = compare(chosen.work, chosen.data, chosen.seeds[0], examples=4 if chosen.quick else EXAMPLES)
    except ShoalError as error:
        sys.exit(f"Error: {error}")
    print(describe(result))
    if chosen.save:
        save("suits_order", result)
    print(json.dumps({"study": "suits_order", **result}))


def compare(work: Path, data: Path, seed: int, *, examples: int) -> dict[str, Any]:
    """Both orders at each depth, and their rank correlation."""
    tuned = {policy: tuned_bleu(work, policy, seed) for policy in POLICIES}
    tuned = {policy: scores for policy, scores in tuned.items() if scores}
    start = work / "stages" / f"dense-seed{seed}" / "checkpoint"
    if len(tuned) < 2 or not start.is_dir():
        raise InvalidInput(f"{work} has no two of the arms any and any-POLICY: run recipe.py --arms 'any*' first")
    lines = work / "dev.jsonl"
    rows = [{"prompt": one.mr, "completion": one.references[0]} for one in read_e2e(data / SPLITS["dev"])]
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = suits(str(start), lines, SuitsConfig(depths=BUDGETS[1:], max_examples=examples))
    depths = []
    for depth in BUDGETS[1:]:
        here = {one.policy: one for one in found.outcomes if one.depth == depth and one.policy in tuned}
        scores = {policy: tuned[policy][name_of(depth)] for policy in here}
        depths.append(
            {
                "depth": depth,
                "rank_correlation": round(
                    rank_correlation({p: one.agreement.value for p, one in here.items()}, scores), 2
                ),
                "policies": [
                    {
                        "policy": policy,
                        "agreement": round(100 * one.agreement.value, 1),
                        "loss_increase": round(one.loss_increase.value, 3),
                        "tuned_bleu": round(scores[policy], 1),
                    }
                    for policy, one in here.items()
                ],
            }
        )
    return {"settings": {"examples": found.num_examples, "seed": seed}, "conditions": conditions(), "depths": depths}


def tuned_bleu(work: Path, policy: str, seed: int) -> dict[str, float]:
    """Development BLEU by depth of the any-depth arm of a policy; empty where it has not run."""
    name = "any" if policy == "skipdecode" else f"any-{policy}"
    assert name in arms()
    path = work / "arms" / f"{name}-dev-seed{seed}.json"
    rows = read_json(path)["rows"] if path.is_file() else []
    return {
        name_of(row["depth"]): Statistics(np.array(row["bleu_counts"], float), bleu_of).score().value for row in rows
    }


def describe(result: dict[str, Any]) -> str:
    """The two orders side by side."""
    header = ("depth, policy", "agreement untuned, %", "loss increase untuned", "BLEU tuned")
    rows = []
    for depth in result["depths"]:
        rows.append([f"**{name_of(depth['depth'])}**, rank correlation {depth['rank_correlation']:+.2f}", "", "", ""])
        for one in depth["policies"]:
            numbers = (f"{one['agreement']:.1f}", f"{one['loss_increase']:+.3f}", f"{one['tuned_bleu']:.1f}")
            rows.append([one["policy"], *numbers])
    intro = (
        f"Token agreement with the dense model before any tuning ({result['settings']['examples']} examples of E2E's development "
        "set) and BLEU after tuning; Spearman's correlation of the two orders."
    )
    return f"{intro}\n\n{table(header, rows)}"


if __name__ == "__main__":
    main()
