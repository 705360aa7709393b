"""Which layers does a prompt need? A tree search over layer sets, after Dr.LLM (arXiv 2510.12773), for router labels.

A node is a set of skipped layers; its children skip one more layer or two neighbours more. A simulation walks down from "nothing
skipped" by

    mean reward + 1.8 sqrt(ln N / n) - 3 (layers that run) / L

(constants of the public code), widens a node to at most 2 sqrt(n) children, in random order (our choice: with 2 L actions per node
and some hundred simulations nothing would ever be tried twice), and evaluates the new node. The reward is 1 where every token of
the completion is the most probable one, under teacher forcing: the greedy answer is right. Simulations of all examples of a batch
share their forward passes.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

EXPLORATION, LENGTH_PENALTY = 1.8, 3.0
Skipped = frozenset[int]


@dataclass(eq=False)
class Node:
    """A set of skipped layers and what was found below it."""

    skipped: Skipped
    untried: list[Skipped]
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0


class Search:
    """One example's search: `propose` names a set to evaluate, `tell` takes the reward."""

    def __init__(self, num_layers: int, *, kept_layers: Sequence[int], seed: str) -> None:
        self.num_layers, self.kept = num_layers, frozenset(kept_layers)
        self.rng = random.Random(seed)
        self.rewards: dict[Skipped, float] = {}
        self.root = self._node(frozenset())
        self._path = [self.root]

    @property
    def best(self) -> Skipped | None:
        """The most skipped layers with a reward of 1 or more; None where even the full model has less."""
        right = [skipped for skipped, reward in self.rewards.items() if reward >= 1]
        return max(right, key=lambda skipped: (len(skipped), sorted(skipped)), default=None)

    def propose(self) -> Skipped:
        """The next set to evaluate."""
        node, self._path = self.root, [self.root]
        while node.visits:
            if node.untried and len(node.children) < 2 * math.sqrt(node.visits):
                node.children.append(self._node(node.untried.pop()))
                node = node.children[-1]
            elif node.children:
                node = max(node.children, key=lambda child: self._worth(child, node.visits))
            else:
                break
            self._path.append(node)
        return node.skipped

    def tell(self, reward: float) -> None:
        """The reward of what was proposed last."""
        self.rewards[self._path[-1].skipped] = reward
        for node in self._path:
            node.visits += 1
            node.total += reward

    def _worth(self, node: Node, visits: int) -> float:
        if node.visits == 0:
            return math.inf
        running = self.num_layers - len(node.skipped)
        explore = EXPLORATION * math.sqrt(math.log(visits) / node.visits)
        return node.total / node.visits + explore - LENGTH_PENALTY * running / self.num_layers

    def _node(self, skipped: Skipped) -> Node:
        free = [layer for layer in range(self.num_layers) if layer not in skipped | self.kept]
        pairs = [(a, b) for a, b in itertools.pairwise(free) if b == a + 1]
        actions = [skipped | {layer} for layer in free] + [skipped | set(pair) for pair in pairs]
        actions = [action for action in actions if len(action) < self.num_layers]
        self.rng.shuffle(actions)
        return Node(skipped, actions)


def search(
    searches: Sequence[Search], evaluate: Callable[[Sequence[Skipped]], Sequence[float]], *, simulations: int
) -> None:
    """Run `simulations` of every search side by side; `evaluate` gives the reward of one set per search."""
    for _ in range(simulations):
        proposed = [one.propose() for one in searches]
        for one, reward in zip(searches, evaluate(proposed), strict=True):
            one.tell(reward)
