"""The Entropy Sentinel (arXiv 2601.09001): from labelled traces to the accuracy of slices that nobody has labelled.

A classifier learns P(correct | statistics of a trace); a slice's accuracy is estimated by the mean of P over its responses. The
default is the paper's: a random forest on the ten distribution statistics, classes balanced, probabilities calibrated. Balancing
moves the mean of P away from the base rate, and the mean is the estimate, so there is no way to leave calibration out. Depth and
splits of the trees are fixed where the paper searches among three of each.

A sentinel's file is JSON: the statistics and labels that it was fitted on, and how. Reading it fits it again, with the same seed:
seconds, and nothing in the file can run. Pickled classifiers are neither written nor read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shoal.engine.entropy import EntropyTrace, TopK
from shoal.errors import InvalidInput, MissingExtra, nearest
from shoal.files import write_json
from shoal.signals.statistics import FEATURES, STATISTICS, Floats, columns_of, statistics
from shoal.signals.traces import Traced, one_top_k

FORMAT = "shoal sentinel 1"
CLASSIFIERS = ("forest", "logistic", "mlp")
FOLDS = 5
"""Parts of the training responses: four fit a classifier, the fifth calibrates it; the five are averaged."""
ALPHA = 1.0
"""Weight decay of the small network; it learns until nothing moves, and this keeps it from learning by heart."""
FEWEST = 2 * FOLDS
"""Right and wrong responses, each, that a sentinel needs."""


@dataclass(frozen=True, kw_only=True)
class SentinelConfig:
    """How a sentinel is fitted."""

    features: str = "10d"
    """A set of `FEATURES`."""
    classifier: Literal["forest", "logistic", "mlp"] = "forest"
    """Random forest, logistic regression or a small network, all scikit-learn's."""
    balance: bool = True
    """Whether right and wrong responses weigh the same while the classifier is fitted; calibration takes them as they are."""
    seed: int = 0
    """Of the classifier and the folds."""

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise InvalidInput(f"unknown features {self.features!r}: {nearest(self.features, FEATURES)}")
        if self.classifier not in CLASSIFIERS:
            raise InvalidInput(f"unknown classifier {self.classifier!r}: {nearest(self.classifier, CLASSIFIERS)}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise InvalidInput(f"seed must be a whole number from 0 to 2^32 - 1, got {self.seed!r}")


class Sentinel:
    """Fitted on labelled responses of one model; estimates for others of the same model, prompts written alike."""

    def __init__(
        self,
        values: Floats,
        correct: NDArray[np.bool_],
        slices: Sequence[str],
        *,
        top_k: TopK,
        config: SentinelConfig | None = None,
    ) -> None:
        """Fit on statistics [N, 18], labels [N] and slice names, one each.

        Raises `InvalidInput` with fewer than 10 right or wrong responses, `MissingExtra` without scikit-learn.
        """
        self.values, self.correct, self.slices = values, correct, tuple(slices)
        self.top_k, self.config = top_k, config or SentinelConfig()
        if not enough(correct):
            right = int(correct.sum())
            raise InvalidInput(
                f"{right} right and {len(correct) - right} wrong responses: a sentinel learns from {FEWEST} of each or more"
            )
        self.columns = columns_of(self.config.features)
        self._model = fitted(values[:, self.columns], correct, self.config)

    @classmethod
    def fit(cls, traced: Sequence[Traced], config: SentinelConfig | None = None) -> Sentinel:
        """From labelled responses. Raises `InvalidInput` where a label is missing or k differs."""
        missing = sum(one.correct is None for one in traced)
        if missing or not traced:
            raise InvalidInput(f"{missing} of {len(traced)} responses have no label: add 'correct': 0 or 1")
        traces = [one.trace for one in traced]
        return cls(
            statistics(traces),
            np.array([bool(one.correct) for one in traced]),
            [one.slice for one in traced],
            top_k=one_top_k(traces, "training"),
            config=config,
        )

    def read(self, traces: Sequence[EntropyTrace]) -> Floats:
        """[N, 18], statistics of traces. Raises `InvalidInput` where their k is not the sentinel's."""
        if traces and (given := one_top_k(traces, "traces")) != self.top_k:
            raise InvalidInput(
                f"the traces' entropies are over the top {given}, the sentinel was fitted on the top {self.top_k}: "
                "take them with the same"
            )
        return statistics(traces)

    def probabilities(self, values: Floats) -> Floats:
        """[N], P(correct) from statistics [N, 18]."""
        found: Floats = self._model.predict_proba(values[:, self.columns])[:, 1]
        return found

    def without(self, *left_out: str) -> Sentinel:
        """One fitted on all slices but these."""
        kept = np.array([name not in left_out for name in self.slices])
        return Sentinel(
            self.values[kept],
            self.correct[kept],
            [name for name in self.slices if name not in left_out],
            top_k=self.top_k,
            config=self.config,
        )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        rows = [[float(f"{value:.7g}") for value in row] for row in self.values]
        write_json(
            path,
            {
                "format": FORMAT,
                "top_k": self.top_k,
                "config": asdict(self.config),
                "statistics": list(STATISTICS),
                "values": rows,
                "correct": [int(label) for label in self.correct],
                "slices": list(self.slices),
            },
            indent=None,
        )

    @classmethod
    def load(cls, path: Path) -> Sentinel:
        """Read and fit again. Raises `InvalidInput` for anything that `save` did not write."""
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT or data["statistics"] != list(STATISTICS):
                raise ValueError("another format")
            values = np.array(data["values"], dtype=float).reshape(-1, len(STATISTICS))
            correct, slices, top_k = data["correct"], data["slices"], data["top_k"]
            if not len(values) == len(correct) == len(slices):
                raise ValueError("rows are missing")
            if (
                not (np.abs(values) < np.finfo(np.float32).max).all()
                or (values[:, STATISTICS.index("length")] < 1).any()
            ):
                raise ValueError("values that are no statistics")
            if any(type(label) is not int or label not in (0, 1) for label in correct):
                raise ValueError("labels are 0 or 1")
            if any(not isinstance(name, str) for name in slices):
                raise ValueError("slices are names")
            if top_k != "full" and not (type(top_k) is int and top_k >= 1):
                raise ValueError(f"top_k is {top_k!r}")
            correct, config = np.array(correct, dtype=bool), SentinelConfig(**data["config"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(f"{path} is not a sentinel of `shoal monitor fit`: {error}") from error
        return cls(values, correct, slices, top_k=top_k, config=config)


def enough(correct: NDArray[np.bool_]) -> bool:
    """Whether a sentinel can learn from responses with these labels [N]."""
    return bool(min(correct.sum(), (~correct).sum()) >= FEWEST)


def fitted(values: Floats, correct: NDArray[np.bool_], config: SentinelConfig) -> Any:
    """z-scores by the training responses, a classifier, and its calibration (isotonic, by five folds)."""
    try:
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.utils.class_weight import compute_sample_weight
    except ImportError as error:
        raise MissingExtra("a sentinel needs scikit-learn: pip install 'shoal[monitor]'") from error

    class BalancedMLP(MLPClassifier):  # type: ignore[misc]
        """Right and wrong responses weigh the same."""

        def fit(self, values: Floats, correct: NDArray[np.bool_]) -> Any:
            return super().fit(values, correct, sample_weight=compute_sample_weight("balanced", correct))

    match config.classifier:
        case "forest":
            weight = "balanced_subsample" if config.balance else None
            classifier: Any = RandomForestClassifier(
                100, max_depth=5, min_samples_split=10, class_weight=weight, random_state=config.seed
            )
        case "logistic":
            weight = "balanced" if config.balance else None
            classifier = LogisticRegression(class_weight=weight, max_iter=1000)
        case _:
            network = BalancedMLP if config.balance else MLPClassifier
            classifier = network((10,), alpha=ALPHA, solver="lbfgs", max_iter=1000, random_state=config.seed)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=config.seed)
    model = CalibratedClassifierCV(make_pipeline(StandardScaler(), classifier), method="isotonic", cv=folds)
    return model.fit(values, correct)
