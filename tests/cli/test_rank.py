"""`shoal rank`: files in and out, forecasts, going on after a failure."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from families import save, tiny_model
from shoal.cli.main import app
from shoal.errors import InvalidInput
from shoal.rank.trec import read_run, run_lines

DOCS = [{"id": f"d{number}", "text": f"passage about {number} fish", "score": 20.0 - number} for number in range(12)]


def shoal(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["rank", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with room for prompts; a token is a byte."""
    return save(tiny_model("llama", max_position_embeddings=2048), tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in DOCS))
    return path


def test_one_query(model: Path, docs: Path, tmp_path: Path) -> None:
    """A table of the best, a line of costs, and JSON with both; the same command again pays for nothing."""
    out = tmp_path / "out.jsonl"
    command = ("--query", "fish?", "--docs", docs, "--model", model, "--budget", 15, "-k", 3, "-o", out)
    first = shoal(*command)
    assert first.exit_code == 0, first.output
    assert "15 calls (15 paid for now)" in first.output
    (line,) = map(json.loads, out.read_text().splitlines())
    assert sorted(line["documents"]) == sorted(one["id"] for one in DOCS)
    assert (line["calls"], line["paid_calls"], line["cut_documents"], line["unparsed"]) == (15, 15, 0, 0)
    again = shoal(*command)
    assert "15 calls (0 paid for now)" in again.output
    assert json.loads(out.read_text())["documents"] == line["documents"]


def test_run_files(model: Path, docs: Path, tmp_path: Path) -> None:
    """A run in, a run out: each query's candidates and no others; the tail beyond --depth is left out."""
    topics, run, out = tmp_path / "topics.tsv", tmp_path / "in.trec", tmp_path / "out.trec"
    topics.write_text("1\tone fish\n2\ttwo fish\n")
    run.write_text(run_lines("1", [f"d{one}" for one in range(6)], "bm25") + run_lines("2", ["d7", "d3", "d9"], "bm25"))
    done = shoal(
        "--queries", topics, "--run", run, "--docs", docs, "-m", model, "--budget", 6, "-k", 2, "--depth", 4, "-o", out
    )
    assert done.exit_code == 0, done.output
    ranked = read_run(out)
    assert {query: sorted(document for document, _ in found) for query, found in ranked.items()} == {
        "1": ["d0", "d1", "d2", "d3"], "2": ["d3", "d7", "d9"],
    }  # fmt: skip
    assert [score for _, score in ranked["2"]] == [3, 2, 1]
    assert (tmp_path / "out.trec.answers").exists()


def test_forecast_asks_nothing(docs: Path) -> None:
    """Not even for the model."""
    done = shoal("--query", "q", "--docs", docs, "-m", "no/where", "--plan", "--ranker", "all-pairs", "--budget", 1000)
    assert done.exit_code == 0, done.output
    assert "About 66 calls per query" in done.output


def test_forecast_of_queries_of_several_sizes(docs: Path, tmp_path: Path) -> None:
    """2 and 5 candidates: 1 + 10 pairs. A query without candidates is said to be left out; --depth cuts a single query's, too."""
    topics, run = tmp_path / "topics.tsv", tmp_path / "in.trec"
    topics.write_text("1\tone\n2\ttwo\n3\tthree\n")
    run.write_text(run_lines("1", ["d1", "d2"], "t") + run_lines("2", [f"d{one}" for one in range(5)], "t"))
    settings = ("--docs", docs, "-m", "no/where", "--plan", "--ranker", "all-pairs")
    done = shoal("--queries", topics, "--run", run, *settings)
    assert "About 6 calls per query (1 to 10 on simulated ones), 1 rounds at batch 32; 11 calls for 2" in done.output
    assert "1 of 3 queries have no candidates" in done.output
    assert "3 calls for 1 query." in shoal("--query", "q", "--depth", 3, *settings).output


