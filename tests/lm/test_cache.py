"""Answers on the disk: nothing lost, torn or paid for twice, whatever dies and whoever writes."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.errors import InvalidInput, LanguageModelError
from shoal.lm import (
    AnswerCache,
    CachedModel,
    ChatJob,
    Decoding,
    GenerateJob,
    Message,
    Reply,
    ScoreJob,
    Scores,
    ScriptedModel,
    ToolCall,
    Usage,
)
from shoal.lm.cache import key_of
from shoal.lm.contract import OnDone
from shoal.rank.prompted import preferences

WORKER = """
import os, random, sys, time
from shoal.lm import AnswerCache, CachedModel, GenerateJob, ScriptedModel

path, log, seed, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def answer(job):
    with open(log, "ab", buffering=0) as file:  # one write: paid for
        file.write((job.prompt + "\\n").encode())
    time.sleep(pause)
    return "answer to " + job.prompt

model = CachedModel(ScriptedModel(generate=answer), AnswerCache(path))
numbers = list(range(NUM))
random.Random(seed).shuffle(numbers)
for start in range(0, len(numbers), 8):
    batch = numbers[start : start + 8]
    replies = model.generate([GenerateJob(prompt=str(n)) for n in batch])
    assert [r.text for r in replies] == [f"answer to {n}" for n in batch]
print("done")
"""


def start(cache: Path, log: Path, seed: int, *, num: int, pause: float = 0.0) -> subprocess.Popen[str]:
    code = WORKER.replace("NUM", str(num))
    command = [sys.executable, "-c", code, str(cache), str(log), str(seed), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(worker: subprocess.Popen[str]) -> None:
    out, err = worker.communicate(timeout=120)
    assert (worker.returncode, out) == (0, "done\n"), err


def test_four_writers_pay_once(tmp_path: Path) -> None:
    """Four processes want the same 200 answers in different orders: each is paid for once, and all are there."""
    cache, log = tmp_path / "answers", tmp_path / "paid"
    workers = [start(cache, log, seed, num=200, pause=0.001) for seed in range(4)]
    for worker in workers:
        finish(worker)
    paid = Counter(log.read_text().split())
    assert paid == Counter(map(str, range(200)))
    assert len(AnswerCache(cache)) == 200


def test_kill_9(tmp_path: Path) -> None:
    """Processes are killed in the middle of calls, others go on. Every answer that is there is whole. A call is paid for again only
    where a process was killed between paying and writing: at most the one call of each that was under way."""
    cache, log = tmp_path / "answers", tmp_path / "paid"
    kills = 3
    for seed in range(kills):
        worker = start(cache, log, seed, num=100, pause=0.01)
        before = len(log.read_text().split()) if log.exists() else 0
        while not log.exists() or len(log.read_text().split()) < before + 10:
            assert worker.poll() is None
            time.sleep(0.005)
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
        kept = len(AnswerCache(cache))
        paid = len(log.read_text().split())
        assert paid - (seed + 1) <= kept <= paid
    finish(start(cache, log, 9, num=100))
    assert len(AnswerCache(cache)) == 100
    counts = Counter(log.read_text().split())
    assert set(counts) == set(map(str, range(100)))
    assert sum(counts.values()) - 100 <= kills
    connection = sqlite3.connect(cache)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_threads_pay_once(tmp_path: Path) -> None:
    """Claims hold between threads of one process, too."""
    script = ScriptedModel(generate=lambda job: job.prompt.upper())
    models = [CachedModel(script, AnswerCache(tmp_path / "answers")) for _ in range(4)]
    jobs = [GenerateJob(prompt=letter) for letter in "abcdefgh"]
    threads = [threading.Thread(target=model.generate, args=(jobs,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(script.asked) == len(jobs)


def test_every_kind_comes_back(tmp_path: Path) -> None:
    """Replies, tool calls, scores with gaps; a kept answer is marked as not paid for, and told of like a fresh one."""
    call = Reply(
        text="", finish_reason="tool_calls", usage=Usage(calls=1, paid_calls=1, prompt_tokens=2),
        tool_calls=(ToolCall(name="f", arguments={"x": [1, None]}, id="c"),),
    )  # fmt: skip
    script = ScriptedModel(generate=lambda job: "é\u2028", score=lambda job: [-0.5, None], chat=lambda job: call)
    model = CachedModel(script, AnswerCache(tmp_path / "answers"))
    chat = ChatJob(messages=(Message(role="user", content="p"),))
    score = ScoreJob(prompt="p", continuations=("a", "b"))
    for ask, job in ((model.generate, GenerateJob(prompt="p")), (model.chat, chat), (model.score, score)):
        heard: list[int] = []
        first, twin = ask([job, job], on_done=lambda place, answer, heard=heard: heard.append(place))  # type: ignore[operator]
        (again,) = ask([job])  # type: ignore[operator]
        assert sorted(heard) == [0, 1]
        assert first.usage.paid_calls == 1
        assert again == twin == replace(first, usage=replace(first.usage, paid_calls=0))
    assert len(script.asked) == 3


def test_a_floor_comes_back(tmp_path: Path) -> None:
    """Of a label that a server does not tell it is known to lie below the others, from the cache, too."""

    class Server(ScriptedModel):
        def score(self, jobs: Sequence[ScoreJob], *, on_done: OnDone[Scores] | None = None) -> list[Scores]:
            return [Scores(logprobs=(-0.5, None), usage=Usage(calls=1, paid_calls=1), floor=-4.0) for _ in jobs]

    job = ScoreJob(prompt="p", continuations=("a", "b"), one_call=True)
    answers = [CachedModel(Server(), AnswerCache(tmp_path / "answers")).score([job])[0] for _ in range(2)]
    assert [one.usage.paid_calls for one in answers] == [1, 0]
    assert [preferences(one) for one in answers] == [(-0.5, -4.0)] * 2


def test_what_is_another_question(tmp_path: Path) -> None:
    """Model, template, prompt and every parameter are part of the key."""
    cache = AnswerCache(tmp_path / "answers")
    job = GenerateJob(prompt="p")
    others = [
        replace(job, prompt="q"),
        replace(job, template="pair 2"),
        replace(job, decoding=Decoding(seed=1)),
        replace(job, decoding=Decoding(max_new_tokens=5)),
    ]
    script = ScriptedModel(generate=lambda job: "x")
    CachedModel(script, cache).generate([job, *others])
    CachedModel(ScriptedModel(generate=lambda job: "y", name="other"), cache).generate([job])
    assert len(cache) == len(script.asked) + 1 == 6
    assert key_of(a=1) != key_of(a="1")


def test_failure_midway_is_resumed(tmp_path: Path) -> None:
    """A server goes away after 3 of 8 calls: the rest is asked for later, and nothing twice."""
    jobs = [GenerateJob(prompt=letter) for letter in "abcdefgh"]
    cache = AnswerCache(tmp_path / "answers")
    dying = ScriptedModel(generate=lambda job: "x", fail_after=3)
    with pytest.raises(LanguageModelError):
        CachedModel(dying, cache).generate(jobs)
    healthy = ScriptedModel(generate=lambda job: "x")
    replies = CachedModel(healthy, cache).generate(jobs)
    assert (len(dying.asked), len(healthy.asked)) == (3, 5)
    assert sum(reply.usage.paid_calls for reply in replies) == 5


def test_not_a_cache(tmp_path: Path) -> None:
    """Another file, a directory, another version: refused, and left as it is."""
    other = tmp_path / "notes.txt"
    other.write_text("not a database, but long enough to be looked at " * 50)
    for path, said in (
        (other, "is no cache"),
        (tmp_path, "cannot be a cache"),
        (tmp_path / "no" / "where", "directory"),
    ):
        with pytest.raises(InvalidInput, match=said):
            AnswerCache(path)
    later = tmp_path / "later"
    connection = sqlite3.connect(later)
    connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(InvalidInput, match="version 7"):
        AnswerCache(later)
    foreign = tmp_path / "foreign"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE answers (question TEXT)")
    with pytest.raises(InvalidInput, match="is no cache"):
        AnswerCache(foreign)
    assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    connection.close()


@pytest.mark.parametrize("row", ["{}", "[1]", "7", "not JSON"])
def test_rows_that_are_no_answers(tmp_path: Path, row: str) -> None:
    """A row that somebody else wrote is refused by the file's name."""
    path = tmp_path / "answers"
    model = CachedModel(ScriptedModel(score=lambda job: [0.0]), AnswerCache(path))
    job = ScoreJob(prompt="p", continuations=("a",))
    model.score([job])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET answer = ?", (row,))
    connection.close()
    with pytest.raises(InvalidInput, match=f"{path} .*choose another file"):
        model.score([job])


