"""The entropy trace against a slow one in float64: under plans, in company, with drafts, in chunks, whatever sampling changes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import reference
from random_plans import random_plan, specification
from shoal import Dense, Engine, Generation, Sampling, SkipDecode
from shoal.engine.entropy import SEGMENT, EntropyTrace, TopK, token_uncertainty
from shoal.engine.intake import Plan
from shoal.errors import InvalidInput
from ways import WAYS, decoder_of

Make = Callable[..., Engine]


def trace_of(generation: Generation) -> EntropyTrace:
    assert generation.trace is not None
    assert len(generation.trace.entropies) == len(generation.trace.nlls) == len(generation.token_ids)
    return generation.trace


def test_the_example_of_the_docstring() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    ((two, nll),) = token_uncertainty(logits, [2], 2)
    ((full, _),) = token_uncertainty(logits, [2], "full")
    assert two == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(4))
    assert full == pytest.approx(1.75 * math.log(2))
    assert nll == pytest.approx(math.log(8))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from([1, 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 25 * SEGMENT, 25 * SEGMENT + 17]),
    top_k=st.sampled_from([1, 2, 20, 10**6, "full"]),
    scale=st.sampled_from([0.0, 1.0, 8.0, 300.0]),
    banned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_equal_the_reference(rows: int, vocab: int, top_k: TopK, scale: float, banned: bool, seed: int) -> None:
    """Every size of vocabulary against segments, logits that are equal, far apart, or minus infinity."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    if banned:
        logits[:, 1::3] = -math.inf
    tokens = [3 * random.Random(f"{seed} {row}").randrange((vocab + 2) // 3) for row in range(rows)]
    k = vocab if top_k == "full" else top_k
    for row, token, (entropy, nll) in zip(logits, tokens, token_uncertainty(logits, tokens, top_k), strict=True):
        expected = reference.uncertainty(row, token, k)
        assert entropy == pytest.approx(expected[0], abs=2e-5, rel=1e-5)
        assert nll == pytest.approx(expected[1], abs=2e-5, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_k", [20, "full"])
def test_traces_equal_the_reference(way: str, top_k: TopK, checkpoint: Path, model: PreTrainedModel) -> None:
    """Against transformers' own passes and sums in float64; chunks, plans of all kinds, more requests than slots."""
    rng = random.Random("traces")
    engine = Engine(decoder_of(way, checkpoint), max_batch=3, max_pass_tokens=9, cache_gib=0.25)
    num_layers = engine.shape.num_layers
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 5, 16, 21, 30)]
    plans: list[Plan] = [
        Dense(),
        SkipDecode(depth=0.5),
        *(random_plan(rng, num_layers, prompt_tokens=len(prompt), max_new_tokens=8) for prompt in prompts[2:]),
    ]
    sampling = Sampling(max_new_tokens=8, ignore_eos=True, entropy_top_k=top_k)
    for prompt, plan, generation in zip(prompts, plans, engine.generate(prompts, sampling, plans), strict=True):
        trace = trace_of(generation)
        assert trace.top_k == top_k
        made = plan if not hasattr(plan, "plan") else generation.plan
        schedule, prompt_layers = specification(made, num_layers, len(prompt))
        token_ids = [*prompt, *generation.token_ids[:-1]]
        ran = reference.ran_table(num_layers, len(prompt), len(token_ids), schedule, prompt_layers)
        rows = reference.logits(model, token_ids, ran)[len(prompt) - 1 :]
        k = rows.shape[1] if top_k == "full" else top_k
        for row, token, entropy, nll in zip(rows, generation.token_ids, trace.entropies, trace.nlls, strict=True):
            assert (entropy, nll) == pytest.approx(reference.uncertainty(row, token, k), abs=1e-4)


def ban_most(token_ids: list[int], logits: Tensor) -> Tensor:
    """A processor that leaves odd tokens alone and changes their logits."""
    logits = logits / 3
    logits[::2] = -math.inf
    return logits


def test_what_sampling_changes_is_not_in_the_trace(make_engine: Make) -> None:
    """Temperature, penalties, bias, cuts, a minimum length, processors: the numbers are of the logits as the model gave them."""
    changes = (
        {"temperature": 1.5, "seed": 3},
        {"temperature": 0.7, "top_p": 0.3, "top_k": 5},
        {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 2.0},
        {"logit_bias": {7: 9.0, 11: -math.inf}},
        {"min_new_tokens": 10},
        {"processor": ban_most, "temperature": 1.0},
    )
    prompt = list(range(40, 52))
    samplings = [Sampling(max_new_tokens=10, entropy_top_k=20, logprobs=20, **one) for one in changes]  # type: ignore[arg-type]
    for generation in make_engine().generate([prompt] * len(samplings), samplings):
        assert generation.logprobs is not None
        trace = trace_of(generation)
        for entropy, nll, one in zip(trace.entropies, trace.nlls, generation.logprobs, strict=True):
            assert nll == pytest.approx(-one.logprob, abs=1e-5)
            assert entropy == pytest.approx(-sum(math.exp(value) * value for value in one.top.values()), abs=1e-5)


def unlike(one: Sequence[float], other: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("draft", ["suffix", "self", "trigram"])
def test_neither_drafts_nor_company_change_a_trace(way: str, draft: str, checkpoint: Path) -> None:
    """Token by token what it is without drafts, alone; to the last bit with the kernel."""
    decoder = decoder_of(way, checkpoint)
    rng = random.Random(f"{way} {draft}")
    samplings = [
        Sampling(
            max_new_tokens=30, ignore_eos=True, temperature=rng.choice([0.0, 0.8]), seed=number,
            repetition_penalty=rng.choice([1.0, 1.3]), entropy_top_k=rng.choice([20, 20, 3, None]), n=rng.choice([1, 2]),
        )
        for number in range(10)
    ]  # fmt: skip
    prompts = [[rng.randrange(256) for _ in range(rng.choice([2, 9, 20]))] * 2 for _ in samplings]
    engine = Engine(decoder, max_batch=6, max_pass_tokens=64, cache_gib=0.25)
    together = engine.generate(prompts, samplings, draft=draft)
    assert sum(one.drafting.drafted for one in together if one.drafting) > 0
    alone = [
        one
        for prompt, sampling in zip(prompts, samplings, strict=True)
        for one in Engine(decoder, max_batch=1, cache_gib=0.25).generate(prompt, sampling)
    ]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.trace is None) == (theirs.trace is None)
        if ours.trace is not None and theirs.trace is not None:
            close = 0.0 if way == "native" else 1e-4
            assert unlike(ours.trace.entropies, theirs.trace.entropies) <= close
            assert unlike(ours.trace.nlls, theirs.trace.nlls) <= close


def test_a_trace_changes_no_token(make_engine: Make) -> None:
    plain = [Sampling(max_new_tokens=20, temperature=t, seed=5) for t in (0.0, 1.0, 1.0)]
    prompts = [[1, 2, 3], [4, 5, 6], [4, 5, 6]]
    expected = make_engine().generate(prompts, plain)
    got = make_engine().generate(prompts, [replace(one, entropy_top_k=20) for one in plain])
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    assert all(one.trace is None for one in expected)


def test_sums_per_response() -> None:
    trace = EntropyTrace(top_k=20, entropies=(0.5, 1.5), nlls=(0.25, 3.0))
    assert trace.mean_entropy == 1.0
    assert trace.g_nll == 3.25
    assert math.isnan(EntropyTrace(top_k=20, entropies=(), nlls=()).mean_entropy)


def test_cancelled_before_its_first_token(make_engine: Make) -> None:
    (generation,) = make_engine().generate([1, 2, 3], Sampling(entropy_top_k=20), timeout_s=0)
    assert generation.finish_reason == "timeout"
    assert trace_of(generation).g_nll == 0


@pytest.mark.parametrize("top_k", [0, -1, "all", 2.5, True])
def test_what_is_no_top_k(top_k: object) -> None:
    with pytest.raises(InvalidInput, match="entropy_top_k must be 1 or more, or 'full'"):
        Sampling(entropy_top_k=top_k)  # type: ignore[arg-type]
