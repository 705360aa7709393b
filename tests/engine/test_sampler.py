"""The choice of a token from logits, against an obvious implementation and against transformers' processors."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from shoal import Sampling
from shoal.depth.plan import Dense
from shoal.engine.request import Request
from shoal.engine.sampler import TOP_P_PREFIX, adjust, choose, sample, token_logprobs
from shoal.engine.sampling import uniform_noise
from shoal.engine.text import TextStream
from shoal.errors import RequestFailed

EOS, VOCAB = 3, 40
FALSE_ALARM = 1e-6
"""Probability that a test of frequencies fails on a correct sampler, were its noise drawn anew. It is not: seeds are fixed."""
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=150)


def request_with(sampling: Sampling, prompt: list[int], output: list[int], *, which: int = 0) -> Request:
    return Request(
        request_id=0, index=0, sample=which, prompt=tuple(prompt), sampling=sampling, plan=Dense().plan(1),
        stop_token_ids=frozenset({EOS}), eos_token_ids=frozenset({EOS}), text=TextStream(None, (), streaming=False),
        deadline=None, future_blocks=np.zeros(1, dtype=np.int64), output=list(output),
    )  # fmt: skip


def random_logits(seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


# --- An obvious implementation, in float64 and plain loops ------------------------------------------------------------


def adjusted_slowly(logits: list[float], sampling: Sampling, prompt: list[int], output: list[int]) -> list[float]:
    scores = list(logits)
    for token in range(len(scores)):
        if token in prompt or token in output:
            penalty = sampling.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        count = output.count(token)
        scores[token] -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
        scores[token] += sampling.logit_bias.get(token, 0.0)
        if token == EOS and len(output) < sampling.min_new_tokens:
            scores[token] = -math.inf
    return scores


def probabilities_slowly(scores: list[float], sampling: Sampling) -> list[float]:
    scores = [score / sampling.temperature for score in scores]
    if sampling.top_k is not None:
        kept = sorted(scores, reverse=True)[: sampling.top_k]
        scores = [score if score >= kept[-1] else -math.inf for score in scores]
    weights = [math.exp(score - max(scores)) for score in scores]
    shares = [weight / sum(weights) for weight in weights]
    if sampling.top_p is not None:
        reached, kept = 0.0, []
        for share in sorted(shares, reverse=True):
            if reached < sampling.top_p:
                kept.append(share)
            reached += share
        shares = [share if share >= kept[-1] else 0.0 for share in shares]
    if sampling.min_p is not None:
        shares = [share if share >= sampling.min_p * max(shares) else 0.0 for share in shares]
    return [share / sum(shares) for share in shares]


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    """Any combination of fields."""
    return Sampling(
        temperature=draw(st.sampled_from([0.3, 1.0, 2.5])),
        top_k=draw(st.none() | st.sampled_from([1, 2, 7, VOCAB, 10**6])),
        top_p=draw(st.none() | st.sampled_from([0.05, 0.5, 0.9, 1.0])),
        min_p=draw(st.none() | st.sampled_from([0.0, 0.1, 0.7, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 0.7, 1.4])),
        presence_penalty=draw(st.sampled_from([0.0, -0.5, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.3, 0.8])),
        logit_bias=draw(
            st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-math.inf, -2.0, 4.0]), max_size=3)
        ),
        min_new_tokens=draw(st.sampled_from([0, 4])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@EXAMPLES
@given(samplings(), st.integers(0, 10**6), st.lists(st.integers(0, VOCAB - 1), max_size=6))
def test_against_the_obvious(sampling: Sampling, seed: int, output: list[int]) -> None:
    """Every combination of penalties, bias, minimum length, temperature, top-k, top-p and min-p, one draw each."""
    logits, prompt = random_logits(seed), [1, 5, 5, 9]
    request = request_with(sampling, prompt, output)
    scores = adjusted_slowly(logits.tolist(), sampling, prompt, output)
    np.testing.assert_allclose(adjust(logits.clone(), request, output).numpy(), scores, rtol=1e-5, atol=1e-5)

    before = logits.clone()
    token = choose(logits, request)
    assert torch.equal(logits, before), "the model's logits are not the sampler's to change"
    cumulative = np.cumsum(probabilities_slowly(scores, sampling))
    noise = uniform_noise(sampling.seed, 0, len(output))
    if np.abs(cumulative - noise).min() > 1e-5:
        assert token == int(np.argmax(cumulative > noise))
    greedy = choose(logits, request_with(replace(sampling, temperature=0.0), prompt, output))
    assert greedy == int(np.argmax(scores))


@EXAMPLES
@given(samplings(), st.integers(0, 10**6))
def test_the_obvious_against_transformers(sampling: Sampling, seed: int) -> None:
    """The obvious implementation keeps what transformers' warpers keep, with their probabilities."""
    warpers: list[Any] = [hf.TemperatureLogitsWarper(sampling.temperature)]
    warpers += [hf.TopKLogitsWarper(sampling.top_k)] if sampling.top_k is not None else []
    warpers += [hf.TopPLogitsWarper(sampling.top_p)] if sampling.top_p is not None else []
    warpers += [hf.MinPLogitsWarper(sampling.min_p)] if sampling.min_p is not None else []
    logits = random_logits(seed).double()
    scores = hf.LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    np.testing.assert_allclose(
        probabilities_slowly(logits.tolist(), sampling), scores.softmax(-1).numpy(), rtol=1e-6, atol=1e-9
    )


