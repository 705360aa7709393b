"""What an adaptive ranker believes: a Gaussian over how the comparator likes the documents, under each of a few hypotheses.

A hypothesis says how much the first stage is worth, and how an answer about i and j comes from their difference in liking, d:

    P(i wins | d) = e + (1 - 2 e) Phi(d / s)

`s` blurs close pairs, `e` turns over any answer. What the comparator likes is not what is relevant: it misjudges a document the
same way however often it is asked. With u = r + m, relevance r ~ N(prior, t sd^2) and a taste m ~ N(0, (1 - t) sd^2) that is the
comparator's own, only the share t (`trust`) of what answers say about u is about r:

    E[r] = prior + t (E[u] - prior)

so with t = 0.7 a document that the first stage has at 0 and the answers at 2 counts as 1.4.

Each hypothesis holds a mean [n] and a covariance [n, n] of u, and after each answer the Gaussian that matches the first two moments
of the exact posterior (assumed-density filtering, as in TrueSkill, with the full covariance: an answer about i and j moves all
documents that are correlated with them). Hypotheses are weighted by how well each predicted the answers before it saw them, which
is how the noise is calibrated as the ranking goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SQRT_2PI = math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Hypothesis:
    """How the comparator errs, and the first stage."""

    blur: float
    """s: standard deviation of what is added to a difference."""
    lapse: float
    """e: probability that an answer is turned over."""
    prior_weight: float
    """Relevance that one standard deviation of the first stage's scores is worth."""
    prior_sd: float
    """Standard deviation of what the comparator likes about what the first stage says."""
    trust: float = 1.0
    """t: the share of that variance which is relevance."""


class Belief:
    """Means, covariances and weights, one per hypothesis."""

    def __init__(self, prior: Floats, hypotheses: tuple[Hypothesis, ...]) -> None:
        """`prior`, [n]: the first stage's scores with mean 0 and standard deviation 1."""
        self.blur = np.array([one.blur for one in hypotheses])
        self.lapse = np.array([one.lapse for one in hypotheses])
        self.trust = np.array([one.trust for one in hypotheses])
        self.priors = np.stack([one.prior_weight * prior for one in hypotheses])
        self.means = self.priors.copy()
        self.covariances = np.stack([one.prior_sd**2 * np.eye(len(prior)) for one in hypotheses])
        self.log_weights = np.zeros(len(hypotheses))

    def learn(self, i: int, j: int, share: float) -> None:
        """Take an answer: `share` is the preference for i over j; 1/2 says nothing."""
        certainty = abs(2 * share - 1)
        if certainty == 0:
            return
        first, second = (i, j) if share > 0.5 else (j, i)
        # P(answer | d) = a + b Phi(d / s), d the winner's relevance less the loser's
        b = certainty * (1 - 2 * self.lapse)
        a = (1 - b) / 2
        column = self.covariances[:, :, first] - self.covariances[:, :, second]  # [hypotheses, n]: covariance with d
        mean = self.means[:, first] - self.means[:, second]
        variance = column[:, first] - column[:, second]
        spread = np.sqrt(variance + self.blur**2)
        z = mean / spread
        density = np.exp(-0.5 * z * z) / SQRT_2PI
        likelihood = a + b * normal_cdf(z)
        slope = b * density / spread / likelihood
        curvature = np.maximum(0.0, slope * (slope + z / spread))
        self.means += column * slope[:, None]
        self.covariances -= (curvature[:, None] * column)[:, :, None] * column[:, None, :]
        self.log_weights += np.log(likelihood)

    def weights(self) -> Floats:
        """[hypotheses]: how much each is believed; adds up to 1."""
        weights = np.exp(self.log_weights - self.log_weights.max())
        result: Floats = weights / weights.sum()
        return result

    def mixture(self) -> tuple[Floats, Floats, float, float]:
        """Of relevance over all hypotheses: mean [n], the covariance [n, n] that answers can still resolve, mean blur and lapse."""
        weights = self.weights()
        relevance = self._relevance()
        mean = weights @ relevance
        apart = relevance - mean
        covariance = np.tensordot(weights * self.trust**2, self.covariances, 1) + (weights[:, None] * apart).T @ apart
        return mean, covariance, float(weights @ (self.trust * self.blur)), float(weights @ self.lapse)

    def mean(self) -> Floats:
        """[n]: expected relevance."""
        result: Floats = self.weights() @ self._relevance()
        return result

    def _relevance(self) -> Floats:
        """[hypotheses, n]: E[r]."""
        result: Floats = self.priors + self.trust[:, None] * (self.means - self.priors)
        return result


def normal_cdf(z: Floats) -> Floats:
    """Phi, by Abramowitz and Stegun 26.2.17: within 7.5e-8, without SciPy.

    >>> float(normal_cdf(np.array([0.0]))[0].round(6)), float(normal_cdf(np.array([-1.96]))[0].round(4))
    (0.5, 0.025)
    """
    t = 1 / (1 + 0.2316419 * np.abs(z))
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper = np.exp(-0.5 * z * z) / SQRT_2PI * poly
    result: Floats = np.where(z >= 0, 1 - upper, upper)
    return result
