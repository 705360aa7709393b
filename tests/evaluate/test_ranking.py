"""Curves of rankers: measures, snapshots, the page, and the collections where the data are."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shoal.cli.main import app
from shoal.errors import InvalidInput
from shoal.evaluate.ranking import (
    FIRST_STAGE,
    ArmConfig,
    EvaluateConfig,
    evaluate_ranking,
    measurer,
    plans_by_budget,
    run_arm,
)  # fmt: skip
from shoal.evaluate.ranking_data import DIRECTORIES, Collection, Topic, collection, load_collection, read_qrels, topic
from shoal.evaluate.ranking_report import from_dict, markdown, render, rows, to_dict, versus, write_results
from shoal.lm import ScriptedModel
from shoal.rank import ranker_named

DATA = Path(os.environ.get("SHOAL_DATA", "../shared/data"))
BM25 = {
    "dl19": (43, 0.5058),
    "dl20": (54, 0.4796),
    "scifact": (300, 0.66),
    "cranfield": (225, 0.33),
    "vaswani": (93, 0.35),
}
"""Topics, and NDCG@10 of the first stage: Anserini's published ones for TREC DL; the others to two digits, by bm25s."""


@pytest.fixture(scope="module")
def made() -> Collection:
    """12 topics of 30 documents, some judged, some relevant ones never found."""
    generator = np.random.default_rng(0)
    judgements: dict[str, dict[str, int]] = {}
    topics: list[Topic] = []
    for number in range(12):
        query = f"q{number}"
        judgements[query] = {f"d{one}": int(generator.integers(-1, 4)) for one in range(40)}
        names = [f"d{one}" for one in generator.permutation(40)[:30]]
        texts = [f"text of {name} {'<b>' if number else ''}" for name in names]
        topics.append(topic(query, f"query {number}", names, texts, list(np.linspace(9, 1, 30)), judgements))
    return collection("made <i>", topics, judgements, 3, 2, "drawn")


def config(*rankers: str, **more: object) -> EvaluateConfig:
    arms = tuple(ArmConfig(ranker=ranker) for ranker in rankers)
    return EvaluateConfig(**{"arms": arms, "budgets": (10, 20, 40), "batch": 8, **more})  # type: ignore[arg-type]


def test_measures_by_hand(made: Collection) -> None:
    """nDCG@10, AP and RR of an order, from their definitions; unjudged and negative grades gain nothing."""
    orders = [list(np.random.default_rng(1).permutation(30)) for _ in made.topics]
    found = measurer(made)(orders)
    for place, (one, order) in enumerate(zip(made.topics, orders, strict=True)):
        gains = [one.grades[document] for document in order]
        discounts = 1 / np.log2(np.arange(2, 12))
        ideal = np.array([*one.judged, *[0] * 10][:10])
        assert found["nDCG@10"][place] == pytest.approx(float(np.dot(gains[:10], discounts) / np.dot(ideal, discounts)))
        hits = np.array(gains) >= 2
        relevant = sum(grade >= 2 for grade in one.judged)
        precisions = [hits[: at + 1].mean() for at in np.flatnonzero(hits)]
        assert found["AP"][place] == pytest.approx(sum(precisions) / relevant)
        assert found["RR"][place] == pytest.approx(1 / (1 + np.flatnonzero(hits)[0]) if hits.any() else 0.0)


@pytest.mark.parametrize("ranker", ["adaptive", "quicksort", "spectral"])
def test_a_budget_is_its_own_run(made: Collection, ranker: str) -> None:
    """Orders noted on the way are those of runs with that budget alone."""
    whole, _, _ = run_arm(made, config(ranker), None, (ArmConfig(ranker=ranker), 3))
    for budget in (10, 20, 40):
        alone, calls, _ = run_arm(made, config(ranker, budgets=(budget,)), None, (ArmConfig(ranker=ranker), 3))
        assert alone[budget] == whole[budget]
        assert max(calls) <= budget
    assert plans_by_budget(ranker_named("adaptive"), (15,), "random")
    assert plans_by_budget(ranker_named("adaptive"), (10,), "both")


def test_perfect_oracle_reaches_the_best_order(made: Collection) -> None:
    """With calls enough; the paired difference to the first stage is above 0."""
    result = evaluate_ranking(made, config("quicksort", budgets=(10, 435), noise="perfect"))
    best = measurer(made)([sorted(range(30), key=lambda one, t=t: -t.grades[one]) for t in made.topics])  # type: ignore[misc]
    assert result.score("quicksort [random]", 435).value == pytest.approx(np.mean(best["nDCG@10"]))
    assert result.difference("quicksort [random]", FIRST_STAGE, 435).low > 0


