"""Measure the shipped model and its two comparisons on E2E, greedily, and write `card.json`.

    python examples/e2e_model/evaluate.py --data ../shared/data/e2e_nlg --work runs/e2e --split dev
    python examples/e2e_model/evaluate.py --data ../shared/data/e2e_nlg --work runs/e2e --split test --card

Three systems: the any-depth model, the dense model before any-depth tuning under the same plans, and the small dense model.
Choose on `dev`; the test set is for one last run. With `--card`, the numbers go into the shipped model's `card.json`.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shoal import Dense, Engine, Sampling, SkipDecode
from shoal.evaluate.bootstrap import Score
from shoal.evaluate.e2e import E2EInput, read_e2e, slot_error_rate
from shoal.evaluate.text import bleu, rouge_l

FILES = {"dev": "devset.csv.gz", "test": "testset_w_refs.csv.gz"}
DEPTHS = (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
MAX_NEW_TOKENS = 100
SHIPPED = Path(__file__).parents[2] / "src" / "shoal" / "data" / "shoal-e2e"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the E2E files")
    parser.add_argument("--work", type=Path, default=Path("runs/e2e"), help="where build.py left its checkpoints")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="the any-depth model")
    parser.add_argument("--split", choices=sorted(FILES), default="dev")
    parser.add_argument("--limit", type=int, help="first so many inputs only")
    parser.add_argument("--only", help="one of: any-depth, dense, small")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and products, the same for all systems")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--card", action="store_true", help="put the results into card.json")
    options = parser.parse_args()

    inputs = read_e2e(options.data / FILES[options.split])[: options.limit]
    systems = {"any-depth": (options.model, DEPTHS), "dense": (options.work / "dense", DEPTHS)}
    systems["small"] = (options.work / "small", (1.0,))
    rows = []
    for name, (directory, depths) in systems.items():
        if options.only in (None, name):
            engine = Engine.from_pretrained(directory, dtype=options.dtype, threads=options.threads)
            for depth in depths:
                rows.append({"system": name, **measure(engine, inputs, depth)})
                print(describe(rows[-1]), flush=True)
    if options.card:
        card = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))
        card["evaluation"] = {
            "split": options.split,
            "num_inputs": len(inputs),
            "decoding": f"greedy, at most {MAX_NEW_TOKENS} new tokens, weights and products in {options.dtype}",
            "intervals": "95%, bootstrap over inputs",
            "human_slot_error_rate": score(
                slot_error_rate([e.mr for e in inputs for _ in e.references], [r for e in inputs for r in e.references])
            ),
            "versions": {name: version(name) for name in ("shoal", "torch", "sacrebleu", "rouge-score")},
            "rows": rows,
        }
        (SHIPPED / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def measure(engine: Engine, inputs: list[E2EInput], depth: float) -> dict[str, Any]:
    """Quality and realised depth of `engine` on `inputs` at a nominal depth."""
    plan = Dense() if depth == 1 else SkipDecode(depth=depth)
    done = engine.generate([e.mr for e in inputs], sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS), plan=plan)
    texts, references = [g.text for g in done], [e.references for e in inputs]
    passes = sum(g.ledger.decode_passes for g in done)
    mean_layers = sum(g.ledger.decode_layer_tokens for g in done) / passes
    return {
        "depth": str(Fraction(depth).limit_denominator(12)),
        "num_layers": engine.shape.num_layers,
        "mean_layers": round(mean_layers, 3),
        "mean_depth": round(mean_layers / engine.shape.num_layers, 4),
        "mean_new_tokens": round(sum(len(g.token_ids) for g in done) / len(done), 2),
        "past_horizon": round(sum(g.past_horizon for g in done) / len(done), 4),
        "unfinished": sum(g.finish_reason != "stop" for g in done),
        "bleu": score(bleu(texts, references)),
        "rouge_l": score(rouge_l(texts, references)),
        "slot_error_rate": score(slot_error_rate([e.mr for e in inputs], texts)),
    }


def score(value: Score) -> dict[str, float]:
    """A score as JSON, in percent."""
    return {name: round(getattr(value, name), 2) for name in ("value", "low", "high")}


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    scores = "  ".join(f"{name} {row[name]['value']:.1f}" for name in ("bleu", "rouge_l", "slot_error_rate"))
    return f"{row['system']:10s} depth {row['depth']:4s} mean layers {row['mean_layers']:5.2f}  {scores}"


if __name__ == "__main__":
    main()
