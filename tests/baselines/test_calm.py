"""Exits equal the slow reference's token by token, do not depend on the batch, and are paid for in full."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import reference
from families import CONFIGS, EOS, save, tiny_model
from shoal import Engine, Sampling
from shoal.baselines.calm import Calm, generate
from shoal.baselines.confidence import Confidence, LinearClassifier, Saturation, SoftmaxGap
from shoal.baselines.exit_cost import BatchCost, Tally
from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.depth.cost import flops
from shoal.depth.shape import ModelShape
from shoal.errors import InvalidInput, InvalidPrompt, RequestFailed
from shoal.models.checkpoint import load_checkpoint
from shoal.models.native.library import library
from ways import kernel

NUM_LAYERS = 6
WAYS = ("plain", "native attention")


def random_prompts(seed: str, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 2, 9, 16, 17]))] for _ in range(count)]


def six_layers(family: str) -> PreTrainedModel:
    return tiny_model(family, **({"n_layer": NUM_LAYERS} if family == "gpt2" else {"num_hidden_layers": NUM_LAYERS}))


def layerwise(way: str, directory: Path, dtype: str = "auto") -> LayerwiseDecoder:
    attention = kernel() if way == "native attention" else None
    return LayerwiseDecoder(*load_checkpoint(directory, dtype=dtype), library=attention)


def gap(before: Tensor, after: Tensor, logits: Tensor) -> float:
    first, second = logits.softmax(dim=-1).sort(descending=True).values[:2].tolist()
    return float(first - second)


def cosine(before: Tensor, after: Tensor, logits: Tensor) -> float:
    return float(before @ after / (before.norm() * after.norm()))


class Classifier:
    """A random direction that about half of the states of a tiny model lie along."""

    def __init__(self, width: int) -> None:
        self.weight = torch.randn(width, generator=torch.Generator().manual_seed(1)) / width**0.5

    def __call__(self, before: Tensor, after: Tensor, logits: Tensor) -> float:
        return 1 / (1 + math.exp(-float(self.weight @ after) - 0.25))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_threshold_above_1_is_the_dense_model(family: str, way: str, tmp_path: Path) -> None:
    model = layerwise(way, save(six_layers(family), tmp_path, tokenizer=False))
    prompts = random_prompts(f"dense {family}", 7)
    dense = Engine(model.decoder, cache_gib=0.1).generate(prompts, Sampling(max_new_tokens=20))
    run = generate(model, prompts, Calm(threshold=1.05), max_new_tokens=20, batch_size=4)
    assert [c.token_ids for c in run.completions] == [g.token_ids for g in dense]
    assert [c.finish_reason for c in run.completions] == [g.finish_reason for g in dense]
    assert [c.cost.ledger for c in run.completions] == [g.ledger for g in dense]
    assert all(set(c.exit_layers) == {NUM_LAYERS} for c in run.completions)
    assert run.cost.checks == run.cost.check_flops == run.cost.filled_layer_tokens == run.cost.fill_flops == 0
    assert run.batch.mean_layers == NUM_LAYERS


MEASURES = {"softmax": (0.05, 0.2, 0.35), "saturation": (0.6, 0.8, 0.93), "classifier": (0.45, 0.55, 0.65)}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_and_exits_equal_the_reference(family: str, measure: str, tmp_path: Path) -> None:
    network = six_layers(family)
    directory = save(network, tmp_path, tokenizer=False)
    models = [layerwise(way, directory) for way in WAYS if way == "plain" or library() is not None]
    model = models[0]
    classifier = Classifier(model.config.shape.hidden_size)
    ours: dict[str, Confidence] = {
        "softmax": SoftmaxGap(),
        "saturation": Saturation(),
        "classifier": LinearClassifier(
            weight=classifier.weight, bias=0.25, fingerprint=model.fingerprint, model="this one"
        ),
    }
    theirs: dict[str, reference.Confidence] = {"softmax": gap, "saturation": cosine, "classifier": classifier}
    prompts = random_prompts(f"{family} {measure}", 2)
    seen: set[int] = set()
    for number, threshold in enumerate(MEASURES[measure]):
        settings = {"threshold": threshold, "tau": 4.0 * number, "min_exit_layer": 1 + number}
        rule = Calm(confidence=ours[measure], **settings)  # type: ignore[arg-type]
        runs = [generate(model, prompts, rule, max_new_tokens=8).completions for model in models]
        for index, prompt in enumerate(prompts):
            expected = reference.calm(
                network, prompt, confidence=theirs[measure], max_new_tokens=8, eos_token_ids=[EOS], **settings
            )  # type: ignore[arg-type]
            assert expected.margin > 2e-6, "too near to another exit to compare: choose another seed"
            for run in runs:
                assert list(run[index].token_ids) == expected.token_ids
                assert list(run[index].exit_layers) == expected.exit_layers
            assert min(expected.exit_layers) >= 1 + number
            seen.update(expected.exit_layers[1:])
    assert len(seen) > 2, "exits at several depths, or little was compared"


def test_filling_the_cache_matters(
    network: PreTrainedModel, model: LayerwiseDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above would prove little if nobody read what is filled in."""
    prompts, rule = random_prompts("fill", 8), Calm(threshold=0.1)
    filled = generate(model, prompts, rule, max_new_tokens=20, ignore_eos=True)
    monkeypatch.setattr(model, "fill", lambda *arguments: None)
    empty = generate(model, prompts, rule, max_new_tokens=20, ignore_eos=True)
    assert [c.token_ids for c in filled.completions] != [c.token_ids for c in empty.completions]


