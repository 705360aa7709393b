"""Random trees of drafted tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

MOST_CHILDREN = 4


def random_tree(rng: random.Random, chain: Sequence[int], vocabulary: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens and parents (as in `Draft`) of a tree with as many tokens as `chain`, a path of which begins as `chain` does."""
    parents = [0]
    while len(parents) < len(chain):
        full = parents[-MOST_CHILDREN:].count(parents[-1]) == MOST_CHILDREN
        parents.append(rng.randint(parents[-1] + full, min(parents[-1] + 2, len(parents))))
    tokens: list[int] = []
    on_path, depth = 0, 0
    for parent in sorted(set(parents)):
        count = parents.count(parent)
        drawn = rng.sample(vocabulary, count)
        if parent == on_path:
            if chain[depth] not in drawn:
                drawn[rng.randrange(count)] = chain[depth]
            on_path, depth = len(tokens) + 1 + drawn.index(chain[depth]), depth + 1
        tokens += drawn
    return tokens, parents
