"""How much to draft: goodput, the expected number of tokens per second of the whole pass (SmartSpec, arXiv 2406.14066).

A pass that verifies k drafted tokens of a row emits 1 + p_1 + p_1 p_2 + ... tokens of it, and takes longer. Each further token of
each row is worth its chance, and the next one is always the likeliest of all rows, so drafts grow together; the best goodput of a
few numbers of tokens wins. The seconds come from the engine's own step-time model. Example: a pass takes 10 ms with one token per
row, 11 with two, 14 with three; the chances are 0.9 and then 0.5. Tokens per second: 100, 1.9 / 11 ms = 173, 2.4 / 14 ms = 171.
So one token is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from shoal.engine.slots import SlotTable
from shoal.engine.step_time import pass_work
from shoal.engine.tally import Tally

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
"""Tokens added to a pass that are looked at: prices are estimates, so every number would be no better."""
LEAST_GAIN = 1.03
"""How many times the goodput of no draft a draft has to promise."""
TRIAL_TOKENS = 4
"""Drafted tokens per row while passes of several tokens have not been measured yet."""
STOP_AT = 0.3
"""A model stops drafting once the chance that something in the draft is wrong exceeds 1 minus this (SpecDec++ calls it h)."""


PassSeconds = Callable[[Mapping[int, int]], float | None]
"""Predicted seconds of the pass at hand if it verifies so many drafted tokens, by slot; None while not measured."""


def pass_seconds(tokens: Mapping[int, int], slots: SlotTable, tally: Tally) -> PassSeconds:
    """What is predicted of a pass that brings `tokens` (by slot) beside the drafted ones. Costs nothing until it is asked."""

    def seconds(added: Mapping[int, int]) -> float | None:
        order = np.fromiter(tokens, dtype=np.int64)
        counts = np.array([count + added.get(slot, 0) for slot, count in tokens.items()])
        num_logits = len(tokens) + sum(added.values())
        return tally.step_time.seconds(
            pass_work(slots.served(order, counts), slots.num_computed[order], counts, num_logits)
        )

    return seconds


def lengths(chances: Mapping[int, Sequence[float]], num_rows: int, seconds: PassSeconds, room: int) -> dict[int, int]:
    """How many tokens of each draft to verify, by slot.

    Args: `chances`: by slot, of each drafted token to be reached and accepted, falling; `num_rows`: rows of the pass, those without
    a draft among them; `seconds`: see `PassSeconds`; `room`: most tokens that all drafts may add.
    """
    ranked = sorted(((chance, slot) for slot, row in chances.items() for chance in row), reverse=True)[:room]
    if not ranked:
        return {}
    base = seconds({})
    if base is None:
        return trial(ranked)
    best, best_goodput = 0, LEAST_GAIN * num_rows / base
    expected, added, at = float(num_rows), dict.fromkeys(chances, 0), 0
    for count in (*(count for count in COUNTS if count < len(ranked)), len(ranked)):
        for chance, slot in ranked[at:count]:
            expected += chance
            added[slot] += 1
        before, at = at, count
        took = seconds(added)
        if took is None:
            if not before:
                return trial(ranked)
            return added_by(ranked[: count if best == before else best])  # try more where more has been better so far
        if expected / took > best_goodput:
            best, best_goodput = count, expected / took
    return added_by(ranked[:best])


def added_by(ranked: Sequence[tuple[float, int]]) -> dict[int, int]:
    """Tokens per slot."""
    added: dict[int, int] = {}
    for _, slot in ranked:
        added[slot] = added.get(slot, 0) + 1
    return added


def trial(ranked: Sequence[tuple[float, int]]) -> dict[int, int]:
    """A few tokens per slot, to learn what they cost."""
    return {slot: min(count, TRIAL_TOKENS) for slot, count in added_by(ranked).items()}


def model_length(
    chance: float, rows: Sequence[int], num_rows: int, seconds: PassSeconds, *, most: int, draft_s: float | None,
    slowness: float = 1.0,
) -> int | None:  # fmt: skip
    """How many tokens a model should draft for `rows` (slots), if each is accepted with `chance`; 0 where none pay, None where what
    it takes has not been measured.

    Args: `num_rows` and `seconds`: see `lengths`; `most`: the longest draft; `draft_s`: seconds per token drafted for all of
    `rows`, None while not measured; `slowness`: how many times longer than predicted such steps take than those without a draft.
    """
    base = seconds({})
    if base is None or draft_s is None:
        return None
    best, best_goodput = 0, LEAST_GAIN * num_rows / base
    gained, before = 0.0, num_rows / base
    for count in range(1, most + 1):
        gained += len(rows) * chance**count
        took = seconds(dict.fromkeys(rows, count))
        if took is None:  # one token more than is known to be good, or nothing is known
            return count if best and best == count - 1 else best or None
        goodput = (num_rows + gained) / (took + count * draft_s) / slowness
        if goodput < before:
            break  # the next token would gain less than this one, and cost as much
        before = goodput
        if goodput > best_goodput:
            best, best_goodput = count, goodput
    return best
