"""What the SkipDecode paper claims, and how each claim is judged.

The paper's body could not be read in any source (only its abstract, its public reviews and what others write of it), so its own
numbers stand nowhere here: a claim is judged by its words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.depth.plan import DepthPlan
from shoal.evaluate.bootstrap import Score, Statistics
from shoal.evaluate.exactness import TOLERANCE_NATS, Exactness
from shoal.evaluate.frontier_result import Arm
from shoal.evaluate.winners import DENSE

MARGIN = 1.0
"""Points of the task's main metric (BLEU) that a loss may have and still be called negligible. The paper's abstract says
"negligible" without a number. One point is less than the 95% interval of a single system on E2E's 630 test inputs (about 1.3 to
either side), so a reader who sees one system at a time could not see it."""

LEAST_DENSE = 10 * MARGIN
"""Score of the dense baseline, lower end of its interval, below which nothing is judged: who can do nothing loses nothing."""
LEAST_INPUTS = 100
"""Test inputs below which nothing is judged: percentile intervals of few inputs are too narrow."""

HOLDS, FAILS, NOT_SHOWN = "holds", "does not hold", "not shown"


Judge = Callable[[Score], str]
"""From a difference to a verdict."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper."""

    title: str
    """In a few words."""
    paper: str
    """What the paper states."""
    source: str
    """Where that was read."""
    rule: str
    """When it holds here, and when it does not; otherwise it is not shown."""


CLAIMS = (
    Claim(
        title="negligible loss",
        paper='2x to 5x "speedup" with negligible regression, on OPT-1.3B and OPT-6.7B and three generation tasks',
        source="its abstract; its public reviews (OpenReview)",
        rule=f"the 95% interval of SkipDecode's loss against dense stays within {MARGIN:g} point; "
        "it does not hold where all of the interval is beyond",
    ),
    Claim(
        title="a warm-up layer helps",
        paper="bottom layers that always run bridge embedding and upper layers, and help consistently",
        source="a review by Paperium; that it is one layer: AdaSkip (arXiv 2501.02336). Numbers were not found",
        rule="the 95% interval of the difference, one warm-up layer minus none, is above 0; it does not hold where it is below",
    ),
    Claim(
        title="skipping beats early termination",
        paper="lower and middle layers are skipped, so that later tokens can attend to what upper layers made of earlier ones",
        source="its abstract; the comparison: a summary by ArXivQA. A reviewer still asked for the gain; numbers were not found",
        rule="the 95% interval of the difference, SkipDecode minus early termination, is above 0; it does not hold where it is "
        "below",
    ),
    Claim(
        title="exits that never rise make batching and caching exact",
        paper="one exit point per position, never rising, so that no key or value of an earlier token is missing, also in a batch",
        source="its abstract. Rows at clocks of their own are ours; the paper's batch shares one position",
        rule="every request writes alone what it writes in a mixed batch (up to near-ties), and log-probabilities equal those of a "
        f"pass without a cache to {TOLERANCE_NATS:g} nats, in float32",
    ),
)
"""In the order of `docs/reproduction.md`."""


def negligible(difference: Score) -> str:
    """The verdict on a loss, `difference` being SkipDecode minus dense where more is better.

    >>> negligible(Score(-0.2, -0.9, 0.5)), negligible(Score(-0.2, -1.9, 0.5)), negligible(Score(-3, -4, -1.1))
    ('holds', 'not shown', 'does not hold')
    """
    if difference.low >= -MARGIN:
        return HOLDS
    return FAILS if difference.high < -MARGIN else NOT_SHOWN


def better(difference: Score) -> str:
    """The verdict on "the first one is better", `difference` being it minus the other.

    >>> better(Score(1, 0.2, 1.8)), better(Score(1, -0.2, 2.2)), better(Score(-1, -1.8, -0.2))
    ('holds', 'not shown', 'does not hold')
    """
    if difference.low > 0:
        return HOLDS
    return FAILS if difference.high < 0 else NOT_SHOWN


