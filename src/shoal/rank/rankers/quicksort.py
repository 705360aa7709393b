"""Quicksort that stops at k, its partitions as rounds.

All documents of a segment meet the same pivot, independently: one round. Segments on both sides of a pivot do not depend on each
other either, so all that are open share a round. A segment that begins at place k or later is left alone.

Example, k = 2 of 5 with pivot c in a b c d e: the round asks a-c b-c d-c e-c; where d and e win, the segments are [d e] c [a b],
and only the first is open.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.rank.questions import Question, Round, Rounds, Task


@dataclass(frozen=True, kw_only=True)
class Quicksort:
    """The pivot is the middle one of its segment, which stays in the first stage's order."""

    pooled: bool = True
    """Whether all open segments share a round. False partitions one segment per round, as published counts do."""
    reuse: bool = True
    """Whether answers are kept."""

    def rounds(self, task: Task) -> Rounds:
        """As in `Ranker`."""
        segments = [list(range(task.n))]
        pivot_first = (
            False  # alternates, so that a comparator with a position bias does not meet the pivot on one side only
        )
        while True:
            start = 0
            opened: list[tuple[int, int, list[int]]] = []
            questions: list[Question] = []
            for place, segment in enumerate(segments):
                if start < task.k and len(segment) > 1 and (self.pooled or not opened):
                    pivot = segment[len(segment) // 2]
                    others = [one for one in segment if one != pivot]
                    opened.append((place, pivot, others))
                    questions += [(pivot, one) if pivot_first else (one, pivot) for one in others]
                start += len(segment)
            if not opened:
                return [document for segment in segments for document in segment]
            current = segments
            answers = iter((yield Round(questions, lambda: current)))  # noqa: B023 read before `current` changes
            parted = {}
            for place, pivot, others in opened:
                left: list[int] = []
                right: list[int] = []
                middle = (len(others) + 1) // 2
                for at, one in enumerate(others):
                    shares = next(answers)
                    share = shares[1] if pivot_first else shares[0]
                    stays_left = at < middle if share == 0.5 else share > 0.5
                    (left if stays_left else right).append(one)
                parted[place] = [part for part in (left, [pivot], right) if part]
            segments = [part for place, segment in enumerate(segments) for part in parted.get(place, [segment])]
            pivot_first = not pivot_first
