"""What the clients of `soak.py` send: a pool of honest requests, and mischief."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

HELD = re.compile(
    r"^shoal_(requests_unfinished|requests_running|requests_waiting|cache_bytes) (\S+)$", flags=re.MULTILINE
)
Request = tuple[str, dict[str, Any]]
"""Path and body."""
NAMES, FOODS = ("Clowns", "The Mill", "Blue Spice", "Zizzi", "Aromi"), ("Chinese", "French", "Italian", "English")


class Busy(Exception):
    """429."""


class Ask:
    """A client: what it gets of an answer is what has to be the same each time."""

    def __init__(self, address: str, model: str) -> None:
        self.address, self.model = address, model

    def __call__(self, request: Request) -> Any:
        """Texts and ends of completions, log-probabilities of scores to three digits. Raises `Busy`."""
        path, body = request
        status, content = exchange(self.address, path, json.dumps(body).encode())
        if status == 429:
            raise Busy
        assert status == 200, (request, content)
        if body.get("stream"):
            return streamed(content)
        answer = json.loads(content)
        if path == "/v1/score":
            return [(one["tokens"], one["greedy"], round(one["logprob"], 3)) for one in answer["data"]]
        return {choice["index"]: (choice["text"], choice["finish_reason"]) for choice in answer["choices"]}

    def metrics(self) -> dict[str, float]:
        """What the server has in hand, all of one moment."""
        content = exchange(self.address, "/metrics")[1].decode()
        return {name: float(value) for name, value in HELD.findall(content)}

    def threads(self, pid: int) -> int:
        """Threads of the server."""
        return len(list(Path(f"/proc/{pid}/task").iterdir()))


def exchange(address: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request; status and body."""
    with closing(http.client.HTTPConnection(address, timeout=600)) as connection:
        connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def streamed(content: bytes) -> dict[int, tuple[str, str]]:
    """The completions that a stream's events add up to."""
    events = re.findall(rb"^data: (.*)$", content, flags=re.MULTILINE)
    assert events[-1] == b"[DONE]", content[-200:]
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for event in map(json.loads, events[:-1]):
        assert "error" not in event, event
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                ends[choice["index"]] = choice["finish_reason"]
    return {index: (text, ends[index]) for index, text in texts.items()}


def pool(model: str, size: int, seed: int) -> list[Request]:
    """Honest requests: depths, plans, drafts, seeds, samples, forms, streams and scores, mixed."""
    rng = random.Random(seed)

    def prompt() -> str:
        return f"name[{rng.choice(NAMES)}], food[{rng.choice(FOODS)}], near[{rng.choice(NAMES)}]"[
            : rng.choice((12, 24, 99))
        ]

    def layers() -> dict[str, Any]:
        plans: list[dict[str, Any]] = [
            {}, {"depth": 0.5}, {"depth": 0.75}, {"depth": 1}, {"plan": {"policy": "skipdecode", "depth": 0.6}},
            {"plan": {"policy": "unified", "depth": 0.5}}, {"plan": {"policy": "early-termination", "depth": 0.5}},
        ]  # fmt: skip
        return rng.choice(plans)

    requests: list[Request] = []
    for _ in range(size):
        if rng.random() < 0.1:
            score = {"model": model, "prompt": prompt(), "continuations": [" a", " b c", " a"]}
            requests.append(("/v1/score", score | rng.choice(({}, {"depth": 0.75}))))
            continue
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt(),
            "max_tokens": rng.randint(1, 60),
            "seed": rng.randrange(100),
        }
        body |= layers() | {"temperature": rng.choice((0, 0, 0.7, 1.2)), "stream": rng.random() < 0.5}
        body |= rng.choice(
            ({}, {"draft": "off"}, {"draft": "ngram"}, {"draft": "suffix"}, {"draft": "self"}, {"draft": "auto"})
        )
        body |= rng.choice(
            ({}, {}, {"n": 2}, {"stop": ["."]}, {"top_p": 0.9, "top_k": 20}, {"repetition_penalty": 1.2})
        )
        if rng.random() < 0.1:
            body["response_format"] = {"type": "regex", "regex": "[a-f]{3} [0-9]{1,6}x"}
        requests.append(("/v1/completions", body))
    return requests


