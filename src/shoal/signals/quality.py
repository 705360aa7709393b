"""How good a classifier's probabilities are: F1, area under precision and recall, accuracy, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.models.passes import Ints

Floats = NDArray[np.float32]
BINS = 10
"""Of the calibration error and the reliability diagram, by confidence."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores on some prompts."""

    f1: float
    """Of the positive class; of more than two classes the mean over them."""
    auprc: float
    """Average precision of the positive class; of more than two the mean over those that occur, each against the others."""
    accuracy: float
    """Share that is right."""
    calibration_error: float
    """Expected calibration error: mean distance of confidence and accuracy over bins of confidence."""
    num_prompts: int
    """How many there were."""


def decided(probabilities: Floats, threshold: float) -> Ints:
    """Classes [n], from probabilities [n, classes]: the most probable; of two the second from `threshold` on."""
    if probabilities.shape[1] == 2:
        second: Ints = (probabilities[:, 1] >= threshold).astype(np.int64)
        return second
    best: Ints = probabilities.argmax(axis=1)
    return best


def quality(probabilities: Floats, labels: Ints, *, threshold: float = 0.5) -> Quality:
    """Scores of probabilities [n, classes] where the classes [n] are known."""
    from sklearn.metrics import average_precision_score, f1_score

    found = decided(probabilities, threshold)
    if probabilities.shape[1] == 2:
        f1 = f1_score(labels, found, zero_division=0.0)
        auprc = average_precision_score(labels, probabilities[:, 1]) if labels.any() else 0.0
    else:
        f1 = f1_score(labels, found, average="macro", zero_division=0.0)
        occurring = np.unique(labels)
        auprc = np.mean([average_precision_score(labels == one, probabilities[:, one]) for one in occurring])
    return Quality(
        f1=float(f1),
        auprc=float(auprc),
        accuracy=float((found == labels).mean()),
        calibration_error=float(
            sum(share * abs(sure - right) for sure, right, share in reliability(probabilities, labels))
        ),
        num_prompts=len(labels),
    )


def reliability(probabilities: Floats, labels: Ints) -> list[tuple[float, float, float]]:
    """(mean confidence, accuracy, share of the prompts) of each bin of confidence that holds any.

    Confidence is the probability of the most probable class; of two classes, that of the second, and accuracy its frequency.
    """
    if probabilities.shape[1] == 2:
        confidence, right = probabilities[:, 1], labels == 1
    else:
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        (float(confidence[bins == one].mean()), float(right[bins == one].mean()), float((bins == one).mean()))
        for one in range(BINS)
        if (bins == one).any()
    ]


def best_threshold(positive: Floats, labels: Ints) -> float:
    """The probability from which on calling a prompt positive gives the best F1, half-way to the next lower one."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, positive)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    below = thresholds[best - 1] if best else thresholds[best]
    return float((thresholds[best] + below) / 2)
