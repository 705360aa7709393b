"""Text metrics against known values."""

from __future__ import annotations

import sys

import pytest

from shoal.errors import InvalidInput, MissingExtra
from shoal.evaluate.bootstrap import Score, Statistics, ratio
from shoal.evaluate.text import bleu, chrf_counts, chrf_of, nist_counts, nist_of, rouge_l

REFERENCES = [
    ["The Vaults is a cheap pub near the river.", "A cheap riverside pub is The Vaults."],
    ["Zizzi serves Italian food in the city centre."],
    [
        "The Mill is a coffee shop with a low customer rating.",
        "Low rated: The Mill, a coffee shop.",
        "The Mill is poor.",
    ],
]


def test_a_reference_scores_100_whatever_its_case():
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with the extra 'evaluate'")
    score = bleu([several[-1].upper() for several in REFERENCES], REFERENCES)
    assert score.value == pytest.approx(100)
    assert score.low == pytest.approx(100)


def test_bleu_equals_sacrebleu_where_all_have_as_many_references():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu comes with the extra 'evaluate'")
    hypotheses = [
        "The Vaults is a pub by the river.",
        "Zizzi is in the city centre and serves Italian.",
        "The Mill is a shop.",
    ]
    several = [r[:1] for r in REFERENCES]
    expected = sacrebleu.corpus_bleu(hypotheses, [[r[0] for r in several]], lowercase=True).score
    score = bleu(hypotheses, several)
    assert score.value == pytest.approx(expected)
    assert 0 < expected < 100
    assert score.low < score.value < score.high
    # A further reference that is the hypothesis itself lifts the score.
    assert bleu(hypotheses, [[*several[0], hypotheses[0]], *several[1:]]).value > expected


def test_rouge_l_takes_the_best_reference():
    pytest.importorskip("rouge_score", reason="rouge-score comes with the extra 'evaluate'")
    # Longest common subsequence "a b c" of 4 and 3 words: precision 3/4, recall 1, F = 6/7; the other reference has F = 0.
    assert rouge_l(["a b x c"], [["a b c", "y z"]]).value == pytest.approx(100 * 6 / 7)


HYPOTHESES = [
    "The Vaults is a pub by the river.",
    "Zizzi is in the city centre and serves Italian.",
    "The Mill is a shop.",
]


def test_chrf_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu comes with the extra 'evaluate'")
    expected = sacrebleu.corpus_chrf(HYPOTHESES, [[r[0] for r in REFERENCES]]).score
    score = Statistics(chrf_counts(HYPOTHESES, [r[:1] for r in REFERENCES]), chrf_of).score()
    assert score.value == pytest.approx(expected)
    assert score.low < score.value < score.high


@pytest.mark.parametrize("longer", [HYPOTHESES, [text * 3 for text in HYPOTHESES], ["pub", *HYPOTHESES[1:]]])
def test_nist_equals_nltk(longer: list[str]):
    """With brevity penalty, without, and with an output that has no pair of words."""
    nist_score = pytest.importorskip("nltk.translate.nist_score", reason="NLTK comes with the extra 'evaluate'")
    sacrebleu = pytest.importorskip("sacrebleu.metrics", reason="sacrebleu comes with the extra 'evaluate'")
    tokens = sacrebleu.BLEU(lowercase=True)._preprocess_segment
    expected = nist_score.corpus_nist(
        [[tokens(r).split() for r in several] for several in REFERENCES], [tokens(h).split() for h in longer]
    )
    assert nist_of(nist_counts(longer, REFERENCES).sum(axis=0, keepdims=True))[0] == pytest.approx(expected)
    assert expected > 0


def test_nothing_scores_nothing():
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with the extra 'evaluate'")
    for counts, formula in ((nist_counts, nist_of), (chrf_counts, chrf_of)):
        assert Statistics(counts(["", "", ""], REFERENCES), formula).score() == Score(0, 0, 0)


def test_ratio_and_its_interval():
    assert ratio([1, 0, 2], [2, 2, 2]) == ratio([1, 0, 2], [2, 2, 2])
    wide, narrow = ratio([0, 1] * 10, [1] * 20), ratio([0, 1] * 1000, [1] * 2000)
    assert wide.value == narrow.value == 0.5
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high
    # The normal approximation of the interval of a proportion.
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * (0.25 / 2000) ** 0.5, rel=0.1)
    assert str(Score(64.93, 63.0, 66.1)) == "64.9 [63.0, 66.1]"


def test_what_is_refused():
    for hypotheses, references in ((["a"], []), ([], []), (["a"], [[]]), (["a"], ["a"])):
        with pytest.raises(InvalidInput, match="references"):
            bleu(hypotheses, references)


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch):
    for module, metric in (
        ("sacrebleu.metrics", bleu),
        ("sacrebleu.metrics", chrf_counts),
        ("sacrebleu.metrics", nist_counts),
        ("rouge_score.rouge_scorer", rouge_l),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtra, match=r"shoal\[evaluate\]"):
            metric(["a"], [["a"]])
