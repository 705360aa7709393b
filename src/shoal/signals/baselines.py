"""What a probe is compared with: MULI, which reads the first token's logits, and a bag of words, which reads no model at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.models.passes import Ints
from shoal.signals.quality import Floats, best_threshold, decided

PENALTIES = (1e-4, 1e-3)
"""MULI's weights of the L1 norm that are tried."""
STRENGTHS = (1.0, 10.0)
"""Inverse L2 penalties of the bag of words that are tried."""

WORD = r"\w+|[^\w\s]+"
"""What counts as a word: letters and digits, or signs."""


def muli(logits: Floats, labels: Ints, train: Ints, validation: Ints, *, seed: int = 0) -> tuple[Any, float]:
    """Sparse logistic regression on the logits after the prompt (Hu et al. 2024, arXiv 2405.18822), the same pass's.

    Args: `logits` [prompts, V] of whatever vocabulary. Returns a classifier with `predict_proba`, and its threshold.
    """
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def make(penalty: float) -> Any:
        sparse = SGDClassifier(loss="log_loss", penalty="l1", alpha=penalty, max_iter=15, tol=None, random_state=seed)
        return make_pipeline(StandardScaler(), sparse)

    return best_of([make(penalty) for penalty in PENALTIES], logits, labels, train, validation)


def bag_of_words(
    texts: Sequence[str], labels: Ints, train: Ints, validation: Ints, *, seed: int = 0
) -> tuple[Any, float]:
    """Logistic regression on tf-idf of words and pairs of words. Returns as `muli`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def make(strength: float) -> Any:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)
        return make_pipeline(words, LogisticRegression(C=strength, max_iter=1000, random_state=seed))

    return best_of([make(strength) for strength in STRENGTHS], np.array(texts, dtype=object), labels, train, validation)


def best_of(classifiers: Sequence[Any], inputs: Any, labels: Ints, train: Ints, validation: Ints) -> tuple[Any, float]:
    """The classifier that is best on the validation part, trained on the other; and its threshold."""
    from sklearn.metrics import f1_score

    scored = []
    for classifier in classifiers:
        classifier.fit(inputs[train], labels[train])
        probabilities = classifier.predict_proba(inputs[validation])
        threshold = best_threshold(probabilities[:, 1], labels[validation]) if probabilities.shape[1] == 2 else 0.5
        found = decided(probabilities, threshold)
        average = "binary" if probabilities.shape[1] == 2 else "macro"
        scored.append((f1_score(labels[validation], found, average=average, zero_division=0.0), classifier, threshold))
    _, best, threshold = max(scored, key=lambda one: one[0])
    return best, threshold