@pytest.mark.parametrize("confidence", [SoftmaxGap(), Saturation()])
def test_a_row_alone_equals_the_row_in_a_batch(confidence: Confidence, model: LayerwiseDecoder) -> None:
    prompts = random_prompts("company", 9)
    rule = Calm(threshold=0.2 if confidence.reads_logits else 0.7, confidence=confidence)
    together = generate(model, prompts, rule, max_new_tokens=16)
    threes = generate(model, prompts, rule, max_new_tokens=16, batch_size=3)
    for index, prompt in enumerate(prompts):
        alone = generate(model, prompt, rule, max_new_tokens=16).completions[0]
        for company in (together.completions[index], threes.completions[index]):
            assert company.index == index
            assert company.token_ids == alone.token_ids
            assert company.exit_layers == alone.exit_layers
            assert company.cost == alone.cost


@pytest.mark.parametrize("min_exit_layer", [1, 3, NUM_LAYERS])
@pytest.mark.parametrize("confidence", [SoftmaxGap(), Saturation()])
def test_costs_follow_from_the_exits(confidence: Confidence, min_exit_layer: int, model: LayerwiseDecoder) -> None:
    """Counted where products run; here once more from the exit layers alone."""
    shape = model.config.shape
    rule = Calm(threshold=0.2 if confidence.reads_logits else 0.7, confidence=confidence, min_exit_layer=min_exit_layer)
    prompts = random_prompts("costs", 8)
    before = sum(layer.num_tokens_run for layer in model.decoder.layers)
    run = generate(model, prompts, rule, max_new_tokens=14)
    ran = sum(layer.num_tokens_run for layer in model.decoder.layers) - before
    assert ran == run.cost.ledger.layer_tokens
    for prompt, completion in zip(prompts, run.completions, strict=True):
        cost, exits = completion.cost, completion.exit_layers[1:]
        checks = sum(max(0, min(exit_layer, NUM_LAYERS - 1) - min_exit_layer + 1) for exit_layer in exits)
        pairs = sum(exit_layer * (len(prompt) + clock + 1) for clock, exit_layer in enumerate(exits))
        plain = flops(shape, layer_tokens=sum(exits), layer_pairs=pairs, heads=len(exits))
        filled = sum(NUM_LAYERS - exit_layer for exit_layer in exits[:-1])
        wasted = sum(max(0, min(exit_layer, NUM_LAYERS) - min_exit_layer) for exit_layer in exits)
        assert cost.ledger.decode_layer_tokens == sum(exits)
        assert cost.ledger.mean_layers == pytest.approx(np.mean(exits))
        assert cost.checks == checks
        assert cost.filled_layer_tokens == filled
        assert cost.fill_flops == filled * 2 * shape.hidden_size * 2 * shape.num_kv_heads * shape.head_dim
        if confidence.reads_logits:  # every check but the one that exits throws its logits away; layer L asks nobody
            assert cost.check_flops == 2 * wasted * shape.head_weights
        else:
            assert cost.check_flops == 6 * checks * shape.hidden_size
        assert cost.ledger.decode_flops == plain + cost.check_flops + cost.fill_flops
    clocks = [
        [c.exit_layers[1:][clock] for c in run.completions if clock < len(c.exit_layers) - 1] for clock in range(13)
    ]
    assert run.batch.steps == sum(bool(rows) for rows in clocks)
    assert run.batch.layers == sum(max(rows) for rows in clocks if rows), "a step ends when its last row exits"
    assert run.batch.mean_layers >= run.cost.ledger.mean_layers
    assert run.batch.decode_s > 0
    if min_exit_layer == NUM_LAYERS:
        assert run.cost.checks == run.cost.filled_layer_tokens == 0
    else:
        assert run.batch.mean_layers > run.cost.ledger.mean_layers