def test_penalties_against_transformers() -> None:
    logits, prompt, output = random_logits(1), [1, 5, 5, 9], [7, 5]
    ids = torch.tensor([[*prompt, *output]])
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits[None].clone())[0]
    ours = adjust(logits.clone(), request_with(Sampling(repetition_penalty=1.3), prompt, output), output)
    torch.testing.assert_close(ours, theirs)
    theirs = hf.MinNewTokensLengthLogitsProcessor(len(prompt), 3, [EOS], device="cpu")(ids, logits[None].clone())[0]
    ours = adjust(logits.clone(), request_with(Sampling(min_new_tokens=3), prompt, output), output)
    torch.testing.assert_close(ours, theirs)
    assert ours[EOS] == -math.inf
    done = adjust(logits.clone(), request_with(Sampling(min_new_tokens=2), prompt, output), output)
    assert torch.equal(done, logits)
    theirs = hf.SequenceBiasLogitsProcessor([[[4], 2.5], [[6], -1.0]])(ids, logits[None].clone())[0]
    ours = adjust(logits.clone(), request_with(Sampling(logit_bias={4: 2.5, 6: -1.0}), prompt, output), output)
    torch.testing.assert_close(ours, theirs)


# --- Noise and frequencies --------------------------------------------------------------------------------------------


def largest_gap_allowed(num_draws: int) -> float:
    """Dvoretzky-Kiefer-Wolfowitz: distance of an empirical from its true distribution function, beyond which `FALSE_ALARM`."""
    return math.sqrt(math.log(2 / FALSE_ALARM) / (2 * num_draws))