def test_files_as_others_write_them(model: Path, tmp_path: Path) -> None:
    """Byte order marks, lines that end in two characters, separators within a line, fewer documents than the usual k."""
    docs, topics, run, out = (tmp_path / name for name in ("docs.txt", "topics.tsv", "in.trec", "out.jsonl"))
    docs.write_text("\ufeffone\r\ntwo\u2028and more\r\nthree\r\n", encoding="utf-8")
    topics.write_text("\ufeffq\tfish\r\n", encoding="utf-8")
    run.write_text("\ufeff" + run_lines("q", ["1", "2", "3"], "t"), encoding="utf-8")
    done = shoal("--queries", topics, "--run", run, "--docs", docs, "-m", model, "--budget", 2, "-o", out)
    assert done.exit_code == 0, done.output
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (sorted(line["documents"]), line["query"], line["cut_query"]) == (["1", "2", "3"], "fish", False)


def test_a_model_that_answers_neither(docs: Path) -> None:
    """An error, with what to try."""
    with judging() as server:
        server.silent = True
        address = f"http://127.0.0.1:{server.server_port}/v1#m"
        done = shoal("--query", "q", "--docs", docs, "-m", address, "--mode", "generate", "--budget", 5)
    assert done.exit_code == 1, done.output
    assert "none of 5 answers" in done.output


