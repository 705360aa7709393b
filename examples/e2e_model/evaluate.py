"""Measure the shipped model and its two comparisons on E2E, greedily, and write `card.json`.

    python examples/e2e_model/evaluate.py --data ../shared/data/e2e_nlg --work runs/e2e --split dev
    python examples/e2e_model/evaluate.py --data ../shared/data/e2e_nlg --work runs/e2e --split test --card

Systems: the any-depth model, the same with its last round at one depth alone, the dense model before any-depth tuning under the
same plans, and the small dense model. What the any-depth model loses at a depth, against itself at depth 1 and against the model
whose last round was at that depth alone, is a paired bootstrap. Choose on `dev`; the test set is for one last run. With `--card`,
the numbers go into the shipped model's `card.json`, and need the checkpoints of the first two; rows of the others are kept where
their checkpoints are not there any more.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shoal import Dense, Engine, Sampling, SkipDecode
from shoal.evaluate.bootstrap import Score, Statistics
from shoal.evaluate.e2e import E2EInput, read_e2e, slot_error_rate
from shoal.evaluate.text import bleu_counts, bleu_of, rouge_l

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
    parser.add_argument("--only", help="one of: any-depth, only-1_2 (_3, _4, _5), dense, small")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and products, the same for all systems")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--card", action="store_true", help="put the results into card.json")
    options = parser.parse_args()

    inputs = read_e2e(options.data / FILES[options.split])[: options.limit]
    systems = {"any-depth": (options.model, DEPTHS)}
    for depth in DEPTHS[1:]:
        systems[f"only-{written(depth).replace('/', '_')}"] = (
            options.work / f"only-{written(depth).replace('/', '_')}",
            (depth,),
        )
    systems |= {"dense": (options.work / "dense", DEPTHS), "small": (options.work / "small", (1.0,))}
    rows, counts = [], {}
    for name, (directory, depths) in systems.items():
        if options.only not in (None, name):
            continue
        if not directory.is_dir():
            print(f"{name}: no checkpoint at {directory}")
            continue
        engine = Engine.from_pretrained(directory, dtype=options.dtype, threads=options.threads)
        for depth in depths:
            row, counts[name, depth] = measure(engine, inputs, depth)
            rows.append({"system": name, **row})
            print(describe(rows[-1]), flush=True)
    paired = compare(counts)
    for one in paired:
        print(f"any-depth at {one['depth']} minus {one['minus']}: {Score(**one['bleu'])} BLEU", flush=True)
    if options.card and (len(paired) < 2 * len(DEPTHS[1:]) or options.limit or options.split != "test"):
        parser.error(
            "--card takes the whole test set, and the any-depth model beside all that had their last round at one depth alone"
        )
    if options.card:
        card = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))
        before = card.get("evaluation", {"rows": []})
        measured = {row["system"] for row in rows}
        card["evaluation"] = {
            "split": options.split,
            "num_inputs": len(inputs),
            "decoding": f"greedy, at most {MAX_NEW_TOKENS} new tokens, weights and products in {options.dtype}",
            "intervals": "95%, bootstrap over inputs",
            "human_slot_error_rate": score(
                slot_error_rate([e.mr for e in inputs for _ in e.references], [r for e in inputs for r in e.references])
            ),
            "versions": {name: version(name) for name in ("shoal", "torch", "sacrebleu", "rouge-score")},
            "rows": rows + [row for row in before["rows"] if row["system"] not in measured],
            "paired": paired,
        }
        (SHIPPED / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def written(depth: float) -> str:
    """`1/3` as people write it."""
    return str(Fraction(depth).limit_denominator(12))


def compare(counts: dict[tuple[str, float], Statistics]) -> list[dict[str, Any]]:
    """BLEU of the any-depth model at each depth, minus its own at depth 1 and with its last round at this depth alone."""
    found = []
    for depth in DEPTHS[1:]:
        for other in (("any-depth", 1.0), (f"only-{written(depth).replace('/', '_')}", depth)):
            if ("any-depth", depth) in counts and other in counts:
                name = "itself at 1" if other[0] == "any-depth" else "its last round at this depth alone"
                difference = counts["any-depth", depth].minus(counts[other])
                found.append({"depth": written(depth), "minus": name, "bleu": score(difference)})
    return found


def measure(
    engine: Engine, inputs: list[E2EInput], depth: float, *, horizon: int | None = None
) -> tuple[dict[str, Any], Statistics]:
    """Quality and realised depth of `engine` on `inputs` at a nominal depth, and what each input adds to BLEU."""
    plan = Dense() if depth == 1 else SkipDecode(depth=depth, horizon=horizon)
    done = engine.generate([e.mr for e in inputs], sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS), plan=plan)
    texts, references = [g.text for g in done], [e.references for e in inputs]
    passes = sum(g.ledger.decode_passes for g in done)
    mean_layers = sum(g.ledger.decode_layer_tokens for g in done) / passes
    statistics = Statistics(bleu_counts(texts, references).astype(float), bleu_of)
    row = {
        "depth": written(depth),
        "num_layers": engine.shape.num_layers,
        "mean_layers": round(mean_layers, 3),
        "mean_depth": round(mean_layers / engine.shape.num_layers, 4),
        "mean_new_tokens": round(sum(len(g.token_ids) for g in done) / len(done), 2),
        "past_horizon": round(sum(g.past_horizon for g in done) / len(done), 4),
        "unfinished": sum(g.finish_reason != "stop" for g in done),
        "bleu": score(statistics.score()),
        "rouge_l": score(rouge_l(texts, references)),
        "slot_error_rate": score(slot_error_rate([e.mr for e in inputs], texts)),
    }
    return row, statistics


def score(value: Score) -> dict[str, float]:
    """A score as JSON, in percent."""
    return {name: round(getattr(value, name), 2) for name in ("value", "low", "high")}


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    scores = "  ".join(f"{name} {row[name]['value']:.1f}" for name in ("bleu", "rouge_l", "slot_error_rate"))
    return f"{row['system']:10s} depth {row['depth']:4s} mean layers {row['mean_layers']:5.2f}  {scores}"


if __name__ == "__main__":
    main()
