"""What probes add to the time of reading prompts.

    python benchmarks/probes.py --save

The same batch with and without probes, by turns in one engine: every layer, one new token; the time is that of the passes. Weights
of models and probes are random: what they say does not change what they take. Probes read all levels; attention is down-cast by 32
and has 4 heads. Processor time is that of all threads: on a machine with other work it says what waiting hides.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gates import print_gates
from machine import conditions
from models import random_checkpoint, random_prompts
from report import extent, interleaved, paired, parser, print_json, rounded, save, spread
from samples import workplace
from shoal import Engine, Probe, Sampling
from shoal.evaluate.markdown import table
from shoal.signals.probe import ProbeSettings

CASES = ((8, 64), (8, 512))
"""(batch, prompt tokens)."""
QUICK_CASES = ((2, 8),)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "pool, mean": [{"operator": "pool", "pooling": "mean"}],
    "pool, max": [{"operator": "pool", "pooling": "max"}],
    "gate": [{"operator": "gate"}],
    "four gates": [{"operator": "gate"}] * 4,
    "attention": [{"operator": "attention", "factor": 32, "heads": 4, "max_prompt_tokens": 1024}],
}
"""Probes that read the prompts together."""


def random_probe(engine: Engine, number: int, settings: dict[str, Any]) -> Probe:
    """A probe of two classes."""
    shape, d = engine.shape, engine.shape.hidden_size
    if d < 32 * 4:
        settings = {**settings, **({"factor": 4} if settings["operator"] == "attention" else {})}
    made = ProbeSettings(
        name=f"probe {number}",
        classes=("no", "yes"),
        hidden_size=d,
        num_levels=shape.num_layers + 1,
        shape=shape,
        fingerprint=engine.config.fingerprint,
        **settings,
    )
    generator = torch.Generator().manual_seed(number)
    sizes = {**made.sizes(), "familiar_means": (2, d), "familiar_scale": (d, d), "familiar_distances": (1001,)}
    tensors = {name: torch.randn(size, generator=generator) / d**0.5 for name, size in sizes.items()}
    return Probe(made, {**tensors, "familiar_distances": tensors["familiar_distances"].sort().values})


def read_s(engine: Engine, prompts: Sequence[list[int]], observer: Any) -> tuple[float, float, int]:
    """Seconds of the passes that read the prompts, seconds of the processors, and what the probes' operations were."""
    engine.stats.reset()
    began = time.process_time()
    done = engine.generate(prompts, Sampling(max_new_tokens=1, ignore_eos=True), probes=observer)
    busy_s = time.process_time() - began
    return engine.stats.prompt_s, busy_s, sum(one.ledger.probe_flops for one in done)


def measure(name: str, dtype: str, options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """The runs of one model in one dtype."""
    cases = QUICK_CASES if options.quick else CASES
    engine = Engine.from_pretrained(
        random_checkpoint(name, directory),
        dtype=dtype,
        max_batch=max(batch for batch, _ in cases),
        max_pass_tokens=max(batch * length for batch, length in cases),
        cache_gib=2,
    )
    observers = {
        label: engine.observer([random_probe(engine, number, one) for number, one in enumerate(probes)])
        for label, probes in VARIANTS.items()
    }
    for batch, length in cases:
        prompts = random_prompts(engine.shape.vocab_size, num_prompts=batch, num_tokens=length)
        variants = {label: partial(read_s, engine, prompts, observer) for label, observer in observers.items()}
        interleaved(variants, 1)
        samples = interleaved(variants, options.rounds)
        seconds = {label: [one[0] for one in timed] for label, timed in samples.items()}
        busy = {label: [one[1] for one in timed] for label, timed in samples.items()}
        (done,) = engine.generate(prompts[:1], Sampling(max_new_tokens=1))
        yield {
            "case": {"model": name, "dtype": dtype, "batch": batch, "prompt_tokens": length},
            "conditions": conditions(),
            "rounds": options.rounds,
            "variants": [
                {
                    "probes": label,
                    "prompt_s": spread(timed),
                    "over_none": paired(timed, seconds["none"]),
                    "busy_over_none": paired(busy[label], busy["none"]),
                    "flops_share": rounded(samples[label][0][2] / (batch * done.ledger.prompt_flops)),
                    "parameters": sum(probe.num_parameters for probe in getattr(observers[label], "probes", ())),
                }
                for label, timed in seconds.items()
            ],
        }


HEADER = (
    *("probes", "parameters", "FLOPs, % of the prompt's", "prompt ms", "min..max", "time over none", "min..max"),
    *("processor time over none", "min..max"),
)


def describe(run: dict[str, Any]) -> str:
    """One run as a table."""
    case = run["case"]
    rows = []
    for row in run["variants"]:
        in_ms = {key: 1e3 * value for key, value in row["prompt_s"].items()}
        over, busy = row["over_none"], row["busy_over_none"]
        rows.append(
            [
                row["probes"],
                f"{row['parameters']:,}",
                f"{100 * row['flops_share']:.2f}",
                f"{in_ms['median']:.1f}",
                f"{in_ms['min']:.1f}..{in_ms['max']:.1f}",
                f"{over['median']:.3f}",
                extent(over),
                f"{busy['median']:.3f}",
                extent(busy),
            ]
        )
    title = f"{case['model']}, {case['dtype']}, {case['batch']} prompts of {case['prompt_tokens']} tokens, {run['rounds']} rounds"
    return f"{title}\n\n{table(HEADER, rows)}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["OPT-125M"])
    options.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    options.add_argument("--keep", type=Path, metavar="DIR", help="keep the checkpoint there for the next run")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.models, chosen.rounds = ["OPT-quick"], 2
    torch.set_num_threads(chosen.threads)
    runs = []
    with workplace(chosen.keep) as directory:
        for name in chosen.models:
            for dtype in chosen.dtypes:
                for run in measure(name, dtype, chosen, directory):
                    print(describe(run), end="\n\n", flush=True)
                    if chosen.save:
                        save("probes", [run])
                    runs.append(run)
    if chosen.gates:
        print_gates("probes", runs)
    print_json("probes", runs)


if __name__ == "__main__":
    main()
