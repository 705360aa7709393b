"""lm-evaluation-harness, unchanged, takes the server for OpenAI's: `local-completions` gives what its `hf` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra harness)")
pytest.importorskip("tenacity", reason="tenacity is not installed, which the harness's models behind an API need")

import lm_eval
from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.filterwarnings("default")  # the harness and what it loads warn of themselves
ROWS = [
    {"question": "The mill is", "choices": [" a pub by the river", " shut", " an expensive restaurant"], "label": 0},
    {"question": "Food? ", "choices": ["French", "Chinese or Indian", "none at all"], "label": 1},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Choices to be scored, whole texts, and answers to be written."""
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"data_files": {"test": str(directory / "rows.jsonl")}, "cache_dir": str(directory / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    choices = {"task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
               "doc_to_target": "label", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    texts = {"task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}} it?",
             "metric_list": [{"metric": "word_perplexity"}]}  # fmt: skip
    answers = {"task": "answers", "output_type": "generate_until", "doc_to_text": "{{question}}?", "doc_to_target": "x",
               "metric_list": [{"metric": "bypass"}],
               "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12}}  # fmt: skip
    return [common | choices, common | texts, common | answers]


def responses(model: str, arguments: dict[str, Any], tasks: list[dict[str, Any]], **more: Any) -> dict[str, list[Any]]:
    """What a model answered to every request of every task, through the harness's own evaluation."""
    result = lm_eval.simple_evaluate(
        model, arguments, tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, **more
    )
    return {
        task: [
            one for sample in sorted(samples, key=lambda s: s["doc_id"]) for resps in sample["resps"] for one in resps
        ]
        for task, samples in result["samples"].items()
    }


@pytest.mark.parametrize("concurrent", [1, 4])
def test_scores_and_answers_are_those_of_transformers(
    url: str, directory: Path, tasks: list[dict[str, Any]], concurrent: int
) -> None:
    """As `lm-eval run --model local-completions --model_args base_url=...,model=...` does it."""
    where = {"base_url": f"{url}/v1/completions", "model": "tiny", "tokenizer": str(directory), "max_length": 256}
    ours = responses("local-completions", where | {"num_concurrent": concurrent, "max_retries": 1}, tasks, batch_size=2)
    theirs = responses("hf", {"pretrained": str(directory), "dtype": "float32", "max_length": 255}, tasks, device="cpu")
    assert [len(ours[task]) for task in ("choices", "texts", "answers")] == [6, 2, 2]
    for (logprob, greedy), (expected, expected_greedy) in zip(ours["choices"], theirs["choices"], strict=True):
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy
    assert ours["texts"] == pytest.approx(theirs["texts"], abs=1e-3)
    assert ours["answers"] == theirs["answers"]
