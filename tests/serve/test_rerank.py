"""`/v1/rerank` against the running server: the order and the cost that the same model gives without one."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from families import save, tiny_model
from running import running
from shoal import Engine, SkipDecode
from shoal.lm import LocalModel
from shoal.rank import RankConfig, Ranking
from shoal.rank.ranking import rank_with
from shoal.serve.config import ServeConfig

QUERY = "do fish sleep?"
DOCS = [f"passage {number}: {'z' * (number % 4)} fish" for number in range(9)]
BODY: dict[str, Any] = {"model": "tiny", "query": QUERY, "documents": DOCS}


@pytest.fixture(scope="module")
def long_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose positions hold a prompt of two passages; its tokens are bytes."""
    model = tiny_model("llama", max_position_embeddings=2048)
    return save(model, tmp_path_factory.mktemp("reranking"))


@pytest.fixture(scope="module")
def local(long_directory: Path) -> LocalModel:
    """The same model without a server."""
    return LocalModel.from_pretrained(long_directory, max_batch=4, cache_gib=0.2)


@pytest.fixture(scope="module")
def engine(long_directory: Path) -> Engine:
    """The engine behind `address`."""
    return Engine.from_pretrained(long_directory, max_batch=4, cache_gib=0.2)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    """Where the server is."""
    with running(engine, ServeConfig(model="tiny", max_queue=64, max_documents=20, max_rank_calls=60)) as url:
        yield url
    assert not engine.has_work
    assert engine.runner.cache.blocks_in_use == 0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def order(self) -> list[int]:
        assert self.status == 200, self.body
        return [result["index"] for result in self.body["results"]]

    @property
    def spent(self) -> dict[str, Any]:
        spent: dict[str, Any] = self.body["usage"]["shoal"]
        return spent

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.body["error"]
        return error


def post(address: str, *, patience_s: float = 60, **changes: Any) -> Answer:
    with closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=patience_s)) as connection:
        body = json.dumps(BODY | changes).encode()
        connection.request("POST", "/v1/rerank", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.headers), json.loads(answer.read()))


def ours(model: LocalModel, **settings: Any) -> Ranking:
    return rank_with(model, RankConfig(**{"budget": 60, **settings}), QUERY, DOCS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ranker": "heapsort", "top_n": 3, "budget": 30},
        {"ranker": "quicksort", "direction": "both", "budget": 21},
        {"ranker": "setwise", "max_tokens_per_doc": 12, "seed": 5},
        {"ranker": "all-pairs", "mode": "generate", "direction": "one", "budget": 11},
    ],
    ids=str,
)
def test_same_as_without_a_server(address: str, local: LocalModel, changes: dict[str, Any]) -> None:
    """Order, calls, rounds and the whole ledger; with prompts in both modes."""
    renamed = {"top_n": "k", "max_tokens_per_doc": "max_passage_tokens"}
    alone = ours(local, **{renamed.get(name, name): value for name, value in changes.items()})
    answer = post(address, **{"budget": 60} | changes)
    assert answer.order == alone.order[: changes.get("top_n")]
    spent, ledger = answer.spent, alone.cost.usage.ledger
    assert ledger is not None
    assert answer.body["usage"]["total_tokens"] == spent["tokens"] == alone.cost.tokens
    for name in ("calls", "rounds", "questions", "reused", "unparsed"):
        assert spent[name] == getattr(alone.cost, name), name
    assert spent["calls"] <= changes.get("budget", 60)
    assert (spent["finished"], spent["cut_documents"]) == (alone.finished, alone.cut_documents)
    assert spent["layer_tokens"] == ledger.layer_tokens + ledger.shared_layer_tokens
    assert spent["flops"] == ledger.prompt_flops + ledger.shared_flops + ledger.decode_flops


def test_form(address: str) -> None:
    """As Cohere and Jina have it: best first, documents on request, texts or objects."""
    answer = post(address, documents=[{"text": DOCS[0]}, *DOCS[1:5]], return_documents=True).body
    assert answer["id"].startswith("rerank-")
    assert answer["model"] == "tiny"
    assert [result["relevance_score"] for result in answer["results"]] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert all(result["document"]["text"] == DOCS[result["index"]] for result in answer["results"])
    assert "document" not in post(address).body["results"][0]
    assert len(post(address, top_n=100).order) == len(DOCS), "at most"
    (single,) = post(address, documents=["alone"]).body["results"]
    assert (single["index"], single["relevance_score"]) == (0, 1.0)


