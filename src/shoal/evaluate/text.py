"""Text metrics against several references, with bootstrap intervals over inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import InvalidInput, MissingExtra

RESAMPLES = 1000
"""Bootstrap resamples behind an interval."""


@dataclass(frozen=True)
class Score:
    """A metric with its 95% bootstrap interval over inputs."""

    value: float
    """The metric on all inputs."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus BLEU in percent (sacrebleu, lowercased, 13a tokens); `references[i]` are those of `hypotheses[i]`, one or more.

    The interval is mean ± half-width of sacrebleu's own bootstrap, shifted onto the score. Raises `MissingExtra`.
    """
    check(hypotheses, references)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise MissingExtra("BLEU needs sacrebleu: pip install 'shoal[evaluate]'") from error
    # sacrebleu wants one stream per reference rank; an input with fewer references has None in the last streams.
    ranks = max(len(r) for r in references)
    streams: list[Any] = [[r[rank] if rank < len(r) else None for r in references] for rank in range(ranks)]
    resamples = RESAMPLES if len(hypotheses) > 1 else 1
    result = BLEU(lowercase=True).corpus_score(list(hypotheses), streams, n_bootstrap=resamples)
    half_width = float(result._ci) if resamples > 1 else 0.0
    return Score(float(result.score), float(result.score) - half_width, float(result.score) + half_width)


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Mean ROUGE-L F-measure in percent, the best reference of each input counting. Raises `MissingExtra`."""
    check(hypotheses, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise MissingExtra("ROUGE-L needs rouge-score: pip install 'shoal[evaluate]'") from error
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(reference, hypothesis)["rougeL"].fmeasure for reference in several)
        for hypothesis, several in zip(hypotheses, references, strict=True)
    ]
    return ratio([100 * f for f in best], [1.0] * len(best))


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Score:
    """Sum over sum, one pair per input, with a percentile bootstrap interval. Denominators of 1 make it a mean.

    >>> ratio([1, 0, 2], [2, 2, 2]).value
    0.5
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    draws = np.random.default_rng(seed).integers(len(top), size=(RESAMPLES, len(top)))
    low, high = np.percentile(top[draws].sum(1) / bottom[draws].sum(1), [2.5, 97.5])
    return Score(float(top.sum() / bottom.sum()), float(low), float(high))


def check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise `InvalidInput` unless there is one set of references, not empty, per hypothesis."""
    if len(hypotheses) != len(references) or not hypotheses:
        raise InvalidInput(
            f"{len(hypotheses)} hypotheses and {len(references)} sets of references: give one set for each"
        )
    for index, several in enumerate(references):
        if isinstance(several, str) or not several:
            raise InvalidInput(f"references[{index}] must be a list with one reference or more")
