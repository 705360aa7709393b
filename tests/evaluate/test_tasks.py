"""Reading tasks: the built-in ones, files of one's own, and what is wrong with a file."""

from __future__ import annotations

import gzip
import json
import os
from decimal import Decimal
from pathlib import Path

import pytest

from shoal.errors import InvalidInput
from shoal.evaluate.metrics import METRICS, final_number, metric_named
from shoal.evaluate.tasks import TASKS, find_file, load_task

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
SIZES = {"e2e": ("e2e_nlg", 630), "scitldr": ("scitldr", 618), "arxiv_abstract_title": ("arxiv_abstract_title", 1000)}
SIZES["gsm8k"] = ("gsm8k", 1319)


def own(tmp_path: Path, *lines: object) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path):
    lines = [
        {"prompt": "2 + 3 =", "answer": "5", "metric": "exact_match"},
        {"prompt": "Say hello.", "references": ["hello", "Hello!"]},
    ]
    task, inputs = load_task(own(tmp_path, *lines), None, max_new_tokens=7)
    assert task.metrics == ("exact_match",)
    assert task.max_new_tokens == 7
    assert [one.references for one in inputs] == [("5",), ("hello", "Hello!")]
    assert load_task(own(tmp_path, *lines), None, metrics=("rouge_l", "chrf"))[0].metrics == ("rouge_l", "chrf")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a", "answer": "b", "metric": "bleu"}, {"answer": "b"}], "line 2: field 'prompt' is missing"),
        ([{"prompt": " ", "answer": "b", "metric": "bleu"}], "line 1: 'prompt' must be a string"),
        ([{"prompt": "a", "metric": "bleu"}], "line 1: give either 'references' or 'answer'"),
        ([{"prompt": "a", "references": [], "metric": "bleu"}], "line 1: 'references' is empty"),
        ([{"prompt": "a", "references": ["b", ""], "metric": "bleu"}], "line 1: 'references' must be strings"),
        ([{"prompt": "a", "answer": "b", "metric": "blue"}], "line 1: unknown metric 'blue': did you mean 'bleu'"),
        ([{"prompt": "a", "answer": "b", "metrics": "bleu"}], "line 1: unknown field 'metrics', did you mean 'metric'"),
        ([{"prompt": "a", "answer": "b"}], "no line has the field 'metric'"),
        (
            [{"prompt": "a", "answer": "b", "metric": "bleu"}, {"prompt": "a", "answer": "b", "metric": "chrf"}],
            "line 2: 'metric' is 'chrf', and was bleu before",
        ),
        (["{"], "line 1: not valid JSON"),
        ([], "holds no inputs"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, lines: list[object], message: str):
    with pytest.raises(InvalidInput, match=message):
        load_task(own(tmp_path, *lines), None)


def test_unknown_names_and_missing_data(tmp_path: Path):
    with pytest.raises(InvalidInput, match="unknown task 'e2': did you mean 'e2e'"):
        load_task("e2", None)
    with pytest.raises(InvalidInput, match="'e2e' needs data"):
        load_task("e2e", None)
    with pytest.raises(InvalidInput, match="no such file"):
        load_task("e2e", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidInput, match=r"has no testset_w_refs\.csv"):
        load_task("e2e", str(tmp_path))
    with pytest.raises(InvalidInput, match="leave out the data"):
        load_task(own(tmp_path, {"prompt": "a", "answer": "b", "metric": "bleu"}), "data")
    (tmp_path / "test.txt").write_text("some text")
    with pytest.raises(InvalidInput, match="no other"):
        load_task("lm", str(tmp_path), metrics=("bleu",))
    with pytest.raises(InvalidInput, match="did you mean 'rouge_l'"):
        metric_named("rouge-l")
    with pytest.raises(InvalidInput, match="unknown metric 'loss'"):
        metric_named("loss")


ROWS = {
    "scitldr": {"source": ["We do  this.", "It works."], "target": ["It works well.", "Works."]},
    "arxiv_abstract_title": {"abstract": "We do this.", "title": "This, Done"},
    "gsm8k": {"question": "2 pens at 9 dollars?", "answer": "2*9 = <<2*9=18>>18\n#### 18"},
}
EXPECTED = {
    "scitldr": ("We do this. It works.\nTL;DR:", ("It works well.", "Works."), " It works well."),
    "arxiv_abstract_title": ("We do this.\nTitle:", ("This, Done",), " This, Done"),
    "gsm8k": ("Question: 2 pens at 9 dollars?\nAnswer:", ("18",), " 2*9 = 18\n#### 18"),
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_built_in_tasks(tmp_path: Path, name: str):
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[name]).encode()))
    _, (one,) = load_task(name, str(tmp_path))
    assert (one.prompt, one.references, one.completion) == EXPECTED[name]
    for field in ROWS[name]:
        if field != "source_labels":
            lacking = {key: value for key, value in ROWS[name].items() if key != field}
            (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[name]) + "\n" + json.dumps(lacking))
            with pytest.raises(InvalidInput, match=f"line 2: field '{field}' is missing"):
                load_task(name, str(tmp_path / "test.jsonl"))


@pytest.mark.parametrize("name", sorted(SIZES))
def test_the_real_data(name: str):
    directory, size = SIZES[name]
    if not (DATA / directory).is_dir():
        pytest.skip(f"{directory} is not in {DATA} (set SHOAL_DATA)")
    task, inputs = load_task(name, str(DATA / directory))
    assert len(inputs) == size
    first = inputs[0]
    for metric in task.metrics:
        perfect = metric_named(metric).statistics([first.prompt], [first.references], [first.references[0]]).score()
        assert perfect.value == 0 if metric == "slot_error_rate" else perfect.value >= 2, metric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So it is 2 * 9 = $1,018.50 a day.", Decimal("1018.5")),
        ("First 5, then #### 18 and 7", Decimal(18)),
        ("-3", Decimal(-3)),
        ("none", None),
    ],
)
def test_the_final_number(text: str, number: Decimal | None):
    assert final_number(text) == number


def test_exact_matches():
    for metric, outputs, value in (
        ("exact_match", ["New  york", "b"], 50),
        ("final_number", ["it is 18.00", "17"], 50),
    ):
        references = [("boston", "new York"), ("c",)] if metric == "exact_match" else [("18",), ("18",)]
        assert METRICS[metric].statistics(["", ""], references, outputs).score().value == value


def test_every_task_names_known_metrics():
    assert all(name in METRICS for task in TASKS.values() for name in task.metrics)
    assert find_file(__file__, None) == Path(__file__)
