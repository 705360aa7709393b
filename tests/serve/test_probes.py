"""Probes over HTTP: what the engine says offline, before the first token of a stream; guards answer nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from made_probes import random_probe
from running import running
from shoal import Engine, Guard, Sampling
from shoal.serve.config import ServeConfig

PROMPTS = ["the shoal turns as one", "q", "a guard reads every prompt, short or long"]


@pytest.fixture(scope="module")
def guarded(alone: Engine) -> tuple[Any, Guard]:
    """A probe that only labels, and a guard that stops some of the prompts."""
    probe = random_probe(alone, "gate", seed=4)
    done = alone.generate(PROMPTS, Sampling(max_new_tokens=1), probes=[probe])
    shares = sorted((one.labels or {})["gate"].probabilities["yes"] for one in done)
    return random_probe(alone, "attention"), Guard(probe=probe, stop_on=("yes",), threshold=(shares[1] + shares[2]) / 2)


@pytest.fixture(scope="module")
def asked(served: Engine, guarded: tuple[Any, Guard]) -> Iterator[OpenAI]:
    """A client of a server with both."""
    with (
        running(served, ServeConfig(model="tiny", max_tokens=200, probes=guarded)) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_labels_are_those_of_the_engine(asked: OpenAI, alone: Engine, guarded: tuple[Any, Guard]) -> None:
    """In one piece and streamed; prompts are read in chunks of 64 tokens there."""
    ours = alone.generate(PROMPTS, Sampling(max_new_tokens=5), probes=list(guarded))
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    for prompt, expected in zip(PROMPTS, ours, strict=True):
        answer = asked.completions.create(prompt=prompt, **body, extra_body={"probes": ["attention"]})
        (choice,) = answer.choices
        blocked = expected.finish_reason == "blocked"
        assert choice.finish_reason == ("content_filter" if blocked else expected.finish_reason)
        assert choice.text == expected.text
        assert answer.usage.shoal["probe_flops"] == expected.ledger.probe_flops
        events = list(
            asked.completions.create(prompt=prompt, **body, stream=True, extra_body={"probes": ["attention"]})
        )
        first = events[0].choices[0]
        assert first.text == ""
        assert all("labels" not in event.choices[0].model_extra for event in events[1:])
        for labels in (choice.labels, first.labels):
            assert expected.labels is not None
            assert labels.keys() == expected.labels.keys() == {"attention", "gate"}
            for name, label in expected.labels.items():
                assert labels[name]["label"] == label.label
                assert labels[name]["probabilities"] == pytest.approx(dict(label.probabilities), abs=1e-5)
                assert labels[name]["probe"] == label.probe
        assert "".join(event.choices[0].text for event in events) == expected.text
    assert sum(one.finish_reason == "blocked" for one in ours) == 1


def test_guards_read_what_did_not_ask(asked: OpenAI) -> None:
    chat = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": PROMPTS[0]}]}
    (choice,) = asked.chat.completions.create(**chat).choices  # type: ignore[call-overload]
    assert choice.labels.keys() == {"gate"}


def test_unknown_probes_are_refused(asked: OpenAI, client: OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "extra_body": {"probes": ["toxicity"]}}
    for where, known in ((asked, "loaded here: attention, gate"), (client, "this server has loaded none")):
        with pytest.raises(openai.BadRequestError, match=known) as refused:
            where.completions.create(**body)
        assert refused.value.param == "probes"
