"""`shoal evaluate rank`: files written, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from families import save, tiny_model
from shoal.cli.main import app
from shoal.evaluate.ranking_data import DIRECTORIES


def shoal(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", "rank", *map(str, arguments)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two topics of six passages in the format of TREC DL 2019."""
    root = tmp_path_factory.mktemp("data")
    directory = root / DIRECTORIES["dl19"]
    directory.mkdir(parents=True)
    found = [
        {
            "query": f"fish {topic}?",
            "hits": [
                {"qid": topic, "docid": f"d{one}", "content": f"passage {one} on {topic}", "score": 9.0 - one}
                for one in range(6)
            ],
        }
        for topic in (1, 2)
    ]
    (directory / "retrieve_results_dl19.json").write_text(json.dumps(found))
    lines = [f"{topic} 0 d{one} {(one + topic) % 4}\n" for topic in (1, 2) for one in range(6)]
    (directory / "qrels.dl19-passage.txt").write_text("".join(lines))
    return root


def test_simulated(data: Path, tmp_path: Path) -> None:
    """A file per collection, a page, and a table; --k above the documents means all of them."""
    out = tmp_path / "new" / "out"
    run = shoal(
        "--data", data, "--collections", "dl19", "--rankers", "quicksort,all-pairs", "--budgets", "5,15",
        "--seeds", 2, "--oracle", "perfect", "-o", out,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    kept = json.loads((out / "dl19.json").read_text())
    assert kept["settings"]["oracle"] == "perfect"
    assert (kept["topics"], kept["settings"]["seeds"]) == (2, 2)
    all_pairs = kept["curves"][1]
    assert [point["calls"] for point in all_pairs["points"]] == [5, 15]
    assert all_pairs["points"][1]["values"]["nDCG@10"] == [1.0, 1.0]
    assert (out / "report.html").is_file()
    assert "quicksort [random]" in run.output


def test_a_model(data: Path, tmp_path: Path) -> None:
    """A checkpoint is asked, and its answers are kept: the same command again gives the same."""
    model = save(tiny_model("llama", max_position_embeddings=2048), tmp_path / "model")
    command = (
        "--data", data, "--collections", "dl19", "--rankers", "quicksort", "--budgets", 5, "--limit", 1, "--batch", 2,
        "--model", model, "-o", tmp_path / "out",
    )  # fmt: skip
    first = shoal(*command)
    assert first.exit_code == 0, first.output
    kept = (tmp_path / "out" / "dl19.json").read_text()
    assert json.loads(kept)["topics"] == 1
    assert (tmp_path / "out" / "answers").is_file()
    assert shoal(*command).exit_code == 0
    assert (tmp_path / "out" / "dl19.json").read_text() == kept


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--oracle", "nonsense"), "--oracle is one of"),
        (("--model", "m", "--seeds", 2, "--jobs", 2), "--seeds, --jobs"),
        (("--model", "m", "--oracle", "perfect"), "--oracle"),
        (("--collections", ""), "--collections"),
        (("--collections", "dl91"), "there is no collection"),
        (("--rankers", ","), "--rankers"),
        (("--rankers", "quiksort"), "quicksort"),
        (("--directions", "up"), "--directions"),
        (("--budgets", "ten"), "whole numbers"),
        (("--budgets", "20,10"), "rising"),
        (("--budgets", ""), "budgets"),
        (("--k", 0), "k must be 1 or more"),
        (("--batch", 0), "batch must be 1 or more"),
        (("--limit", 0), "--limit"),
        (("--jobs", 0), "jobs"),
    ],
)  # fmt: skip
def test_refused(data: Path, tmp_path: Path, given: tuple[object, ...], said: str) -> None:
    """By its name, with exit code 2, and without a result."""
    run = shoal("--data", data, "--collections", "dl19", "-o", tmp_path / "out", *given)
    assert run.exit_code == 2, run.output
    assert said in " ".join(run.output.split())
    assert not (tmp_path / "out" / "report.html").exists()


def test_out_is_no_directory(data: Path, tmp_path: Path) -> None:
    """Known before any ranking."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        run = shoal("--data", data, "--collections", "dl19", "-o", out)
        assert run.exit_code == 2
        assert "cannot be a directory" in " ".join(run.output.split())
    assert (tmp_path / "file").read_text() == "mine"
