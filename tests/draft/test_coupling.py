"""Acceptance by coupled distributions: what comes out is distributed as without drafting, whatever drafts, chains and trees.

Chi-square tests that raise a false alarm once in 10,000 each; seeds are fixed, so they pass always or never. SHOAL_DRAWS says how
often each draws.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chi2_contingency, chisquare
from torch import Tensor

from shoal import Engine, Sampling
from shoal.depth.early_termination import EarlyTermination
from shoal.draft import SelfDraft
from shoal.draft.trees import TreeDraft, draw_different
from shoal.engine.drafting import Draft, DraftRow
from shoal.engine.sampler import Sampled, adjust, choose, couple, distribution, verify
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


@pytest.mark.parametrize("siblings", [1, 5])
@pytest.mark.parametrize("drafter", ["uniform", "wrong", "point", "same"])
def test_any_two_distributions(drafter: str, siblings: int) -> None:
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
        drafted = draw_different(q, [uniform_noise(seed, 0, one) for one in range(siblings)])
        coins = [uniform_noise(seed, 1, one) for one in range(len(drafted))]
        token = couple(p, drafted, q, coins=coins, noise=uniform_noise(seed, 2, 0))
        counts[token] += 1
        kept += token == drafted[0]
    assert_distributed(counts, p)
    share = float(torch.minimum(p, q).sum())  # 1 - the total variation distance
    near = pytest.approx(share, abs=4 * (0.25 / DRAWS) ** 0.5)
    assert kept / DRAWS == near  # where the first is rejected nothing is left of it


@pytest.mark.parametrize("siblings", [1, 3])
@pytest.mark.parametrize("option", OPTIONS)
def test_any_sampling(option: str, siblings: int) -> None:
    """`choose` with drafted tokens against the distribution that it draws from without any."""
    logits = torch.tensor([1.0, 0.3, -0.2, 0.9, 0.1, -1.0])
    q = torch.tensor([0.1, 0.4, 0.1, 0.1, 0.2, 0.1])

    expected = expected_distribution(logits, request_of(option, 0))
    counts: Counter[int] = Counter()
    for seed in range(DRAWS):
        drafted = draw_different(q, [uniform_noise(seed, 7, one) for one in range(siblings)])
        counts[choose(logits, request_of(option, seed), (), (drafted, q))] += 1
    assert_distributed(counts, expected)


def request_of(option: str, seed: int) -> Any:
    """What the sampler reads of a request."""
    return SimpleNamespace(
        sampling=Sampling(seed=seed, **OPTIONS[option]), prompt=(0, 1), output=[3, 3], sample=0, index=0,
        eos_token_ids=(), stop_token_ids=(), text=SimpleNamespace(stop=()),
    )  # fmt: skip


def expected_distribution(logits: Tensor, request: Any, ahead: Sequence[int] = ()) -> Tensor:
    """By the sampler's own parts, which `tests/engine/test_sampler.py` holds against the textbook."""
    return distribution(adjust(logits.clone(), request, [*request.output, *ahead]), request.sampling)


@pytest.mark.parametrize("branches", [(6,), (3, 2), (2, 2, 2)])
@pytest.mark.parametrize("option", ["temperature", "penalties"])
def test_any_tree(option: str, branches: tuple[int, ...]) -> None:
    """A tenth of the draws, each of a whole tree: after all beginnings that occur often, the next token is distributed as without
    drafting.

    The two models are tables of logits, one row for each last token.
    """
    generator = torch.Generator().manual_seed(5)
    plan, drafter = torch.randn(2, VOCAB, VOCAB, generator=generator).unbind()
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    drafted, accepted = 0, 0
    for seed in range(DRAWS // 10):
        request = request_of(option, seed)
        tree = TreeDraft(DraftRow(request=request, slot=0, position=3, most=32), branches)
        while not tree.whole:
            tree.grow(drafter[tree.deepest])
        draft = Draft(tokens=tuple(tree.tokens), parents=tuple(tree.parents), distributions=tuple(tree.distributions))
        (ones,) = verify(plan[[request.output[-1], *draft.tokens]], [request], [draft])
        token_ids = [one.token for one in ones if isinstance(one, Sampled)]
        for at, token in enumerate(token_ids):
            counts[tuple(token_ids[:at])][token] += 1
        drafted, accepted = drafted + len(draft.tokens), accepted + len(token_ids) - 1
    assert 0 < accepted < drafted
    assert max(map(len, counts)) == len(branches)
    statistic, freedom = 0.0, 0
    for ahead, seen in counts.items():
        last = (3, *ahead)[-1]
        expected = expected_distribution(plan[last], request_of(option, 0), ahead).double()
        expected *= sum(seen.values()) / expected.sum()
        assert all(expected[token] > 0 for token in seen)
        if expected[expected > 0].min() < 5:
            continue  # too few for the statistic
        statistic += sum((seen[token] - mean) ** 2 / mean for token, mean in enumerate(expected.tolist()) if mean)
        freedom += int((expected > 0).sum()) - 1
    assert freedom >= 2
    assert chi2.sf(statistic, freedom) > FALSE_ALARM


@pytest.mark.parametrize("how", [{"tokens": 2, "coupled": True}, {"coupled": True}, {"branches": (2, 2)}])
def test_whole_texts(make_engine: Callable[..., Engine], how: dict[str, Any]) -> None:
    """Four tokens of 3,000 seeds (with trees 1,500) from an engine that drafts with two layers, against as many without; lengths
    are fixed, or the engine's choice, which must not depend on what was drawn."""
    engine = make_engine(max_batch=32)
    draft = SelfDraft(plan=EarlyTermination(min_layers=2, max_layers=2), **how)
    # Towards a request's end trees are thinner.
    num_tokens, num_seeds = (10, 1500) if draft.branches else (4, 3000)

    def texts(first_seed: int, how: object) -> tuple[Counter[tuple[int, ...]], int, int]:
        samplings = [
            Sampling(max_new_tokens=num_tokens, temperature=1.0, top_k=2, seed=seed, ignore_eos=True)
            for seed in range(first_seed, first_seed + num_seeds)
        ]
        done = engine.generate([[1, 2, 3]] * len(samplings), samplings, draft=how)
        drafted = sum(one.drafting.drafted for one in done if one.drafting)
        accepted = sum(one.drafting.accepted for one in done if one.drafting)
        return Counter(one.token_ids[:4] for one in done), drafted, accepted

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