def test_calls_are_a_mean_of_what_each_topic_took(made: Collection) -> None:
    """A topic of 2 documents takes 1 call and one of 30 many, so at a budget of 4 the mean is 2.5, not the budget."""
    few = replace(
        made.topics[0],
        **{part: getattr(made.topics[0], part)[:2] for part in ("documents", "texts", "scores", "grades")},
    )
    two = replace(made, topics=(few, made.topics[1]))
    result = evaluate_ranking(two, config("quicksort", budgets=(4, 40), seeds=2))
    assert result.curves[0].points[0].calls == 2.5


def test_processes_change_nothing(made: Collection) -> None:
    """Two processes, the same numbers; and seeds are averaged per topic."""
    one, two = (evaluate_ranking(made, config("mohajer", "adaptive", seeds=2, jobs=jobs)) for jobs in (1, 2))
    assert to_dict(one) == to_dict(two)
    single = [evaluate_ranking(made, config("mohajer", seeds=1)).values("mohajer [random]", 20)]
    assert len(single[0]) == len(one.values("mohajer [random]", 20)) == 12


def test_a_model_is_asked(made: Collection) -> None:
    """Instead of a simulated comparator; one run, whatever the seeds."""
    model = ScriptedModel(score=lambda job: [0.0, -1.0])
    few = replace(made, topics=made.topics[:2])
    result = evaluate_ranking(few, config("quicksort", budgets=(10,), seeds=5), model=model)
    assert len(model.asked) == 2 * 10
    assert (result.settings["oracle"], result.settings["seeds"]) == ("scripted", 1)


def test_report(made: Collection, tmp_path: Path) -> None:
    """JSON that comes back, a table, and a page in which names are text and nothing is loaded."""
    result = evaluate_ranking(made, config("adaptive", "quicksort"))
    path = write_results([replace(result, collection="made")], tmp_path / "out")
    kept = from_dict(json.loads((tmp_path / "out" / "made.json").read_text()))
    assert json.dumps(to_dict(kept)) == json.dumps(to_dict(replace(result, collection="made")))
    assert rows(kept) == rows(result)
    assert path.read_text().count("<polyline") == 2
    page = render([result])
    assert "made &lt;i&gt;" in page
    assert "made <i>" not in page
    assert "<script" not in page
    assert "src=" not in page
    assert "first stage" in markdown(result)
    assert [(budget, best) for budget, best, _ in versus(result, "adaptive")] == [
        (b, "quicksort [random]") for b in (10, 20, 40)
    ]
    with pytest.raises(InvalidInput, match="no result"):
        from_dict({"curves": []})


@pytest.mark.parametrize("name", sorted(BM25))
def test_collections(name: str) -> None:
    """Topics, and the first stage's quality."""
    path = DATA / DIRECTORIES[name]
    if not path.is_dir():
        pytest.skip(f"{path} is not there: set SHOAL_DATA")
    loaded = load_collection(name, path)
    count, quality = BM25[name]
    assert len(loaded.topics) == count
    assert all(len(one.documents) == len(set(one.documents)) == 100 for one in loaded.topics)
    assert all(list(one.scores) == sorted(one.scores, reverse=True) for one in loaded.topics)
    first = measurer(loaded)([list(range(100)) for _ in loaded.topics])
    assert np.mean(first["nDCG@10"]) == pytest.approx(quality, abs=0.00006 if name.startswith("dl") else 0.011)


def test_bad_input(tmp_path: Path) -> None:
    """Named, and without a traceback on the command line."""
    with pytest.raises(InvalidInput, match="line 2: expected query"):
        read_qrels("1 0 d 1\n1 0 d x\n")
    with pytest.raises(InvalidInput, match="did you mean 'dl19'"):
        load_collection("dl18", tmp_path)
    with pytest.raises(InvalidInput, match="is not the directory of scifact"):
        load_collection("scifact", tmp_path)
    for settings, said in (
        ({"budgets": (20, 10)}, "budgets"), ({"seeds": 0}, "seeds"), ({"noise": "loud"}, "noise"), ({"k": 0}, "k must"),
        ({"batch": 0}, "batch"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=said):
            config("quicksort", **settings)  # type: ignore[arg-type]
    run = CliRunner().invoke(
        app, ["evaluate", "rank", "--data", str(tmp_path), "-o", str(tmp_path), "--budgets", "ten"]
    )
    assert run.exit_code == 2
    assert "whole numbers" in run.output