def test_claims_that_cannot_be_made(tmp_path: Path) -> None:
    """A directory stands where the locks would be."""
    (tmp_path / "answers.claims").mkdir()
    model = CachedModel(ScriptedModel(generate=lambda job: "x"), AnswerCache(tmp_path / "answers"))
    with pytest.raises(InvalidInput, match="cannot be used as a cache"):
        model.generate([GenerateJob(prompt="p")])


def test_a_model_that_tells_nothing_on_the_way(tmp_path: Path) -> None:
    """What it returns is kept and told of all the same; so are scores that are NaN, for whoever asked to judge."""

    class Silent(ScriptedModel):
        def score(self, jobs: Sequence[ScoreJob], *, on_done: OnDone[Scores] | None = None) -> list[Scores]:
            return super().score(jobs)

    script = Silent(score=lambda job: [float("nan"), -1.0])
    model = CachedModel(script, AnswerCache(tmp_path / "answers"))
    jobs = [ScoreJob(prompt=prompt, continuations=("a", "b")) for prompt in ("p", "q")]
    heard: list[int] = []
    model.score(jobs, on_done=lambda place, answer: heard.append(place))
    again = model.score(jobs)
    assert sorted(heard) == [0, 1]
    assert len(script.asked) == 2
    for answer in again:
        assert math.isnan(answer.logprobs[0])  # type: ignore[arg-type]
        assert answer.logprobs[1] == -1.0
