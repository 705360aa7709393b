"""Exactness on a tiny random model: what it finds where all is well, and that it finds what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from families import save, tiny_model
from shoal import Engine, Generation, Sampling, SkipDecode
from shoal.depth.plan import DepthPlan
from shoal.engine.request import TokenLogprobs
from shoal.evaluate.exactness import (
    TOLERANCE_NATS,
    Exactness,
    common,
    difference,
    join_one_by_one,
    measure_exactness,
    near_tie,
    uncached_difference,
)

PROMPTS = [f"name[The {word}]" for word in ("Mill", "Vaults", "Blue Spice", "Eagle", "Punter", "Cricketers")]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("opt", num_hidden_layers=6), tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def generation(checkpoint: Path) -> Generation:
    engine = Engine.from_pretrained(checkpoint, dtype="float32")
    plan = SkipDecode(depth=1 / 2, horizon=8)
    return engine.generate(PROMPTS[0], Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2), plan)[0]


def test_the_engine_is_exact(checkpoint: Path):
    found = measure_exactness(checkpoint, PROMPTS, depths=(1 / 2, 1 / 3), max_new_tokens=NEW_TOKENS, device="cpu")
    assert found.exact
    assert found.num_parted == found.num_near_ties == 0
    assert found.num_requests == len(PROMPTS)
    assert found.num_tokens > len(PROMPTS)
    assert found.layers_skipped > 0
    assert found.company_nats < 1e-5
    assert 0 < found.uncached_nats < 1e-4


def test_requests_join_one_pass_after_another(checkpoint: Path):
    engine = Engine.from_pretrained(checkpoint, dtype="float32")
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    plans = [SkipDecode(depth=depth, horizon=8) for depth in (1 / 2, 1 / 3, 2 / 3)]
    together, most_clocks = join_one_by_one(engine, PROMPTS[:3], plans, sampling)
    assert most_clocks == 3
    assert engine.stats.decode_passes == NEW_TOKENS + 1  # the last of three joined two passes late
    alone = [engine.generate(prompt, sampling, plan)[0] for prompt, plan in zip(PROMPTS[:3], plans, strict=True)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


@pytest.mark.parametrize("layer", [2, 3, 4])
def test_a_layer_that_runs_for_one_token_too_many_is_found(checkpoint: Path, generation: Generation, layer: int):
    """The smallest error that a cache could have: read without one, the same completion runs one layer one token longer."""
    prompt = [list(Engine.from_pretrained(checkpoint).tokenizer(PROMPTS[0]).input_ids)]
    assert uncached_difference(checkpoint, prompt, [generation], "cpu") < 1e-4
    cutoffs = list(generation.plan.cutoffs)
    cutoffs[layer] += 1
    wrong = replace(generation, plan=DepthPlan(tuple(cutoffs)))
    assert uncached_difference(checkpoint, prompt, [wrong], "cpu") > 10 * TOLERANCE_NATS


def with_tokens(generation: Generation, tokens: tuple[int, ...], tops: list[dict[int, float]]) -> Generation:
    """A generation that emitted `tokens`, the two most probable ones at each place being `tops`."""
    steps = tuple(TokenLogprobs(logprob=top[token], top=top) for token, top in zip(tokens, tops, strict=True))
    return replace(generation, token_ids=tokens, logprobs=steps)


def test_near_ties(generation: Generation):
    """Two runs that part at their second token, whose log-probabilities differ by 0.001 before."""
    one = with_tokens(generation, (5, 6), [{5: -0.1, 9: -3.0}, {6: -0.700, 7: -0.703}])
    other = with_tokens(generation, (5, 7), [{5: -0.101, 9: -3.0}, {7: -0.700, 6: -0.701}])
    assert common(one, other) == 1
    assert difference(one, other) == pytest.approx(0.001)
    assert near_tie(one, other, 0.001)
    assert not near_tie(one, other, 0.0005)  # 0.003 apart, and a near-tie is less than 4 times the difference
    stranger = with_tokens(generation, (5, 8), [{5: -0.1, 9: -3.0}, {8: -0.700, 6: -0.701}])
    assert not near_tie(one, stranger, 0.001)
    longer = with_tokens(generation, (5, 6, 7), [{5: -0.1}, {6: -0.7}, {7: -0.1}])
    assert not near_tie(one, longer, 0.001)


def test_what_counts_as_exact():
    found = Exactness(
        num_requests=4, num_tokens=80, layers_skipped=100, most_clocks=4, num_parted=1, num_near_ties=1,
        company_nats=1e-6, uncached_nats=1e-5,
    )  # fmt: skip
    assert found.exact
    assert not replace(found, num_near_ties=0).exact
    assert not replace(found, uncached_nats=2 * TOLERANCE_NATS).exact
    assert not replace(found, company_nats=2 * TOLERANCE_NATS).exact
