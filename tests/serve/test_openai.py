"""OpenAI's client, unchanged: what it gets is what the engine gives to the same request alone."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from running import running
from shoal import Engine, Sampling, SkipDecode
from shoal.serve.config import ServeConfig
from shoal.signals.traces import read_traces

PROMPT = "the shoal turns as one"


def expected(engine: Engine, prompt: Any = PROMPT, depth: float | None = None, **sampling: Any) -> list[Any]:
    plan = None if depth is None else SkipDecode(depth=depth)
    return engine.generate(prompt, Sampling(**{"max_new_tokens": 20, "temperature": 1.0, **sampling}), plan)


def complete(client: OpenAI, prompt: Any = PROMPT, **body: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": 20, **body})


def test_completion(client: OpenAI, alone: Engine) -> None:
    """Greedy and sampled; tokens are counted."""
    for body, sampling in (({"temperature": 0}, {"temperature": 0.0}), ({"seed": 7}, {"seed": 7})):
        (ours,) = expected(alone, **sampling)
        answer = complete(client, **body)
        assert answer.choices[0].text == ours.text
        assert answer.choices[0].finish_reason == ours.finish_reason
        assert answer.usage.prompt_tokens == len(PROMPT)
        assert answer.usage.completion_tokens == len(ours.token_ids)


def test_every_sampling_parameter(client: OpenAI, alone: Engine) -> None:
    """Each changes what comes, as it changes it in the engine."""
    plain = expected(alone, seed=3)[0].text
    same = {"top_p": 0.5, "presence_penalty": 1.5, "frequency_penalty": 1.0}
    more = {"top_k": 3, "min_p": 0.2, "repetition_penalty": 1.3}
    renamed: list[tuple[dict[str, Any], dict[str, Any]]] = [
        *(({name: value}, {name: value}) for name, value in same.items()),
        *(({"extra_body": {name: value}}, {name: value}) for name, value in more.items()),
        ({"temperature": 0.3}, {"temperature": 0.3}),
        ({"logit_bias": {"65": 100}}, {"logit_bias": {65: 100.0}}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"stop": plain[4]}, {"stop": plain[4]}),
        ({"stop": ["nothing", plain[6:8]]}, {"stop": ("nothing", plain[6:8])}),
    ]
    for body, sampling in renamed:
        (ours,) = expected(alone, seed=3, **sampling)
        assert complete(client, seed=3, **body).choices[0].text == ours.text != plain, body


def test_several_prompts_and_samples(client: OpenAI, alone: Engine) -> None:
    """Texts or token ids; choice i of prompt p is number p n + i; prompts draw noise of their own."""
    for prompts in (["one", "one", "two"], [list(b"one"), list(b"one"), list(b"two")]):
        answer = complete(client, prompts, n=2, seed=5)
        ours = [g for i, p in enumerate(["one", "one", "two"]) for g in expected(alone, p, seed=5 + i, n=2)]
        if isinstance(prompts[0], str):
            assert [choice.text for choice in answer.choices] == [g.text for g in ours]
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert len({choice.text for choice in answer.choices}) == 6
    assert complete(client).choices[0].text != complete(client).choices[0].text, "no seed is another one each time"


@pytest.mark.parametrize("depth", [None, 0.5])
def test_streams(client: OpenAI, alone: Engine, depth: float | None) -> None:
    """Pieces add up to the text, usage comes last where asked for, layers are those of the plan."""
    extra: dict[str, Any] = {} if depth is None else {"depth": depth}
    extra["stream_options"] = {"include_usage": True, "include_layers": True}
    (ours,) = expected(alone, depth=depth, seed=1)
    pieces = list(complete(client, stream=True, seed=1, extra_body=extra))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == ours.text
    assert [p.choices[0].finish_reason for p in pieces[:-1] if p.choices[0].finish_reason] == [ours.finish_reason]
    layers = [count for piece in pieces[:-1] for count in piece.shoal["layers"]]
    assert layers == [4, *(ours.plan.depth(clock) for clock in range(len(ours.token_ids) - 1))]
    assert [token for piece in pieces[:-1] for token in piece.shoal["token_ids"]] == list(ours.token_ids)
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == len(ours.token_ids)
    assert pieces[-1].usage.shoal["mean_layers"] == pytest.approx(ours.ledger.mean_layers, abs=1e-3)
    assert all(piece.usage is None for piece in complete(client, stream=True, seed=1))


def test_what_it_cost(client: OpenAI, alone: Engine) -> None:
    """`usage.shoal` is the ledger."""
    (ours,) = expected(alone, depth=0.5, seed=2)
    spent = complete(client, seed=2, extra_body={"depth": 0.5}).usage.shoal
    assert spent["layers"] == 4
    assert spent["layer_tokens"] == ours.ledger.layer_tokens
    assert spent["layer_tokens_saved"] == ours.ledger.layer_tokens_saved > 0
    assert spent["flops"] == ours.ledger.prompt_flops + ours.ledger.decode_flops
    forecast = client.post(
        "/plan", body={"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "depth": 0.5}, cast_to=object
    )
    assert isinstance(forecast, dict)
    if len(ours.token_ids) == 20:
        assert forecast["layer_tokens"] == spent["layer_tokens"]
    assert forecast["dense_layer_tokens"] == 4 * (len(PROMPT) + 19)
    assert len(forecast["layers"]) == 20


def test_plans(client: OpenAI, alone: Engine) -> None:
    """A policy by name, layers one by one; and drafting, which changes nothing."""
    (ours,) = expected(alone, depth=0.5, seed=4)
    plans = [{"policy": "skipdecode", "depth": 0.5}, ours.plan.to_dict()]
    for plan in plans:
        assert complete(client, seed=4, extra_body={"plan": plan}).choices[0].text == ours.text
    for draft in ("auto", "self", "ngram", "suffix", "off"):
        answer = complete(client, seed=4, extra_body={"depth": 0.5, "draft": draft})
        assert answer.choices[0].text == ours.text
        assert (answer.usage.shoal["draft"] is None) == (draft == "off")


def test_logprobs(client: OpenAI, alone: Engine) -> None:
    """Of completions, with the prompt's where it comes back."""
    ours = expected(alone, seed=1, logprobs=3, prompt_logprobs=3, max_new_tokens=4)[0]
    answer = complete(client, seed=1, logprobs=3, echo=True, max_tokens=4).choices[0]
    assert answer.text == PROMPT + ours.text
    assert answer.logprobs.token_logprobs[0] is None
    scores = [one.logprob for one in (*ours.prompt_logprobs, *ours.logprobs)]
    assert answer.logprobs.token_logprobs[1:] == pytest.approx(scores, abs=1e-5)
    assert answer.logprobs.tokens[: len(PROMPT)] == list(PROMPT)
    assert answer.logprobs.text_offset[: len(PROMPT)] == list(range(len(PROMPT)))
    assert max(answer.logprobs.top_logprobs[1].values()) == pytest.approx(
        max(ours.prompt_logprobs[0].top.values()), abs=1e-5
    )
    looked = complete(client, logprobs=0, echo=True, max_tokens=0).choices[0]
    assert looked.text == PROMPT
    assert looked.logprobs.token_logprobs[1:] == pytest.approx(scores[: len(PROMPT) - 1], abs=1e-5)


