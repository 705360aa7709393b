"""Traces of a model that nobody has: right answers are surer than wrong ones, and accuracies are known."""

from __future__ import annotations

import numpy as np

from shoal.engine.entropy import EntropyTrace
from shoal.signals.traces import Traced


def made_slice(
    name: str, accuracy: float, count: int, *, seed: int, labelled: bool = True, scale: float = 1.0
) -> list[Traced]:
    """`count` responses of which a share of `accuracy` is right: half the entropy where they are, the same lengths."""
    rng = np.random.default_rng([seed, *name.encode()])
    made = []
    for correct in rng.permutation(np.arange(count) < round(accuracy * count)):
        entropies = rng.gamma(1.5, scale * (0.2 if correct else 0.45), rng.integers(4, 40))
        trace = EntropyTrace(
            top_k=20, entropies=tuple(entropies), nlls=tuple(entropies * rng.exponential(size=len(entropies)))
        )
        made.append(Traced(trace=trace, slice=name, correct=bool(correct) if labelled else None))
    return made


TRAINING = tuple(
    one
    for name, accuracy in (("easy", 0.9), ("good", 0.7), ("fair", 0.5), ("hard", 0.25))
    for one in made_slice(name, accuracy, 150, seed=1)
)
"""Labelled."""
