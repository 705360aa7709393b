"""Tasks that take several steps over the prompt while the answer is one token: pointer chasing, and questions about facts.

A prompt asks several questions and ends with a mark; the answers follow, one token each, in the order of the questions. The first
answer comes from the prompt's own pass. Questions are drawn apart from each other, so one answer does not help with the next, and
a model cannot trade steps over the prompt for tokens written. Every prompt of a task has the same length.
"""

from __future__ import annotations

import gzip
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import InvalidInput

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Problems of one task."""

    prompts: Ints
    """[B, P] token ids."""
    answers: Ints
    """[B, A] token ids."""
    hops: Ints
    """[B, A]: steps that each question needs, from 0 (the answer is what it starts from)."""


class Task(Protocol):
    """Makes problems; a batch is a function of its arguments alone."""

    max_hops: int
    num_answers: int

    @property
    def vocabulary(self) -> list[str]:
        """A name for each token id."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """P."""
        ...

    @property
    def question_ends(self) -> list[int]:
        """Of each question, the column of its last token."""
        ...

    def batch(self, size: int, *, max_hops: int, seed: Sequence[int]) -> Batch:
        """`size` problems whose questions need 0 to `max_hops` steps, drawn evenly."""
        ...


@dataclass(frozen=True, kw_only=True)
class PointerChasing:
    """Follow a cycle: node i's successor stands at position i, a question is (k steps, start s), its answer f applied k times to s.

    Example, 4 nodes, 0 -> 2 -> 1 -> 3 -> 0, questions (2, 0) and (1, 3), `k1`, `k2` the tokens of step counts:

        prompt  2 3 1 0   k2 0   k1 3   =        answers  1 0

    The successor stands at a fixed place, so one step is one attention to a known position: nothing but the number of steps asks
    for depth. The permutation is one cycle, so that k steps below the number of nodes never lead back to the start.
    """

    num_nodes: int = 8
    max_hops: int = 5
    num_answers: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.max_hops < self.num_nodes:
            raise InvalidInput(f"max_hops must be from 1 to num_nodes - 1 = {self.num_nodes - 1}, got {self.max_hops}")

    @property
    def vocabulary(self) -> list[str]:
        """Nodes, step counts, the mark."""
        return [*map(str, range(self.num_nodes)), *(f"k{k}" for k in range(self.max_hops + 1)), "="]

    @property
    def prompt_tokens(self) -> int:
        """The table, two tokens per question, the mark."""
        return self.num_nodes + 2 * self.num_answers + 1

    @property
    def question_ends(self) -> list[int]:
        """Behind the table, every second column."""
        return list(range(self.num_nodes + 1, self.num_nodes + 2 * self.num_answers, 2))

    def batch(self, size: int, *, max_hops: int, seed: Sequence[int]) -> Batch:
        """See `Task.batch`."""
        rng, n, rows = np.random.default_rng(list(seed)), self.num_nodes, np.arange(size)[:, None]
        cycle = rng.permuted(np.tile(np.arange(n), (size, 1)), axis=1)  # the order in which nodes follow each other
        successor = np.empty_like(cycle)
        successor[rows, cycle] = np.roll(cycle, -1, axis=1)
        hops = rng.integers(0, max_hops + 1, size=(size, self.num_answers))
        place = rng.integers(n, size=hops.shape)
        start, answers = cycle[rows, place], cycle[rows, (place + hops) % n]
        questions = np.stack([n + hops, start], axis=2).reshape(size, -1)
        mark = np.full((size, 1), len(self.vocabulary) - 1)
        return Batch(np.concatenate([successor, questions, mark], axis=1), answers, hops)


PAIR = 2
"""Orientations of a relation: forward and backward."""


@dataclass(frozen=True, kw_only=True)
class FactQuestions:
    """Questions of up to three steps over facts of a knowledge graph that stand in the prompt, made from MetaQA's.

    `num_chains` walks of one kind, such as actor -> film -> director -> film, from the graph, plus `num_others` facts about their
    entities with other relations; every fact is `subject relation object`, in shuffled order, and a relation against its stored
    direction has a token of its own. A question is (relation, ... , start): the relations to follow, filled up with `-` to three.
    Entities are letters that are dealt anew for every prompt: what is known about films is of no use, the facts must be read. All
    walks have the same relations, so that the last relation alone leaves as many candidates as there are walks.
    """

    graph: Mapping[int, Mapping[int, tuple[int, ...]]]
    """entity -> oriented relation -> entities, see `read_graph`."""
    relations: tuple[str, ...]
    """Names of the oriented relations."""
    max_hops: int = 3
    num_chains: int = 3
    num_others: int = 4
    num_answers: int = 4
    kinds: int = 60
    """Kinds of walks that are used, the most frequent ones."""
    walks: int = 20_000
    """Random walks that kinds are counted on."""

    @property
    def num_letters(self) -> int:
        """Letters: an entity each at most."""
        return self.num_chains * (self.max_hops + 1) + self.num_others

    @property
    def vocabulary(self) -> list[str]:
        """Letters, relations, the filler, the mark."""
        return [*(f"e{i}" for i in range(self.num_letters)), *self.relations, "-", "="]

    @property
    def prompt_tokens(self) -> int:
        """Three tokens per fact, the questions, the mark."""
        facts = self.num_chains * self.max_hops + self.num_others
        return 3 * facts + (self.max_hops + 1) * self.num_answers + 1

    @property
    def question_ends(self) -> list[int]:
        """The last column before the mark, and back from there in strides of a question."""
        return [self.prompt_tokens - 2 - (self.max_hops + 1) * i for i in reversed(range(self.num_answers))]

    @cached_property
    def walks_by_kind(self) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        """(relations, walks [entities]) of the most frequent kinds, each with as many walks as a prompt needs, or more."""
        rng = np.random.default_rng(0)
        entities = sorted(self.graph)
        found: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
        for _ in range(self.walks):
            walk, path = [entities[rng.integers(len(entities))]], []
            while len(path) < self.max_hops:
                edges = self.graph[walk[-1]]
                relation = list(edges)[rng.integers(len(edges))]
                walk.append(edges[relation][rng.integers(len(edges[relation]))])
                path.append(relation)
            if len(set(walk)) == len(walk):
                found[tuple(path)].add(tuple(walk))
        usable = [(path, sorted(walks)) for path, walks in found.items() if len(walks) >= 4 * self.num_chains]
        if not usable:
            raise InvalidInput("the knowledge graph is too small: no kind of walk is frequent enough")
        return sorted(usable, key=lambda kind: (-len(kind[1]), kind[0]))[: self.kinds]

    def batch(self, size: int, *, max_hops: int, seed: Sequence[int]) -> Batch:
        """See `Task.batch`."""
        rng = np.random.default_rng(list(seed))
        problems = [self.problem(rng, max_hops) for _ in range(size)]
        prompts, answers, hops = (np.array(part, dtype=np.int64) for part in zip(*problems, strict=True))
        return Batch(prompts, answers, hops)

    def problem(self, rng: np.random.Generator, max_hops: int) -> tuple[list[int], list[int], list[int]]:
        """Prompt, answers, hops of one problem."""
        path, walks = self.draw_walks(rng)
        facts = {(walk[i], path[i]): walk[i + 1] for walk in walks for i in range(self.max_hops)}
        letters = rng.permutation(self.num_letters)
        letter = {entity: int(letters[i]) for i, entity in enumerate(dict.fromkeys(e for walk in walks for e in walk))}
        lines = [(letter[s], r, letter[o]) for (s, r), o in facts.items()]
        # Other facts: a relation that is not asked of this entity, leading to a letter that nothing else uses.
        subjects = rng.permutation(list(letter))[: self.num_others]
        for i, subject in enumerate(subjects):
            others = [r for r in range(len(self.relations)) if (subject, r) not in facts]
            lines.append((letter[int(subject)], int(rng.choice(others)), int(letters[len(letter) + i])))
        order = rng.permutation(len(lines))
        first_relation, filler = self.num_letters, self.num_letters + len(self.relations)
        prompt = [token for i in order for token in (lines[i][0], first_relation + lines[i][1], lines[i][2])]
        answers, hops = [], []
        for _ in range(self.num_answers):
            k = int(rng.integers(0, max_hops + 1))
            walk, begin = walks[rng.integers(len(walks))], int(rng.integers(self.max_hops - k + 1))
            asked = [first_relation + r for r in path[begin : begin + k]]
            prompt += [*asked, *[filler] * (self.max_hops - k), letter[walk[begin]]]
            answers.append(letter[walk[begin + k]])
            hops.append(k)
        return [*prompt, filler + 1], answers, hops

    def draw_walks(self, rng: np.random.Generator) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """A kind of walk, and `num_chains` walks of it that share no entity."""
        while True:
            path, walks = self.walks_by_kind[rng.integers(len(self.walks_by_kind))]
            drawn: list[tuple[int, ...]] = []
            for i in rng.permutation(len(walks))[: 4 * self.num_chains]:
                if not any(set(walks[i]) & set(other) for other in drawn):
                    drawn.append(walks[i])
                if len(drawn) == self.num_chains:
                    return path, drawn


def read_graph(path: Path) -> tuple[dict[int, dict[int, tuple[int, ...]]], tuple[str, ...]]:
    """MetaQA's `kb.txt.gz` (`subject|relation|object` lines) as `FactQuestions.graph`, and the names of oriented relations.

    Relation r forward is 2r, backward 2r + 1. Raises `InvalidInput` for other files.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as MetaQA's kb.txt.gz: {error}") from error
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    edges: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, line in enumerate(lines, 1):
        parts = line.split("|")
        if len(parts) != 3:
            raise InvalidInput(f"{path}, line {number}: expected subject|relation|object, got {line!r}")
        # A film and an actor of one name are one entity here, as in MetaQA.
        subject, object_ = (entities.setdefault(name, len(entities)) for name in (parts[0], parts[2]))
        relation = relations.setdefault(parts[1], len(relations))
        edges[subject][PAIR * relation].append(object_)
        edges[object_][PAIR * relation + 1].append(subject)
    names = tuple(name for relation in relations for name in (relation, f"{relation}-of"))
    return {e: {r: tuple(objects) for r, objects in by.items()} for e, by in edges.items()}, names
