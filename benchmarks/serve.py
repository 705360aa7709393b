"""A server under load: what depth gains where HTTP, streams, arrivals at random and reading prompts are all in it.

    python benchmarks/serve.py --save --gates                      (an hour on 2 cores)
    python benchmarks/serve.py --save --loads saturated            (the gates alone)

One server process (`serve_process.py`: what `shoal serve` runs), asked by an asyncio client on the same cores (`http_load.py`): 32
prompt + 128 new tokens, greedy, streamed, no token ends a request; each request says its depth. Random weights: depth and lengths
decide the time. *Saturated*: a closed loop of twice as many clients as slots; counted are whole fillings of the slots after one
that is not. Other loads are Poisson arrivals, in shares of the requests per second that a closed loop gets with every layer.

A request is good if it keeps to the target: its TTFT is at most 5 and its TPOT at most 2 times those of a request alone with every
layer (medians). *Goodput* is good requests per second of arrivals.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from gates import print_gates
from machine import conditions
from models import MODELS, random_checkpoint
from peers.client import Absent
from peers.servers import SERVERS, PeerServer, started
from report import interleaved, paired, parser, print_json, rounded, save, spread
from samples import workplace
from serve_process import MODEL, ServerProcess
from serve_rounds import DENSE, Rounds, Sample, Variant, beside_forecast
from serve_tables import describe

SATURATED = "saturated"
LOADS = ("0.3", "0.6", "0.9", "1.2", "1.6", SATURATED)
PROMPT_TOKENS = 32
NEW_TOKENS = 128
SLOTS = 8

VARIANTS = {
    "dense": DENSE,
    "depth 1/2": Variant(depths=(1 / 2,)),
    "depth 1/2, staggered": Variant(depths=(1 / 2,), staggered=True),
    "depth 1/2, staggered, at once": Variant(depths=(1 / 2,), staggered=True, waves=False),
    "depth 1/5": Variant(depths=(1 / 5,)),
    "mixed": Variant(depths=(1, 1 / 2, 1 / 5)),
}


def measure(
    one_round: Rounds,
    variants: dict[str, Variant],
    peers: Sequence[PeerServer],
    load: str,
    target: dict[str, float],
    capacity_per_s: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """All variants and peers under one load, by turns."""
    runs: dict[str, Callable[[], Sample]] = {}
    about: dict[str, Any] = {}
    if load == SATURATED:
        runs = {label: partial(one_round.saturated, one, fillings=options.fillings) for label, one in variants.items()}
        runs |= {peer.name: partial(one_round.peer_saturated, peer, fillings=options.fillings) for peer in peers}
        rounds = options.rounds
    else:
        rate_per_s, rounds = float(load) * capacity_per_s, options.load_rounds
        requests = 4 if options.quick else max(options.slots, round(rate_per_s * options.load_s))
        how = partial(dict, rate_per_s=rate_per_s, requests=requests)
        runs = {
            label: partial(one_round.loaded, one, **how(seeds=list(range(1, rounds + 1))))
            for label, one in variants.items()
        }
        runs |= {
            peer.name: partial(one_round.peer_loaded, peer, **how(seeds=list(range(1, rounds + 1)))) for peer in peers
        }
        about = {"rate_per_s": rounded(rate_per_s)}
    samples: dict[str, list[Sample]] = {label: [] for label in runs}
    began = time.monotonic()
    for _ in range(rounds):
        for label, timed in interleaved(runs, 1).items():
            samples[label] += timed
        if time.monotonic() - began > options.most_s:
            break
    rows = [one_round.row(label, samples[label], target) for label in runs]
    if load == SATURATED:
        dense = [one.seconds for one in samples["dense"]]
        for row in rows:
            ours = samples[row["variant"]]
            row["speedup"] = paired(dense, [one.seconds for one in ours])
            if row["variant"] in variants:
                row["pass_share"] = spread([one.pass_share or 0 for one in ours])
            row |= beside_forecast(
                ours, fillings=options.fillings, slots=options.slots, new_tokens=one_round.new_tokens
            )
    state = one_round.server.ask()
    run = {
        "case": {"model": options.model, "dtype": options.dtype, "load": load},
        "conditions": conditions() | {"threads": options.threads},
        "client": "shares the cores with the server",
        "executor": state["executor"],
        "slots": options.slots,
        "prompt_tokens": one_round.prompt_tokens,
        "new_tokens": one_round.new_tokens,
        "rounds": len(samples["dense"]),
        **about,
        "target": target,
        "pass_relative_error": rounded(state["relative_error"] or 0),
        "peers": [{"peer": peer.name, "version": peer.version} for peer in peers],
        "variants": rows,
    }
    return run


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="Llama-300M", choices=MODELS)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--slots", type=int, default=SLOTS, help="requests that run together")
    options.add_argument("--loads", nargs="+", default=LOADS, help="shares of the dense capacity, or saturated")
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="dense among them")
    options.add_argument("--fillings", type=int, default=3, help="times that all slots are served, per round")
    options.add_argument("--load-rounds", type=int, default=2, help="rounds of Poisson arrivals")
    options.add_argument("--load-s", type=float, default=12, help="seconds of arrivals in a round")
    options.add_argument("--most-s", type=float, default=math.inf, help="begin no round of a load after so long")
    options.add_argument("--peers", nargs="*", default=(), choices=SERVERS, help="see peers/README.md")
    options.add_argument("--keep", type=Path, help="keep the checkpoint in this directory")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.model, chosen.slots, chosen.fillings, chosen.loads = "Llama-quick", 2, 2, ("0.5", SATURATED)
    runs = []
    with workplace(chosen.keep) as directory, ExitStack() as stack:
        checkpoint = random_checkpoint(chosen.model, directory, words=True)
        sizes = {"slots": chosen.slots, "threads": chosen.threads}
        variants = {label: VARIANTS[label] for label in chosen.variants}
        peers = []
        for name in chosen.peers:
            about = {"model": MODEL, "cache": checkpoint.parent / "peers", **sizes}
            peer = stack.enter_context(started(name, checkpoint, chosen.dtype, **about))
            if isinstance(peer, Absent):
                print(f"{peer.name} is absent: {peer.reason}")
            else:
                peers.append(peer)
        server = stack.enter_context(ServerProcess(checkpoint, chosen.dtype, **sizes))
        prompt_tokens, new_tokens = (4, 8) if chosen.quick else (PROMPT_TOKENS, NEW_TOKENS)
        one_round = Rounds(
            server,
            vocab_size=MODELS[chosen.model].vocab_size,
            slots=chosen.slots,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
        )
        target = one_round.alone()
        for variant in variants.values():  # what passes cost is learnt here
            one_round.saturated(variant, fillings=1)
        for peer in tuple(peers):
            try:
                one_round.peer_saturated(peer, fillings=1)
            except RuntimeError as error:
                print(f"{peer.name} is absent: {error}")
                peers.remove(peer)
        capacity_per_s = chosen.slots / one_round.saturated(DENSE, fillings=1).seconds
        for load in chosen.loads:
            run = measure(one_round, variants, peers, load, target, capacity_per_s, chosen)
            print(describe(run), end="\n\n", flush=True)
            if chosen.save:
                save("serve", [run])
            runs.append(run)
    if chosen.gates:
        print_gates("serve", runs)
    print_json("serve", runs)


if __name__ == "__main__":
    main()
