"""The same questions to the engine, to a real server, and to the model by hand."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from shoal import Dense, Sampling, SkipDecode
from shoal.errors import InvalidInput, LanguageModelError, NoLogprobs
from shoal.lm import ChatJob, Decoding, GenerateJob, LocalModel, Message, ScoreJob, Tool, load_model
from shoal.lm.engine_model import parse_calls
from shoal.lm.remote import RemoteLimits, RemoteModel

PROMPTS = ["the shoal turns", "as one", "a fish"]
JOBS = [
    ScoreJob(prompt="which of the two:", continuations=(" A", " B")),
    ScoreJob(prompt="which of the two:", continuations=(" Passage A", " Passage B")),
    ScoreJob(prompt="one", continuations=(" two three",)),
    ScoreJob(prompt="one", continuations=(" two", " three and four")),
]


def by_hand(local: LocalModel, prompt: str, continuation: str) -> float:
    """Log-probability of a continuation, from the engine's log-probabilities of a whole prompt."""
    text = prompt + continuation
    (done,) = local.engine.generate(text, Sampling(max_new_tokens=1, prompt_logprobs=1))
    assert done.prompt_logprobs is not None
    return sum(one.logprob for one in done.prompt_logprobs[len(prompt) - 1 :])


def test_local_scores_equal_whole_prompts(local: LocalModel) -> None:
    """Labels from one pass, shared tokens, and longer continuations."""
    for job, scores in zip(JOBS, local.score(JOBS), strict=True):
        wanted = [by_hand(local, str(job.prompt), continuation) for continuation in job.continuations]
        assert scores.logprobs == pytest.approx(wanted, abs=1e-4)
        passes = 1 if len({one[:-1] for one in job.continuations}) == 1 else len(job.continuations)
        assert scores.usage.calls == passes
        assert scores.usage.ledger is not None
        assert scores.usage.prompt_tokens == scores.usage.ledger.prompt_tokens


def test_one_call_or_none(local: LocalModel, remote: RemoteModel) -> None:
    """Labels of a token each take one, what a server does not tell lies below its floor; others are refused, or told of as None."""
    labels = ScoreJob(prompt="which:", continuations=("A", "B", "z"), one_call=True)
    (ours,), (theirs,) = local.score([labels]), remote.score([labels])
    assert ours.usage.calls == theirs.usage.calls == 1
    assert theirs.floor is not None
    assert ours.floor is None
    for exact, told in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert exact is not None
        assert exact <= theirs.floor + 1e-4 if told is None else told == pytest.approx(exact, abs=1e-4)
    words = ScoreJob(prompt="which:", continuations=(" two", " three"), one_call=True)
    with pytest.raises(InvalidInput, match="cannot score ' two', ' three' in one pass"):
        local.score([words])
    (theirs,) = remote.score([words])
    assert (theirs.logprobs, theirs.usage.calls) == ((None, None), 1)


