"""Ways to rank, by name."""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import InvalidInput, nearest
from shoal.rank.questions import Ranker
from shoal.rank.rankers.adaptive import Adaptive
from shoal.rank.rankers.all_pairs import AllPairs
from shoal.rank.rankers.bubblesort import Bubblesort
from shoal.rank.rankers.heapsort import Heapsort
from shoal.rank.rankers.mohajer import Mohajer
from shoal.rank.rankers.pac import PacBestK
from shoal.rank.rankers.quicksort import Quicksort
from shoal.rank.rankers.sampled import SampledPairs
from shoal.rank.rankers.sliding import Sliding
from shoal.rank.rankers.tournament import Tournament

RANKERS: dict[str, Callable[[], Ranker]] = {
    "adaptive": Adaptive,
    "all-pairs": AllPairs,
    "bradley-terry": lambda: SampledPairs(aggregate="bradley-terry"),
    "bubblesort": Bubblesort,
    "bubblesort-uncached": lambda: Bubblesort(reuse=False),
    "heapsort": Heapsort,
    "listwise": lambda: Sliding(window=20, stride=10, passes=1),
    "mohajer": Mohajer,
    "mohajer-bubble": lambda: Mohajer(bubble=True),
    "pac": PacBestK,
    "quicksort": Quicksort,
    "setwise": lambda: Heapsort(children=3, setwise=True),
    "sliding": Sliding,
    "spectral": lambda: SampledPairs(aggregate="spectral"),
    "tournament": Tournament,
}
"""Every ranker with its defaults."""
KINDS = {"listwise": "list", "setwise": "set"}
"""Of templates that rankers of more than pairs need; the others ask pairs."""


def ranker_named(name: str) -> Ranker:
    """A ranker with its defaults; `auto` is `adaptive`. Raises `InvalidInput`."""
    if name == "auto":
        return Adaptive()
    if name not in RANKERS:
        raise InvalidInput(f"there is no ranker {name!r}, {nearest(name, ['auto', *RANKERS])}")
    return RANKERS[name]()
