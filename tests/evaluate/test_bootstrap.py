"""Intervals and paired differences beside a slow bootstrap that anyone can believe."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from shoal.errors import InvalidInput
from shoal.evaluate import bootstrap
from shoal.evaluate.bootstrap import Statistics, quotient, ratio
from shoal.evaluate.text import bleu_counts, bleu_of

REFERENCES = [["a b c d e f"], ["g h i j k", "g h i"], ["l m n o p q r"], ["s t u v w"], ["a g l s x y"]]
ONE = ["a b c d e f", "g h i j", "l m n o q r", "s t v w", "a g l s y"]
OTHER = ["a b c e f", "g h i j k", "l m n p q r", "s t u v", "a l s x y"]
SEED, RESAMPLES = 11, 80


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bootstrap, "RESAMPLES", RESAMPLES)
    bootstrap.resample_weights.cache_clear()
    yield
    bootstrap.resample_weights.cache_clear()


def slow_bleu(outputs: list[str], drawn: list[int]) -> float:
    """BLEU of a corpus in which the drawn inputs stand one after the other."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu comes with the extra 'evaluate'")
    streams = [[REFERENCES[i][rank] if rank < len(REFERENCES[i]) else None for i in drawn] for rank in range(2)]
    return sacrebleu.metrics.BLEU(lowercase=True).corpus_score([outputs[i] for i in drawn], streams).score


def slow_draws() -> list[list[int]]:
    return np.random.default_rng(SEED).integers(5, size=(RESAMPLES, 5)).tolist()


@pytest.mark.usefixtures("fewer_resamples")
def test_an_interval_equals_the_slow_one():
    everyone = list(range(5))
    score = Statistics(bleu_counts(ONE, REFERENCES), bleu_of).score(seed=SEED)
    resampled = [slow_bleu(ONE, drawn) for drawn in slow_draws()]
    assert score.value == pytest.approx(slow_bleu(ONE, everyone))
    assert [score.low, score.high] == pytest.approx(np.percentile(resampled, [2.5, 97.5]))
    assert score.low < score.value < score.high


@pytest.mark.usefixtures("fewer_resamples")
def test_a_paired_difference_equals_the_slow_one():
    one, other = (Statistics(bleu_counts(outputs, REFERENCES), bleu_of) for outputs in (ONE, OTHER))
    difference = one.minus(other, seed=SEED)
    resampled = [slow_bleu(ONE, drawn) - slow_bleu(OTHER, drawn) for drawn in slow_draws()]
    everyone = list(range(5))
    assert difference.value == pytest.approx(slow_bleu(ONE, everyone) - slow_bleu(OTHER, everyone))
    assert [difference.low, difference.high] == pytest.approx(np.percentile(resampled, [2.5, 97.5]))


def test_pairing_takes_away_what_inputs_share():
    """Inputs differ by 100, systems by 1 on every input: the difference is known, although neither score is."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 100, size=200)
    one, other = (Statistics(np.stack([values, np.ones(200)], axis=1), quotient) for values in (base + 1, base))
    assert one.score().high - one.score().low > 5
    difference = one.minus(other)
    assert (difference.value, difference.low, difference.high) == pytest.approx((1, 1, 1))


def test_some_inputs_only_and_different_ones():
    statistics = Statistics(np.array([[1.0, 2], [3, 4], [5, 6]]), quotient)
    assert statistics.of([0, 2]).score() == ratio([1, 5], [2, 6])
    with pytest.raises(InvalidInput, match="3 and 2 inputs"):
        statistics.minus(statistics.of([0, 1]))