def test_continuations_follow_what_the_tokenizer_appends(directory: Path, tmp_path: Path) -> None:
    """Where every prompt ends in a separator, generation goes on behind it; so do scores, still in one pass."""
    shutil.copytree(directory, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    model = LocalModel.from_pretrained(tmp_path / "model", max_batch=4, cache_gib=0.2)
    (scores,) = model.score([ScoreJob(prompt="which:", continuations=(" A", " B"), one_call=True)])
    ids = {letter: tokenizer.encode(letter, add_special_tokens=False).ids for letter in ("which:", " A", " B")}
    for letter, logprob in zip((" A", " B"), scores.logprobs, strict=True):
        whole = [*ids["which:"], end, *ids[letter]]
        (done,) = model.engine.generate([whole], Sampling(max_new_tokens=1, prompt_logprobs=1))
        assert done.prompt_logprobs is not None
        assert logprob == pytest.approx(sum(one.logprob for one in done.prompt_logprobs[-2:]), abs=1e-4)


def test_answers_that_are_none() -> None:
    """A server of something else is named, whatever it says."""
    for body in ({"choices": [{"index": 0}]}, {"choices": 5}, {"answer": 42}):
        with answering((200, body)) as (url, _), pytest.raises(LanguageModelError, match=r"answered"):
            RemoteModel(url, "m").score(JOBS[:1])
    for address in ("http://127.0.0.1:port/v1", "http://[::1/v1", "localhost:8000"):
        with pytest.raises(InvalidInput, match="no address of a server"):
            RemoteModel(address, "m")


def test_remote_equals_local(local: LocalModel, remote: RemoteModel) -> None:
    """Texts, chats and scores; a label that the server does not tell is asked for by `echo`."""
    decoding = Decoding(max_new_tokens=12, stop=("zz",))
    jobs = [GenerateJob(prompt=prompt, decoding=decoding) for prompt in PROMPTS]
    for ours, theirs in zip(local.generate(jobs), remote.generate(jobs), strict=True):
        assert (ours.text, ours.usage.prompt_tokens, ours.usage.new_tokens) == (
            theirs.text, theirs.usage.prompt_tokens, theirs.usage.new_tokens,
        )  # fmt: skip
    chats = [ChatJob(messages=(Message(role="user", content=prompt),), decoding=decoding) for prompt in PROMPTS]
    assert [one.text for one in local.chat(chats)] == [one.text for one in remote.chat(chats)]
    for ours, theirs in zip(local.score(JOBS), remote.score(JOBS), strict=True):
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-3)


def test_chat_scores_read_the_turn(local: LocalModel, remote: RemoteModel) -> None:
    """Labels of a conversation come after the template's opening of the assistant's turn."""
    turn = (Message(role="user", content="A or B?"),)
    (ours,) = local.score([ScoreJob(prompt=turn, continuations=("A", "B"))])
    wanted = [by_hand(local, "<user>A or B?<assistant>", label) for label in "AB"]
    assert ours.logprobs == pytest.approx(wanted, abs=1e-4)
    (told,) = remote.score([ScoreJob(prompt=turn, continuations=("A", "B"))])
    for our, their in zip(ours.logprobs, told.logprobs, strict=True):
        assert their is None or their == pytest.approx(our, abs=1e-3)


def test_plan_changes_text_and_name(local: LocalModel) -> None:
    """Depth acts on generated tokens, and answers at another depth are another model's."""
    shallow = LocalModel(local.engine, name=local.name, plan=SkipDecode(depth=1 / 2, horizon=8))
    assert shallow.name != local.name == LocalModel(local.engine, name=local.name, plan=Dense()).name
    (done,) = shallow.generate([GenerateJob(prompt="the shoal", decoding=Decoding(max_new_tokens=8))])
    assert done.usage.ledger is not None
    assert done.usage.ledger.decode_layer_tokens < done.usage.ledger.dense_decode_layer_tokens


def test_tools(local: LocalModel) -> None:
    """Tools reach the template; calls are read out of the text, and what is no call stays there."""
    tool = Tool(name="add", description="adds", parameters={"type": "object"})
    job = ChatJob(messages=(Message(role="user", content="x"),), tools=(tool,), decoding=Decoding(max_new_tokens=1))
    (reply,) = local.chat([job])
    assert reply.usage.prompt_tokens == len("[add]<user>x<assistant>")
    text, calls = parse_calls(
        'a <tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call> b <tool_call>{x}</tool_call>'
    )
    assert text == "a  b <tool_call>{x}</tool_call>"
    assert [(call.name, dict(call.arguments)) for call in calls] == [("add", {"x": 1})]


def test_cut(local: LocalModel, remote: RemoteModel) -> None:
    """By tokens here (a byte each), by words without a tokenizer."""
    assert (local.cut("the shoal turns", 9).text, local.cut("the", 3).was_cut) == ("the shoal", False)
    cut = remote.cut("the shoal turns as one", 3)
    assert (cut.text, cut.was_cut) == ("the shoal turns", True)


