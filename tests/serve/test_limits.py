"""Keys, bodies, full queues, deadlines, clients that vanish, and what fails alone."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from openai import OpenAI

from running import running
from shoal import Engine, Sampling
from shoal.errors import InvalidInput
from shoal.serve.config import ServeConfig
from shoal.serve.fair import FairShares
from shoal.serve.limits import holder, read_keys

LONG: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 200, "extra_body": {"ignore_eos": True}}


class Gate:
    """Stops the engine before a pass while it is closed."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        step = engine.step

        def gated() -> Any:
            assert self.open.wait(60), "nobody opened the gate"
            return step()

        monkeypatch.setattr(engine, "step", gated)


@pytest.fixture
def gate(served: Engine, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(served, monkeypatch)


@pytest.fixture
def serve(served: Engine) -> Iterator[Callable[..., str]]:
    """Start a server with options of its own over the module's engine."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            running(served, ServeConfig(model="tiny", max_tokens=200, **options))
        )
    assert is_idle(served)


CLIENTS: list[OpenAI] = []


@pytest.fixture(autouse=True)
def close_clients() -> Iterator[None]:
    """Their connections end with the test."""
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def client_of(url: str, key: str = "none") -> OpenAI:
    CLIENTS.append(OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
    return CLIENTS[-1]


def fetch(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of one request; a POST where it has a body."""
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        encoded = {name.replace("_", "-"): value.encode() for name, value in headers.items()}
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, encoded, encode_chunked=not isinstance(body, bytes | None))
        answer = connection.getresponse()
        return answer.status, answer.read()


def answered(line: socket.socket) -> tuple[int, bytes]:
    """Status and body of what comes over a bare connection."""
    answer = http.client.HTTPResponse(line)
    answer.begin()
    with closing(answer):
        return answer.status, answer.read()


def is_idle(engine: Engine) -> bool:
    """Every slot and block is free."""
    cache = engine.runner.cache
    return not engine.has_work and cache.blocks_in_use == 0 and len(cache.free_slots) == cache.num_slots


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    ends_at = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends_at, "it did not come"
        time.sleep(0.005)


def connect(url: str) -> socket.socket:
    """A connection without HTTP."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=60)


def head(length: int, path: str = "/v1/completions") -> bytes:
    """The head of a POST whose body has `length` bytes."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def test_keys(serve: Callable[..., str]) -> None:
    """With keys, every path but the page's and the probes' wants one."""
    url = serve(api_keys={"alice": "sk-one", "bob": "sk-two"})
    for key in ("sk-one", "sk-two"):
        assert client_of(url, key).completions.create(model="tiny", prompt="a", max_tokens=1).choices
    for key in ("sk-three", "sk-on", "", "sk-öne"):
        status, answer = fetch(url, "/v1/completions", b"{}", authorization=f"Bearer {key}")
        assert status == 401
        assert json.loads(answer)["error"]["code"] == "invalid_api_key"
    for path, status in (
        ("/health", 200),
        ("/ready", 200),
        ("/", 200),
        ("/metrics", 401),
        ("/v1/models", 401),
        ("/page/x", 404),
    ):
        assert (fetch(url, path)[0], path) == (status, path)


def test_key_files() -> None:
    assert read_keys("# ours\nsk-one\n\nalice sk-two # until May\n") == {"key 2": "sk-one", "alice": "sk-two"}
    for text in ("", "# none", "a b c", "sk-one\nsk-one", "a k1\na k2"):
        with pytest.raises(InvalidInput):
            read_keys(text)
    assert holder({"a": "one", "b": "two"}, "two") == "b"
    assert holder({"a": "one"}, "") is None


@pytest.mark.parametrize("announced", [True, False])
def test_bodies_that_are_too_long(serve: Callable[..., str], announced: bool) -> None:
    """Whether the client says so or just goes on."""
    url = serve(max_body_bytes=1000)
    body = json.dumps({"model": "tiny", "prompt": "x" * 2000}).encode()
    content: Any = body if announced else iter([body[:900], body[900:]])
    more = {} if announced else {"transfer_encoding": "chunked"}
    status, answer = fetch(url, "/v1/completions", content, content_type="application/json", **more)
    assert status == 413
    assert json.loads(answer)["error"]["code"] == "body_too_long"


def test_bodies_that_never_end(serve: Callable[..., str]) -> None:
    """They are told so in time, and what others ask goes on."""
    url = serve(body_timeout_s=0.2)
    with connect(url) as hanging:
        hanging.sendall(head(100) + b'{"model": ')
        assert client_of(url).completions.create(model="tiny", prompt="a", max_tokens=2).choices
        assert answered(hanging)[0] == 408


