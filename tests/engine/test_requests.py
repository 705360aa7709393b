"""What a user may give and what is refused: prompts, counts, lengths, plans, devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from families import edit_json, save, tiny_model
from shoal import Dense, DepthPlan, Engine, Sampling, SkipDecode
from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import ALWAYS
from shoal.errors import CheckpointError, InvalidInput, InvalidPlan, InvalidPrompt
from shoal.models.executor import Executor

SHORT = Sampling(max_new_tokens=4, ignore_eos=True)
Make = Callable[..., Engine]


def test_prompts_as_text_and_as_ids(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """One or several, text or ids, in lists, tuples, NumPy arrays and generators."""
    ids = tokenizer("shoal").input_ids
    expected = engine.generate([ids], SHORT)[0].token_ids
    forms: list[Any] = [
        "shoal", ids, tuple(ids), np.array(ids), ["shoal"], [ids], [np.array(ids)], [tuple(ids)], (p for p in ["shoal"]),
    ]  # fmt: skip
    for prompts in forms:
        (generation,) = engine.generate(prompts, SHORT)
        assert generation.token_ids == expected
        assert generation.ledger.prompt_tokens == len(ids)
    mixed = engine.generate(["shoal", ids, "other"], SHORT)
    assert [g.index for g in mixed] == [0, 1, 2]
    assert mixed[0].token_ids == mixed[1].token_ids == expected
    assert mixed[0].text == tokenizer.decode(expected, skip_special_tokens=True)


def test_nothing_to_do(engine: Engine) -> None:
    assert engine.generate([]) == []
    assert list(engine.stream([])) == []
    assert engine.step() == []
    assert not engine.has_work


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 0: the prompt is empty"),
        ([[]], "prompt 0: the prompt is empty"),
        (["a", "", "b"], "prompt 1: the prompt is empty"),
        (None, "prompts are a string, a list of token ids"),
        (3, "prompts are a string, a list of token ids"),
        (b"bytes", "prompts are a string, a list of token ids"),
        ({"prompt": "a"}, "prompts are a string, a list of token ids"),
        ([1, "a"], "prompt 0: a prompt is a string or a list of token ids"),
        (["a", None], "prompt 1: a prompt is a string or a list of token ids"),
        ([[1.0, 2.0]], "prompt 0: a prompt is a string or a list of token ids"),
        ([["a", "b"]], "prompt 0: a prompt is a string or a list of token ids"),
        (["a", "half a pair \ud83d"], "prompt 1: .*surrogate"),
        ([[1, 263]], r"prompt 0: token id 263 is outside the vocabulary \(0 to 262\)"),
        ([[1, -1]], r"prompt 0: token id -1 is outside the vocabulary \(0 to 262\)"),
    ],
)
def test_prompts_that_are_none(engine: Engine, prompts: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        engine.generate(prompts, SHORT)
    assert not engine.has_work, "nothing of a refused call may run"
    assert engine.generate([5], SHORT)[0].finish_reason == "length"


def test_one_of_each_or_one_per_prompt(engine: Engine) -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]
    samplings = [Sampling(max_new_tokens=n, ignore_eos=True) for n in (1, 2, 3)]
    plans = [Dense(), SkipDecode(depth=0.5), DepthPlan((ALWAYS, 0, 0, 1, 2, ALWAYS))]
    generations = engine.generate(prompts, samplings, plans)
    assert [len(g.token_ids) for g in generations] == [1, 2, 3]
    assert generations[2].ledger.decode_layer_tokens == (1 + 1 + 1 + 1) + (1 + 1 + 1)
    for prompt, sampling, plan, generation in zip(prompts, samplings, plans, generations, strict=True):
        assert engine.generate(prompt, sampling, plan)[0].token_ids == generation.token_ids
    for wrong in ({"sampling": samplings[:2]}, {"plan": plans * 2}, {"sampling": []}):
        name = next(iter(wrong))
        with pytest.raises(InvalidInput, match=f"got {len(wrong[name])} values of {name} for 3 prompts"):  # type: ignore[arg-type]
            engine.generate(prompts, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SkipDecode, "plan must be a DepthPlan or a policy"),
        ("dense", "plan must be a DepthPlan or a policy"),
        (0.5, "plan must be a DepthPlan or a policy"),
        (DepthPlan((ALWAYS, 0)), "the plan is for 2 layers, the model has 6"),
        (SkipDecode(depth=0.2), r"between 2/6 = 0\.333 and 1"),
        (SkipDecode(min_layers=2, max_layers=7), r"within warmup_layers \+ 1 = 2 and 6"),
    ],
)
def test_plans_that_do_not_fit(engine: Engine, plan: Any, message: str) -> None:
    with pytest.raises(InvalidPlan, match=f"prompt 1: .*{message}"):
        engine.generate([[1], [2]], SHORT, [Dense(), plan])
    assert not engine.has_work


def test_a_sampling_that_is_none(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="sampling must be a Sampling"):
        engine.generate([1], SkipDecode(depth=0.5))  # type: ignore[arg-type]


def test_up_to_the_last_position_and_not_beyond(engine: Engine) -> None:
    """256 positions: 250 + 6 run, 250 + 7 are refused, and the message says what would fit."""
    assert len(engine.generate([1] * 250, Sampling(max_new_tokens=6, ignore_eos=True))[0].token_ids) == 6
    with pytest.raises(InvalidPrompt, match=r"250 .* \+ 7 .* exceed the model's 256 positions: .* at most 6"):
        engine.generate([1] * 250, Sampling(max_new_tokens=7))
    with pytest.raises(InvalidPrompt, match="exceed the model's 256 positions: shorten the prompt"):
        engine.generate([1] * 256, Sampling(max_new_tokens=1))


@pytest.mark.parametrize("max_pass_tokens", [2, 2048])
def test_one_token_in_one_token_out(make_engine: Make, max_pass_tokens: int) -> None:
    """The shortest request makes no decode pass; with a longer prompt in chunks neither."""
    engine = make_engine(max_batch=2, max_pass_tokens=max_pass_tokens)
    short, long = engine.generate([[7], [7, 8, 9, 10]], Sampling(max_new_tokens=1))
    for generation, prompt_tokens in ((short, 1), (long, 4)):
        assert len(generation.token_ids) == 1
        assert generation.ledger.decode_passes == generation.ledger.decode_layer_tokens == 0
        assert generation.ledger.prompt_layer_tokens == 6 * prompt_tokens
        assert generation.ledger.mean_layers == 0.0
        assert not generation.past_horizon
    assert engine.stats.decode_passes == 0


def test_past_the_horizon_is_said(engine: Engine) -> None:
    """Horizon 3: clocks 0, 1, 2 are planned; the fourth decode pass, of the fifth token, is beyond."""
    plan = SkipDecode(min_layers=2, max_layers=5, horizon=3)
    for new_tokens, past in ((4, False), (5, True)):
        sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
        assert engine.generate([1, 2], sampling, plan)[0].past_horizon is past
    assert not engine.generate([1, 2], Sampling(max_new_tokens=9, ignore_eos=True), Dense())[0].past_horizon


def test_a_checkpoint_fills_open_fields(decoder: Executor) -> None:
    """`depth_plan.json` gives horizon and warm-up where the policy leaves them open."""
    tuned = Engine(decoder, tuned=TunedDepth(horizon=4, warmup_layers=2), max_batch=1, cache_gib=0.1)
    plain = Engine(decoder, max_batch=1, cache_gib=0.1)
    sampling = Sampling(max_new_tokens=9, ignore_eos=True)
    told = plain.generate([1, 2], sampling, SkipDecode(depth=2 / 3, horizon=4, warmup_layers=2))[0]
    filled = tuned.generate([1, 2], sampling, SkipDecode(depth=2 / 3))[0]
    assert filled == told
    assert plain.generate([1, 2], sampling, SkipDecode(depth=2 / 3))[0].ledger != told.ledger


def test_an_engine_without_a_tokenizer(decoder: Executor) -> None:
    engine = Engine(decoder, max_batch=1, cache_gib=0.1)
    generation = engine.generate([1, 2], SHORT)[0]
    assert (len(generation.token_ids), generation.text) == (4, "")
    with pytest.raises(InvalidPrompt, match="no tokenizer: give prompts as lists of token ids"):
        engine.generate("text", SHORT)
    with pytest.raises(InvalidInput, match="stop strings need a tokenizer"):
        engine.generate([1], Sampling(stop="a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
        ({"max_batch": 0}, "max_batch must be 1 or more, got 0"),
        ({"cache_gib": -1}, "cache_gib must be above 0"),
    ],
)
def test_engines_that_cannot_be_made(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Engine.from_pretrained(checkpoint, **options)


def test_a_malformed_depth_plan_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    directory = save(tiny_model("opt"), tmp_path)
    (directory / "depth_plan.json").write_text(json.dumps({"horizon": 0}))
    with pytest.raises(CheckpointError, match=r"depth_plan\.json cannot be read: horizon must be 1 or more"):
        Engine.from_pretrained(directory)


def test_beyond_a_sliding_window(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(save(tiny_model("mistral", sliding_window=24), tmp_path), cache_gib=0.1)
    assert len(engine.generate([1] * 20, SHORT)[0].token_ids) == 4
    with pytest.raises(InvalidPrompt, match=r"prompt 0: .* exceed the sliding window of 24 tokens"):
        engine.generate([1] * 21, SHORT)


def test_several_end_tokens(tmp_path: Path) -> None:
    """Whichever of the config's end tokens comes first ends the completion."""
    directory = save(tiny_model("opt"), tmp_path)
    edit_json(directory / "generation_config.json", eos_token_id=[97, 98])
    engine = Engine.from_pretrained(directory, cache_gib=0.1)
    for token in (97, 98):
        generation = engine.generate([1, 2], Sampling(logit_bias={token: 1000.0}))[0]
        assert (generation.token_ids, generation.finish_reason) == ((token,), "stop")


def test_threads_are_the_processs(checkpoint: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        Engine.from_pretrained(checkpoint, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