@contextmanager
def answering(*script: tuple[int, dict[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    """A server that gives the answers of `script` in turn, the last one for ever; and when it was asked."""
    asked: list[float] = []

    class Scripted(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = script[min(len(asked), len(script) - 1)]
            asked.append(time.monotonic())
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(content)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str = "x", logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    return {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def test_dropped_logprobs_are_loud() -> None:
    """A server that ignores `logprobs` is named, with what to do; so is one that refuses."""
    said = r"without the log-probabilities.*mode='generate'"
    with answering((200, completion())) as (url, _), pytest.raises(NoLogprobs, match=said):
        RemoteModel(url, "m").score(JOBS[:1])
    refusal, said = {"error": {"message": "logprobs are not supported"}}, r"answered 400.*logprobs are not supported"
    with answering((400, refusal)) as (url, _), pytest.raises(LanguageModelError, match=said):
        RemoteModel(url, "m").score(JOBS[:1])


def test_retries_then_answers_and_gives_up() -> None:
    """429 and 500 are tried again; what lasts is an error that names the server."""
    busy = (429, {"error": {"message": "busy"}})
    job = GenerateJob(prompt="p", decoding=Decoding(max_new_tokens=1))
    with answering(busy, (500, {}), (200, completion("done"))) as (url, asked):
        (reply,) = RemoteModel(url, "m").generate([job])
        assert (reply.text, len(asked)) == ("done", 3)
    with answering(busy) as (url, asked):
        with pytest.raises(LanguageModelError, match="answered 429"):
            RemoteModel(url, "m", limits=RemoteLimits(max_retries=1)).generate([job])
        assert len(asked) == 2
    with pytest.raises(LanguageModelError, match="cannot be reached, tried 1 times"):
        RemoteModel("http://127.0.0.1:9/v1", "m", limits=RemoteLimits(max_retries=0)).generate([job])


def test_failure_midway_keeps_what_came() -> None:
    """Answers before the failure are told of, each once."""
    came: list[int] = []
    jobs = [GenerateJob(prompt=str(number)) for number in range(5)]
    with answering((200, completion()), (200, completion()), (400, {"error": {"message": "no"}})) as (url, _):
        model = RemoteModel(url, "m", limits=RemoteLimits(concurrency=1))
        with pytest.raises(LanguageModelError):
            model.generate(jobs, on_done=lambda place, reply: came.append(place))
    assert came == [0, 1]


def test_rate_limit() -> None:
    """Requests begin no faster than they may."""
    jobs = [GenerateJob(prompt=str(number)) for number in range(4)]
    with answering((200, completion())) as (url, asked):
        RemoteModel(url, "m", limits=RemoteLimits(max_requests_per_s=20)).generate(jobs)
    assert max(asked) - min(asked) >= 3 / 20 - 0.03


def test_labels_with_spaces_around() -> None:
    """A label's probability is that of all its spellings among the top tokens."""
    top = {" A": math.log(0.5), "A": math.log(0.25), "B": math.log(0.125)}
    told = {"tokens": [" A"], "token_logprobs": [-0.1], "top_logprobs": [top], "text_offset": [0]}
    with answering((200, completion(logprobs=told))) as (url, _):
        (scores,) = RemoteModel(url, "m").score([ScoreJob(prompt="p", continuations=(" A ", " B"))])
    assert scores.logprobs == pytest.approx((math.log(0.75), math.log(0.125)))


def test_bad_input(local: LocalModel) -> None:
    """Refused by name."""
    with pytest.raises(InvalidInput, match="names no model"):
        load_model("http://localhost:1/v1")
    with pytest.raises(InvalidInput, match="continuations"):
        ScoreJob(prompt="p", continuations=())
    with pytest.raises(InvalidInput, match="concurrency"):
        RemoteLimits(concurrency=0)
    with pytest.raises(InvalidInput, match="max_new_tokens"):
        Decoding(max_new_tokens=0)
