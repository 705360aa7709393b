"""Entropy Adaptive Decoding: its ends are the two models, and a model that catches up is as if it had read along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from families import save, tiny_model
from shoal import Engine, Sampling
from shoal.baselines.entropy_adaptive import AdaptiveConfig, Reader, adaptive_decode, entropy_bits
from shoal.engine.text import TextStream
from shoal.errors import InvalidInput
from shoal.models.checkpoint import load_checkpoint
from shoal.models.executor import Executor, make_decoder

PROMPT = [3, 1, 4, 1, 5]
NEVER, ALWAYS = (
    AdaptiveConfig(threshold_bits=float("inf"), max_new_tokens=40),
    AdaptiveConfig(threshold_bits=-1, max_new_tokens=40),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Executor]]:
    """A small one and a large one."""
    made = []
    for name, options in (("small", {"num_hidden_layers": 2, "seed": 1}), ("large", {"num_hidden_layers": 5})):
        path = save(tiny_model("llama", **options), tmp_path_factory.mktemp(name))
        made.append((path, make_decoder(*load_checkpoint(path))))
    return made


def greedy(path: Path, prompt: list[int]) -> tuple[int, ...]:
    (done,) = Engine.from_pretrained(path, cache_gib=0.1).generate(prompt, Sampling(max_new_tokens=40))
    return done.token_ids


def test_the_ends(models: list[tuple[Path, Executor]]) -> None:
    (small_path, small), (large_path, large) = models
    alone = adaptive_decode(small, large, PROMPT, NEVER)
    assert alone.token_ids == greedy(small_path, PROMPT)
    assert not any(alone.by_large)
    taken_over = adaptive_decode(small, large, PROMPT, ALWAYS)
    first = greedy(small_path, PROMPT)[0]
    assert taken_over.by_large == (False, *[True] * (len(taken_over.token_ids) - 1))
    assert taken_over.token_ids[1:] == greedy(large_path, [*PROMPT, first])[: len(taken_over.token_ids) - 1]
    assert taken_over.flops > alone.flops


@pytest.mark.parametrize(("window", "hold"), [(1, 1), (5, 1), (3, 4)])
def test_caught_up_is_as_read(models: list[tuple[Path, Executor]], window: int, hold: int) -> None:
    """Each token is what its writer says of the text before it, read anew; and the rule decides who writes."""
    (_, small), (_, large) = models
    whole = adaptive_decode(small, large, PROMPT, replace(NEVER, threshold_bits=1e9))
    middle = sorted(whole.entropies)[len(whole.entropies) // 2]
    config = AdaptiveConfig(threshold_bits=middle, window=window, hold=hold, max_new_tokens=40)
    got = adaptive_decode(small, large, PROMPT, config)
    assert any(got.by_large)
    assert not all(got.by_large)
    held = 0
    for at, (token, by_large) in enumerate(zip(got.token_ids, got.by_large, strict=True)):
        text = [*PROMPT, *got.token_ids[:at]]
        logits = Reader(large if by_large else small, 64).read(text)
        assert int(logits.argmax()) == token
        assert entropy_bits(logits) == pytest.approx(got.entropies[at], abs=1e-4)
        held = held + 1 if at and got.by_large[at - 1] == by_large else 1
        if at + 1 < len(got.token_ids):
            recent = got.entropies[max(0, at + 1 - window) : at + 1]
            wanted = sum(recent) / len(recent) > middle
            assert got.by_large[at + 1] == (wanted if held >= hold else by_large)


def test_a_stop_string_ends_the_text(models: list[tuple[Path, Executor]]) -> None:
    """As it does in the engine, which writes the same text at this threshold."""
    (path, small), (_, large) = models
    engine = Engine.from_pretrained(path, cache_gib=0.1)
    (whole,) = engine.generate(PROMPT, Sampling(max_new_tokens=40))
    stop = whole.text[8:10]
    (expected,) = engine.generate(PROMPT, Sampling(max_new_tokens=40, stop=(stop,)))
    stream = TextStream(engine.tokenizer, (stop,), streaming=False)
    got = adaptive_decode(small, large, PROMPT, NEVER, stream=stream)
    stream.finish()
    assert (got.token_ids, stream.text) == (expected.token_ids, expected.text)
    assert len(got.token_ids) < len(whole.token_ids)


def test_refused(models: list[tuple[Path, Executor]], tmp_path: Path) -> None:
    (_, small), (_, large) = models
    with pytest.raises(InvalidInput, match="window must be 1 or more"):
        AdaptiveConfig(threshold_bits=1, window=0)
    with pytest.raises(InvalidInput, match="the prompt is empty"):
        adaptive_decode(small, large, [], NEVER)
    with pytest.raises(InvalidInput, match="exceed 256 positions"):
        adaptive_decode(small, large, PROMPT, replace(NEVER, max_new_tokens=1000))
    other = make_decoder(*load_checkpoint(save(tiny_model("llama", vocab_size=300), tmp_path)))
    with pytest.raises(InvalidInput, match="must share a tokenizer"):
        adaptive_decode(other, large, PROMPT, NEVER)


def test_entropy() -> None:
    assert entropy_bits(torch.tensor([0.0, -float("inf")])) == 0
    assert entropy_bits(torch.zeros(4)) == pytest.approx(2)