def long_requests(model: str, count: int) -> list[Request]:
    """Requests that run until the last token they may have, streamed and whole."""
    body = {"model": model, "prompt": "name[The Mill]", "max_tokens": 150, "ignore_eos": True, "temperature": 1}
    return [
        ("/v1/completions", body | {"seed": seed, "stream": seed % 2 == 0} | ({"depth": 0.5} if seed % 3 == 0 else {}))
        for seed in range(count)
    ]


# Mischief: each returns how the server took it, in a word.


def connect(address: str) -> socket.socket:
    """A connection without HTTP."""
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=60)


def head(length: int) -> bytes:
    """Of a POST whose body has `length` bytes."""
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def reply(line: socket.socket) -> str:
    """The status that comes, if one does."""
    answer = line.recv(15)
    return answer[9:12].decode("ascii", "replace") or "closed"


def vanish(address: str, model: str, rng: random.Random) -> str:
    """Go away in the middle of an answer, politely or not."""
    body = {"model": model, "prompt": "name[Zizzi]", "max_tokens": 200, "ignore_eos": True, "n": rng.choice((1, 3))}
    body |= {"stream": rng.random() < 0.7, "draft": rng.choice(("off", "suffix")), "depth": rng.choice((0.5, 1))}
    content = json.dumps(body).encode()
    with connect(address) as line:
        line.sendall(head(len(content)) + content)
        if body["stream"]:
            line.recv(rng.randint(1, 4000))
        time.sleep(rng.random() * 0.3)
        if rng.random() < 0.5:  # a reset instead of an end
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return "gone"


def hang(address: str, model: str, rng: random.Random) -> str:
    """Stop in the middle of a body, or a little before its end."""
    content = json.dumps({"model": model, "prompt": "x" * rng.randint(10, 5000)}).encode()
    with connect(address) as line:
        line.sendall(head(len(content)) + content[: rng.randrange(len(content))])
        if rng.random() < 0.3:
            return "gone"
        return reply(line)


def garbage(address: str, model: str, rng: random.Random) -> str:
    """No HTTP, no JSON, or none of ours."""
    bodies = (
        rng.randbytes(200),
        b"[" * 9000,
        b"null",
        b"{}",
        json.dumps({"model": model, "prompt": [[]]}).encode(),
        b'{"model": ',
    )
    content = rng.choice(bodies)
    with connect(address) as line:
        line.sendall(rng.choice((b"", head(len(content)), head(len(content)))) + content + b"\r\n\r\n")
        return reply(line)


def too_much(address: str, model: str, rng: random.Random) -> str:
    """More than there is."""
    asked: tuple[dict[str, Any], ...] = (
        {"n": 10**9}, {"max_tokens": 10**7}, {"prompt": "word " * 40_000}, {"prompt": "x" * 300_000}, {"logprobs": 10**4},
        {"depth": 1e-9}, {"stop": ["a"] * 1000},
        {"n": QUEUE_FILLING, "max_tokens": 60, "ignore_eos": True}, {"timeout_s": 0.02, "max_tokens": 200},
        {"response_format": {"type": "regex", "regex": "(a{500}){500}"}},
    )  # fmt: skip
    content = json.dumps({"model": model, "prompt": "name[Aromi]"} | rng.choice(asked)).encode()
    with suppress(ConnectionError, TimeoutError):
        return str(exchange(address, "/v1/completions", content)[0])
    return "cut off"


QUEUE_FILLING = 20
MISCHIEF: tuple[Callable[[str, str, random.Random], str], ...] = (vanish, vanish, hang, garbage, too_much)