def test_depth(address: str, local: LocalModel) -> None:
    """It acts on written answers; where it could not act it is refused."""
    plan = SkipDecode(depth=1 / 2, horizon=6)
    shallow = LocalModel(local.engine, name="tiny", plan=plan)
    alone = ours(shallow, ranker="all-pairs", mode="generate", budget=10)
    given = {"policy": "skipdecode", "depth": 0.5, "horizon": 6}
    answer = post(address, ranker="all-pairs", mode="generate", budget=10, plan=given)
    assert answer.order == alone.order
    assert alone.cost.usage.ledger is not None
    assert answer.spent["mean_layers"] == pytest.approx(alone.cost.usage.ledger.mean_layers, abs=1e-3)
    assert answer.spent["mean_layers"] < 4
    of_prompts = {"cutoffs": [None, 0, None, None], "prompt_layers": [0, 2, 3]}
    whole, cut = post(address).spent, post(address, plan=of_prompts).spent
    assert cut["layer_tokens"] / cut["tokens"] < whole["layer_tokens"] / whole["tokens"]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model", {"model": "another"}),
        ("query", {"query": "  "}),
        ("query", {"query": "\ud800"}),
        ("documents", {"documents": []}),
        ("documents", {"documents": [f"{number}" for number in range(21)]}),
        ("documents", {"documents": ["one", "two", "one"]}),
        ("documents", {"documents": ["one", "\n"]}),
        ("documents[1].title", {"documents": ["one", {"text": "two", "title": "t"}]}),
        ("documents", {"documents": ["x" * 2000, "y" * 2000], "max_tokens_per_doc": 2000}),
        ("top_n", {"top_n": 0}),
        ("max_tokens_per_doc", {"max_tokens_per_doc": 0}),
        ("ranker", {"ranker": "quickest"}),
        ("budget", {"budget": 0}),
        ("budget", {"budget": 61}),
        ("mode", {"mode": "guess"}),
        ("direction", {"direction": "up"}),
        ("seed", {"seed": -1}),
        ("timeout_s", {"timeout_s": 0}),
        ("depth", {"depth": 0.5}),
        ("depth", {"depth": 0.01, "mode": "generate"}),
        ("plan", {"plan": {"policy": "skipdecode", "depth": 0.5}}),
        ("plan", {"plan": {"cutoffs": [None]}, "mode": "generate"}),
        ("rank_fields", {"rank_fields": ["text"]}),
    ],
    ids=str,
)
def test_refused(address: str, field: str, changes: dict[str, Any]) -> None:
    """400 (404 for another model), and the field."""
    answer = post(address, **changes)
    assert answer.status == (404 if field == "model" else 400), answer.body
    assert answer.error["param"] == field
    assert answer.error["message"]


def test_out_of_time(address: str) -> None:
    answer = post(address, timeout_s=1e-6)
    assert answer.status == 504
    assert answer.error["code"] == "timeout"


def test_many_at_once(address: str, local: LocalModel) -> None:
    """They share passes, and each comes out as it would alone."""
    rankers = ["adaptive", "quicksort", "heapsort", "tournament", "all-pairs", "adaptive"]
    with ThreadPoolExecutor(len(rankers)) as threads:
        answers = list(threads.map(lambda ranker: post(address, ranker=ranker, budget=30), rankers))
    assert [answer.order for answer in answers] == [ours(local, ranker=one, budget=30).order for one in rankers]


class Gate:
    """Stops the engine before a pass while it is closed, and counts the passes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting, self.passes = threading.Event(), threading.Event(), 0
        step = engine.step

        def gated() -> Any:
            self.waiting.set()
            assert self.open.wait(60), "nobody opened the gate"
            self.passes += 1
            return step()

        monkeypatch.setattr(engine, "step", gated)


def test_whoever_goes_away_cancels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further round is asked, and its place is free for another."""
    with running(engine, ServeConfig(model="tiny", max_queue=64, max_rankings=1)) as url:
        gate = Gate(engine, monkeypatch)
        with pytest.raises(TimeoutError):
            post(url, patience_s=0.5, ranker="bubblesort")
        assert gate.waiting.is_set()
        gate.open.set()
        after = post(url, ranker="bubblesort", budget=3)
        while after.status == 429:
            after = post(url, ranker="bubblesort", budget=3)
        assert after.spent["calls"] == 3
        assert gate.passes < 10, "bubblesort would take 30 rounds"


def test_full(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ranking too many is told so. One that was let in goes on though the queue is full meanwhile."""
    with running(engine, ServeConfig(model="tiny", max_queue=0, max_rankings=1)) as url:
        gate = Gate(engine, monkeypatch)
        with ThreadPoolExecutor(1) as thread:
            let_in = thread.submit(post, url, ranker="all-pairs", budget=12)
            assert gate.waiting.wait(60)
            refused = post(url)
            assert (refused.status, refused.error["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            gate.open.set()
            assert let_in.result().spent["calls"] == 12
