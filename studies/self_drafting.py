"""Does tuning for any depth make a model a better self-drafter? Shallow passes of the same weights propose, full depth verifies.

    python studies/self_drafting.py --work ~/.cache/shoal/studies/recipe --data ../shared/data/e2e_nlg --save

Needs a work directory of `recipe.py` with some of the arms `dense`, `any`, `any-distill` and `one-skipdecode-*`. Every checkpoint
completes the development inputs at full depth, drafting 4 tokens per pass by SkipDecode at each depth; drafting never changes what
comes out, so each model's own text is the measure. Layers are counted without prompts: of the plan, of drafting, and in vain.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from recipe import SPLITS
from shoal import Engine, Ledger, Sampling, SkipDecode
from shoal.draft import SelfDraft
from shoal.engine.drafting import DraftStats
from shoal.errors import InvalidInput, ShoalError
from shoal.evaluate.e2e import read_e2e
from shoal.evaluate.markdown import table
from study import conditions, parser, save

STAGES = {
    "dense": "dense+dense",
    "any depth": "dense+depths=1_1_1-2_1-3_1-4_1-5",
    "any depth, self-distilled": "dense+depths=1_1_1-2_1-3_1-4_1-5,distill=0.5",
    "1/2 alone": "dense+depths=1-2",
    "1/5 alone": "dense+depths=1-5",
}
"""What a model was tuned for, and the stage of `recipe.py` that holds it."""
DEPTHS = {"1/2": 1 / 2, "1/3": 1 / 3, "1/5": 1 / 5}
DRAFT_TOKENS = 4
HORIZON = 32
INPUTS = 200


def main() -> None:
    options = parser(__doc__, work="recipe")
    options.add_argument("--data", type=Path, required=True, help="directory of the E2E files")
    chosen = options.parse_args()
    try:
        torch.set_num_threads(chosen.threads)
        result = compare(chosen.work, chosen.data, chosen.seeds[0], inputs=4 if chosen.quick else INPUTS)
    except ShoalError as error:
        sys.exit(f"Error: {error}")
    print(describe(result))
    if chosen.save:
        save("self_drafting", result)
    print(json.dumps({"study": "self_drafting", **result}))


def compare(work: Path, data: Path, seed: int, *, inputs: int) -> dict[str, Any]:
    """Every model that is there, at every draft depth."""
    prompts = [one.mr for one in read_e2e(data / SPLITS["dev"])][:inputs]
    found = {name: work / "stages" / f"{stage}-seed{seed}" / "checkpoint" for name, stage in STAGES.items()}
    models = [measure(name, path, prompts) for name, path in found.items() if path.is_dir()]
    if not models:
        raise InvalidInput(f"{work} holds none of {', '.join(found)}: run recipe.py --arms dense any any-distill first")
    settings = {"inputs": inputs, "draft_tokens": DRAFT_TOKENS, "horizon": HORIZON, "seed": seed}
    return {"settings": settings, "conditions": conditions(), "models": models}


def measure(name: str, checkpoint: Path, prompts: list[str]) -> dict[str, Any]:
    """One model: its own text at full depth, drafted for at each depth."""
    engine = Engine.from_pretrained(checkpoint, cache_gib=1)
    sampling = Sampling(max_new_tokens=64)
    expected = [done.token_ids for done in engine.generate(prompts, sampling)]
    rows = []
    for label, depth in DEPTHS.items():
        draft = SelfDraft(plan=SkipDecode(depth=depth, horizon=HORIZON), tokens=DRAFT_TOKENS)
        done = engine.generate(prompts, sampling, draft=draft)
        stats = sum((one.drafting for one in done if one.drafting is not None), DraftStats())
        ledger = sum((one.ledger for one in done), Ledger())
        rows.append(
            {
                "depth": label,
                "acceptance": round(stats.acceptance or 0, 4),
                "tokens_per_pass": round(ledger.decode_passes / stats.steps, 3),
                "layers_of_the_plan": engine.shape.num_layers,
                "layers_beyond": round(ledger.draft_layer_tokens / ledger.decode_passes, 3),
                "same_tokens": sum(one.token_ids == tokens for one, tokens in zip(done, expected, strict=True)),
            }
        )
    return {"model": name, "depths": rows}


def describe(result: dict[str, Any]) -> str:
    """A row per model and draft depth."""
    settings = result["settings"]
    header = ["tuned for", "draft depth", "accepted", "tokens per pass", "layers per token", "beyond the plan's"]
    rows = [
        [
            model["model"],
            row["depth"],
            f"{100 * row['acceptance']:.1f}%",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['layers_of_the_plan'] + row['layers_beyond']:.1f}",
            f"{row['layers_beyond']:.1f}",
        ]
        for model in result["models"]
        for row in model["depths"]
    ]
    same = sum(row["same_tokens"] for model in result["models"] for row in model["depths"])
    of = settings["inputs"] * sum(len(model["depths"]) for model in result["models"])
    return (
        f"{settings['inputs']} inputs, {settings['draft_tokens']} tokens drafted per pass, full depth verifies, seed "
        f"{settings['seed']}; {same} of {of} completions are those without drafting.\n\n" + table(header, rows)
    )


if __name__ == "__main__":
    main()