def test_chat(client: OpenAI, alone: Engine) -> None:
    """The template's prompt; whole, streamed, with log-probabilities."""
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    (ours,) = expected(alone, "<system>be brief<user>hello<assistant>", seed=9, max_new_tokens=12, logprobs=2)
    body: dict[str, Any] = {"model": "tiny", "messages": messages, "seed": 9, "max_completion_tokens": 12}
    answer = client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == ours.text
    content = answer.choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in ours.logprobs], abs=1e-5)
    assert [len(one.top_logprobs) for one in content] == [2] * len(ours.token_ids)
    pieces = list(client.chat.completions.create(**body, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == ours.text


def test_asynchronous_clients_share_passes(url: str, alone: Engine) -> None:
    """Twelve at once on four slots, at depths of their own: each answer is that of the request alone."""
    depths = [None, 0.5, 0.75] * 4

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            calls = [
                client.completions.create(
                    model="tiny", prompt=PROMPT[:number], seed=number, max_tokens=20,
                    extra_body=None if depth is None else {"depth": depth},
                )
                for number, depth in enumerate(depths, start=1)
            ]  # fmt: skip
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    ours = [
        expected(alone, PROMPT[:number], depth, seed=number)[0].text for number, depth in enumerate(depths, start=1)
    ]
    assert asyncio.run(all_of_them()) == ours


def test_forms(client: OpenAI) -> None:
    """Whatever a random model would like to say, it says it in the form that was asked for; drafting included."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    body: dict[str, Any] = {"max_tokens": 60, "seed": 2}
    for draft in ("off", "suffix"):
        answer = complete(
            client,
            **body,
            n=2,
            extra_body={
                "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
                "draft": draft,
            },
        )
        for choice in answer.choices:
            value = json.loads(choice.text)
            assert set(value) == {"name", "age"}
            assert value["age"] in range(10)
    form: dict[str, Any] = {"type": "regex", "regex": "[ab]{3}-[0-9]{1,9}x"}
    text = complete(client, **body, extra_body={"response_format": form}).choices[0].text
    assert re.fullmatch(form["regex"], text)
    form = {"type": "choice", "choice": ["yes.", "no (never)"]}
    assert complete(client, **body, extra_body={"response_format": form}).choices[0].text in form["choice"]


def test_scores(client: OpenAI, alone: Engine) -> None:
    """One pass at full depth, token by token at less: with every layer both are the same."""
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "continuations": [" and", list(b" or not")]}
    dense: Any = client.post("/score", body=body, cast_to=object)
    stepwise: Any = client.post("/score", body=body | {"plan": {"cutoffs": [None] * 4}}, cast_to=object)
    (ours,) = alone.generate(PROMPT + " and", Sampling(max_new_tokens=1, prompt_logprobs=1))
    assert dense["data"][0]["logprob"] == pytest.approx(sum(one.logprob for one in ours.prompt_logprobs[-4:]), abs=1e-4)
    for one, other in zip(dense["data"], stepwise["data"], strict=True):
        assert one["token_logprobs"] == pytest.approx(other["token_logprobs"], abs=1e-4)
    assert [one["index"] for one in dense["data"]] == [0, 1]
    shallow: Any = client.post("/score", body=body | {"depth": 0.5}, cast_to=object)
    assert shallow["data"][0]["logprob"] != pytest.approx(dense["data"][0]["logprob"], abs=1e-3)


def test_scores_after_a_special_token() -> None:
    """shoal-e2e's prompts end with one: two continuations were cut to the same tokens once, their first ones lost."""
    engine = Engine.from_pretrained("shoal-e2e", max_batch=4, cache_gib=0.1)
    body = {"model": "m", "prompt": "name[Zizzi]", "continuations": ["Zizzi is near", "Clowns is near"]}
    with running(engine, ServeConfig(model="m")) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer: Any = client.post("/score", body=body, cast_to=object)
    right, wrong = answer["data"]
    assert engine.tokenizer.decode(right["tokens"]) == "Zizzi is near"
    assert right["logprob"] > wrong["logprob"] + 1


def test_forms_that_are_too_large() -> None:
    """The request gives up, soon: each token of it would keep the model's thread from everybody else's."""
    engine = Engine.from_pretrained("shoal-e2e", max_batch=1, cache_gib=0.1)
    body: dict[str, Any] = {"model": "m", "prompt": "name[Zizzi]"}
    form = {"response_format": {"type": "regex", "regex": "(a{500}){500}"}}
    with running(engine, ServeConfig(model="m")) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError, match=r"response_format.*too many"):
            client.completions.create(**body, extra_body=form)
        assert client.completions.create(**body).choices


def test_models_and_tokens(client: OpenAI, url: str) -> None:
    """The model by name, and text to tokens and back."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").shoal["num_layers"] == 4
    root = client.with_options(base_url=url)
    tokens: Any = root.post("/tokenize", body={"prompt": PROMPT}, cast_to=object)
    assert tokens["count"] == len(PROMPT)
    text: Any = root.post("/detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)
    assert text["prompt"] == PROMPT
    chat: Any = root.post("/tokenize", body={"messages": [{"role": "user", "content": "x"}]}, cast_to=object)
    assert chat["count"] == len("<user>x<assistant>")


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 201}, "max_tokens"),
    ({"prompt": "x" * 100, "max_tokens": 200}, "max_tokens"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, 99999]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, -1]}, "prompt[1]"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"65": 101}}, "logit_bias.65"),
    ({"presence_penalty": 1e300}, "presence_penalty"),
    ({"frequency_penalty": -101}, "frequency_penalty"),
    ({"extra_body": {"repetition_penalty": 5e-324}}, "repetition_penalty"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": ["a"] * 33}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": ["a", "b" * 257]}, "stop[1]"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"prompt": "x" * 10**6}, "prompt"),
    ({"extra_body": {"service_tier": "flex"}}, "service_tier"),
    ({"extra_body": {"metadata": {"a": "b"}}}, "metadata"),
    ({"extra_body": {"depth": 2}}, "depth"),
    ({"extra_body": {"depth": 0.01}}, "depth"),
    ({"extra_body": {"depth": 0.5, "plan": {"policy": "skipdecode"}}}, "plan"),
    ({"extra_body": {"plan": {"policy": "nosuch"}}}, "plan"),
    ({"extra_body": {"plan": {"cutoffs": [None, 0]}}}, "plan"),
    ({"extra_body": {"plan": {"cutoffs": [None, "x", 1, 2]}}}, "plan.cutoffs[1]"),
    ({"extra_body": {"draft": "/etc/passwd"}}, "draft"),
    ({"extra_body": {"draft": "trigram"}}, "draft"),
    ({"extra_body": {"tools": []}}, "tools"),
    ({"extra_body": {"response_format": {"type": "regex", "regex": "("}}}, "response_format"),
    ({"extra_body": {"response_format": {"type": "json_schema"}}}, "response_format.json_schema"),
    ({"extra_body": {"min_tokens": 30}}, "min_tokens"),
    ({"extra_body": {"timeout_s": 0}}, "timeout_s"),
]


CHAT_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_completion_tokens": 201}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 5}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 100}], "max_completion_tokens": 200}, "max_completion_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages"),
    ({"messages": []}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"store": True}, "store"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "none"}, "tool_choice"),
]


@pytest.mark.parametrize(("body", "param"), CHAT_REFUSED, ids=[str(body)[:60] for body, _ in CHAT_REFUSED])
def test_refusals_of_chats_name_the_field(client: OpenAI, body: dict[str, Any], param: str) -> None:
    """Among them what this server cannot do at all, with the reason."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": [{"role": "user", "content": "x"}], **body})
    assert (refused.value.param or "").startswith(param), refused.value.message
    if param.startswith("tool"):
        assert "calls no tools" in refused.value.message