def test_ties_and_order_of_run_files(tmp_path: Path) -> None:
    """By score; of equal scores by rank; broken lines and repeats are named."""
    path = tmp_path / "run"
    path.write_text("q Q0 a 2 1.0 t\nq Q0 b 1 1.0 t\nq Q0 c 3 5 t\n")
    assert [document for document, _ in read_run(path)["q"]] == ["c", "b", "a"]
    for text, said in (
        ("q Q0 a 1 1 t\nq Q0 a 2 0 t\n", "line 2: document 'a' of query 'q' stands in line 1"), ("q Q0 a x 1 t\n", "line 1"),
        ("q Q0 a 1 nan t\n", "not finite"), ("", "holds no line"), ("q Q0\n", "expected query"),
        ("q Q0 MS 12 1 2 t\n", "expected query"), ("q Q0 a 1 2\n", "expected query"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InvalidInput, match=said):
            read_run(path)


class Judge(ThreadingHTTPServer):
    """A server that prefers the passage with more fish, and falls silent once it has answered `allowed` prompts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Judging)
        self.allowed = 10**9
        self.answered: list[str] = []
        self.lock = threading.Lock()
        self.silent = False


class Judging(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        with self.server.lock:
            if len(self.server.answered) >= self.server.allowed:
                return self.close_connection_now()
            self.server.answered.append(prompt)
        first, second = (int(line.split()[4]) for line in prompt.splitlines() if line.startswith("Passage "))
        text = "I cannot say." if self.server.silent else f" Passage {'AB'[first < second]}"
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
        told = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        content = json.dumps(told).encode()
        self.send_response(200)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def close_connection_now(self) -> None:
        """As of a server that was killed: no answer at all."""
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def judging() -> Iterator[Judge]:
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("died_after", [1, 17, 30])
def test_goes_on_after_a_server_died(docs: Path, tmp_path: Path, died_after: int) -> None:
    """Three queries; the server dies in the first, the second or the third. The same command goes on: it ends as if nothing had
    happened, and no prompt is answered twice over both."""
    topics, run = tmp_path / "topics.tsv", tmp_path / "in.trec"
    topics.write_text("1\tone fish\n2\ttwo fish\n3\tthree fish\n")
    run.write_text("".join(run_lines(query, [one["id"] for one in DOCS], "bm25") for query in "123"))  # type: ignore[misc]
    with judging() as server:
        command = (
            "--queries", topics, "--run", run, "--docs", docs, "-m", f"http://127.0.0.1:{server.server_port}/v1#m",
            "--mode", "generate", "--budget", 14, "-k", 3, "--batch", 4, "--max-retries", 0,
        )  # fmt: skip
        whole = shoal(*command, "-o", tmp_path / "whole.jsonl")
        assert whole.exit_code == 0, whole.output
        asked, server.answered = Counter(server.answered), []
        assert sum(asked.values()) == 42
        out = tmp_path / "out.jsonl"
        server.allowed = died_after
        failed = shoal(*command, "-o", out)
        assert failed.exit_code == 1, failed.output
        assert f"query '{1 + died_after // 14}'" in failed.output
        assert not out.exists()
        server.allowed = 10**9
        again = shoal(*command, "-o", out)
        assert again.exit_code == 0, again.output
        assert f"42 calls ({42 - died_after} paid for now)" in again.output
        assert Counter(server.answered) == asked
    ended, expected = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (out, tmp_path / "whole.jsonl")
    )
    for line in (*ended, *expected):
        del line["paid_calls"]
    assert ended == expected
    assert all(line["documents"] != [one["id"] for one in DOCS] for line in ended)


def test_bad_input(docs: Path, tmp_path: Path) -> None:
    """The message alone, and 2."""
    topics, run = tmp_path / "topics.tsv", tmp_path / "in.trec"
    topics.write_text("1\tone\n")
    run.write_text("1 Q0 d99 1 1.0 t\n")
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}\n{"text": ""}\n')
    rising, some, words, spaced = (tmp_path / f"{name}.jsonl" for name in ("rising", "some", "words", "spaced"))
    rising.write_text('{"text": "a", "score": 1}\n{"text": "b", "score": 2}\n')
    some.write_text('{"text": "a", "score": 1}\n{"text": "b"}\n')
    words.write_text('{"text": "a", "score": "high"}\n')
    spaced.write_text('{"text": "a", "id": "MS 12"}\n{"text": "b"}\n')
    same = tmp_path / "same.txt"
    same.write_text("one\ntwo\none\n")
    model = ("-m", "no/where")
    for arguments, said in (
        (("--docs", docs, *model), "give --query"),
        (("--docs", docs, "--query", "q", "--run", run, *model), "give --query"),
        (("--docs", docs, "--queries", topics, "--run", run, *model), "'d99' of query '1' is not among"),
        (("--docs", other, "--query", "q", *model), "line 2: 'text'"),
        (("--docs", same, "--query", "q", "-k", 1, *model), "0 and 2 are the same"),
        (("--docs", docs, "--query", "q", "-k", 13, *model), "--k 13 is above its 12"),
        (("--docs", docs, "--query", "q", "--budget", 0, *model), "budget must be 1 or more"),
        (("--docs", docs, "--query", "q", "--ranker", "bogo", *model), "no ranker 'bogo'"),
        (("--docs", docs, "--query", "q", "-m", "http://localhost:1/v1"), "names no model"),
        (("--docs", tmp_path / "none", "--query", "q", *model), "cannot be read"),
        (("--docs", rising, "--query", "q", *model), "line 2: the score 2 is above the one before"),
        (("--docs", some, "--query", "q", *model), "1 of 2 documents have a 'score'"),
        (("--docs", words, "--query", "q", *model), "'score' must be a number, got 'high'"),
        (("--docs", spaced, "--query", "q", *model, "-o", tmp_path / "o.trec"), "the id 'MS 12' is empty or holds a space"),
        (("--docs", docs, "--query", "q", *model, "-o", docs), "is the file that --docs is read from"),
        (("--docs", docs, "--query", "q", *model, "-o", tmp_path / "no" / "o"), "cannot be written"),
        (("--docs", docs, "--query", "q", *model, "--max-retries", 2), "--max-retries is for servers"),
        (("--docs", docs, "--query", "q", *model, "--budget", 1, "--direction", "both"), "2 where pairs are asked in both"),
        (("--docs", docs, "--query", "q\udcff", *model), "half of a surrogate pair"),
        (("--docs", docs, "--query", "q", "-m", "http://127.0.0.1:port/v1#m"), "no address of a server"),
    ):  # fmt: skip
        done = shoal(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert said in " ".join(done.output.split())


def test_a_server_that_is_not_there(docs: Path, tmp_path: Path) -> None:
    """It says where the answers are, and how to go on."""
    done = shoal(
        "--query", "q", "--docs", docs, "-m", "http://127.0.0.1:9/v1#m", "-o", tmp_path / "out.trec", "--max-retries", 0
    )
    assert done.exit_code == 1, done.output
    said = " ".join(done.output.split())
    assert "cannot be reached" in said
    assert "the same command goes on from there" in said
