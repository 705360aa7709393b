"""Log-probabilities of prompts, chunk by chunk and in company; log-probabilities as they stream; who enters first."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from shoal import Engine, Sampling, SkipDecode
from shoal.evaluate.continuations import forced
from shoal.models.executor import Executor

Make = Callable[..., Engine]
SCORED = Sampling(max_new_tokens=3, ignore_eos=True, prompt_logprobs=2, logprobs=1)


def prompt_of(length: int) -> list[int]:
    return [random.Random(length).randrange(256) for _ in range(length)]


@pytest.mark.parametrize("max_pass_tokens", [7, 2048])
def test_prompts_are_scored_as_if_they_were_written(make_engine: Make, max_pass_tokens: int) -> None:
    """Every token's log-probability is the one it would have if the model had been made to emit it; chunks change nothing."""
    prompts = [prompt_of(length) for length in (1, 2, 40, 250)]  # the last needs two passes even if all of it would fit
    alone = make_engine()
    written = [
        alone.generate([prompt[:1]], replace(forced(prompt[:1], prompt[1:]), logprobs=2))[0].logprobs
        if prompt[1:]
        else ()
        for prompt in prompts
    ]
    engine = make_engine(max_batch=4, max_pass_tokens=max_pass_tokens)
    plans = [SkipDecode(depth=0.5), None, None, SkipDecode(depth=0.5)]
    for generation, expected, prompt in zip(engine.generate(prompts, SCORED, plans), written, prompts, strict=True):
        got = generation.prompt_logprobs
        assert got is not None
        assert expected is not None
        assert len(got) == len(prompt) - 1
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert ours.top == pytest.approx(theirs.top, abs=1e-5)


def test_scoring_changes_no_token(make_engine: Make) -> None:
    """Beside requests that are not scored and ones that draft."""
    engine = make_engine(max_batch=6, max_pass_tokens=64)
    prompts = [prompt_of(length) for length in (90, 5, 60, 33, 2, 11)]
    plain = Sampling(max_new_tokens=12, temperature=1.0, ignore_eos=True)
    scored = [replace(plain, prompt_logprobs=0) if index % 2 else plain for index in range(6)]
    drafts = ["suffix", None, "self", "ngram", None, "suffix"]
    expected, got = engine.generate(prompts, plain), engine.generate(prompts, scored, draft=drafts)
    assert [g.token_ids for g in got] == [g.token_ids for g in expected]
    assert [g.prompt_logprobs is None for g in got] == [True, False] * 3
    assert engine.runner.cache.blocks_in_use == 0


def test_chunks_carry_log_probabilities(make_engine: Make) -> None:
    """Together they are the generation's, with drafts of several tokens at once, too."""
    for draft in (None, "suffix"):
        chunks = list(make_engine().stream(prompt_of(20) * 3, Sampling(max_new_tokens=40, logprobs=1), draft=draft))
        generation = chunks[-1].generation
        assert generation is not None
        assert tuple(one for chunk in chunks for one in chunk.logprobs or ()) == generation.logprobs
        assert all(len(chunk.logprobs or ()) == len(chunk.token_ids) for chunk in chunks)


def test_lower_priority_numbers_enter_first(decoder: Executor) -> None:
    """Of equal ones whoever came first; a running request is not put back."""
    engine = Engine(decoder, max_batch=1, cache_gib=0.1)
    names: dict[int, str] = {}
    for name, priority in (("running", 9.0), ("b", 1.0), ("c", 1.0), ("last", 2.0), ("a", 0.5)):
        (request,) = engine.prepare([1, 2], Sampling(max_new_tokens=3, ignore_eos=True))
        request.priority, names[request.request_id] = priority, name
        engine.submit([request])
        if name == "running":
            engine.step()
    ended = []
    while engine.has_work:
        ended += [names[chunk.request_id] for chunk in engine.step() if chunk.generation is not None]
    assert ended == ["running", "a", "b", "c", "last"]
