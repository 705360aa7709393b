"""Reading traces: ours, and log-probabilities of other servers, whole or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import InvalidInput
from shoal.signals.traces import read_traces

OWN = {"top_k": 3, "entropies": [0.5, 0.25], "nlls": [0.1, 2.0]}
TOPS = [[-0.5, -1.5, -2.0], [-0.1, -3.0, -4.0]]


def chat(tops: list[list[float]], sampled: list[float]) -> dict[str, Any]:
    """A chat completion's choice."""
    content = [
        {
            "token": "a",
            "logprob": one,
            "top_logprobs": [{"token": str(i), "logprob": value} for i, value in enumerate(top)],
        }
        for one, top in zip(sampled, tops, strict=True)
    ]
    return {"choices": [{"index": 0, "message": {"content": "aa"}, "logprobs": {"content": content}}]}


def text(tops: list[list[float]], sampled: list[float]) -> dict[str, Any]:
    """A text completion's choice."""
    listed = [{str(i): value for i, value in enumerate(top)} for top in tops]
    return {"choices": [{"index": 0, "text": "aa", "logprobs": {"token_logprobs": sampled, "top_logprobs": listed}}]}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_all_forms_say_the_same(tmp_path: Path) -> None:
    """Alone on a line or in `response`; of vLLM's entry beyond the top the entropy knows nothing."""
    beyond = [[*TOPS[0], -9.0], TOPS[1]]
    sampled = [-9.0, -0.1]
    rows = [chat(beyond, sampled), {"response": text(beyond, sampled), "slice": "b", "correct": 1}, chat(TOPS, sampled)]
    traced = read_traces(write(tmp_path / "t.jsonl", *rows))
    expected = [-sum(math.exp(value) * value for value in top) for top in TOPS]
    for one in traced:
        assert one.trace.top_k == 3
        assert one.trace.entropies == pytest.approx(expected)
        assert one.trace.nlls == (9.0, 0.1)
    assert [(one.slice, one.correct) for one in traced] == [("all", None), ("b", True), ("all", None)]


def test_own_traces(tmp_path: Path) -> None:
    rows = [{"trace": OWN, "slice": "x", "correct": False, "prompt": "p"}, {"trace": OWN}]
    first, second = read_traces(write(tmp_path / "t.jsonl", *rows))
    assert (first.trace.top_k, first.trace.entropies, first.trace.nlls) == (3, (0.5, 0.25), (0.1, 2.0))
    assert (first.slice, first.correct, second.slice, second.correct) == ("x", False, "all", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "neither a 'trace' .* nor a response with 'choices'"),
        ({"choices": [{"index": 0, "text": "a"}]}, "no log-probabilities: ask the server"),
        ({"choices": [{"index": 0, "text": "a", "logprobs": None}]}, "no log-probabilities"),
        (chat([TOPS[0], TOPS[1][:1]], [-0.5, -0.1]), "token 0 lists 3 top tokens where 1 were expected"),
        (chat([TOPS[0], []], [-0.5, -0.1]), "token 0 lists 3 top tokens|token 1 lists 0 top tokens"),
        (chat([[], []], [-0.5, -0.1]), "token 0 lists 0 top tokens where some were expected"),
        (text([TOPS[0]], [-0.5, -0.1]), "2 tokens but 1 lists"),
        (text(TOPS, [-0.5, None]), "no numbers below 0"),  # type: ignore[list-item]
        ({"trace": {"entropies": [1.0]}}, "has the fields top_k, entropies and nlls"),
        ({"trace": {**OWN, "nlls": [0.1]}}, "2 entropies but 1 nlls"),
        ({"trace": {**OWN, "top_k": 0}}, "top_k must be 1 or more"),
        ({"trace": {**OWN, "nlls": [0.1, -2.0]}}, "not negative"),
        ({"trace": {"top_k": 3, "entropies": [], "nlls": []}}, "a response without tokens"),
        ({"trace": OWN, "correct": 2}, "'correct' must be 0 or 1"),
        ({"trace": OWN, "slice": 7}, "'slice' must be a name"),
        ({"choices": chat(TOPS, [-1, -1])["choices"] * 2, "correct": 1}, "one label for 2 choices"),
        ({"trace": {**OWN, "entropies": [10**400, 1.0]}}, "not negative, at most 1e\\+09"),
        ({"trace": {**OWN, "entropies": [1e308, 1.0]}}, "not negative, at most 1e\\+09"),
        ({"choices": [{"logprobs": [1, 2]}]}, "not laid out as OpenAI's API has them"),
        ({"choices": [{"logprobs": {"content": [1, 2]}}]}, "not laid out"),
        ({"choices": [{"logprobs": {"content": "abc"}}]}, "not laid out"),
        ({"choices": [{"logprobs": {"content": [{"logprob": -1, "top_logprobs": [-1, -2]}]}}]}, "not laid out"),
        ({"choices": [{"logprobs": {"token_logprobs": 5, "top_logprobs": 3}}]}, "not laid out"),
        ({"choices": [{"logprobs": {"token_logprobs": [-1], "top_logprobs": [[-1]]}}]}, "not laid out"),
        ({"choices": [{"logprobs": {"token_logprobs": "ab", "top_logprobs": [{}, {}]}}]}, "no numbers below 0"),
    ],
)
def test_what_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the line that is at fault."""
    path = write(tmp_path / "t.jsonl", {"trace": OWN}, row)
    with pytest.raises(InvalidInput, match=message) as refused:
        read_traces(path)
    assert "t.jsonl, line 2" in str(refused.value)


def test_other_numbers_of_top_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"trace": OWN}, {"trace": {**OWN, "top_k": 20}})
    with pytest.raises(InvalidInput, match="entropies over different numbers of tokens"):
        read_traces(path)
    # Every sampled token is beyond the top: only who asked knows that there were three.
    path = write(tmp_path / "u.jsonl", chat([[*TOPS[0], -9.0]], [-9.0]))
    assert [one.trace.top_k for one in read_traces(path)] == [4]
    assert [one.trace.top_k for one in read_traces(path, top_k=3)] == [3]
    with pytest.raises(InvalidInput, match="lists 4 top tokens where 20 were expected"):
        read_traces(path, top_k=20)


def test_top_k_holds_for_own_traces_too(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"trace": OWN})
    assert len(read_traces(path, top_k=3)) == 1
    with pytest.raises(InvalidInput, match="over the top 3, not over 20"):
        read_traces(path, top_k=20)


def test_two_choices_without_a_label(tmp_path: Path) -> None:
    row = {"choices": chat(TOPS, [-1, -1])["choices"] * 2, "correct": None}
    assert [one.correct for one in read_traces(write(tmp_path / "t.jsonl", row))] == [None, None]


def test_requests_that_failed_are_left_out_and_said(tmp_path: Path) -> None:
    empty, said = {"top_k": 3, "entropies": [], "nlls": []}, []
    rows = [{"trace": OWN}, *({"trace": empty, "finish_reason": reason} for reason in ("error", "blocked"))]
    traced = read_traces(write(tmp_path / "t.jsonl", *rows), warn=said.append)
    assert len(traced) == 1
    assert "2 requests had failed or were blocked, the first in line 2" in said[0]


def test_a_file_without_traces(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="has no traces"):
        read_traces(write(tmp_path / "t.jsonl"))
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_traces(tmp_path / "absent.jsonl")
