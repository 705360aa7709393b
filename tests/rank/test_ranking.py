"""Texts to texts: prompts, modes, caches, failures, a real server."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from families import save, tiny_model
from running import running
from shoal import Engine
from shoal.errors import InvalidInput, LanguageModelError
from shoal.lm import AnswerCache, GenerateJob, LocalModel, ScoreJob, ScriptedModel
from shoal.lm.remote import RemoteModel
from shoal.rank import RankConfig, plan, rank
from shoal.rank.questions import Task
from shoal.rank.rankers.adaptive import prior_of
from shoal.rank.ranking import rank_with
from shoal.rank.templates import Template, load_template
from shoal.serve.config import ServeConfig

DOCS = [f"{'x' * length} is {length}" for length in (3, 9, 1, 7, 5, 8, 2, 6, 4, 10)]
LONGEST = [f"{'x' * length} is {length}" for length in range(10, 0, -1)]
PASSAGE = re.compile(r"^(?:Passage \w+:|\[\w\]) (.*)$", re.MULTILINE)
LABEL_ALONE = """
[alone]
version = "1"
kind = "pair"
labels = ["A", "B"]
passage = "{label}: {text}"
answer = "{label}"
text = "{query}\\n{passages}\\nbetter:"
"""


def sizes(prompt: str) -> list[float]:
    return [float(len(passage)) for passage in PASSAGE.findall(prompt)]


def by_score(job: ScoreJob) -> list[float]:
    """It prefers long passages."""
    return sizes(str(job.prompt))


def in_words(job: GenerateJob) -> str:
    """The same, as text."""
    found = sizes(job.prompt)
    places = sorted(range(len(found)), key=lambda one: -found[one])
    if "identifiers" in job.prompt:
        return " > ".join(f"[{'ABCDEFGHIJ'[one]}]" for one in places)
    return f" Passage {'ABCDEFGH'[places[0]]}."


@pytest.mark.parametrize("ranker", ["quicksort", "heapsort", "setwise", "listwise", "mohajer", "adaptive", "all-pairs"])
@pytest.mark.parametrize("mode", ["score", "generate"])
def test_rankers_through_prompts(ranker: str, mode: str) -> None:
    """Pairs, sets and lists, scored and written."""
    model = ScriptedModel(score=by_score, generate=in_words)
    done = rank("long ones", DOCS, model=model, k=4, budget=400, ranker=ranker, mode=mode)
    assert [one.text for one in done.documents[:4]] == LONGEST[:4]
    assert done.cost.calls == done.cost.usage.paid_calls == len(model.asked)
    assert done.cost.tokens == sum(len(str(job.prompt).split()) for job in model.asked) + done.cost.usage.new_tokens
    assert done.cost.unparsed == 0
    heard: list[int] = []
    rank_with(
        model,
        RankConfig(k=4, budget=60, ranker=ranker, mode=mode),
        "long ones",
        DOCS,
        on_answer=lambda: heard.append(1),
    )  # type: ignore[arg-type]
    assert len(heard) == len(model.asked) - done.cost.calls > 0


def test_model_that_answers_neither() -> None:
    """Answers that cannot be read are counted and are ties; where none can, that is an error, and where they are no numbers."""
    model = ScriptedModel(generate=lambda job: "I would rather not say" if "is 10" in job.prompt else in_words(job))
    done = rank("q", DOCS, model=model, k=3, budget=90, mode="generate", ranker="all-pairs", direction="one")
    assert (done.cost.unparsed, done.cost.calls) == (9, 45)
    assert done.documents[0].text == LONGEST[1]
    silent = ScriptedModel(generate=lambda job: "Neither", score=lambda job: [float("nan"), 0.0])
    for mode in ("generate", "score"):
        with pytest.raises(LanguageModelError, match="none of 20 answers of scripted could be read"):
            rank("q", DOCS, model=silent, k=3, budget=20, mode=mode)


def test_passages_are_cut_and_it_is_said() -> None:
    """By tokens of the model: here words."""
    model = ScriptedModel(score=by_score)
    docs = ["one two three four five", "six seven", "eight nine ten eleven"]
    done = rank("a query of many words", docs, model=model, k=1, max_passage_tokens=3, max_query_tokens=2)
    assert (done.cut_documents, done.cut_query) == (2, True)
    prompts = "\n".join(str(job.prompt) for job in model.asked)  # type: ignore[union-attr]
    assert "one two three\n" in prompts
    assert "four" not in prompts
    assert "Query: a query\n" in prompts
    assert set(done.order) == {0, 1, 2}
    assert done.documents[0].text in docs


def test_resume_pays_nothing_twice(tmp_path: Path) -> None:
    """A model dies after 13 calls. The same call goes on, ends where an undisturbed one does, and pays for the rest only."""
    settings = {"k": 4, "budget": 30, "ranker": "quicksort"}
    whole = rank("q", DOCS, model=ScriptedModel(score=by_score), **settings)  # type: ignore[arg-type]
    cache = AnswerCache(tmp_path / "answers")
    dying, healthy = ScriptedModel(score=by_score, fail_after=13), ScriptedModel(score=by_score)
    with pytest.raises(LanguageModelError):
        rank("q", DOCS, model=dying, cache=cache, **settings)  # type: ignore[arg-type]
    resumed = rank("q", DOCS, model=healthy, cache=cache, **settings)  # type: ignore[arg-type]
    assert resumed.order == whole.order
    assert resumed.cost.calls == whole.cost.calls == len(dying.asked) + len(healthy.asked)
    assert resumed.cost.usage.paid_calls == len(healthy.asked) == whole.cost.calls - 13


def test_directions_share_answers(tmp_path: Path) -> None:
    """What was asked in both directions answers the drawn one."""
    cache = AnswerCache(tmp_path / "answers")
    model = ScriptedModel(score=by_score)
    rank("q", DOCS, model=model, cache=cache, ranker="all-pairs", direction="both", budget=None)
    assert len(model.asked) == 90
    again = rank("q", DOCS, model=model, cache=cache, ranker="all-pairs", direction="random", budget=None)
    assert (len(model.asked), again.cost.calls, again.cost.usage.paid_calls) == (90, 45, 0)


def test_here_and_on_a_server(tmp_path: Path) -> None:
    """A tiny model gives the same order here and behind `shoal serve`, for as many tokens; each call is a pass, or a request."""
    model = tiny_model("gpt_neox", max_position_embeddings=2048)
    directory = save(model, tmp_path)
    with torch.no_grad():  # a server tells its most probable tokens: the labels are always among them
        labels = AutoTokenizer.from_pretrained(directory)(["A", "B"]).input_ids
        bias = model.gpt_neox.final_layer_norm.bias.mul_(10)
        model.lm_head.weight[torch.tensor(labels)[:, 0]] += 20 * bias / bias.square().sum()
    save(model, tmp_path)
    template = tmp_path / "alone.toml"
    template.write_text(LABEL_ALONE)
    settings: dict[str, Any] = {"k": 3, "budget": 25, "max_passage_tokens": 40, "template": str(template)}
    local = LocalModel.from_pretrained(directory, max_batch=4, cache_gib=0.2)
    ours = rank("long ones", DOCS, model=local, **settings)
    assert ours.order != list(range(len(DOCS)))
    engine = Engine.from_pretrained(directory, max_batch=4, cache_gib=0.2)
    with running(engine, ServeConfig(model="tiny", max_queue=64)) as url:
        theirs = rank("long ones", DOCS, model=RemoteModel(f"{url}/v1", "tiny"), **settings)
    assert theirs.order == ours.order
    for usage in (ours.cost.usage, theirs.cost.usage):
        assert usage.calls == usage.paid_calls == 25
    assert ours.cost.usage.ledger is not None
    assert ours.cost.usage.prompt_tokens == ours.cost.usage.ledger.prompt_tokens == theirs.cost.usage.prompt_tokens


def test_templates() -> None:
    """Slots stand once, texts with braces stay texts, and answers are read or not."""
    pair, listed = load_template("pair"), load_template("list")
    prompt = pair.prompt("{passages} {query}", ["{label} one", "two"])
    assert "Query: {passages} {query}\n" in prompt
    assert "Passage A: {label} one\n" in prompt
    assert pair.answers(2) == (" Passage A", " Passage B")
    for text, wanted in (
        ("A", (1.0, 0.0)), (" Passage B", (0.0, 1.0)), ("passage b, since", (0.0, 1.0)), ("[A]", (1.0, 0.0)),
        ("**Passage A**", (1.0, 0.0)), ("Passage: B.", (0.0, 1.0)), ("B\n\nIt says so.", (0.0, 1.0)),
        ("Apples", None), ("", None), ("Neither", None), ("Passage C", None), ("A better passage is B.", None),
        ("A and B are equal", None), ("Passage A or Passage B: B", None), ("Passage A is less relevant", None), ("A. Not B.", None),
    ):  # fmt: skip
        assert pair.parse(text, 2) == wanted, text
    assert load_template("set").parse("Passage C", 3) == (0.0, 0.0, 1.0)
    assert listed.parse("[B] > [A]", 3) == (2.0, 3.0, 0.0)
    for text in ("[B] > [B]", "B > A", "[D] > [A]", "[21] > [A]"):
        assert listed.parse(text, 3) is None
    assert (pair.parted(2), listed.parted(2)) == ((" Passage", (" A", " B")), (" [", ("A", "B")))


def test_templates_that_are_none(tmp_path: Path) -> None:
    """Each problem is named."""
    good = {
        "name": "t", "version": "1", "kind": "pair", "labels": ("A", "B"), "passage": "{label} {text}", "answer": " {label}",
        "text": "{query} {passages}",
    }  # fmt: skip
    Template(**good)  # type: ignore[arg-type]
    for part, bad in (
        ("text", "{query} {query} {passages}"),
        ("passage", "{text}"),
        ("answer", " A"),
        ("labels", ("A", "A")),
    ):
        with pytest.raises(InvalidInput, match=part):
            Template(**{**good, part: bad})  # type: ignore[arg-type]
    file = tmp_path / "mine.toml"
    file.write_text("[mine]\nversion = '1'\n")
    with pytest.raises(InvalidInput, match="must be a table with"):
        load_template(str(file))
    with pytest.raises(InvalidInput, match="no template file"):
        load_template(str(tmp_path / "other.toml"))
    with pytest.raises(InvalidInput, match="needs a template of kind set"):
        RankConfig(ranker="setwise", template="pair").make()


def test_bad_input() -> None:
    """Documents, sizes and settings; said before anything is asked."""
    model = ScriptedModel(score=by_score)
    for docs, said in (
        ([], "no documents"),
        (["a", " "], "document 1 is empty"),
        (["a", "b", "a"], "0 and 2 are the same"),
    ):
        with pytest.raises(InvalidInput, match=said):
            rank("q", docs, model=model)
    with pytest.raises(InvalidInput, match="must be a list of texts, got generator"):
        rank("q", (text for text in DOCS), model=model)  # type: ignore[arg-type]
    for query, said in ((" ", "query is empty"), (None, "query is empty"), ("q\udcff", "surrogate")):
        with pytest.raises(InvalidInput, match=said):
            rank(query, DOCS, model=model)  # type: ignore[arg-type]
    for settings, said in (
        ({"budget": 0}, "budget must be 1 or more"), ({"k": 0}, "k must be"), ({"soft": True, "mode": "generate"}, "soft"),
        ({"ranker": "bogosort"}, "no ranker"), ({"mode": "guess"}, "mode"), ({"budget": 2.5}, "budget must be a whole number"),
        ({"k": None}, "k must be a whole"), ({"budget": 1, "direction": "both"}, "budget must be"),
        ({"scores": [1.0]}, "1 first-stage scores"), ({"scores": list(range(len(DOCS)))}, "higher score"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=said):
            rank("q", DOCS, model=model, **settings)  # type: ignore[arg-type]
    assert model.asked == []


@pytest.mark.parametrize("ranker", ["adaptive", "bradley-terry", "spectral", "quicksort", "all-pairs"])
def test_an_end_is_told_from_a_stop(ranker: str) -> None:
    """Also of rankers that cut themselves to the budget: 10 calls for 30 documents end none of them, 435 pairs all."""
    texts = [f"text {number}" for number in range(30)]
    few, many = (
        rank("q", texts, model=ScriptedModel(score=by_score), ranker=ranker, budget=budget) for budget in (10, 436)
    )
    assert (few.cost.calls, few.finished, many.finished) == (10, False, True)


def test_forecasts_of_many_documents() -> None:
    """Fewer samples, and what cannot be is refused."""
    assert plan(4000, 10, "heapsort", 32, budget=5).calls == 5
    for sizes, said in (({"n": -1}, "n must be"), ({"k": 9}, "k must be"), ({"samples": 0}, "samples must be")):
        with pytest.raises(InvalidInput, match=said):
            plan(**{"n": 8, "k": 2, "ranker": "quicksort", "batch": 4, **sizes})  # type: ignore[arg-type]


def test_scores_too_large_to_square() -> None:
    """Count as none; no warning of an overflow."""
    scores = [1e308 * (1 - place / 10) for place in range(8)]
    task = Task(n=8, k=3, scores=scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prior_of(task).tolist() == prior_of(Task(n=8, k=3)).tolist()


def test_whole_numbers_and_paths_of_any_kind(tmp_path: Path) -> None:
    """NumPy's integers, and a template by its path object."""
    (tmp_path / "own.toml").write_text(LABEL_ALONE)
    config = RankConfig(k=np.int64(3), template=tmp_path / "own.toml")  # type: ignore[arg-type]
    assert config.make()[1].name == "alone"
