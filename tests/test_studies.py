"""Every study runs at tiny sizes, resumes, and ends with a JSON line. Nothing here looks at a score."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).parents[1] / "studies"


def run(script: str, *options: object) -> tuple[dict[str, Any], str]:
    """The last line that a study prints at quick sizes, and everything before it."""
    command = [sys.executable, str(STUDIES / script), "--quick", "--threads", "1", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["study"] == script.removesuffix(".py")
    return result, done.stdout


@pytest.fixture
def e2e(tmp_path: Path) -> Path:
    """A handful of restaurants in the format of the E2E data."""
    for name, start, count in (("trainset", 0, 24), ("devset", 24, 6)):
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(["mr", "ref"])
        for i in range(start, start + count):
            rows.writerow([f"name[Place {i}], eatType[pub]", f"Place {i} is a pub{' by the river' * (i % 3)}."])
        (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    return tmp_path


def test_recipe_takes_equal_budgets_and_resumes(e2e: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = ["--data", e2e, "--work", work, "--arms", "any", "one-d3-1_3", "small-4"]
    result, _ = run("recipe.py", *options)
    assert result["budget_of_an_arm"]["steps"] == [4]
    assert len(result["budget_of_an_arm"]["tokens"]) == 1
    assert [budget["depth"] for budget in result["budgets"]] == [1, 1 / 2, 1 / 3, 1 / 5]
    third = {one["arm"]: one for one in result["budgets"][2]["arms"]}
    assert set(third) == {"any", "one-d3-1_3", "small-4"}
    assert third["small-4"]["mean_layers"] == 4
    before = {path: path.stat().st_mtime_ns for path in work.glob("arms/*.json")}
    assert len(before) == 3
    again, printed = run("recipe.py", *options[:-3], "any-distill")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "any-distill seed 0" in printed
    assert {one["arm"] for one in again["budgets"][1]["arms"]} == {"any", "any-distill"}


def test_recipe_trains_routers_and_runs_exits(e2e: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = ["--data", e2e, "--work", work, "--arms", "first-1_3", "dr-llm-1_2", "dr-llm-1_5", "calm-dense"]
    result, printed = run("recipe.py", *options)
    assert len(result["budget_of_an_arm"]["tokens"]) == 1
    _, half, third, fifth = (
        {one["arm"]: one for one in budget["arms"]} for budget in [{"arms": []}, *result["budgets"]]
    )
    assert (set(half), set(third), set(fifth)) == ({"dr-llm-1_2"}, {"first-1_3"}, {"dr-llm-1_5"})
    assert 1 <= fifth["dr-llm-1_5"]["mean_layers"] < half["dr-llm-1_2"]["mean_layers"] < 12
    for budget in result["budgets"]:
        (calm,) = budget["calm"]
        assert 1 <= calm["mean_layers"] <= calm["batch_layers"][0] <= 12
    assert result["routers"]["first-1_3"]["router_steps"] == 1
    assert result["routers"]["dr-llm-1_2"] == result["routers"]["dr-llm-1_5"], "one search serves all depths"
    assert all(
        note in printed
        for note in ("- `first-*`: 1 of the 4 steps", "- `dr-llm-*`: the network had", "- CALM: softmax")
    )

    # As if recovery had been interrupted: its router and what other stages have done stay.
    (stage,) = work.glob("stages/*router_share*")
    (stage / "report.json").unlink()
    (work / "arms" / "first-1_3-dev-seed0.json").unlink()
    kept = {
        p: p.stat().st_mtime_ns for name in ("stages/*/report.json", "stages/*/router-*/*") for p in work.glob(name)
    }
    again, _ = run("recipe.py", *options)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert again["routers"]["first-1_3"] == result["routers"]["first-1_3"]


def test_deep_reading_draws_its_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra 'plot'")
    options = ["--work", tmp_path / "work", "--tasks", "pointers", "--seeds", 0, 1, "--arms"]
    result, _ = run("deep_reading.py", *options, "deep", "small-2", "shallow-prompt")
    task = result["tasks"]["pointers"]
    assert [(point["arm"], point["depth"]) for point in task["points"]] == [
        *(("deep", depth) for depth in (1, 1 / 2, 3 / 8, 1 / 4)),
        *(("shallow-prompt", depth) for depth in (1, 1 / 2, 3 / 8, 1 / 4)),
        ("small-2", 1),
    ]
    layers = {(point["arm"], point["depth"]): point["mean_layers"] for point in task["points"]}
    assert layers["deep", 1 / 4] == layers["small-2", 1] == 2
    assert all(point["seeds"] == [0, 1] for point in task["points"])
    assert len(task["verdicts"]) == 1
    figure = (tmp_path / "work" / "deep_reading.svg").read_text(encoding="utf-8")
    assert "<svg" in figure


def test_long_outputs_compares_losses_by_position(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra 'plot'")
    words = [f"word{i}" for i in range(21)]
    for split, seed in (("train", 0), ("test", 1)):
        rows = [{"title": f"On {words[i % 9]} {i}", "abstract": " ".join(words[(i * j + seed) % 20] for j in range(400))}
                for i in range(1, 9)]  # fmt: skip
        data = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    options = ["--data", tmp_path, "--work", tmp_path / "work", "--arms", "any-depth", "small-6"]
    result, printed = run("long_outputs.py", *options)
    layers = {one["arm"]: one["mean_layers"] for one in result["arms"]}
    assert layers["any-depth: dense"] == 12
    assert layers["small-6: dense"] == 6
    assert layers["any-depth: skipdecode 0.5"] == pytest.approx(6, rel=0.05)
    assert all(len(one["by_band"]) == 4 for one in result["arms"])
    assert "depth 0.5 (" in printed
    assert "<svg" in (tmp_path / "work" / "long_outputs.svg").read_text(encoding="utf-8")


def test_suits_and_self_drafting_compare_the_recipes_arms(e2e: Path, tmp_path: Path) -> None:
    options = ["--data", e2e, "--work", tmp_path / "work"]
    run("recipe.py", *options, "--arms", "any", "any-unified")
    drafted, _ = run("self_drafting.py", *options)
    (model,) = drafted["models"]
    assert model["model"] == "any depth"
    assert [row["same_tokens"] for row in model["depths"]] == [4, 4, 4]
    assert all(1 <= row["tokens_per_pass"] <= 5 for row in model["depths"])
    result, _ = run("suits_order.py", *options)
    assert [depth["depth"] for depth in result["depths"]] == [1 / 2, 1 / 3, 1 / 5]
    for depth in result["depths"]:
        assert {one["policy"] for one in depth["policies"]} == {"skipdecode", "unified"}


def test_probes_are_tried_beside_their_baselines(tmp_path: Path) -> None:
    (tmp_path / "cls_sst2").mkdir()
    for name, count in (("train", 60), ("dev", 8), ("test", 20)):
        lines = (f"{i % 2}\t{'good' if i % 2 else 'bad'} film , number {i} of {name}\n" for i in range(count))
        (tmp_path / "cls_sst2" / f"{name}.tsv.gz").write_bytes(gzip.compress("".join(lines).encode()))
    options = [
        "--model",
        "shoal-e2e",
        "--data",
        tmp_path,
        "--work",
        tmp_path / "work",
        "--arms",
        "SST-2",
        "--seeds",
        "0",
        "1",
    ]
    result, printed = run("probes.py", *options)
    arms = result["tasks"]["SST-2"]
    assert {"pool", "gate", "attention", "MULI", "bag of words", "gate of 1", "gate of 11"} <= arms.keys()
    assert arms["gate"].keys() == {"0", "1"}
    assert all(one["quality"]["num_prompts"] == 20 for arm in arms.values() for one in arm.values())
    assert "at least pooling on" in printed
    again, _ = run("probes.py", *options)
    assert again["tasks"] == result["tasks"]


@pytest.fixture
def every_set(e2e: Path, tmp_path: Path) -> Path:
    """Restaurants with all slots, and dialogue acts of four domains, where studies look for them."""
    data = tmp_path / "data"
    (data / "e2e_nlg").mkdir(parents=True)
    values = {
        "name": ("Zizzi", "The Vaults", "Aromi", "Cocum", "Blue Spice"), "eatType": ("pub", "coffee shop", "restaurant"),
        "food": ("French", "Italian", "English"), "priceRange": ("cheap", "moderate", "high"),
        "customer rating": ("low", "average", "high"), "area": ("riverside", "city centre"), "familyFriendly": ("yes", "no"),
        "near": ("Burger King", "Café Sicilia"),
    }  # fmt: skip
    mrs = [", ".join(f"{name}[{some[i % len(some)]}]" for name, some in values.items()) for i in range(30)]
    rows = [f'"{mr}",Zizzi is a pub.' for mr in mrs]
    text = "\n".join(["mr,ref", *rows]) + "\n"
    (data / "e2e_nlg" / "trainset.csv.gz").write_bytes(gzip.compress(text.encode()))
    for domain in ("restaurant", "laptop", "tv", "hotel"):
        (data / "rnnlg_dialogue" / domain).mkdir(parents=True)
        for part in ("train", "test"):
            names = [f"{part} {'abcdefg'[i % 7] * (1 + i // 7)}" for i in range(40)]
            acts = [[f"inform(name='{name}')", f"{name} is here", ""] for name in names]
            body = "# a comment\n" + json.dumps(acts)
            (data / "rnnlg_dialogue" / domain / f"{part}.json.gz").write_bytes(gzip.compress(body.encode()))
    return data


def test_the_sentinels_answers_stay(every_set: Path, tmp_path: Path) -> None:
    """A second call asks the model nothing again."""
    options = ["--data", every_set, "--work", tmp_path, "--steps", "0", "--quick", "--threads", "1"]
    times = set()
    for _ in range(2):
        command = [sys.executable, str(STUDIES / "sentinel.py"), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        times.add((tmp_path / "traces-0.jsonl").stat().st_mtime_ns)
    assert len(times) == 1
    lines = (tmp_path / "traces-0.jsonl").read_text().splitlines()
    assert len({json.loads(line)["slice"] for line in lines}) == 12


def test_arithmetic_slices_are_answered(tmp_path: Path) -> None:
    """A network of four steps answers every slice, with a trace."""
    command = [sys.executable, str(STUDIES / "sentinel_arithmetic.py"), "--quick", "--threads", "1", "--work", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "traces-0.jsonl").read_text().splitlines()]
    assert len(lines) == 16 * 3
    assert all(line["trace"]["entropies"] and line["prompt"].endswith("=") for line in lines)


@pytest.fixture
def collections(tmp_path: Path) -> Path:
    """Every test collection, each in its own format, with queries of a word and documents that hold it or do not."""
    data = tmp_path / "data"
    words = ["pub", "river", "food", "city"]
    texts = [f"a {words[i % 4]} place, number {i}" for i in range(24)]
    judged = [(query, place) for query in range(4) for place in range(24) if place % 4 == query and place % 3]

    def put(path: str, text: str) -> None:
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_text(text, encoding="utf-8")

    papers = [json.dumps({"id": str(i), "title": f"On {i}", "abstract": text}) for i, text in enumerate(texts)]
    (data / "arxiv_abstract_title").mkdir(parents=True)
    for part in ("train", "dev"):
        (data / "arxiv_abstract_title" / f"{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(papers).encode()))
    qrels = "\n".join(f"{query} 0 {place} 1" for query, place in judged)
    for name in ("dl19", "dl20"):
        entries = [
            {"query": word, "hits": [{"qid": query, "docid": i, "content": text, "score": 24 - i} for i, text in enumerate(texts)]}
            for query, word in enumerate(words)
        ]  # fmt: skip
        put(f"ir_trec_dl_2019_2020_bm25/retrieve_results_{name}.json", json.dumps(entries))
        put(f"ir_trec_dl_2019_2020_bm25/qrels.{name}-passage.txt", qrels)
    corpus = [json.dumps({"doc_id": i, "title": text, "abstract": []}) for i, text in enumerate(texts)]
    put("ir_scifact/corpus.jsonl", "\n".join(corpus))
    put("ir_scifact/topics.test.tsv", "\n".join(f"{query}\t{word}" for query, word in enumerate(words)))
    put("ir_scifact/qrels.test.txt", qrels)
    put("ir_cranfield/cran.all.1400", "".join(f".I {i}\n.T\n{text}\n.W\n{text}\n" for i, text in enumerate(texts)))
    put("ir_cranfield/cran.qry", "".join(f".I {query}\n.W\n{word}\n" for query, word in enumerate(words)))
    put("ir_cranfield/cranqrel", "\n".join(f"{query + 1} {place} 3" for query, place in judged))
    put("ir_vaswani/doc-text.trec", "".join(f"<DOC>\n<DOCNO>{i}</DOCNO>\n{t}\n</DOC>\n" for i, t in enumerate(texts)))
    put("ir_vaswani/query-text.trec", "".join(f"<num>{q}</num><title>\n{w}\n</title>" for q, w in enumerate(words)))
    put("ir_vaswani/qrels", qrels)
    return data


def test_the_judge_is_trained_and_asked(collections: Path, tmp_path: Path) -> None:
    options = ["--model", "shoal-e2e", "--data", collections, "--work", tmp_path / "work"]
    result, printed = run("judge.py", *options)
    assert [one["stage"] for one in result["training"]] == ["papers", "judged"]
    assert [one["steps"] for one in result["training"]] == [2, 2]
    assert set(result["pairs"]) == {"arxiv", "vaswani", "dl19", "dl20", "scifact", "cranfield"}
    for models in result["pairs"].values():
        assert set(models) == {"start", "judge"}
        assert len({one["first stage"][0] for one in models.values()}) == 1, "all are asked about the same pairs"
    assert [one["collection"] for one in result["rankings"]] == ["dl20", "scifact", "cranfield"]
    for one in result["rankings"]:
        assert all(row["calls"] <= row["budget"] for rows in one["arms"].values() for row in rows)
    assert "- On pairs of test collections" in printed

    # As if it had been interrupted: what was asked is not asked again, and training is not done again.
    (tmp_path / "work" / "rankings-dl20.json").unlink()
    (tmp_path / "work" / "pairs-dl20-judge.json").unlink()
    weights = (tmp_path / "work" / "judged" / "model.safetensors").stat().st_mtime_ns
    again, _ = run("judge.py", *options)
    assert again["rankings"] == result["rankings"]
    assert again["pairs"] == result["pairs"]
    assert (tmp_path / "work" / "judged" / "model.safetensors").stat().st_mtime_ns == weights