def exact(found: Exactness) -> str:
    """The verdict on exactness; nothing is shown where no plan skipped a layer, or no two clocks shared a pass."""
    if not found.layers_skipped or found.most_clocks < 2:
        return NOT_SHOWN
    return HOLDS if found.exact else FAILS


def overall(verdicts: Iterable[str]) -> str:
    """The verdict on a claim about several depths: it holds if it holds at all of them, and does not if it fails at one.

    >>> overall(["holds", "holds"]), overall(["holds", "not shown"]), overall(["does not hold", "not shown"])
    ('holds', 'not shown', 'does not hold')
    """
    verdicts = set(verdicts)
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts == {HOLDS} else NOT_SHOWN


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One checkpoint at one depth."""

    checkpoint: str
    """Its name in the reproduction."""
    arm: Arm
    """As its frontier has it."""
    statistics: Statistics
    """What each input adds to the main metric."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints on the same inputs, at one depth."""

    depth: float
    """Nominal."""
    ours: str
    """Checkpoint whose claim it is."""
    other: str
    """What it is compared with."""
    mean_layers: tuple[float, float] | None
    """Realised, of both; None where it was not measured."""
    scores: tuple[Score, Score] | None
    """Of both, with their own intervals."""
    difference: Score | None
    """Ours minus other, by a paired bootstrap."""
    verdict: str
    """On this depth."""
    reason: str | None
    """Why there is no verdict, where none can be given."""


def compare(
    depth: float,
    ours: Measured | None,
    other: Measured | None,
    dense: Measured,
    *,
    names: tuple[str, str],
    metric: str,
    judge: Judge,
    seed: int,
) -> Comparison:
    """Compare two arms by `judge` (`negligible` or `better`); `dense` is the baseline that went on dense.

    Not shown where an arm could not run (None), or where the numbers cannot carry a verdict, see `too_little`.
    """
    if ours is None or other is None:
        return Comparison(
            depth=depth,
            ours=names[0],
            other=names[1],
            mean_layers=None,
            scores=None,
            difference=None,
            verdict=NOT_SHOWN,
            reason="needs outputs of two tokens or more: the prompt's pass predicts the first one",
        )
    difference = ours.statistics.minus(other.statistics, seed=seed)
    reason = too_little(ours, other, dense.arm.scores[metric])
    return Comparison(
        depth=depth,
        ours=names[0],
        other=names[1],
        mean_layers=(ours.arm.realised_mean_layers, other.arm.realised_mean_layers),
        scores=(ours.arm.scores[metric], other.arm.scores[metric]),
        difference=difference,
        verdict=NOT_SHOWN if reason else judge(difference),
        reason=reason,
    )


def too_little(ours: Measured, other: Measured, dense: Score) -> str | None:
    """Why a comparison cannot carry a verdict: too few inputs, a model that never learned the task, schedules that differ."""
    if len(ours.statistics.counts) < LEAST_INPUTS:
        return f"needs {LEAST_INPUTS} test inputs or more"
    if dense.low < LEAST_DENSE:
        return f"needs a dense model that has learned the task, with a score of {LEAST_DENSE:g} or more"
    one, two = schedule(ours.arm), schedule(other.arm)
    if other.arm.policy != DENSE and one != two:
        return f"needs more layers: here one runs {one[0]} to {one[-1]} of them, the other one {two[0]} to {two[-1]}"
    return None


def schedule(arm: Arm) -> list[int]:
    """How many layers each clock runs, until the plan stops getting shallower."""
    assert arm.plan is not None
    plan = DepthPlan.from_dict(arm.plan)
    return [plan.depth(clock) for clock in range((plan.horizon or 0) + 1)]


def judged(comparisons: Sequence[Sequence[Comparison]], exactness: Exactness) -> list[dict[str, Any]]:
    """All claims with their verdicts, as JSON: `comparisons` of the first three, in their order."""
    found = [
        {
            **asdict(claim),
            "verdict": overall(one.verdict for one in several),
            "comparisons": [asdict(one) for one in several],
        }
        for claim, several in zip(CLAIMS[:-1], comparisons, strict=True)
    ]
    return [*found, {**asdict(CLAIMS[-1]), "verdict": exact(exactness), "measured": asdict(exactness)}]
