"""The metrics that a task can ask for, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from shoal.errors import InvalidInput, nearest
from shoal.evaluate.bootstrap import Floats, Formula, Statistics, quotient
from shoal.evaluate.e2e import slot_errors
from shoal.evaluate.text import bleu_counts, bleu_of, chrf_counts, chrf_of, nist_counts, nist_of, rouge_l_counts

Counts = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[str]], Floats]
"""`counts(prompts, references, outputs)`: [N, K], what each input adds to the metric's sums."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric: what it counts of each input, and its formula over the sums."""

    label: str
    """As people write it."""
    counts: Counts | None
    """None where the counts do not come from outputs: the loss is counted by the model."""
    formula: Formula
    """See `shoal.evaluate.bootstrap`."""
    higher_is_better: bool = True
    """False for losses and error rates."""

    def statistics(
        self, prompts: Sequence[str], references: Sequence[Sequence[str]], outputs: Sequence[str]
    ) -> Statistics:
        """Count outputs. Raises `MissingExtra` where the metric's library is absent."""
        assert self.counts is not None
        return Statistics(self.counts(prompts, references, outputs), self.formula)


def _slot_errors(prompts: Sequence[str], references: Sequence[Sequence[str]], outputs: Sequence[str]) -> Floats:
    errors = [slot_errors(mr, text) for mr, text in zip(prompts, outputs, strict=True)]
    return np.array([[100.0 * e.count, e.num_slots] for e in errors])


def _share_of(agrees: Callable[[str, str], bool]) -> Counts:
    """Percent of the outputs that agree with one of their references."""

    def count(prompts: Sequence[str], references: Sequence[Sequence[str]], outputs: Sequence[str]) -> Floats:
        right = [
            any(agrees(text, reference) for reference in several)
            for text, several in zip(outputs, references, strict=True)
        ]
        return np.array([[100.0 * one, 1.0] for one in right])

    return count


def same_text(text: str, reference: str) -> bool:
    """Whether two answers are the same but for case and white space.

    >>> same_text(" New  York\\n", "new york")
    True
    """
    return text.casefold().split() == reference.casefold().split()


def final_number(text: str) -> Decimal | None:
    """The number after `####` (the mark of GSM8K's solutions) where there is one, else the last number; None without any.

    >>> final_number("So 2 * 9 = $1,018.00 a day."), final_number("#### 18"), final_number("none")
    (Decimal('1018.00'), Decimal('18'), None)
    """
    _, mark, answer = text.rpartition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    if not numbers:
        return None
    return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))


def same_number(text: str, reference: str) -> bool:
    """Whether the final numbers are equal: `18` and `18.00` are. A text without a number equals nothing."""
    return (number := final_number(text)) is not None and number == final_number(reference)


METRICS: dict[str, Metric] = {
    "bleu": Metric(label="BLEU", counts=lambda p, refs, out: bleu_counts(out, refs), formula=bleu_of),
    "nist": Metric(label="NIST", counts=lambda p, refs, out: nist_counts(out, refs), formula=nist_of),
    "rouge_l": Metric(label="ROUGE-L", counts=lambda p, refs, out: rouge_l_counts(out, refs), formula=quotient),
    "chrf": Metric(label="chrF", counts=lambda p, refs, out: chrf_counts(out, refs), formula=chrf_of),
    "slot_error_rate": Metric(label="slot error rate", counts=_slot_errors, formula=quotient, higher_is_better=False),
    "exact_match": Metric(label="exact match", counts=_share_of(same_text), formula=quotient),
    "final_number": Metric(label="final number", counts=_share_of(same_number), formula=quotient),
    "loss": Metric(label="loss", counts=None, formula=quotient, higher_is_better=False),
}
"""All in percent but NIST (bits) and the loss (nats per token)."""


def metric_named(name: str) -> Metric:
    """The metric of a name that counts outputs. Raises `InvalidInput` with the nearest name."""
    counted = {known for known, metric in METRICS.items() if metric.counts is not None}
    if name not in counted:
        raise InvalidInput(f"unknown metric {name!r}: {nearest(name, counted)}")
    return METRICS[name]
