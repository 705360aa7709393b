"""How the recipe study runs a checkpoint: under a plan or a router by the engine, or with CALM's confidence exits.

CALM's measure is the softmax gap, the best of those in its paper that need no training. Its thresholds are chosen on the
development set, so that the mean exit comes as close to a budget as it can. It runs in batches of 32: rows exit on their own, but a
step ends with its last row, and both are counted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from recipe_arms import NUM_LAYERS
from shoal import Engine, Sampling
from shoal.baselines.calm import Calm, ExitRun, generate
from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.evaluate.e2e import E2EInput, slot_errors
from shoal.evaluate.text import bleu_counts
from study import read_json, write_json

MAX_NEW_TOKENS = 80
CALM_BATCH = 32
HALVINGS = 7
"""Of the interval of thresholds: to 1/128."""


def measure(engine: Engine, inputs: list[E2EInput], plan: Any, quick: bool) -> dict[str, Any]:
    """One arm at one depth: mean layers as they ran, texts, and counts per input. `plan`: a policy or a router."""
    sampling = Sampling(max_new_tokens=8 if quick else MAX_NEW_TOKENS)
    done = engine.generate([e.mr for e in inputs], sampling=sampling, plan=plan)
    passes = sum(g.ledger.decode_passes for g in done)
    return {
        "mean_layers": round(sum(g.ledger.decode_layer_tokens for g in done) / max(1, passes), 3),
        "decode_flops": round(sum(g.ledger.decode_flops for g in done) / max(1, passes)),
        "unfinished": sum(g.finish_reason != "stop" for g in done),
        **counted(inputs, [g.text for g in done]),
    }


def counted(inputs: list[E2EInput], texts: list[str]) -> dict[str, Any]:
    """What each text adds to BLEU and to slot errors, and the texts."""
    errors = [slot_errors(e.mr, text) for e, text in zip(inputs, texts, strict=True)]
    return {
        "bleu_counts": bleu_counts(texts, [e.references for e in inputs]).astype(int).tolist(),
        "slot_counts": [[100 * e.count, e.num_slots] for e in errors],
        "texts": texts,
    }


def run_calm(model: LayerwiseDecoder, inputs: list[E2EInput], threshold: float, quick: bool) -> ExitRun:
    """The inputs completed with exits at `threshold`."""
    tokens = 8 if quick else MAX_NEW_TOKENS
    prompts = [e.mr for e in inputs]
    return generate(model, prompts, Calm(threshold=threshold), max_new_tokens=tokens, batch_size=CALM_BATCH)


def measure_calm(model: LayerwiseDecoder, inputs: list[E2EInput], threshold: float, quick: bool) -> dict[str, Any]:
    """As `measure`, with the layers that a step of the batch ran, and the FLOPs in percent of dense decoding."""
    run = run_calm(model, inputs, threshold, quick)
    ledger = run.cost.ledger
    return {
        "threshold": threshold,
        "mean_layers": round(ledger.mean_layers, 3),
        "batch_layers": round(run.batch.mean_layers, 3),
        "decode_flops": round(ledger.decode_flops / max(1, ledger.decode_passes)),
        "flops_percent": round(100 * ledger.decode_flops / max(1, ledger.dense_decode_flops), 1),
        "unfinished": sum(one.finish_reason != "stop" for one in run.completions),
        **counted(inputs, [one.text for one in run.completions]),
    }


def thresholds(
    model: LayerwiseDecoder, inputs: list[E2EInput], depths: list[float], home: Path, quick: bool
) -> list[float]:
    """Per depth the threshold at which rows exit after that share of the layers on average, or the nearest to it that was found.

    By halving: a higher threshold lets tokens exit later. What was chosen is kept in `home`.
    """
    record = home / "report.json"
    if not record.is_file():
        home.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        tried: dict[float, float] = {}

        def mean_exit(threshold: float) -> float:
            if threshold not in tried:
                tried[threshold] = run_calm(model, inputs, threshold, quick).cost.ledger.mean_layers
                spent = time.perf_counter() - began
                print(f"{home.name} threshold {threshold} exits at {tried[threshold]:.2f} {spent:.0f} s", flush=True)
            return tried[threshold]

        mean_exit(0.0), mean_exit(1.0)
        for depth in depths:
            low, high = 0.0, 1.0
            for _ in range(1 if quick else HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if mean_exit(middle) < depth * NUM_LAYERS else (low, middle)
        found = [min(tried, key=lambda tried_one: abs(tried[tried_one] - depth * NUM_LAYERS)) for depth in depths]
        write_json(record, {"depths": depths, "thresholds": found, "tried": sorted(tried.items())})
    chosen: list[float] = read_json(record)["thresholds"]
    return chosen
