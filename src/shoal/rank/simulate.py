"""Comparators made from judgements: how rankers are measured without a model, and how costs are forecast.

A comparator sees document a first and b second, and its log-odds for a are

    u_a - u_b + c_{ab} + q + e_{ab}

    u    what it takes a document's relevance for: `sharpness` x grade + `misjudged` x N(0, 1), drawn once per document
    c    drawn once per pair (c_ba = -c_ab, sd `intransitive`): what makes circles of preferences
    q    position bias: above 0 it likes what stands first
    e    drawn once per ordered pair (sd `wavering`): what makes the two directions disagree beyond the bias

All of it is fixed by the seed: a comparator that decodes greedily says the same when it is asked again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shoal.rank.oracle import NOTHING, Reading
from shoal.rank.questions import Question

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class NoiseModel:
    """What is wrong with a simulated comparator; see above."""

    sharpness: float = 1.0
    misjudged: float = 0.0
    intransitive: float = 0.0
    position_bias: float = 0.0
    wavering: float = 0.0
    tail_df: float = math.inf
    """Degrees of freedom of the draws: finite for Student's t, with its outliers."""
    surface_bias: float = 0.0
    """Added to u per standard deviation of the first stage's place, lower places higher: a taste that the first stage has not."""
    unparsed: float = 0.0
    """Share of presentations whose answer cannot be read."""


PERFECT = NoiseModel()
PUBLISHED = NoiseModel(sharpness=1.6, misjudged=1.5, intransitive=0.6, position_bias=0.5, wavering=1.05)
"""Near published runs of Flan-T5-XL on TREC DL: see `studies/ranking.py`, which measures what it comes to."""
MISMATCHED = NoiseModel(
    sharpness=1.2, misjudged=1.1, intransitive=0.9, position_bias=-0.9, wavering=0.7, tail_df=3.0, surface_bias=0.15
)
"""Another comparator: it likes what stands second, errs with outliers, and favours what the first stage does not."""
NOISE_MODELS = {"perfect": PERFECT, "published": PUBLISHED, "mismatched": MISMATCHED}


@dataclass(frozen=True, eq=False)
class Simulated:
    """A comparator of documents by their grades, in the first stage's order."""

    grades: Sequence[float]
    """Per document."""
    noise: NoiseModel = PERFECT
    """What is wrong with it."""
    seed: int = 0
    """Of all draws."""

    @cached_property
    def logits(self) -> Floats:
        """[n, n]: log-odds for the row's document where it stands first and the column's second."""
        noise, n = self.noise, len(self.grades)
        generator = np.random.default_rng(self.seed)

        def draws(*shape: int) -> Floats:
            if math.isinf(noise.tail_df):
                return generator.standard_normal(shape)
            return generator.standard_t(noise.tail_df, shape) / math.sqrt(noise.tail_df / (noise.tail_df - 2))

        place = (np.arange(n) - (n - 1) / 2) / max(1.0, n / math.sqrt(12))
        utility = noise.sharpness * np.asarray(self.grades, dtype=np.float64) + noise.misjudged * draws(n)
        utility = utility + noise.surface_bias * place
        pair = np.triu(draws(n, n), 1)
        result: Floats = utility[:, None] - utility[None, :] + noise.intransitive * (pair - pair.T)
        result = result + noise.position_bias + noise.wavering * draws(n, n)
        return result

    @cached_property
    def unreadable(self) -> NDArray[np.bool_]:
        """[n, n]: presentations without an answer."""
        n = len(self.grades)
        return np.random.default_rng([self.seed, 1]).random((n, n)) < self.noise.unparsed

    def read(self, presentations: Sequence[Question]) -> list[Reading]:
        """As in `Comparator`. Of more than two documents each gets the mean of its pairs, in the order shown."""
        readings = []
        for shown in presentations:
            if len(shown) == 2:
                logit = float(self.logits[shown])
                dead = self.noise.unparsed and self.unreadable[shown]
                readings.append(Reading(None if dead else (logit / 2, -logit / 2), NOTHING))
                continue
            among = self.logits[np.ix_(shown, shown)]
            above = np.triu(among, 1)
            preference = (above.sum(axis=1) - above.sum(axis=0)) / len(shown)
            readings.append(Reading(tuple(map(float, preference)), NOTHING))
        return readings
