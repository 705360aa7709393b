"""Acceptance by coupled distributions: what comes out is distributed as without drafting, whatever drafts.

Chi-square tests that raise a false alarm once in 10,000 each; seeds are fixed, so they pass always or never.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor

from shoal import Engine, Sampling
from shoal.depth.early_termination import EarlyTermination
from shoal.draft import SelfDraft
from shoal.engine.sampler import choose, couple, distribution, draw
from shoal.engine.sampling import uniform_noise

FALSE_ALARM = 1e-4
DRAWS = int(os.environ.get("SHOAL_DRAWS", "10000"))
VOCAB = 6

OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "cold": {"temperature": 0.5},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    "bias": {"temperature": 1.0, "logit_bias": {2: 1.5, 4: -float("inf")}},
}


def assert_distributed(counts: Counter[int], expected: Tensor) -> None:
    """Counts of tokens against probabilities; what cannot come has not."""
    total = sum(counts.values())
    possible = np.flatnonzero(expected.numpy() > 0)
    assert set(counts) <= set(possible.tolist())
    expected_counts = total * expected.double().numpy()[possible] / expected.double().sum().item()
    p_value = chisquare([counts[int(token)] for token in possible], expected_counts).pvalue
    assert p_value > FALSE_ALARM


@pytest.mark.parametrize("drafter", ["uniform", "wrong", "point", "same"])
def test_any_two_distributions(drafter: str) -> None:
    p = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05, 0.0])
    q = {
        "uniform": torch.full((VOCAB,), 1 / VOCAB),
        "wrong": torch.tensor([0.0, 0.05, 0.05, 0.1, 0.3, 0.5]),
        "point": torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        "same": p,
    }[drafter]
    counts: Counter[int] = Counter()
    kept = 0
    for seed in range(DRAWS):
        drafted = draw(q, uniform_noise(seed, 0, 0))
        token = couple(p, [drafted], q, coins=[uniform_noise(seed, 1, 0)], noise=uniform_noise(seed, 2, 0))
        counts[token] += 1
        kept += token == drafted
    assert_distributed(counts, p)
    share = float(torch.minimum(p, q).sum())  # 1 - the total variation distance
    assert kept / DRAWS == pytest.approx(share, abs=4 * (0.25 / DRAWS) ** 0.5)


@pytest.mark.parametrize("option", OPTIONS)
def test_any_sampling(option: str) -> None:
    """`choose` with a drafted token against the distribution that it draws from without one."""
    logits = torch.tensor([1.0, 0.3, -0.2, 0.9, 0.1, -1.0])
    q = torch.tensor([0.1, 0.4, 0.1, 0.1, 0.2, 0.1])

    def request(seed: int) -> Any:
        sampling = Sampling(seed=seed, **OPTIONS[option])
        return SimpleNamespace(sampling=sampling, prompt=(0, 1), output=[3, 3], sample=0, index=0, eos_token_ids=())

    expected = expected_distribution(logits, request(0))
    counts: Counter[int] = Counter()
    for seed in range(DRAWS):
        drafted = draw(q, uniform_noise(seed, 7, 7))
        counts[choose(logits, request(seed), (), ([drafted], q))] += 1
    assert_distributed(counts, expected)


def expected_distribution(logits: Tensor, request: Any) -> Tensor:
    """By the sampler's own parts, which `tests/engine/test_sampler.py` holds against the textbook."""
    from shoal.engine.sampler import adjust

    return distribution(adjust(logits.clone(), request, request.output), request.sampling)


@pytest.mark.parametrize("tokens", [2, None])
def test_whole_texts(make_engine: Callable[..., Engine], tokens: int | None) -> None:
    """Four tokens of 3,000 seeds from an engine that drafts with two layers, against as many without; lengths are fixed, or the
    engine's choice, which must not depend on what was drawn."""
    engine = make_engine(max_batch=32)
    bottom = EarlyTermination(min_layers=2, max_layers=2)
    draft = SelfDraft(plan=bottom, tokens=tokens, coupled=True)

    def texts(first_seed: int, how: object) -> tuple[Counter[tuple[int, ...]], int, int]:
        samplings = [
            Sampling(max_new_tokens=4, temperature=1.0, top_k=2, seed=seed, ignore_eos=True)
            for seed in range(first_seed, first_seed + 3000)
        ]
        done = engine.generate([[1, 2, 3]] * len(samplings), samplings, draft=how)
        drafted = sum(one.drafting.drafted for one in done if one.drafting)
        accepted = sum(one.drafting.accepted for one in done if one.drafting)
        return Counter(one.token_ids for one in done), drafted, accepted

    plain, _, _ = texts(0, None)
    coupled, drafted, accepted = texts(10_000, draft)
    assert 0 < accepted < drafted
    outcomes = sorted(plain.keys() | coupled.keys())
    assert len(outcomes) == 16
    table = [[counts[outcome] for outcome in outcomes] for counts in (plain, coupled)]
    assert chi2_contingency(table).pvalue > FALSE_ALARM


def test_greedy_requests_are_not_coupled(make_engine: Callable[..., Engine]) -> None:
    """At temperature 0 a coupled draft is as any other: the very tokens."""
    engine = make_engine(max_batch=2)
    sampling = Sampling(max_new_tokens=30, ignore_eos=True)
    (plain,) = engine.generate([5, 6], sampling)
    (got,) = engine.generate([5, 6], sampling, draft=SelfDraft(coupled=True, tokens=3))
    assert got.token_ids == plain.token_ids