def test_garbage(serve: Callable[..., str]) -> None:
    """Bytes, JSON that is none of ours, numbers that are none, depths of nesting: refused, each with a reason."""
    url = serve()
    bodies = [
        b"\x00\xff\xfe", b"[]", b"null", b'"x"', b"{}", b'{"model": 1}', b"[" * 50_000, b'{"a":' * 50_000,
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b'{"model": "tiny", "prompt": "a", "seed": 1e400}',
        b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "tiny", "prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ]  # fmt: skip
    for body in bodies:
        with connect(url) as line:
            line.sendall(head(len(body)) + body)
            status, answer = answered(line)
            assert status == 400, (body[:50], answer)
            assert json.loads(answer)["error"]["message"]
    with connect(url) as line:
        line.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert answered(line)[0] == 400


def test_a_full_queue(serve: Callable[..., str], served: Engine, gate: Gate) -> None:
    """429, with when to come again; what was taken is answered."""
    url = serve(max_queue=2)
    gate.open.clear()
    answers: list[Any] = []

    def ask() -> None:
        answers.append(client_of(url).completions.create(**LONG))

    threads = [threading.Thread(target=ask) for _ in range(served.runner.cache.num_slots + 2)]
    for thread in threads:
        thread.start()

    def full() -> bool:
        return fetch(url, "/ready")[0] == 503

    until(full)
    with pytest.raises(openai.RateLimitError) as refused:
        client_of(url).completions.create(**LONG)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert refused.value.code == "queue_full"
    gate.open.set()
    for thread in threads:
        thread.join(60)
    assert [len(answer.choices) for answer in answers] == [1] * len(threads)
    assert not full()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish(
    serve: Callable[..., str], served: Engine, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their slots are free after the pass that was under way when the server heard of it."""
    url, passes, heard = serve(), [], []
    step = served.step
    slow = threading.Event()

    def counted() -> Any:
        passes.append(len(served.runner.slots.running))
        if slow.is_set():
            time.sleep(0.02)
        return step()

    cancel = served.cancel
    monkeypatch.setattr(served, "step", counted)
    monkeypatch.setattr(served, "cancel", lambda request_id: [heard.append(len(passes)), cancel(request_id)])
    slow.set()
    body = json.dumps(
        {"model": "tiny", "prompt": "abc", "max_tokens": 200, "ignore_eos": True, "stream": stream}
    ).encode()
    with connect(url) as line:
        line.sendall(head(len(body)) + body)
        until(lambda: bool(served.runner.slots.running))
        if stream:
            assert line.recv(1)
    until(lambda: is_idle(served))
    slow.clear()
    assert len(heard) == 1
    assert len(passes) <= heard[0] + 1 < 150, "one call of `step` ends it, and runs no pass of it"


def test_deadlines(serve: Callable[..., str], served: Engine) -> None:
    """A request's own, below the server's; a stream says so in an event."""
    url = serve()
    body = LONG | {"extra_body": {"ignore_eos": True, "timeout_s": 1e-9}}
    with pytest.raises(openai.InternalServerError) as late:
        client_of(url).completions.create(**body)
    assert (late.value.status_code, late.value.code) == (504, "timeout")
    with pytest.raises(openai.APIError, match="out of time"):
        list(client_of(url).completions.create(**body, stream=True))


def test_a_request_that_fails_ends_alone(
    serve: Callable[..., str], served: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are not finite in one row of a shared pass."""
    url = serve()
    decoder = served.runner.decoder
    first = threading.Event()

    def broken(work: Any, cache: Any) -> torch.Tensor:
        logits = decoder(work, cache).clone()
        if 66 in work.token_ids and len(work.logit_tokens) > 1:
            first.set()
        row = next((i for i, token in enumerate(work.logit_tokens) if work.token_ids[token] == 66), None)
        if row is not None:
            logits[row] = torch.nan
        return logits

    monkeypatch.setattr(served.runner, "decoder", Proxy(decoder, broken))
    fine, bad = list(b"aaa"), [66]
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client_of(url).completions.create(model="tiny", prompt=bad, max_tokens=5, seed=0)
    answer = client_of(url).completions.create(
        model="tiny", prompt=fine, max_tokens=5, temperature=0, extra_body={"logit_bias": {"66": -100}}
    )
    assert len(answer.choices) == 1


class Proxy:
    """A decoder whose passes go through `call`."""

    def __init__(self, decoder: Any, call: Callable[..., torch.Tensor]) -> None:
        self._decoder, self._call = decoder, call

    def __call__(self, work: Any, cache: Any) -> torch.Tensor:
        return self._call(work, cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def test_a_pass_that_raises(serve: Callable[..., str], served: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was in it hears of it, whole or streamed; the next request runs as ever."""
    url = serve()
    step, broken = served.step, threading.Event()

    def failing() -> Any:
        if broken.is_set():
            broken.clear()
            raise MemoryError("no room")
        return step()

    monkeypatch.setattr(served, "step", failing)
    broken.set()
    with pytest.raises(openai.InternalServerError, match="log"):
        client_of(url).completions.create(**LONG)
    until(lambda: is_idle(served))
    broken.set()
    with pytest.raises(openai.APIError, match="log"):
        list(client_of(url).completions.create(**LONG, stream=True))
    assert client_of(url).completions.create(**LONG).usage.completion_tokens == 200


def test_logs_hold_no_text(serve: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    """Who, how much and how deep; nothing of what was said."""
    caplog.set_level(logging.DEBUG)
    url = serve(api_keys={"alice": "sk-one"})
    answer = client_of(url, "sk-one").completions.create(
        model="tiny", prompt="a very private matter", max_tokens=30, user="u\n1", seed=3
    )
    until(lambda: "key='alice'" in caplog.text)
    assert r"user='u\n1'" in caplog.text
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("shoal"))
    assert "private" not in ours
    assert answer.choices[0].text[:10] not in ours
    assert "sk-one" not in ours


def test_fair_shares() -> None:
    """Alternating keys of equal cost, a dear one less often; a pause gives no claim. The example of `fair.py`."""
    engine_request = lambda cost: _Request(cost)  # noqa: E731
    shares = FairShares()
    tags = [shares.tag(key, engine_request(10)) for key in "aaabb"]  # type: ignore[arg-type]
    assert tags == [0, 10, 20, 0, 10]
    order = sorted(range(5), key=lambda i: tags[i])
    assert ["aaabb"[i] for i in order] == ["a", "b", "a", "b", "a"]
    late = engine_request(10)
    late.priority = 20.0
    shares.served(late)  # type: ignore[arg-type]
    assert shares.tag("c", engine_request(1)) == 20.0  # type: ignore[arg-type]


class _Request:
    """As much of a request as costs tell of: one layer, a prompt of `cost` tokens, one new token."""

    def __init__(self, cost: int) -> None:
        self.prompt = (0,) * cost
        self.sampling = Sampling(max_new_tokens=1)
        self.plan = type("OneLayer", (), {"runs_prompt": (True,), "cutoffs": (2**31 - 1,)})
        self.priority = 0.0


def test_one_key_does_not_crowd_out_another(serve: Callable[..., str], served: Engine, gate: Gate) -> None:
    """Twelve requests of one key wait when another's first one comes: it is among the next."""
    url = serve(api_keys={"many": "k1", "one": "k2"})
    gate.open.clear()
    ended: list[str] = []

    def ask(key: str, name: str) -> None:
        client_of(url, key).completions.create(
            model="tiny", prompt="abc", max_tokens=20, extra_body={"ignore_eos": True}
        )
        ended.append(name)

    threads = [threading.Thread(target=ask, args=("k1", "many")) for _ in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: metric(url, "k1", "shoal_requests_unfinished") == 12)
    last = threading.Thread(target=ask, args=("k2", "one"))
    last.start()
    until(lambda: metric(url, "k1", "shoal_requests_unfinished") == 13)
    gate.open.set()
    for thread in (*threads, last):
        thread.join(60)
    assert ended.index("one") <= 8, ended


def metric(url: str, key: str, name: str) -> float:
    """A gauge by its name."""
    lines = fetch(url, "/metrics", authorization=f"Bearer {key}")[1].decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def test_metrics(serve: Callable[..., str]) -> None:
    """Counted once, layers run and saved with them."""
    url = serve()
    answer = client_of(url).completions.create(
        model="tiny", prompt="abcd", max_tokens=9, extra_body={"ignore_eos": True, "depth": 0.5}
    )
    spent = answer.usage.shoal
    names = {
        'shoal_tokens_total{kind="prompt"}': 4,
        'shoal_tokens_total{kind="new"}': 9,
        'shoal_layer_tokens_total{kind="run"}': spent["layer_tokens"],
        'shoal_layer_tokens_total{kind="saved"}': spent["layer_tokens_saved"],
        'shoal_requests_total{finish_reason="length"}': 1,
        "shoal_first_token_seconds_count": 1,
        "shoal_token_seconds_count": 8,
        "shoal_requests_running": 0,
        "shoal_cache_bytes": 0,
    }
    for name, value in names.items():
        assert metric(url, "", name) == value, name


def test_config() -> None:
    for options in (
        {"min_depth": 0},
        {"max_tokens": 0},
        {"max_queue": -1},
        {"timeout_s": float("inf")},
        {"body_timeout_s": 0},
    ):
        with pytest.raises(InvalidInput, match=next(iter(options))):
            ServeConfig(model="m", **options)  # type: ignore[arg-type]


def test_no_chat_template(tmp_path: Path) -> None:
    """A checkpoint that says nothing of turns completes, and refuses to chat with the reason."""
    from families import save, tiny_model

    engine = Engine.from_pretrained(save(tiny_model("gpt2"), tmp_path), max_batch=2, cache_gib=0.1)
    with running(engine, ServeConfig(model="tiny")) as url:
        assert client_of(url).models.retrieve("tiny").shoal["chat"] is False
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client_of(url).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])


def test_more_completions_than_will_ever_fit(serve: Callable[..., str]) -> None:
    """Refused before any is made, whatever they are made of."""
    url = serve(max_queue=3)
    bodies: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", {"prompt": "a", "n": 10**9}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 4, "n": 2}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 200_000}, "prompt"),
        ("/v1/score", {"prompt": "a", "continuations": ["b"] * 200_000}, "continuations"),
    ]
    for path, body, param in bodies:
        status, answer = fetch(
            url, path, json.dumps({"model": "tiny", **body}).encode(), content_type="application/json"
        )
        assert (status, json.loads(answer)["error"]["param"]) == (400, param)
