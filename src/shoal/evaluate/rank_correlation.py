"""Whether two ways of scoring order the same things alike: Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.errors import InvalidInput


def rank_correlation(untuned: Mapping[str, float], tuned: Mapping[str, float]) -> float:
    """Spearman's correlation of two scorings of the same policies, both with higher scores for better ones; equals share a rank.

    -1 for the reverse order, 1 for the same; NaN where one side has a single score for all. Raises `InvalidInput` for different
    policies, or fewer than two.

    >>> rank_correlation({"unified": 0.9, "d3": 0.7, "skipdecode": 0.5}, {"unified": 64.0, "d3": 61.0, "skipdecode": 63.0})
    0.5
    """
    if untuned.keys() != tuned.keys() or len(untuned) < 2:
        raise InvalidInput(
            f"a rank correlation needs the same two policies or more on both sides, got {', '.join(untuned) or 'none'} "
            f"and {', '.join(tuned) or 'none'}"
        )
    first, second = ranks([untuned[name] for name in untuned]), ranks([tuned[name] for name in untuned])
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale else float("nan")


def ranks(scores: Sequence[float]) -> NDArray[np.float64]:
    """Rank of each score from 1, the lowest; equal scores share their mean rank.

    >>> ranks([5.0, 1.0, 5.0]).tolist()
    [2.5, 1.0, 2.5]
    """
    values = np.asarray(scores, float)
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    mean_ranks: NDArray[np.float64] = below + (equal + 1) / 2
    return mean_ranks
