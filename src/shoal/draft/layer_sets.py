"""Searching sets of layers: random ones first, then neighbours of the best, best first.

A neighbour has one layer in the place of another or, where the number of layers is open, one more or one fewer; the latter are
few, and tried first. The best set whose neighbours have not been tried is taken next, and left for the first neighbour that is
better. So the search climbs, and where it stands on a top it goes on from the second best. Example, two of layers 0 to 3, worth
their sum: (0, 2) was drawn; (0, 1) is worse, (2, 3) is better and taken next; no neighbour of it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import comb

Layers = tuple[int, ...]
"""Ascending."""
RANDOM_SHARE = 0.25
"""Of the trials, sets drawn at random."""


def best_layers(
    worth: Callable[[Layers], float],
    num_layers: int,
    *,
    counts: Sequence[int],
    starts: Sequence[Layers],
    trials: int,
    seed: int,
) -> Layers:
    """The set of layers that is worth most among those tried: `worth` is asked once for each of at most `trials` sets, and all sets
    are tried where there are no more. Of equal ones the one that was tried first.

    Args: `counts`: allowed sizes; `starts`: sets tried first, of these sizes; `seed`: equal ones make equal searches.
    """
    known: dict[Layers, float] = {}
    if sum(comb(num_layers, count) for count in counts) <= trials:
        known = {layers: worth(layers) for count in counts for layers in combinations(range(num_layers), count)}
        return max(known, key=lambda layers: known[layers])
    rng = random.Random(seed)
    for layers in starts[:trials]:
        known.setdefault(layers, worth(layers))
    while len(known) < RANDOM_SHARE * trials:
        layers = tuple(sorted(rng.sample(range(num_layers), rng.choice(counts))))
        if layers not in known:
            known[layers] = worth(layers)
    left: set[Layers] = set()
    while len(known) < trials:
        if len(left) == len(known):
            left.clear()  # a set is left for the first better neighbour: the others are still untried
        here = max((layers for layers in known if layers not in left), key=lambda layers: known[layers])
        left.add(here)
        around = [layers for layers in neighbours(here, num_layers, counts) if layers not in known]
        rng.shuffle(around)
        around.sort(key=lambda layers: len(layers) == len(here))
        for layers in around[: trials - len(known)]:
            known[layers] = worth(layers)
            if known[layers] > known[here]:
                break
    return max(known, key=lambda layers: known[layers])


def neighbours(layers: Layers, num_layers: int, counts: Sequence[int]) -> Iterator[Layers]:
    """Sets that differ in one layer: another one, one more, one fewer.

    >>> list(neighbours((0, 2), 3, [2]))
    [(1, 2), (0, 1)]
    """
    others = [layer for layer in range(num_layers) if layer not in layers]
    for at in range(len(layers)):
        rest = layers[:at] + layers[at + 1 :]
        yield from (tuple(sorted((*rest, other))) for other in others)
        if len(rest) in counts:
            yield rest
    if len(layers) + 1 in counts:
        yield from (tuple(sorted((*layers, other))) for other in others)