def test_the_step_of_the_docstring_in_bytes() -> None:
    """L = 4, three rows that exit at 1, 1 and 3, one cached position before: every count by hand."""
    shape = ModelShape(
        num_layers=4, hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, intermediate_size=16, gated_mlp=False, vocab_size=32
    )  # fmt: skip
    shared = BatchCost(steps=1)
    tally = Tally(shape, 3, shared)
    rows, position = np.arange(3), np.ones(3, dtype=np.int64)
    for depth in (1, 2, 3):
        running = rows if depth == 1 else rows[2:]
        tally.layer(running, position[running])
        tally.check(running)
        tally.head(running)
    for skipped in (rows[:2], rows[:2], rows):
        tally.fill(skipped)
    costs = [tally.cost(row, prompt_tokens=1, new_tokens=2, measure_flops=0) for row in range(3)]
    total = costs[0] + costs[1] + costs[2]
    assert total.ledger.decode_layer_tokens == 5
    assert total.filled_layer_tokens == 7
    assert shared.layers == 3
    assert total.checks == 5
    assert total.check_flops == 2 * (2 * 8 * 32), "row 2 threw the logits of layers 1 and 2 away"
    layer_weights, head_weights, kv_weights = 8 * 4 * 6 + 2 * 8 * 16, 8 * 32, 8 * 2 * 4
    cached = 2 * (3 + 1 + 1) + 7  # own and earlier position of 3, 1 and 1 rows, and 7 filled
    assert shared.decode_bytes == 4 * (3 * layer_weights + 3 * head_weights + 3 * kv_weights + cached * 2 * 4)


@given(threshold=st.floats(0, 1), tau=st.floats(0, 50), clock=st.integers(0, 999), max_new_tokens=st.integers(1, 1000))
def test_the_threshold_falls_from_its_start(threshold: float, tau: float, clock: int, max_new_tokens: int) -> None:
    rule = Calm(threshold=threshold, tau=tau)
    first, now, later = (rule.threshold_at(at, max_new_tokens) for at in (0, clock, clock + 1))
    assert first == pytest.approx(0.9 * threshold + 0.1)
    assert 0.9 * threshold <= later + 1e-12
    assert later <= now <= first <= 1


def test_nothing_reaches_a_threshold_above_1() -> None:
    """Not 0.9 lambda, which is below 1 at 1.05 and late: the clip would let a confidence of 1 exit."""
    assert Calm(threshold=1.05).threshold_at(99, 100) == math.inf
    assert Calm(threshold=1.0).threshold_at(0, 100) == 1.0


