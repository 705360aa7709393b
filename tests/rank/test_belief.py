"""The adaptive ranker's belief against integrals done by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.rank.questions import Task
from shoal.rank.rankers.adaptive import prior_of
from shoal.rank.rankers.belief import Belief, Hypothesis, normal_cdf


@given(
    share=st.floats(0, 1),
    blur=st.floats(0.2, 2),
    lapse=st.floats(0, 0.3),
    gap=st.floats(-2, 2),
)
@settings(deadline=None, max_examples=60)
def test_moments_of_one_answer(share: float, blur: float, lapse: float, gap: float) -> None:
    """Mean and variance of the difference after an answer, and its probability, by summing over a fine grid."""
    prior = np.array([gap / 2, -gap / 2, 0.3])
    belief = Belief(prior, (Hypothesis(blur, lapse, 1.0, 0.8),))
    belief.learn(0, 1, share)
    grid = np.linspace(-14, 14, 28001)
    weight = np.exp(-0.5 * (grid - gap) ** 2 / (2 * 0.8**2))
    weight /= weight.sum()
    wins = lapse + (1 - 2 * lapse) * normal_cdf(grid / blur)
    likelihood = share * wins + (1 - share) * (1 - wins)
    posterior = weight * likelihood / (weight * likelihood).sum()
    mean = (posterior * grid).sum()
    variance = (posterior * (grid - mean) ** 2).sum()
    covariance = belief.covariances[0]
    said = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert belief.means[0, 0] - belief.means[0, 1] == pytest.approx(mean, abs=2e-5)
    if variance <= 2 * 0.8**2:  # a surprise may widen the exact posterior; the belief never does
        assert said == pytest.approx(variance, abs=2e-5)
    else:
        assert said == pytest.approx(2 * 0.8**2, abs=1e-9)
    assert belief.means[0, 2] == pytest.approx(0.3)
    if abs(2 * share - 1) > 0:
        assert belief.log_weights[0] == pytest.approx(np.log((weight * likelihood).sum()), abs=2e-5)


def test_answers_calibrate_the_noise() -> None:
    """After 300 answers, of ten that a comparator gives at random the belief is in much noise; of a sure one in little."""
    hypotheses = (Hypothesis(0.3, 0.0, 0.0, 1.0), Hypothesis(0.3, 0.4, 0.0, 1.0))
    generator = np.random.default_rng(0)
    relevance = generator.standard_normal(30)
    for sure, likely in ((True, 0), (False, 1)):
        belief = Belief(np.zeros(30), hypotheses)
        for _ in range(300):
            i, j = generator.choice(30, 2, replace=False)
            belief.learn(int(i), int(j), float(relevance[i] > relevance[j] if sure else generator.random() < 0.5))
        assert belief.weights()[likely] > 0.99
        if sure:
            assert np.corrcoef(belief.mean(), relevance)[0, 1] > 0.9


def test_relevance_is_a_share_of_what_the_comparator_likes() -> None:
    """Posterior of r in u = r + m by conditioning the joint Gaussian of [r, u] on differences of u seen with noise."""
    prior, sd, trust = np.array([1.0, 0.2, -1.2]), 1.3, 0.7
    belief = Belief(prior, (Hypothesis(0.5, 0.1, 0.4, sd, trust),))
    for i, j, share in ((0, 1, 0.0), (1, 2, 1.0), (0, 2, 0.0)):
        belief.learn(i, j, share)
    # regress r on u: cov(r, u) / var(u), both before any answer
    joint = np.kron(np.array([[trust, trust], [trust, 1.0]]), sd**2 * np.eye(3))
    slope = joint[:3, 3:] @ np.linalg.inv(joint[3:, 3:])
    mean, covariance, blur, _ = belief.mixture()
    assert mean == pytest.approx(0.4 * prior + slope @ (belief.means[0] - 0.4 * prior))
    assert covariance == pytest.approx(slope @ belief.covariances[0] @ slope.T)
    assert blur == pytest.approx(trust * 0.5)


def test_covariances_stay_covariances() -> None:
    """Symmetric, no negative variance, never wider than before."""
    belief = Belief(np.zeros(20), (Hypothesis(0.5, 0.1, 0.5, 1.0), Hypothesis(1.5, 0.0, 0.5, 1.0)))
    generator = np.random.default_rng(1)
    before = belief.covariances.copy()
    for _ in range(200):
        i, j = (int(one) for one in generator.choice(20, 2, replace=False))
        belief.learn(i, j, float(generator.choice([0.0, 0.2, 0.5, 1.0])))
    assert np.allclose(belief.covariances, belief.covariances.transpose(0, 2, 1))
    assert np.linalg.eigvalsh(belief.covariances).min() > -1e-9
    assert (np.diagonal(belief.covariances, axis1=1, axis2=2) <= np.diagonal(before, axis1=1, axis2=2) + 1e-12).all()
    mean, covariance, blur, lapse = belief.mixture()
    assert np.allclose(mean, belief.mean())
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
    assert 0.5 <= blur <= 1.5
    assert 0.0 <= lapse <= 0.1


def test_prior() -> None:
    """Scores where there are any, else ranks; always with mean 0 and deviation 1, but where all are the same."""
    for scores in ([9.0, 5.0, 1.0], None, [2.0, 2.0, 2.0], [float("nan"), 1.0, 0.0]):
        prior = prior_of(Task(n=3, k=1, scores=scores))
        assert prior.mean() == pytest.approx(0)
        assert prior.std() == pytest.approx(1)
        assert list(prior) == sorted(prior, reverse=True)
    assert list(prior_of(Task(n=1, k=1))) == [0.0]