def test_defaults_of_openai_are_no_reason_to_refuse(client: OpenAI) -> None:
    """Fields that say what holds anyway; and a conversation goes on with the message that came back."""
    harmless: dict[str, Any] = {
        "store": False, "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"], "max_tokens": 3, "seed": -1,
    }  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, **harmless)
    messages += [answer.choices[0].message, {"role": "user", "content": "y", "name": "z"}]
    assert client.chat.completions.create(model="tiny", messages=messages, **harmless).choices
    options: dict[str, Any] = {"include_usage": True, "include_obfuscation": False}
    pieces = list(complete(client, stream=True, stream_options=options, extra_body={"service_tier": "default"}))
    assert pieces[-1].usage is not None


@pytest.mark.parametrize("body", [{"n": 2}, {"prompt": ["a", "b"]}])
def test_a_plan_is_of_one_completion(client: OpenAI, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/plan", body={"model": "tiny", "prompt": "a", **body}, cast_to=object)
    assert refused.value.param == next(iter(body))


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[str(body)[:60] for body, _ in REFUSED])
def test_refusals_name_the_field(client: OpenAI, body: dict[str, Any], param: str | None) -> None:
    """400, and nothing runs."""
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **body)
    assert refused.value.param == param, refused.value.message
    assert refused.value.type == "invalid_request_error"
    assert len(refused.value.message) > 10


