"""Every field of `Sampling` as a user meets it: through an engine, and its allowed range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import reference
from families import EOS, VOCAB
from shoal import Engine, Generation, Sampling, SkipDecode
from shoal.errors import InvalidInput

PROMPT = [10, 20, 30]


def force(tokens: list[int]) -> Callable[[list[int], Tensor], Tensor]:
    """A processor that makes `PROMPT` go on with these tokens."""

    def choose(token_ids: list[int], logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, -math.inf)
        forced[tokens[len(token_ids) - len(PROMPT)]] = 0
        return forced

    return choose


def say(engine: Engine, text: str, **fields: Any) -> Generation:
    """What the engine makes of a model that says `text`, a byte per token, and then would go on for ever."""
    tokens = engine.tokenizer(text).input_ids
    fields = {"max_new_tokens": len(tokens), **fields}
    return engine.generate(PROMPT, Sampling(processor=force(tokens), **fields))[0]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_new_tokens", 0, "1 or more"),
        ("max_new_tokens", 2.5, "a whole number"),
        ("max_new_tokens", None, "a whole number"),
        ("min_new_tokens", -1, "0 to 64"),
        ("min_new_tokens", 65, "0 to 64"),
        ("temperature", -0.1, r"0 \(greedy\) or more"),
        ("temperature", math.inf, r"0 \(greedy\) or more"),
        ("temperature", math.nan, r"0 \(greedy\) or more"),
        ("temperature", "hot", "a number"),
        ("top_k", 0, "1 or more"),
        ("top_k", 1.5, "a whole number"),
        ("top_p", 0.0, "above 0, at most 1"),
        ("top_p", 1.1, "above 0, at most 1"),
        ("min_p", -0.1, "0 to 1"),
        ("min_p", 1.1, "0 to 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", math.inf, "above 0"),
        ("presence_penalty", math.inf, "a finite number"),
        ("frequency_penalty", math.nan, "a finite number"),
        ("logit_bias", {"a": 1.0}, "a mapping from token ids"),
        ("logit_bias", {3: math.nan}, "numbers below infinity"),
        ("logit_bias", {3: math.inf}, "numbers below infinity"),
        ("logit_bias", [3], "a mapping from token ids"),
        ("stop", "", "not empty"),
        ("stop", ("a", ""), "not empty"),
        ("stop", (1,), "strings"),
        ("stop", None, "a string or several"),
        ("seed", -1, r"0 to 2\*\*64 - 1"),
        ("seed", 2**64, r"0 to 2\*\*64 - 1"),
        ("n", 0, "1 or more"),
        ("logprobs", -1, "0 or more"),
        ("logprobs", 1.0, "a whole number"),
    ],
)
def test_ranges(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidInput, match=f"{field} must be .*{allowed}"):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 1, "min_new_tokens": 1},
        {"temperature": 1e-300, "top_k": 1, "top_p": 1.0, "min_p": 1.0},
        {"min_p": 0.0, "seed": 2**64 - 1, "logprobs": 0, "stop": ["a", "b"]},
        {"repetition_penalty": 0.5, "presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {5: -math.inf}},
    ],
)
def test_ends_of_the_ranges_run(engine: Engine, fields: dict[str, Any]) -> None:
    assert engine.generate(PROMPT, Sampling(**{"max_new_tokens": 3, **fields}))[0].finish_reason in ("length", "stop")


def test_greedy_by_other_ways(engine: Engine) -> None:
    """One token to choose from, or a temperature near zero, is greedy."""
    expected = engine.generate(PROMPT)[0].token_ids
    for fields in ({"top_k": 1, "temperature": 1.5}, {"min_p": 1.0, "temperature": 1.5}, {"temperature": 1e-30}):
        assert engine.generate(PROMPT, Sampling(**fields))[0].token_ids == expected  # type: ignore[arg-type]


def test_same_seed_same_tokens(make_engine: Callable[..., Engine]) -> None:
    """Alone, in company, in another engine, in another order, streamed; another seed gives other tokens."""
    ask = [Sampling(temperature=1.0, seed=seed, max_new_tokens=15, ignore_eos=True) for seed in (1, 2, 1)]
    plan = SkipDecode(depth=0.5)
    first, second, again = make_engine().generate([PROMPT] * 3, ask, plan)
    assert first.token_ids == again.token_ids != second.token_ids
    assert make_engine(max_batch=1).generate(PROMPT, ask[0], plan)[0].token_ids == first.token_ids
    crowd = make_engine(max_batch=3).generate([[1, 2], [3] * 30, PROMPT], ask[::-1], plan)
    assert crowd[2].token_ids == first.token_ids
    streamed = [t for chunk in make_engine().stream(PROMPT, ask[1], plan) for t in chunk.token_ids]
    assert tuple(streamed) == second.token_ids


def test_n_completions(engine: Engine) -> None:
    """Prompt-major, numbered, each with noise of its own; the first is what n = 1 gives. Greedy ones are alike."""
    sampling = Sampling(n=3, temperature=1.0, max_new_tokens=8, ignore_eos=True)
    generations = engine.generate([PROMPT, [7, 7]], sampling)
    assert [(g.index, g.sample) for g in generations] == [(i, s) for i in range(2) for s in range(3)]
    assert len({g.token_ids for g in generations}) == 6
    one = engine.generate([PROMPT, [7, 7]], Sampling(temperature=1.0, max_new_tokens=8, ignore_eos=True))
    assert [g.token_ids for g in one] == [generations[0].token_ids, generations[3].token_ids]
    assert len({g.token_ids for g in engine.generate(PROMPT, Sampling(n=4, max_new_tokens=8))}) == 1
    mixed = engine.generate([PROMPT, [7, 7]], [Sampling(max_new_tokens=2), Sampling(n=2, max_new_tokens=2)])
    assert [(g.index, g.sample) for g in mixed] == [(0, 0), (1, 0), (1, 1)]


def test_end_token(engine: Engine) -> None:
    """It ends the completion, is one of its tokens and none of its text, unless ignored or too early."""
    wants_to_end = {EOS: 1000.0}
    ended = engine.generate(PROMPT, Sampling(logit_bias=wants_to_end))[0]
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((EOS,), "", "stop")
    assert ended.ledger.decode_passes == 0
    later = engine.generate(PROMPT, Sampling(logit_bias=wants_to_end, min_new_tokens=5))[0]
    assert len(later.token_ids) == 6
    assert later.token_ids.index(EOS) == 5
    ignored = engine.generate(PROMPT, Sampling(logit_bias=wants_to_end, ignore_eos=True, max_new_tokens=4))[0]
    assert (ignored.token_ids, ignored.finish_reason) == ((EOS,) * 4, "length")
    last = engine.generate(PROMPT, Sampling(logit_bias=wants_to_end, min_new_tokens=3, max_new_tokens=3))[0]
    assert last.finish_reason == "length"
    assert EOS not in last.token_ids


def test_bias_and_penalties_reach_the_tokens(engine: Engine) -> None:
    plain = engine.generate(PROMPT, Sampling(max_new_tokens=30, ignore_eos=True))[0].token_ids
    assert engine.generate(PROMPT, Sampling(max_new_tokens=3, logit_bias={77: 1000.0}))[0].token_ids == (77,) * 3
    banned = engine.generate(PROMPT, Sampling(max_new_tokens=30, ignore_eos=True, logit_bias={plain[0]: -math.inf}))[0]
    assert plain[0] not in banned.token_ids
    for fields in ({"frequency_penalty": 1000.0}, {"presence_penalty": 1000.0}):
        sampling = Sampling(max_new_tokens=30, ignore_eos=True, **fields)
        tokens = engine.generate(PROMPT, sampling)[0].token_ids
        assert len(set(tokens)) == 30, "a token that was seen is out of reach"
    sampling = Sampling(max_new_tokens=30, ignore_eos=True, repetition_penalty=1e6)
    tokens = engine.generate(list(range(200)), sampling)[0].token_ids
    assert len(set(tokens)) == 30
    assert min(tokens) >= 200, "the repetition penalty counts the prompt, too"


def test_logprobs_are_the_models(engine: Engine, model: PreTrainedModel) -> None:
    """From the logits as the model gave them: not changed by bias, penalties, temperature or the processor."""
    fields: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
    changed = {
        "temperature": 2.0,
        "logit_bias": {5: 3.0},
        "repetition_penalty": 1.5,
        "processor": lambda _, x: x.mul_(0.5),
    }
    for extra in ({}, changed):
        generation = engine.generate(PROMPT, Sampling(**fields, **extra, logprobs=4))[0]
        tokens = [*PROMPT, *generation.token_ids]
        ran = reference.ran_table(6, len(tokens), len(tokens), reference.dense(6))
        expected = reference.logits(model, tokens, ran).log_softmax(-1)[len(PROMPT) - 1 : -1]
        assert generation.logprobs is not None
        assert len(generation.logprobs) == 6
        for row, token, got in zip(expected, generation.token_ids, generation.logprobs, strict=True):
            assert got.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert list(got.top) == row.argsort(descending=True)[:4].tolist()
            assert list(got.top.values()) == pytest.approx(row.sort(descending=True).values[:4].tolist(), abs=1e-4)
    assert engine.generate(PROMPT, Sampling(**fields))[0].logprobs is None
    only_chosen = engine.generate(PROMPT, Sampling(**fields, logprobs=0))[0].logprobs
    assert only_chosen is not None
    assert [got.top for got in only_chosen] == [{}] * 6


def test_processor_sees_prompt_and_output(engine: Engine) -> None:
    seen: list[tuple[list[int], torch.Size, torch.dtype]] = []

    def watch(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append((list(token_ids), logits.shape, logits.dtype))
        return logits

    generation = engine.generate(PROMPT, Sampling(max_new_tokens=4, ignore_eos=True, processor=watch))[0]
    whole = [*PROMPT, *generation.token_ids]
    assert seen == [(whole[: 3 + step], torch.Size([VOCAB]), torch.float32) for step in range(4)]


def test_processor_acts_after_penalties_and_bias(engine: Engine) -> None:
    seen: list[Tensor] = []

    def watch(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits

    engine.generate(PROMPT, Sampling(max_new_tokens=1, processor=watch))
    engine.generate(PROMPT, Sampling(max_new_tokens=1, processor=watch, logit_bias={5: 2.5}, temperature=9.0))
    difference = seen[1] - seen[0]
    assert difference[5] == pytest.approx(2.5, abs=1e-5)
    assert difference.abs().sum() == pytest.approx(2.5, abs=1e-5)


def raise_after(num_tokens: int) -> Callable[[list[int], Tensor], Tensor]:
    def run(token_ids: list[int], logits: Tensor) -> Tensor:
        if len(token_ids) == len(PROMPT) + num_tokens:
            raise KeyError("the user's own mistake")
        return logits

    return run


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (raise_after(0), "the logits processor raised KeyError"),
        (raise_after(3), "the logits processor raised KeyError"),
        (lambda _, logits: None, "must return logits of shape .263., it returned None"),
        (lambda _, logits: logits[:9], "it returned shape .9."),
        (lambda _, logits: logits.sum(), "it returned shape .."),
        (lambda _, logits: logits * math.nan, "left no finite logit"),
        (lambda _, logits: logits - math.inf, "left no finite logit"),
    ],
)
def test_a_broken_processor_ends_its_request_alone(
    engine: Engine, processor: Callable[[list[int], Tensor], Tensor], message: str
) -> None:
    plain = Sampling(max_new_tokens=6, ignore_eos=True)
    expected = engine.generate([[1, 2], [3]], plain)
    broken = Sampling(max_new_tokens=6, ignore_eos=True, processor=processor)
    before, ill, after = engine.generate([[1, 2], PROMPT, [3]], [plain, broken, plain])
    assert ill.finish_reason == "error"
    assert ill.error is not None
    assert message.replace(".", "") in ill.error.replace("[", "").replace("]", "").replace(".", "")
    assert "prompt 1" in ill.error
    assert [before.token_ids, after.token_ids] == [g.token_ids for g in expected]
    assert before.error is None
    assert engine.runner.cache.blocks_in_use == 0
    assert [g.token_ids for g in engine.generate([[1, 2], [3]], plain)] == [g.token_ids for g in expected]


def test_tokens_before_an_error_are_kept(engine: Engine) -> None:
    plain = engine.generate(PROMPT, Sampling(max_new_tokens=6, ignore_eos=True))[0]
    sampling = Sampling(max_new_tokens=6, ignore_eos=True, processor=raise_after(3), logprobs=1)
    ill = engine.generate(PROMPT, sampling)[0]
    assert ill.token_ids == plain.token_ids[:3]
    assert ill.logprobs is not None
    assert len(ill.logprobs) == 3
    assert ill.ledger.new_tokens == 3


@pytest.mark.parametrize(
    ("text", "stop", "expected", "num_tokens"),
    [
        ("hello END world", "END", "hello ", 9),
        ("hello END world", ("nothing", "END"), "hello ", 9),
        ("hello END world", ("NDX", "ENDX"), "hello END world", 15),
        ("END", "END", "", 3),
        ("one\n\ntwo", "\n\n", "one", 5),
        ("鱼。鱼", "。", "鱼", 6),
        ("a🐟b", "🐟", "a", 5),
        ("the end", "the end", "", 7),
    ],
)
def test_stop_strings(engine: Engine, text: str, stop: str | tuple[str, ...], expected: str, num_tokens: int) -> None:
    generation = say(engine, text, stop=stop)
    assert generation.text == expected
    assert generation.finish_reason == ("stop" if expected != text else "length")
    assert generation.token_ids == tuple(engine.tokenizer(text).input_ids[:num_tokens])


def test_a_stop_string_beats_the_length_and_the_end_token(engine: Engine) -> None:
    """Complete with the last allowed token it is a stop; an end token after it never comes."""
    assert say(engine, "abc", stop="bc", max_new_tokens=3).finish_reason == "stop"
    assert say(engine, "abc", stop="bcd", max_new_tokens=3).finish_reason == "length"
    assert say(engine, "abc", stop="bcd", max_new_tokens=3).text == "abc"


def test_the_prompt_does_not_stop_its_completion(engine: Engine) -> None:
    prompt = "END here"
    tokens = engine.tokenizer("abc").input_ids
    width = len(engine.tokenizer(prompt).input_ids)

    def abc(token_ids: list[int], logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, -math.inf)
        forced[tokens[len(token_ids) - width]] = 0
        return forced

    assert engine.generate(prompt, Sampling(stop="END", processor=abc, max_new_tokens=3))[0].text == "abc"


def test_a_special_token_as_stop_string(engine: Engine) -> None:
    """Its text never shows in a completion, so it stops by id, also where end tokens are ignored."""
    tokens = [*engine.tokenizer("ab").input_ids, EOS, 97]
    for ignore_eos in (False, True):
        sampling = Sampling(stop="</s>", processor=force(tokens), max_new_tokens=4, ignore_eos=ignore_eos)
        generation = engine.generate(PROMPT, sampling)[0]
        assert (generation.text, generation.finish_reason, generation.token_ids) == ("ab", "stop", tuple(tokens[:3]))


def test_streamed_pieces_hold_back_what_may_become_a_stop_string(engine: Engine) -> None:
    tokens = engine.tokenizer("aENbEND!").input_ids
    sampling = Sampling(processor=force(tokens), stop="END", max_new_tokens=8)
    chunks = list(engine.stream(PROMPT, sampling))
    assert [chunk.text for chunk in chunks] == ["a", "", "", "ENb", "", "", ""]
    assert chunks[-1].generation is not None
    assert chunks[-1].generation.text == "aENb"
