"""What papers say about pairwise ranking with language models, beside what `ranking.py` counted with honest top-k stopping.

The sentences are arXiv 2505.24643's (batches and caches) and arXiv 2605.14236's (active rankers); the numbers here are simulated
comparators' on TREC DL, and whether a claim holds follows from them.
"""

from __future__ import annotations

from typing import Any

from shoal.evaluate.markdown import table


def describe(result: dict[str, Any]) -> str:
    """A row per claim: the published number, the one counted here, and whether it holds."""
    counts, claims = result["counts"], result["claims"]

    def compared(name: str, batch: int = 1) -> float:
        return float(counts[name][str(batch)][0])

    def points(name: str) -> float:
        return 100 * float(claims[name]["ndcg10"])

    heap, quick = compared("heapsort, stop at 10"), "quicksort, top 10, one partition at a time"
    saved_at_1, saved_at_2 = 1 - compared(quick) / heap, 1 - compared(quick, 2) / heap
    both = [claims[f"{name} [both]"]["batches_of_2"] for name in ("heapsort", "quicksort")]
    saved_both = 1 - both[1] / both[0]
    exact = 1 - compared("bubblesort, 10 passes, unique pairs") / compared("bubblesort, 10 passes, no cache")
    noisy = 1 - claims["bubblesort [both]"]["prompts"] / claims["bubblesort-uncached [both]"]["prompts"]
    sorts = [points(f"{name} [both]") for name in ("heapsort", "quicksort", "bubblesort")]
    pairs = {
        name: (claims[f"{name} [random]"], claims[f"{name} [both]"])
        for name in ("heapsort", "quicksort", "bubblesort", "mohajer", "pac")
    }
    fewer = {name: 1 - random["prompts"] / twice["prompts"] for name, (random, twice) in pairs.items()}
    better = {name: 100 * (random["ndcg10"] - twice["ndcg10"]) for name, (random, twice) in pairs.items()}
    dearer = claims["heapsort [random]"]["prompts"] / claims["mohajer [random]"]["prompts"]
    lowest = min(
        one["scores"]["heapsort [random]"][0][0] - one["scores"]["first stage"][0][0] for one in result["curves"]
    )
    at_ends = [points(f"{name} [random]") for name in ("heapsort", "mohajer")]
    rows = [
        ["quicksort needs fewer inferences than heapsort at batches of 2", "44% fewer",
         f"{saved_at_2:.0%} fewer (at 1: {saved_at_1:.0%})", holds(saved_at_2 > 0.3)],
        ["... when each pair is asked in both directions", "44% fewer",
         f"{both[1]:.0f} batches against {both[0]:.0f}: a pair fills one; at 8 {1 - ratio(claims, 'batches_of_8'):.0%} fewer",
         holds(saved_both > 0.3)],
        ["a cache saves bubblesort's calls", "46%", f"{exact:.0%} if answers are true, {noisy:.0%} if they err",
         holds(noisy > 0.36)],
        ["which sort is used does not change quality", "unchanged",
         "heapsort, quicksort, bubblesort " + ", ".join(f"{one:.1f}" for one in sorts), holds(max(sorts) - min(sorts) < 1)],
        ["a random direction reaches Mohajer's best in fewer calls", "44% fewer",
         f"{fewer['mohajer']:.0%} fewer, {better['mohajer']:+.1f} points", holds(better["mohajer"] > -0.5)],
        ["a random direction is better than both for bubblesort", "+5.6 points at 300 calls",
         f"{better['bubblesort']:+.1f} points at the end, {fewer['bubblesort']:.0%} fewer calls", holds(better["bubblesort"] > 0)],
        ["Mohajer takes far fewer calls than heapsort", "3 to 7 times",
         f"{dearer:.1f} times where both stop at 10; {at_ends[1]:.1f} against {at_ends[0]:.1f} points", holds(dearer > 3)],
        ["heapsort within a small budget is worse than the first stage", "6.8 against 49.3",
         f"{lowest:+.1f} points at 20 calls: known winners first, then the first stage's order", holds(lowest < 0)],
    ]  # fmt: skip
    parts = [table(["claim", "published", "here", "holds"], rows)]
    rows = [
        [name, *(cell for one in asked for cell in (f"{one['prompts']:.0f}", f"{100 * one['ndcg10']:.1f}"))]
        for name, asked in pairs.items()
    ]
    parts.append(table(["to the end", "random: calls", "nDCG@10", "both: calls", "nDCG@10"], rows))
    return "\n\n".join(parts)


def ratio(claims: dict[str, Any], unit: str) -> float:
    """Quicksort's cost in a unit, of heapsort's, in both directions."""
    return float(claims["quicksort [both]"][unit] / claims["heapsort [both]"][unit])


def holds(does: bool) -> str:
    """A verdict."""
    return "yes" if does else "no"
