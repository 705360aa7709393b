"""Every family computes what transformers computes: prefill and cached decode, in ragged batches."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import PAD, VARIANTS, VOCAB, save, tiny_model
from near_ties import assert_same_tokens_up_to_near_ties
from shoal import Engine, Generation, Sampling
from shoal.errors import InvalidPrompt
from shoal.models.families import FAMILIES, PLAIN, Family
from ways import WAYS, decoder_of

NUM_ROWS, NUM_NEW_TOKENS = 16, 64


def ragged_prompts(num_rows: int = NUM_ROWS) -> list[list[int]]:
    """Prompts of 1, 4, 7, ... tokens, in no order."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + 3 * row for row in torch.randperm(num_rows, generator=generator).tolist()]
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


class Recorder:
    """A logits processor that changes nothing and keeps what it sees, by the tokens so far."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        self.seen[tuple(token_ids)] = logits.clone()
        return logits

    def rows(self, prompt: list[int], generation: Generation) -> Tensor:
        """[generated, V]: the logits that each token of `generation` was chosen from."""
        tokens = [*prompt, *generation.token_ids]
        return torch.stack([self.seen[tuple(tokens[:end])] for end in range(len(prompt), len(tokens))])


@torch.no_grad()
def expected_rows(model: PreTrainedModel, prompt: list[int], token_ids: list[int]) -> Tensor:
    """[generated, V]: transformers' logits for the same tokens, one row without padding or cache."""
    return model(torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1].float()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the standard deviation of the expected values."""
    return float((got - expected).abs().max() / expected.std())


def assert_parity(engine: Engine, model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> float:
    """Hold the engine's logits in one ragged batch against transformers'; returns the largest difference."""
    recorder = Recorder()
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True, processor=recorder)
    largest = 0.0
    for prompt, generation in zip(prompts, engine.generate(prompts, sampling), strict=True):
        got = recorder.rows(prompt, generation)
        expected = expected_rows(model, prompt, generation.token_ids)
        assert expected.std() >= 1, "the model's logits are too flat to tell anything"
        assert relative_error(got, expected) <= 1e-4
        largest = max(largest, float((got - expected).abs().max()))
    return largest


@pytest.fixture(scope="module", params=itertools.product(VARIANTS, WAYS), ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, PreTrainedModel]:
    """An engine and transformers' model, for every family and for the options that change what is computed, each way."""
    variant, way = request.param
    family, options = VARIANTS[variant]
    model = tiny_model(family, **options)
    directory = save(model, tmp_path_factory.mktemp(variant), tokenizer=False)
    return Engine(decoder_of(way, directory), cache_gib=0.25), model


def test_prefill_and_cached_decode_logits(pair: tuple[Engine, PreTrainedModel]) -> None:
    assert_parity(*pair, ragged_prompts(), new_tokens=8)


def test_greedy_tokens_equal_generate(pair: tuple[Engine, PreTrainedModel]) -> None:
    """Dense greedy decoding of a ragged batch: the tokens of `model.generate`, padded on the left as it wants them."""
    engine, model = pair
    prompts = ragged_prompts()
    largest = assert_parity(engine, model, prompts[:4], new_tokens=NUM_NEW_TOKENS)
    got = [g.token_ids for g in engine.generate(prompts, Sampling(max_new_tokens=NUM_NEW_TOKENS))]

    width = max(map(len, prompts))
    padded = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(padded, attention_mask=mask, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=PAD)[
        :, width:
    ]
    eos = model.config.eos_token_id
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in out.tolist()]
    rows = [expected_rows(model, prompt, tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    assert_same_tokens_up_to_near_ties(got, expected, rows, largest_difference=largest)


def test_end_token_ends_a_row_of_the_batch(tmp_path: Path) -> None:
    """With an end token that the model is bound to draw, rows end at different steps, as `generate`'s do."""
    model = tiny_model("llama")
    engine = Engine.from_pretrained(save(model, tmp_path), dtype="float32")
    prompts = ragged_prompts(4)
    free = [g.token_ids for g in engine.generate(prompts, Sampling(max_new_tokens=12, ignore_eos=True))]
    end = free[0][5]
    model.config.eos_token_id = model.generation_config.eos_token_id = [end, VOCAB - 1]
    engine = Engine.from_pretrained(save(model, tmp_path), dtype="float32")
    for tokens, generation in zip(free, engine.generate(prompts, Sampling(max_new_tokens=12)), strict=True):
        length = tokens.index(end) + 1 if end in tokens else 12
        assert generation.token_ids == tokens[:length]
        assert generation.finish_reason == ("stop" if end in tokens else "length")


NEW_ROWS: dict[str, tuple[Family, dict[str, Any]]] = {
    "seed_oss": (
        replace(PLAIN, qkv_bias="attention_bias", out_bias="attention_out_bias", mlp_bias="mlp_bias"),
        {"head_dim": 12},
    ),
    "phi3": (
        replace(PLAIN, qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "starcoder2": (
        Family(
            norm="layernorm", norm_eps="norm_epsilon", gated_mlp=False, qkv_bias="use_bias", out_bias="use_bias",
            mlp_bias="use_bias", up=("mlp.c_fc",), down="mlp.c_proj",
        ),
        {"sliding_window": None},
    ),
}  # fmt: skip
"""Families that the table does not have: Llama with other biases, with other tensors, with other parts."""


@pytest.mark.parametrize("family", NEW_ROWS)
def test_a_new_family_is_one_row(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, options = NEW_ROWS[family]
    monkeypatch.setitem(FAMILIES, family, row)
    model = tiny_model(family, **options)
    engine = Engine.from_pretrained(save(model, tmp_path), dtype="float32")
    assert engine.config.family == family
    assert_parity(engine, model, ragged_prompts(6), new_tokens=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox"])
def test_low_precision_is_close(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """`auto` takes the stored dtype; its logits stay within the precision of 8 (bfloat16) or 11 bits of float32's."""
    model = tiny_model(family)
    engine = Engine.from_pretrained(save(model, tmp_path, dtype=dtype))
    assert engine.config.shape.bytes_per_value == 2
    model = model.to(dtype).float()  # what the rounded weights compute exactly
    recorder, prompts = Recorder(), ragged_prompts(4)
    sampling = Sampling(max_new_tokens=8, ignore_eos=True, processor=recorder)
    for prompt, generation in zip(prompts, engine.generate(prompts, sampling), strict=True):
        expected = expected_rows(model, prompt, generation.token_ids)
        bound = 0.15 if dtype == torch.bfloat16 else 0.02
        assert relative_error(recorder.rows(prompt, generation), expected) < bound


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_window(family: str, tmp_path: Path) -> None:
    """Up to its window a model with one is an ordinary model; beyond it a request is refused."""
    options = {"use_sliding_window": True, "max_window_layers": 2} if family == "qwen2" else {}
    model = tiny_model(family, sliding_window=24, **options)
    engine = Engine.from_pretrained(save(model, tmp_path), dtype="float32")
    assert engine.config.sliding_window == 24
    assert_parity(engine, model, [[1] * 16, [2, 3, 4]], new_tokens=8)
    with pytest.raises(InvalidPrompt, match=r"16 prompt tokens \+ 9 new tokens exceed the sliding window of 24 tokens"):
        engine.generate([1] * 16, Sampling(max_new_tokens=9))