def test_text_and_ends(model: LayerwiseDecoder) -> None:
    prompts = ["a pub", "by the river", "cheap"]
    run = generate(model, prompts, Calm(threshold=0.15), max_new_tokens=40)
    for completion in run.completions:
        assert completion.text == model.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert len(completion.exit_layers) == len(completion.token_ids)
        assert (completion.token_ids[-1] == EOS) == (completion.finish_reason == "stop")
        assert EOS not in completion.token_ids[:-1]
    on = generate(model, prompts, Calm(threshold=0.15), max_new_tokens=40, ignore_eos=True)
    assert all(len(completion.token_ids) == 40 for completion in on.completions)
    one = generate(model, prompts, Calm(threshold=0.15), max_new_tokens=1)
    assert [c.token_ids for c in one.completions] == [c.token_ids[:1] for c in on.completions]
    assert one.batch.steps == one.cost.ledger.decode_flops == 0


def test_bfloat16_runs(checkpoint: Path) -> None:
    model = LayerwiseDecoder.from_pretrained(checkpoint, dtype="bfloat16")
    run = generate(model, ["a pub", "b"], Calm(threshold=0.15), max_new_tokens=12, ignore_eos=True)
    assert 1 < run.cost.ledger.mean_layers < NUM_LAYERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold must be 0 to 1"),
        ({"threshold": math.nan}, "threshold must be 0 to 1"),
        ({"threshold": math.inf}, "threshold must be 0 to 1"),
        ({"threshold": "0.5"}, "threshold must be 0 to 1"),
        ({"threshold": 0.5, "min_exit_layer": 0}, "min_exit_layer must be 1 or more"),
        ({"threshold": 0.5, "tau": -1.0}, "tau must be 0 or more"),
    ],
)
def test_rules_outside_their_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Calm(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, InvalidPrompt, "there is no prompt"),
        (["a", ""], {}, InvalidPrompt, "prompt 1: the prompt is empty"),
        ([[1], []], {}, InvalidPrompt, "prompt 1: the prompt is empty"),
        ([[1, 263]], {}, InvalidInput, "token id 263 is outside the vocabulary"),
        ([[1] * 250], {}, InvalidPrompt, "exceed the model's 256 positions"),
        ("a", {"max_new_tokens": 0}, InvalidInput, "max_new_tokens must be 1 or more"),
        ("a", {"batch_size": 0}, InvalidInput, "batch_size must be 1 or more"),
    ],
)
def test_bad_input(
    prompts: object, options: dict[str, int], error: type[Exception], message: str, model: LayerwiseDecoder
) -> None:
    with pytest.raises(error, match=message):
        generate(model, prompts, Calm(threshold=0.5), **options)  # type: ignore[arg-type]


def test_an_exit_layer_that_the_model_does_not_have(model: LayerwiseDecoder) -> None:
    with pytest.raises(InvalidInput, match="min_exit_layer is 7, and the model has 6 layers"):
        generate(model, "a", Calm(threshold=0.5, min_exit_layer=7))


def test_broken_weights_are_found(tmp_path: Path) -> None:
    network = tiny_model("llama")
    with torch.no_grad():
        network.model.layers[2].mlp.down_proj.weight.fill_(torch.nan)
    model = LayerwiseDecoder.from_pretrained(save(network, tmp_path))
    with pytest.raises(RequestFailed, match="not finite"):
        generate(model, "a", Calm(threshold=0.5))


def test_a_deeper_layer_reads_the_exit_state(network: PreTrainedModel, model: LayerwiseDecoder) -> None:
    """`fill` writes what the layer itself would have cached for a token that came with this state."""
    zero, at = np.zeros(1, dtype=np.int64), np.full(1, 5)
    state = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        filled, ran = model.new_cache(1, 6), model.new_cache(1, 6)
        model.fill(3, state, zero, at, filled)
        attention = model.decoder.attention(model.work([[7]], zero, at), ran)
        model.decoder.layers[3](state.clone(), attention(3))
    torch.testing.assert_close(filled.keys[3][0, :, 5], ran.keys[3][0, :, 5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(filled.values[3][0, :, 5], ran.values[3][0, :, 5], rtol=1e-5, atol=1e-5)
    assert F.cosine_similarity(filled.keys[3][0, 0, 5], filled.values[3][0, 0, 5], dim=0) < 0.99
