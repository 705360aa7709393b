"""How much a model has to skip: on a model that could skip everything, on random ones, and on bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save, tiny_model
from shoal import Engine, Sampling
from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import DepthPlan
from shoal.depth.policies import POLICIES, policy_at
from shoal.errors import InvalidInput, InvalidPlan, InvalidPrompt
from shoal.evaluate.bootstrap import Score
from shoal.evaluate.layer_change import LayerChange
from shoal.evaluate.predictions import predict
from shoal.evaluate.suits import Outcome, Suitability, SuitsConfig, measure, plans_at, spread, suits, write_completions
from shoal.evaluate.suits_advice import advice
from shoal.train.data import Example
from shoal.train.depth_context import decoder_layers

EXAMPLES = [Example([5 + i, 9, 30 + i], [(7 * i + 3 * k) % 250 for k in range(2 + i % 9)] + [256]) for i in range(12)]
DEPTHS = (0.9, 2 / 3, 1 / 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT of 6 layers."""
    return save(tiny_model("opt", num_hidden_layers=6), tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def found() -> Suitability:
    """What is measured on a random OPT of 6 layers."""
    return measure(tiny_model("opt", num_hidden_layers=6), EXAMPLES, DEPTHS, model="random")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_layers_that_do_nothing_can_all_be_skipped() -> None:
    """Only layer 0 of 6 does something, and every policy keeps it."""
    network = tiny_model("opt", num_hidden_layers=6)
    with torch.no_grad():
        for layer in decoder_layers(network)[1:]:
            for product in (layer.self_attn.out_proj, layer.fc2):
                product.weight.zero_()
                product.bias.zero_()
    idle = measure(network, EXAMPLES, DEPTHS, model="idle")
    assert {outcome.policy for outcome in idle.outcomes} == set(POLICIES)
    for outcome in idle.outcomes:
        assert outcome.agreement == Score(1, 1, 1)
        assert outcome.loss_increase.value == pytest.approx(0, abs=1e-6)
    assert advice(idle).startswith("idle has much to skip as it is: at ")
    assert "5 of 6 layers (1-5) change" in advice(idle)


def test_a_random_model_against_counting_by_hand(found: Suitability) -> None:
    network = tiny_model("opt", num_hidden_layers=6)
    dense = predict(network, EXAMPLES, DepthPlan((2**31 - 1,) * 6))
    lengths = sorted(len(example.completion) for example in EXAMPLES)
    assert found.horizon == round((lengths[5] + lengths[6]) / 2)
    assert found.num_tokens == sum(lengths) - 12
    for outcome in found.outcomes:
        policy = policy_at(outcome.policy, outcome.depth)
        plan = policy.plan(6, prompt_tokens=0, max_new_tokens=found.horizon)
        same = total = layers = 0
        increase = 0.0
        for example, ours, full in zip(EXAMPLES, predict(network, EXAMPLES, plan), dense, strict=True):
            for clock in range(len(example.completion) - 1):
                same += ours.tokens[clock + 1] == full.tokens[clock + 1]
                increase += float(ours.losses[clock + 1] - full.losses[clock + 1])
                layers += plan.depth(clock)
                total += 1
        assert outcome.agreement.value == pytest.approx(same / total)
        assert outcome.loss_increase.value == pytest.approx(increase / total, abs=1e-5)
        assert outcome.realised_depth == pytest.approx(layers / total / 6)
        assert outcome.agreement.low <= outcome.agreement.value <= outcome.agreement.high
    assert "leaves little to skip without tuning" in advice(found), advice(found)


def test_order_and_refusals(found: Suitability) -> None:
    for depth in DEPTHS:
        agreements = list(found.agreement(depth).values())
        assert agreements == sorted(agreements, reverse=True)
    assert [outcome.depth for outcome in found.outcomes] == sorted((o.depth for o in found.outcomes), reverse=True)
    assert len(found.outcomes) + len(found.refused) == len(DEPTHS) * len(POLICIES)
    plans, refused = plans_at((1 / 2, 1 / 6), 6, horizon=8, tuned=None)
    assert {policy for policy, depth in plans if depth == 1 / 2} == set(POLICIES)
    assert "choose between" in refused[0].reason
    assert {one.depth for one in refused} == {1 / 6}


def test_a_tuned_checkpoints_horizon_and_warmup_layers_are_used() -> None:
    tuned = TunedDepth(horizon=20, warmup_layers=2, depths=(1.0, 0.5))
    plans, _ = plans_at((2 / 3,), 6, horizon=tuned.horizon, tuned=tuned)
    assert plans["skipdecode", 2 / 3] == policy_at("skipdecode", 2 / 3, horizon=20, warmup_layers=2).plan(
        6, prompt_tokens=0, max_new_tokens=99
    )
    again = measure(tiny_model("opt", num_hidden_layers=6), EXAMPLES, DEPTHS, model="m", tuned=tuned)
    assert again.horizon == 20
    assert advice(again).endswith(
        "It was tuned with skipdecode for depths 1, 0.5, so these are not numbers of an untuned model."
    )


def test_realised_depth_is_what_the_engine_counts(checkpoint: Path, tmp_path: Path, found: Suitability) -> None:
    """Completions that the model wrote: the engine's ledger under the same plan, for completions of the same lengths."""
    data = write(tmp_path / "prompts.jsonl", [{"prompt": f"prompt {i}"} for i in range(5)])
    own = suits(str(checkpoint), data, SuitsConfig(depths=(2 / 3,), max_new_tokens=9))
    engine = Engine.from_pretrained(checkpoint, dtype="float32")
    lengths = [
        len(done.token_ids) for done in engine.generate([f"prompt {i}" for i in range(5)], Sampling(max_new_tokens=9))
    ]
    assert own.num_tokens == sum(lengths) - 5
    for outcome in own.outcomes:
        plan = policy_at(outcome.policy, outcome.depth).plan(6, prompt_tokens=0, max_new_tokens=own.horizon)
        samplings = [Sampling(max_new_tokens=length, ignore_eos=True) for length in lengths]
        ledgers = [done.ledger for done in engine.generate([f"prompt {i}" for i in range(5)], samplings, plan)]
        ran, full = (sum(getattr(one, f"{name}decode_layer_tokens") for one in ledgers) for name in ("", "dense_"))
        assert outcome.realised_depth == pytest.approx(ran / full)


def test_without_completions_the_model_writes_them(checkpoint: Path, tmp_path: Path) -> None:
    """At full depth each of its tokens is its own choice."""
    data = write(tmp_path / "prompts.jsonl", [{"prompt": f"prompt {i}"} for i in range(5)])
    config = SuitsConfig(max_examples=3, max_new_tokens=8)
    rows = [(i, {"prompt": f"prompt {i}"}) for i in range(5)]
    written = write_completions(checkpoint, data, rows, config)
    dense = predict(tiny_model("opt", num_hidden_layers=6), written, DepthPlan((2**31 - 1,) * 6))
    assert [one.tokens.tolist() for one in dense] == [example.completion for example in written]
    own = suits(str(checkpoint), data, config)
    assert own.self_written
    assert own.num_examples == 3
    assert own.num_tokens <= 3 * 7


def test_given_completions_low_precision_and_json(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}", "completion": f"completion {i * i}"} for i in range(9)]
    data = write(tmp_path / "pairs.jsonl", rows)
    calls = []
    config = SuitsConfig(depths=(0.5, 2 / 3, 0.5), max_examples=4)
    full = suits(str(checkpoint), data, config, report=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == len(calls)
    assert not full.self_written
    assert full.num_examples == 4
    low = suits(str(checkpoint), data, replace(config, dtype="bfloat16"))
    assert low.dense_loss == pytest.approx(full.dense_loss, rel=0.05)
    loaded = json.loads(json.dumps(full.to_dict(), allow_nan=False))
    assert [one["policy"] for one in loaded["outcomes"]] == [one.policy for one in full.outcomes]
    assert len(loaded["layers"]) == loaded["num_layers"] == 6


def test_spread() -> None:
    assert spread("abcdefg", 3) == ["a", "c", "e"]
    assert spread("abc", 3) == spread("abc", 9) == ["a", "b", "c"]


GOOD = {"prompt": "a", "completion": "some text"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no examples"),
        ([GOOD, {"prompt": "b"}], "line 2: field 'completion' is missing, but line 1 has it"),
        ([{"completion": "b"}], "line 1: field 'prompt' is missing; the line has 'completion'"),
        ([{**GOOD, "answer": "b"}], "line 1: unknown field 'answer'"),
        ([{"prompt": "a", "completion": ""}], "'completion' must be a non-empty string"),
        ([{"prompt": "a" * 200, "completion": "b" * 100}], "line 1: 301 tokens, but the model has 256 positions"),
    ],
)
def test_bad_data(checkpoint: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        suits(str(checkpoint), write(tmp_path / "data.jsonl", rows), SuitsConfig())


def test_a_prompt_too_long_to_be_continued(checkpoint: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "a" * 200}])
    with pytest.raises(InvalidPrompt, match=r"line 2: 200 prompt tokens \+ 64 new tokens exceed"):
        suits(str(checkpoint), data, SuitsConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (0.5, 1.0)}, "got 1.0"),
        ({"depths": ()}, "got none"),
        ({"max_examples": 0}, "max_examples must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        SuitsConfig(**settings)


def test_a_device_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    for rows in ([GOOD], [{"prompt": "a"}]):
        with pytest.raises(InvalidInput, match="device 'cuda:77' cannot be used"):
            suits(str(checkpoint), write(tmp_path / "data.jsonl", rows), SuitsConfig(device="cuda:77"))


def test_nothing_to_measure() -> None:
    with pytest.raises(InvalidInput, match="every completion is a single token"):
        measure(tiny_model("opt"), [Example([1], [2])], DEPTHS)
    for num_layers in (1, 2):
        with pytest.raises(InvalidPlan, match=f"no policy can skip anything on {num_layers} layers at these depths"):
            measure(tiny_model("opt", num_hidden_layers=num_layers), EXAMPLES, DEPTHS)


def outcome(policy: str, depth: float, agreement: float, loss_increase: float) -> Outcome:
    return Outcome(
        policy=policy,
        depth=depth,
        realised_depth=float(Fraction(depth).limit_denominator(10)),
        agreement=Score(agreement, agreement, agreement),
        loss_increase=Score(loss_increase, loss_increase, loss_increase),
    )


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        (
            [outcome("unified", 0.9, 0.99, 0.01), outcome("d3", 0.9, 0.7, 1), outcome("d3", 0.5, 0.92, 0.05)],
            "m has much to skip as it is: at 50% of its layers (d3, depth 0.5) it agrees with itself on 92% of tokens and its loss "
            "changes by +0.05 nats. ",
        ),
        (
            [outcome("unified", 0.9, 0.97, 0.0), outcome("unified", 0.5, 0.89, -0.03)],
            "m has a little to skip as it is: at 90% of its layers (unified, depth 0.9) it agrees with itself on 97% of tokens and "
            "its loss changes by +0.00 nats; tune it to go further. ",
        ),
        (
            [outcome("d3", 0.9, 0.99, 0.06), outcome("unified", 0.9, 0.6, -1.5), outcome("d3", 0.5, 0.02, 7.0)],
            "m leaves little to skip without tuning: at 90% of its layers (d3, depth 0.9) it agrees with itself on 99% of tokens "
            "and its loss changes by +0.06 nats, and that is the best policy there; tune first. ",
        ),
        ([], "m has too few layers for these depths"),
    ],
)
def test_advice_follows_its_rules(found: Suitability, outcomes: list[Outcome], sentence: str) -> None:
    assert advice(replace(found, model="m", outcomes=tuple(outcomes))).startswith(sentence)


def test_advice_on_layers(found: Suitability) -> None:
    def layers(*changes: float) -> tuple[LayerChange, ...]:
        return tuple(
            LayerChange(prompt_cosine=0.5, prompt_change=0.0, completion_cosine=0.9, completion_change=change)
            for change in changes
        )

    idle = advice(replace(found, num_layers=3, layers=layers(0.3, 0.09, 0.01)))
    assert "2 of 3 layers (1-2) change generated tokens' states by less than 10%." in idle
    busy = advice(replace(found, num_layers=3, layers=layers(0.3, 0.1, 0.4)))
    assert "No layer is idle (the least active, 1, changes generated tokens' states by 10%)" in busy
    assert not math.isnan(found.dense_loss)
