"""Text metrics against several references, counted input by input so that they can be resampled.

Counts are those of sacrebleu and rouge-score. NIST has no library that keeps them apart by input, so it is counted here and held
against NLTK's `corpus_nist` in the tests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shoal.errors import InvalidInput, MissingExtra
from shoal.evaluate.bootstrap import Floats, Score, Statistics, quotient

NIST_ORDER = 5
"""Longest n-gram of NIST (Doddington 2002)."""


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus BLEU in percent (sacrebleu, lowercased, 13a tokens); `references[i]` are those of `hypotheses[i]`, one or more.

    Raises `MissingExtra`.
    """
    return Statistics(bleu_counts(hypotheses, references), bleu_of).score()


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Mean ROUGE-L F-measure in percent, the best reference of each input counting. Raises `MissingExtra`."""
    return Statistics(rouge_l_counts(hypotheses, references), quotient).score()


def bleu_counts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """[N, 10]: length, length of the nearest reference, matched n-grams (n = 1..4), n-grams. Raises `MissingExtra`."""
    return _sacrebleu_counts(_bleu(), hypotheses, references)


def bleu_of(sums: Floats) -> Floats:
    """Corpus BLEU in percent of `bleu_counts`' sums [R, 10]."""
    return _sacrebleu_score(_bleu(), sums)


def chrf_counts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """[N, 18]: for character n-grams, n = 1..6, those of the text, of its best reference, and in both. Raises `MissingExtra`."""
    return _sacrebleu_counts(_chrf(), hypotheses, references)


def chrf_of(sums: Floats) -> Floats:
    """chrF2 in percent (Popović 2015) of `chrf_counts`' sums [R, 18]."""
    return _sacrebleu_score(_chrf(), sums)


def rouge_l_counts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """[N, 2]: F-measure in percent with the best reference, and 1. Raises `MissingExtra`."""
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
    return np.array([[100 * f, 1.0] for f in best])


def nist_counts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """[N, 12]: information of matched n-grams (n = 1..5), n-grams, length of the references that matched best, own length.

    Tokens are those of `bleu`. An n-gram carries log2(count of its first n - 1 words / its own count) bits, counted over all
    references; these weights belong to the task and stay as they are in resamples. Raises `MissingExtra`.
    """
    check(hypotheses, references)
    tokens = _bleu()._preprocess_segment
    texts = [tokens(text).split() for text in hypotheses]
    several = [[tokens(text).split() for text in one] for one in references]
    seen = Counter(
        gram for one in several for text in one for n in range(1, NIST_ORDER + 1) for gram in _ngrams(text, n)
    )
    num_words = sum(len(text) for one in several for text in one)

    def information(matched: Counter[tuple[str, ...]]) -> float:
        return sum(
            times * math.log2((seen[gram[:-1]] if len(gram) > 1 else num_words) / seen[gram])
            for gram, times in matched.items()
        )

    counts = np.zeros((len(texts), 2 * NIST_ORDER + 2))
    for row, (text, its_references) in enumerate(zip(texts, several, strict=True)):
        for n in range(1, NIST_ORDER + 1):
            own = Counter(_ngrams(text, n))
            # Of equally good references the longer one counts, as in NLTK.
            best, length = max((information(own & Counter(_ngrams(r, n))), len(r)) for r in its_references)
            counts[row, n - 1] = best
            counts[row, NIST_ORDER + n - 1] = own.total()
            counts[row, -2] += length
            counts[row, -1] += len(text)
    return counts


def nist_of(sums: Floats) -> Floats:
    """NIST (Doddington 2002, eq. 3; its length penalty is 1/2 at 2/3 of the reference length) of `nist_counts`' sums [R, 12]."""
    matched, possible = sums[:, :NIST_ORDER], sums[:, NIST_ORDER : 2 * NIST_ORDER]
    precision = np.divide(matched, possible, out=np.zeros_like(matched), where=possible > 0).sum(axis=1)
    length = np.clip(sums[:, -1] / np.maximum(sums[:, -2], 1), 0, 1)
    beta = math.log(0.5) / math.log(1.5) ** 2
    penalty = np.exp(beta * np.log(np.maximum(length, 1e-9)) ** 2) * (length > 0)
    scores: Floats = precision * penalty
    return scores


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _bleu() -> Any:
    return _sacrebleu("BLEU", lambda metrics: metrics.BLEU(lowercase=True))


def _chrf() -> Any:
    return _sacrebleu("chrF", lambda metrics: metrics.CHRF())


def _sacrebleu(name: str, make: Callable[[Any], Any]) -> Any:
    try:
        import sacrebleu.metrics
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{name} needs sacrebleu: pip install 'shoal[evaluate]'") from error
    return make(sacrebleu.metrics)


def _sacrebleu_counts(metric: Any, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    check(hypotheses, references)
    # sacrebleu wants one stream per reference rank; an input with fewer references has None in the last streams.
    ranks = max(len(r) for r in references)
    streams = [[r[rank] if rank < len(r) else None for r in references] for rank in range(ranks)]
    return np.array(metric._extract_corpus_statistics(list(hypotheses), streams), float)


def _sacrebleu_score(metric: Any, sums: Floats) -> Floats:
    return np.array([metric._compute_score_from_stats([int(count) for count in row]).score for row in sums])


def check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise `InvalidInput` unless there is one set of references, not empty, per hypothesis."""
    if len(hypotheses) != len(references) or not hypotheses:
        raise InvalidInput(
            f"{len(hypotheses)} hypotheses and {len(references)} sets of references: give one set for each"
        )
    for index, several in enumerate(references):
        if isinstance(several, str) or not several:
            raise InvalidInput(f"references[{index}] must be a list with one reference or more")
