"""Mohajer, Suh and Elmahdy (ICML 2017): tournaments in k groups, and a heap of their champions.

Group r holds the first stage's ranks r, r + k, r + 2k, ..., so that strong documents are spread. Each group plays single
elimination, all groups at once. The heap's best is an answer; its group plays again without it, and its new champion enters the
heap.

Group 0 of n = 8, k = 2 plays 0-2 4-6, then 0-4. When 0 is taken, with the tree kept only 2's path is played again: 2 has nobody
left to beat in the first match, and meets 4 in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from shoal.rank.questions import Question, Round, Rounds, Shares, Standing, Task, goes_first
from shoal.rank.rankers.bubblesort import bubble

Tree = list[list[int | None]]
"""Documents by level: leaves first, the champion alone in the last; None where all below are taken."""


@dataclass(frozen=True, kw_only=True)
class Mohajer:
    """Top k exactly under an oracle that never errs."""

    keep_tree: bool = True
    """Whether a group plays again only the matches of the document that was taken. False is the published procedure, which plays a
    group's whole tournament again each time, also after the last document has been taken."""
    bubble: bool = False
    """Whether the first 2 k are then bubblesorted, against errors."""
    reuse: bool = True
    """Whether answers are kept."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        k = min(task.k, task.n)
        groups = [list(range(first, task.n, k)) for first in range(k)]
        trees: list[Tree] = [[list(group)] for group in groups]
        yield from play(trees, lambda: [sorted(one for tree in trees for one in tree[-1] if one is not None)])
        taken: list[int] = []
        heap: list[int] = [champion(tree) for tree in trees]

        def standing() -> Standing:
            return [*([one] for one in taken), sorted(heap)]

        for node in reversed(range(len(heap) // 2)):
            yield from sink(heap, node, standing)
        while heap and len(taken) < k:
            best = heap[0]
            taken.append(best)
            tree = trees[best % k]
            if len(taken) < k or not self.keep_tree:
                fresh = yield from self._next_champion(tree, best, standing)
                heap[0] = heap[-1] if fresh is None else fresh
                if fresh is None:
                    heap.pop()
                if heap:
                    yield from sink(heap, 0, standing)
        if not self.bubble:
            return [*taken, *(one for one in sorted(heap) if one not in taken)]
        rest = [one for one in range(task.n) if one not in taken]
        later = [one for one in sorted(heap) if one not in taken]
        order = [*taken, *later, *(one for one in rest if one not in later)]
        head = order[: 2 * k]
        yield from bubble(head, k)
        return head + order[2 * k :]

    def _next_champion(
        self, tree: Tree, best: int, standing: Callable[[], Standing]
    ) -> Generator[Round, list[Shares], int | None]:
        """Who wins the group of `best` without it; None where nobody is left."""
        if not self.keep_tree:
            left = [one for one in tree[0] if one is not None and one != best]
            tree[:] = [list(left)] if left else [[None]]
            yield from play([tree], standing)
            return tree[-1][0]
        place = tree[0].index(best)
        tree[0][place] = None
        for level in range(1, len(tree)):
            below, place = tree[level - 1], place // 2
            pair = [one for one in below[2 * place : 2 * place + 2] if one is not None]
            if len(pair) == 2:
                question = (pair[1], pair[0])
                (shares,) = yield Round([question], standing)
                tree[level][place] = question[0] if goes_first(question, shares) else question[1]
            else:
                tree[level][place] = pair[0] if pair else None
        return tree[-1][0]


def champion(tree: Tree) -> int:
    """Who won."""
    (one,) = tree[-1]
    assert one is not None
    return one


def play(trees: list[Tree], standing: Callable[[], Standing]) -> Generator[Round, list[Shares], None]:
    """Single elimination in all trees at once: a round per level, an odd one out goes on without a match."""
    while any(len(tree[-1]) > 1 for tree in trees):
        matches: list[tuple[list[int | None], Question]] = []
        for tree in trees:
            level = tree[-1]
            if len(level) == 1:
                continue
            above: list[int | None] = []
            for first, second in zip(level[::2], level[1::2], strict=False):
                assert first is not None
                assert second is not None
                matches.append((above, (second, first)))
            tree.append(above)
        answers = yield Round([question for _, question in matches], standing)
        for (above, question), shares in zip(matches, answers, strict=True):
            above.append(question[0] if goes_first(question, shares) else question[1])
        for tree in trees:
            if len(tree) > 1 and len(tree[-1]) < (len(tree[-2]) + 1) // 2:
                tree[-1].append(tree[-2][-1])


def sink(heap: list[int], node: int, standing: Callable[[], Standing]) -> Generator[Round, list[Shares], None]:
    """Let the document at `node` sink below children that beat it."""
    while (child := 2 * node + 1) < len(heap):
        if child + 1 < len(heap):
            question = (heap[child + 1], heap[child])
            (shares,) = yield Round([question], standing)
            child += goes_first(question, shares)
        question = (heap[child], heap[node])
        (shares,) = yield Round([question], standing)
        if not goes_first(question, shares):
            return
        heap[node], heap[child] = heap[child], heap[node]
        node = child