def test_unknown_models_and_paths(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        complete(client, model="gpt-9")
    assert refused.value.code == "model_not_found"
    assert "tiny" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match="JSON"):
        client.with_options(base_url=url).post("/v1/completions", content=b"{", cast_to=object)


def test_entropy_traces(client: OpenAI, alone: Engine, tmp_path: Path) -> None:
    """Beside the usage, of every completion, streamed or not; `shoal monitor` reads the response as it is."""
    ours = expected(alone, seed=3, n=2, entropy_top_k=20)
    answer = complete(client, seed=3, n=2, extra_body={"entropy": True})
    got = answer.usage.shoal["traces"]
    assert [len(one["nlls"]) for one in got] == [len(one.token_ids) for one in ours]
    for one, generation in zip(got, ours, strict=True):
        assert one["entropies"] == pytest.approx(generation.trace.entropies, abs=1e-4)
        assert one["g_nll"] == pytest.approx(generation.trace.g_nll, abs=1e-3)
    extra = {"entropy": True, "stream_options": {"include_usage": True}}
    pieces = list(complete(client, seed=3, n=2, stream=True, extra_body=extra))
    assert [len(one["nlls"]) for one in pieces[-1].usage.shoal["traces"]] == [len(one["nlls"]) for one in got]
    assert "traces" not in complete(client).usage.shoal
    path = tmp_path / "responses.jsonl"
    path.write_text(answer.model_dump_json() + "\n")
    assert [one.trace.nlls for one in read_traces(path)] == [tuple(one["nlls"]) for one in got]