@pytest.mark.parametrize("varied", ["seed", "sample", "position"])
def test_noise_is_uniform(varied: str) -> None:
    """In each of its three keys alone, neighbours included."""
    keys = {"seed": 12345, "sample": 2, "position": 7}
    draws = np.array([uniform_noise(**{**keys, varied: value}) for value in range(40_000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    expected = (np.arange(len(draws)) + 1) / len(draws)
    assert np.abs(np.sort(draws) - expected).max() < largest_gap_allowed(len(draws))
    for lag in (1, 2, 7):  # neighbours are independent: their sum has the triangular distribution
        sums = np.sort(draws[:-lag:2] + draws[lag::2]) if lag % 2 else np.sort((draws[:-lag] + draws[lag:])[::4])
        triangular = np.where(sums < 1, sums**2 / 2, 1 - (2 - sums) ** 2 / 2)
        expected = (np.arange(len(sums)) + 1) / len(sums)
        assert np.abs(triangular - expected).max() < largest_gap_allowed(len(sums))


def test_noise_differs_between_keys() -> None:
    draws = {uniform_noise(seed, which, at) for seed in (0, 1, 2**64 - 1) for which in range(8) for at in range(64)}
    assert len(draws) == 3 * 8 * 64


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 1.7, "top_k": 6},
        {"temperature": 0.8, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1, "top_p": 0.95, "top_k": 20},
    ],
)
def test_frequencies_approach_the_distribution(fields: dict[str, Any]) -> None:
    """Draws by position, then by seed: a correct sampler fails with probability 1e-6 (`FALSE_ALARM`)."""
    logits, num_draws = random_logits(5), 6000
    expected = np.cumsum(probabilities_slowly(logits.tolist(), Sampling(**fields)))
    seeds = [request_with(Sampling(**fields, seed=seed), [1], []) for seed in range(num_draws // 2)]
    samples = [request_with(Sampling(**fields), [1], [], which=which) for which in range(num_draws // 2)]
    for requests in (seeds, samples):
        drawn = Counter(choose(logits, request) for request in requests)
        frequencies = np.array([drawn[token] for token in range(VOCAB)]) / len(requests)
        assert np.abs(np.cumsum(frequencies) - expected).max() < largest_gap_allowed(len(requests))
        assert all(expected[token] - (expected[token - 1] if token else 0) > 0 for token in drawn)


def test_a_nucleus_wider_than_the_prefix() -> None:
    """Flat logits over a large vocabulary: top-p needs more tokens than are looked at first."""
    vocab = 4 * TOP_P_PREFIX
    logits = random_logits(3, vocab) * 0.01
    sampling = Sampling(temperature=1.0, top_p=0.9)
    kept = {token for token, share in enumerate(probabilities_slowly(logits.tolist(), sampling)) if share > 0}
    assert len(kept) > 3 * TOP_P_PREFIX
    drawn = {choose(logits, request_with(replace(sampling, seed=seed), [], [])) for seed in range(1500)}
    assert drawn <= kept
    assert len(drawn) > 1000


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45, 5e-324])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    for seed in range(20):
        logits = random_logits(seed)
        assert choose(logits, request_with(Sampling(temperature=temperature, seed=seed), [], [])) == int(
            logits.argmax()
        )


def test_huge_temperature_is_uniform() -> None:
    drawn = Counter(
        choose(random_logits(0), request_with(Sampling(temperature=1e30, seed=s), [], [])) for s in range(4000)
    )
    frequencies = np.cumsum([drawn[token] / 4000 for token in range(VOCAB)])
    assert np.abs(frequencies - np.arange(1, VOCAB + 1) / VOCAB).max() < largest_gap_allowed(4000)


# --- What fails, and what a batch may hold ----------------------------------------------------------------------------


def test_a_mixed_batch() -> None:
    """Greedy, drawn, penalised and failing rows in one call: each as if alone, and the failing ones named."""
    rng = random.Random("mixed")
    rows, requests = [], []
    for number in range(30):
        rows.append(random_logits(number))
        temperature = rng.choice([0.0, 1.0])
        penalty = rng.choice([1.0, 1.5])
        bias = {int(rows[-1].argmax()): -math.inf} if number % 7 == 0 else {}
        sampling = Sampling(
            temperature=temperature, repetition_penalty=penalty, logit_bias=bias, seed=number, logprobs=2
        )
        requests.append(request_with(sampling, [number % VOCAB], [2, number % 5]))
    rows[4][17], rows[11][0] = math.nan, math.inf
    rows[13][:] = -math.inf
    together = sample(torch.stack(rows), requests)
    for number, (row, request, got) in enumerate(zip(rows, requests, together, strict=True)):
        (alone,) = sample(row[None], [request])
        if number in (4, 11, 13):
            assert isinstance(got, RequestFailed)
            assert isinstance(alone, RequestFailed)
            assert "logits are not finite (prompt 0, after 2 new tokens)" in str(got)
        else:
            assert got == alone


def test_minus_infinity_is_a_logit_like_others() -> None:
    logits = random_logits(2)
    logits[[0, 5, 9]] = -math.inf
    for seed in range(300):
        assert choose(logits, request_with(Sampling(temperature=3.0, seed=seed), [], [])) not in (0, 5, 9)


def test_nothing_left_to_choose_from() -> None:
    everything = dict.fromkeys(range(VOCAB), -math.inf)
    for temperature in (0.0, 1.0):
        (got,) = sample(
            random_logits(0)[None], [request_with(Sampling(temperature=temperature, logit_bias=everything), [], [])]
        )
        assert isinstance(got, RequestFailed)
        assert "left no finite logit to choose from" in str(got)


def test_top_logprobs() -> None:
    logits = random_logits(8)
    expected = logits.log_softmax(-1)
    got = token_logprobs(logits, 6, 4)
    assert got.logprob == pytest.approx(float(expected[6]))
    assert list(got.top) == expected.argsort(descending=True)[:4].tolist()
    assert list(got.top.values()) == pytest.approx(expected.sort(descending=True).values[:4].tolist())
    assert token_logprobs(logits, 6, 0).top == {}
    assert len(token_logprobs(logits, 6, 999).top) == VOCAB
