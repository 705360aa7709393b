"""The bounds that results have to keep, each with the number that was measured.

python benchmarks/gates.py            (of results/*.json; exit status 1 if one is missed)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from report import load
from shoal.evaluate.markdown import table

PROBES_AT_MOST = {"pool, mean": 1.06, "pool, max": 1.06, "gate": 1.06, "attention": 1.3}
"""Time of reading prompts with probes over that without."""
OPENVINO_AT_LEAST = {1: 0.75, 8: 0.85, 32: 0.85}
"""Our dense decoding over OpenVINO's, by batch."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One bound on one number."""

    what: str
    case: dict[str, Any]
    """Of the run."""
    value: float | None
    """None: not measured."""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or that there is no number."""
        if self.value is None:
            return "not measured"
        kept = (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )
        return "PASS" if kept else "FAIL"

    def cells(self) -> list[str]:
        """A row of the table."""
        bounds = [
            f"{sign} {bound:g}" for sign, bound in ((">=", self.at_least), ("<=", self.at_most)) if bound is not None
        ]
        measured = "-" if self.value is None else f"{self.value:.3f}"
        return [
            self.what,
            " ".join(str(value) for value in self.case.values()),
            measured,
            ", ".join(bounds),
            self.verdict,
        ]


def decode_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """Beside peers in bfloat16, and the gain of depth beside its bound."""
    case, batch = run["case"], run["case"]["batch"]

    def over(row: dict[str, Any] | None, label: str) -> float | None:
        return None if row is None else float(row["over"][label]["decode"]["median"])

    if case["dtype"] == "bfloat16" and "peers" in run:
        peers = {row["peer"]: row for row in run["peers"]}
        if batch in OPENVINO_AT_LEAST:
            yield Gate(
                what="dense over transformers", case=case, value=over(peers.get("transformers"), "dense"), at_least=1.8
            )
            least = OPENVINO_AT_LEAST[batch]
            yield Gate(
                what="dense over OpenVINO", case=case, value=over(peers.get("openvino"), "dense"), at_least=least
            )
        for name, row in peers.items():
            yield Gate(what=f"depth 1/2 over {name}", case=case, value=over(row, "depth 1/2"), at_least=1)
    if batch in (8, 32):
        least_gain = min(row["gain_over_bound"] for row in run["variants"] if row["variant"].startswith("depth"))
        yield Gate(what="gain over bound, one clock, worst depth", case=case, value=least_gain, at_least=0.9)


def clocks_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """The gain of four plans at staggered clocks beside its bound."""
    for row in run["variants"]:
        if (row["plans"], row["admission"]) == ("four plans", "staggered") and "decode_gain_over_bound" in row:
            value = row["decode_gain_over_bound"]
            yield Gate(what="gain over bound, four plans staggered", case=run["case"], value=value, at_least=0.8)


def memory_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """Resident memory beside weights and cache, loading beside reading."""
    value = run["generating_over_planned"]["median"]
    yield Gate(what="memory over weights + cache", case=run["case"], value=value, at_most=1.15)
    if run["case"]["dtype"] == "bfloat16":  # the dtype of the file
        yield Gate(what="loading over reading", case=run["case"], value=run["load_over_read"]["median"], at_most=2)


def scaling_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """Time per step against active layers, worst of the row counts."""
    worst = min(line["r_squared"] for line in run["lines"] if line["axis"] == "layers")
    yield Gate(what="time per step linear in layers, R²", case=run["case"], value=worst, at_least=0.99)


def drafting_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """What can be copied is; what cannot costs nothing; and tokens are the same."""
    case, rows = run["case"], {row["draft"]: row for row in run["variants"] if row["draft"] != "none"}
    if (case["text"], case["batch"]) == ("edit", 1):
        best = max(rows[name]["speedup"]["median"] for name in ("ngram", "suffix"))
        yield Gate(what="n-gram or suffix, edited text", case=case, value=best, at_least=1.8)
    if case["text"] == "free":
        worst = max(row["draft_share"]["median"] for row in rows.values())
        yield Gate(what="drafting's share of a step when it is off", case=case, value=worst, at_most=0.03)
    left_to_the_engine = [row for name, row in rows.items() if "tokens" not in name]
    worst = min(row["speedup"]["max"] for row in left_to_the_engine)
    yield Gate(what="no draft slower: largest of 5 ratios, worst draft", case=case, value=worst, at_least=1)


def entropy_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """What a trace adds to decoding."""
    rows = {row["trace"]: row for row in run["variants"]}
    value = rows["top 20"]["over_none"]["median"]
    yield Gate(what="entropy trace over none", case=run["case"], value=value, at_most=1.05)


def probes_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """What probes add to reading prompts."""
    for row in run["variants"]:
        if (most := PROBES_AT_MOST.get(row["probes"])) is not None:
            value = row["over_none"]["median"]
            yield Gate(what=f"prompt time with {row['probes']}", case=run["case"], value=value, at_most=most)


def serve_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """Where the server has all that it can do: what depth gains, and whether the engine knew before."""
    if run["case"]["load"] != "saturated":
        return
    case, rows = run["case"], {row["variant"]: row for row in run["variants"]}
    gain = rows["depth 1/2"]["speedup"]["median"]
    yield Gate(what="depth 1/2 over dense, served", case=case, value=gain, at_least=1.3)
    for label in ("dense", "depth 1/2"):
        over = rows[label].get("over_forecast", {"median": None})["median"]
        yield Gate(what=f"{label} served over forecast", case=case, value=over, at_least=0.9, at_most=1.1)


def rank_gates(run: dict[str, Any]) -> Iterator[Gate]:
    """Whether ranking takes little beside asking."""
    name, seconds = max(run["seconds_per_1000_queries"].items(), key=lambda pair: float(pair[1]))
    yield Gate(what=f"seconds of the slowest ranker, {name}", case=run["case"], value=seconds, at_most=120)


GATES: dict[str, Callable[[dict[str, Any]], Iterator[Gate]]] = {
    "decode": decode_gates,
    "clocks": clocks_gates,
    "memory": memory_gates,
    "scaling": scaling_gates,
    "drafting": drafting_gates,
    "entropy": entropy_gates,
    "probes": probes_gates,
    "rank": rank_gates,
    "serve": serve_gates,
}
HEADER = ("gate", "case", "measured", "wanted", "")


def gates_of(benchmark: str, runs: Sequence[dict[str, Any]]) -> list[Gate]:
    """Every gate that these runs answer."""
    return [gate for run in runs for gate in GATES[benchmark](run)]


def saved_gates() -> list[Gate]:
    """Every gate that the saved results answer."""
    return [gate for name in GATES for gate in gates_of(name, load(name))]


def as_table(gates: Sequence[Gate]) -> str:
    """A row each."""
    return table(HEADER, [gate.cells() for gate in gates])


def print_gates(benchmark: str, runs: Sequence[dict[str, Any]]) -> None:
    """What `--gates` prints."""
    print(as_table(gates_of(benchmark, runs)), end="\n\n", flush=True)


if __name__ == "__main__":
    found = saved_gates()
    print(as_table(found))
    sys.exit(any(gate.verdict == "FAIL" for gate in found))
