"""What the studies compute: problems with answers that an independent solver confirms, budgets, verdicts, resuming."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from made_reproduction import reproduction
from shoal.depth.plan import ALWAYS
from shoal.errors import InvalidInput
from shoal.evaluate.reproduce_tables import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

import deep_reading
import reading_training
import recipe
import recipe_arms
import recipe_table
import study
import study_tables
from reading_tasks import FactQuestions, PointerChasing, read_graph

sys.path.pop(0)

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> FactQuestions:
    """Questions over a small graph of films, in MetaQA's format."""
    rng = random.Random(0)
    lines = []
    for film in range(60):
        lines += [
            f"film {film}|directed_by|person {rng.randrange(20)}",
            f"film {film}|release_year|{rng.randrange(1960, 1990)}",
        ]
        lines += [f"film {film}|starred_actors|person {person}" for person in rng.sample(range(20, 60), 2)]
    path = tmp_path_factory.mktemp("kb") / "kb.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    graph, relations = read_graph(path)
    return FactQuestions(graph=graph, relations=relations, walks=4000)


def words_of(task, prompt) -> list[str]:
    return [task.vocabulary[token] for token in prompt]


def solve_pointers(task: PointerChasing, prompt) -> tuple[list[str], list[int]]:
    """Answers and steps, read from the prompt's words alone, one step at a time."""
    words = words_of(task, prompt)
    table, questions = words[: task.num_nodes], words[task.num_nodes : -1]
    answers, hops = [], []
    for count, node in zip(questions[::2], questions[1::2], strict=True):
        hops.append(int(count[1:]))
        for _ in range(hops[-1]):
            node = table[int(node)]
        answers.append(node)
    return answers, hops


@settings(max_examples=25, deadline=None)
@given(num_nodes=st.integers(4, 16), answers=st.integers(1, 5), seed=st.integers(0, 2**31), data=st.data())
def test_pointer_answers_are_those_of_a_slow_solver(num_nodes, answers, seed, data):
    most = data.draw(st.integers(1, num_nodes - 1))
    level = data.draw(st.integers(1, most))
    task = PointerChasing(num_nodes=num_nodes, max_hops=most, num_answers=answers)
    batch = task.batch(5, max_hops=level, seed=(seed, 1))
    assert batch.prompts.shape == (5, task.prompt_tokens)
    assert batch.hops.min() >= 0
    assert batch.hops.max() <= level
    for prompt, answer, hops in zip(batch.prompts, batch.answers, batch.hops, strict=True):
        assert solve_pointers(task, prompt) == (words_of(task, answer), hops.tolist())
        assert words_of(task, prompt)[-1] == "="


def solve_facts(task: FactQuestions, prompt) -> tuple[list[list[str]], list[int]]:
    """Every possible answer of each question, and its steps: all paths through the facts as they stand in the prompt."""
    words = words_of(task, prompt)
    num_facts = task.num_chains * task.max_hops + task.num_others
    lines = [tuple(words[3 * i : 3 * i + 3]) for i in range(num_facts)]
    rest = words[3 * num_facts : -1]
    found, hops = [], []
    for i in range(task.num_answers):
        *relations, start = rest[i * (task.max_hops + 1) : (i + 1) * (task.max_hops + 1)]
        relations = [relation for relation in relations if relation != "-"]
        ends = [start]
        for relation in relations:
            ends = [o for end in ends for s, r, o in lines if (s, r) == (end, relation)]
        found.append(ends)
        hops.append(len(relations))
    return found, hops


def test_fact_answers_are_the_only_ones_that_a_slow_solver_finds(facts: FactQuestions):
    batch = facts.batch(60, max_hops=3, seed=(0, 1))
    assert batch.prompts.shape == (60, facts.prompt_tokens)
    assert set(batch.hops.flatten()) == {0, 1, 2, 3}
    for prompt, answer, hops in zip(batch.prompts, batch.answers, batch.hops, strict=True):
        assert solve_facts(facts, prompt) == ([[word] for word in words_of(facts, answer)], hops.tolist())


def test_the_last_relation_of_a_question_leaves_as_many_candidates_as_there_are_walks(facts: FactQuestions):
    """Otherwise one step would answer a question that says it needs three."""
    for prompt in facts.batch(20, max_hops=3, seed=(3,)).prompts:
        words = words_of(facts, prompt)
        num_facts = facts.num_chains * facts.max_hops + facts.num_others
        relations = words[1 : 3 * num_facts : 3]
        for i in range(facts.num_answers):
            asked = words[3 * num_facts :][4 * i : 4 * i + 3]
            asked = [relation for relation in asked if relation != "-"]
            assert not asked or relations.count(asked[-1]) >= facts.num_chains


def test_batches_are_functions_of_their_seed(facts: FactQuestions):
    for task in (PointerChasing(), facts):
        once, again, other = (task.batch(4, max_hops=2, seed=seed) for seed in ((1, 2), (1, 2), (1, 3)))
        assert (once.prompts == again.prompts).all()
        assert (once.prompts != other.prompts).any()


def test_metaqa_itself_fits_the_task():
    path = DATA / "kg_metaqa" / "kb.txt.gz"
    if not path.is_file():
        pytest.skip(f"needs MetaQA at {path}: set SHOAL_DATA to the directory of the data sets")
    graph, relations = read_graph(path)
    task = FactQuestions(graph=graph, relations=relations)
    assert len(relations) == 18
    assert task.prompt_tokens < 64
    assert len(task.vocabulary) < 64
    assert len(task.walks_by_kind) == task.kinds
    batch = task.batch(10, max_hops=3, seed=(0,))
    for prompt, answer in zip(batch.prompts, batch.answers, strict=True):
        assert solve_facts(task, prompt)[0] == [[word] for word in words_of(task, answer)]


def test_the_tables_are_those_of_the_results():
    assert {path.name for path in study_tables.DOCUMENTS} == {"README.md", "reproduction.md", "ranking.md"}
    for path in study_tables.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert study_tables.SECTION.search(text), f"{path} has no section to render"
        assert study_tables.render(text) == text, "run: python studies/study_tables.py"


def test_a_reproduction_is_rendered_from_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    document = study_tables.DOCUMENTS[1].read_text(encoding="utf-8")
    rendered = study_tables.render(document)
    before, _, after = rendered.partition("<!-- reproduction -->\nNo results yet.\n<!-- end -->")
    assert after, "without results the block says so"
    conditions = {"threads": 1, "cores": 2, "torch": "2", "transformers": "5", "python": "3.11", "date": "2026-11-21"}
    made = {**reproduction(), "conditions": conditions}
    (tmp_path / "reproduction.json").write_text(json.dumps(made))
    rendered = study_tables.render(document)
    assert rendered.startswith(before)
    assert rendered.endswith(after)
    assert describe(made) in rendered
    assert "*1 threads on 2 cores; PyTorch 2," in rendered


def test_facts_need_their_data():
    with pytest.raises(InvalidInput, match=r"give the directory of its kb\.txt\.gz with --data"):
        deep_reading.make_task("facts", argparse.Namespace(data=None))


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "kb.txt.gz").write_bytes(gzip.compress(b"a|b|c\na|b\n"))
    with pytest.raises(InvalidInput, match=r"line 2: expected subject\|relation\|object, got 'a\|b'"):
        read_graph(tmp_path / "kb.txt.gz")
    (tmp_path / "kb.txt.gz").write_bytes(b"a|b|c")
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_graph(tmp_path / "kb.txt.gz")
    with pytest.raises(InvalidInput, match="max_hops"):
        PointerChasing(num_nodes=4, max_hops=4)


TINY = reading_training.Recipe(width=16, heads=2, batch_size=4, steps=12, fall_steps=2)


def test_a_run_that_stops_after_every_step_gives_the_weights_of_one_that_does_not(tmp_path: Path):
    task = PointerChasing(num_nodes=5, max_hops=2, num_answers=2)
    plans = list(deep_reading.ARMS["deep"].plans(task).values())
    whole = reading_training.train(task, 8, plans, TINY, seed=1, state=tmp_path / "whole.pt")
    calls, found = 0, None
    while found is None:
        found = reading_training.train(task, 8, plans, TINY, seed=1, state=tmp_path / "parts.pt", stop_at=0.0)
        calls += 1
    assert calls == whole[1].step == found[1].step == 12
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, found[0].state_dict()[name]), name


def test_the_curriculum_goes_on_when_answers_are_right_and_ends_when_the_loss_is_flat():
    task, recipe_ = PointerChasing(), replace(TINY, steps=10**6)
    progress = reading_training.Progress()
    for _ in range(20):
        reading_training.advance(progress, 1.0, 1.0, task, recipe_)
    assert progress.level == 1
    while progress.falling_since is None:
        reading_training.advance(progress, 1.0, 0.2, task, recipe_)
    assert progress.step <= 20 + (reading_training.PATIENCE + 2) * reading_training.WINDOW
    assert progress.level == 1
    assert reading_training.rate(progress, recipe_) == 1
    while not reading_training.done(progress, recipe_):
        reading_training.advance(progress, 0.9, 1.0, task, recipe_)
        assert 0 <= reading_training.rate(progress, recipe_) < 1
    assert progress.level == 1, "no new level while the learning rate falls"
    assert not reading_training.flat([3.0, 2.0, 1.9, 1.8, 1.7, 1.6])
    assert reading_training.flat([3.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_plans_of_the_arms_cost_what_their_small_models_do():
    task = PointerChasing()
    for name, arm in deep_reading.ARMS.items():
        for depth, plan in arm.plans(task).items():
            mean = plan.mean_depth(task.num_answers - 1) * arm.num_layers
            assert mean == pytest.approx(arm.num_layers * depth, abs=0.01)
            prompt_layers = sum(plan.runs_prompt)
            assert (prompt_layers < arm.num_layers) == (name == "shallow-prompt" and depth < 1)
            assert plan.cutoffs[-1] == ALWAYS


def test_verdicts_follow_the_rule():
    def point(arm: str, depth: float, *shares: float) -> dict:
        return {"arm": arm, "depth": depth, "right": {"written": {"1": [1.0] * len(shares), "2": list(shares)}}}

    small, shallow = point("small-4", 1.0, 0.5, 0.6), point("shallow-prompt", 0.5, 0.4, 0.3)
    assert "confirmed. Of questions" in deep_reading.verdicts([point("deep", 0.5, 0.7, 0.8), small, shallow], 2)[0]
    assert "open" in deep_reading.verdicts([point("deep", 0.5, 0.55, 0.8), small, shallow], 2)[0]
    assert "refuted" in deep_reading.verdicts([point("deep", 0.5, 0.45, 0.4), small, shallow], 2)[0]
    assert deep_reading.verdicts([point("deep", 0.5, 0.45), small], 2) == []


def test_arms_differ_in_what_they_say_and_cover_what_the_study_promises():
    arms = recipe_arms.arms()
    assert {
        "dense",
        "any",
        "any-scratch",
        "any-no-warmup",
        "any-lora",
        "any-distill",
        "any-need",
        "small-6",
    } <= arms.keys()
    for policy in ("early-termination", "unified", "hierarchical", "d3"):
        assert [depth for _, depth, _ in arms[f"any-{policy}"].evaluate] == list(recipe_arms.BUDGETS)
        assert f"one-{policy}-1_5" in arms
    for kind in ("first", "dr-llm"):
        assert [arms[f"{kind}-1_{part}"].evaluate for part in (2, 3, 5)] == [((kind, 1 / n, 1 / n),) for n in (2, 3, 5)]
    on_others = {name: arm for name, arm in arms.items() if name.startswith(("dr-llm-", "calm-"))}
    trainings = [recipe.stage_name(arm, 1, 0) for name, arm in arms.items() if name not in on_others]
    assert len(set(trainings)) == len(trainings)
    assert {recipe.stage_name(arm, 1, 0) for arm in on_others.values()} == {
        recipe.stage_name(arms[name], 1, 0) for name in recipe_arms.CALM_ON
    }
    assert not any("/" in name or "|" in name for name in trainings)
    assert recipe.stage_name(arms["any"], 0, 0) == recipe.stage_name(arms["dense"], 0, 0)


def test_a_winner_is_named_only_beyond_chance():
    rng = np.random.default_rng(0)

    def entry(quality: int, seeds: tuple[int, ...] = (0,)) -> dict:
        """60 inputs of 20 words; `quality` in 20 match, more or less."""
        rows = []
        for _ in seeds:
            matched = np.clip(quality + rng.integers(-2, 3, size=60), 1, 17)[:, None] - np.arange(4)
            counts = np.concatenate(
                [np.full((60, 2), 20), np.maximum(matched, 0), np.tile(20 - np.arange(4), (60, 1))], axis=1
            )
            slots = [[100, 5]] * 60
            rows.append({"mean_layers": 4.0, "bleu_counts": counts.tolist(), "slot_counts": slots})
        return {"runs": [{"seed": s, "train_s": 1.0} for s in seeds], "rows": rows}

    clear = {"depth": 1 / 3, **recipe_table.compare({"any": entry(10), "small-4": entry(15)})}
    assert [one["arm"] for one in clear["arms"]] == ["small-4", "any"]
    assert clear["arms"][1]["behind_best"]["low"] > 0
    assert clear["arms"][0]["slot_error_rate"]["value"] == 20
    assert recipe_table.verdict(clear).startswith("At depth 1/3 `small-4` wins with ")
    near = {"depth": 1 / 3, **recipe_table.compare({"any": entry(12), "any-need": entry(12)})}
    assert "within chance of" in recipe_table.verdict(near)
    more = recipe_table.compare({"any": entry(10), "small-4": entry(15, (0, 1))})
    assert more["seeds"] == [0], "arms are ranked on the seeds that all have"
    assert [len(one["bleu_by_seed"]) for one in more["arms"]] == [2, 1]
    assert more["arms"][1]["behind_best"] is not None
    unpaired = {"depth": 1 / 3, **recipe_table.compare({"any": entry(10, (1,)), "small-4": entry(15)})}
    assert recipe_table.verdict(unpaired).endswith("With other seeds, and so not compared: `any`.")
    beside = recipe_table.compare({"calm-dense": entry(15), "any": entry(10)})
    assert [one["arm"] for one in beside["arms"]] == ["any"], "what exits by confidence does not compete"
    assert beside["calm"][0]["behind_best"]["high"] < 0


def test_recipe_says_who_wins_and_who_was_not_compared():
    def arm(name: str, low: float | None) -> dict:
        behind = None if low is None else {"value": low + 1, "low": low, "high": low + 2}
        return {"arm": name, "bleu": {"value": 60.0}, "mean_layers": 4.0, "behind_best": behind}

    def said(*others: dict) -> str:
        return recipe_table.verdict({"depth": 1 / 3, "arms": [arm("any", None), *others]})

    assert said() == "At depth 1/3 only `any` has run (60.0 BLEU at 4.0 layers)."
    assert said(arm("dr-llm-1_3", 2)).endswith(
        "wins with 60.0 BLEU at 4.0 layers; every other arm is behind it beyond chance."
    )
    close = said(arm("first-1_3", -1), arm("small-4", 0.5), arm("one-d3-1_3", None))
    assert "but within chance of `first-1_3`. The small dense model `small-4` is behind beyond chance." in close
    assert close.endswith("With other seeds, and so not compared: `one-d3-1_3`.")
    assert "every other arm with its seeds is behind it" in said(arm("small-4", 1), arm("one-d3-1_3", None))
    assert "within chance" not in said(arm("one-d3-1_3", None))


def test_unequal_budgets_are_noticed(tmp_path: Path):
    recipe.check_equal(tmp_path, "a", 0, [{"steps": 2, "tokens": 10}, {"steps": 2, "tokens": 12}])
    recipe.check_equal(tmp_path, "b", 0, [{"steps": 2, "tokens": 12}, {"steps": 2, "tokens": 10}])
    with pytest.raises(AssertionError, match="other arms took"):
        recipe.check_equal(tmp_path, "c", 0, [{"steps": 2, "tokens": 10}, {"steps": 2, "tokens": 11}])
    regrouped = {"steps": 2, "tokens": 11, "tokens_as_grouped": 12, "regrouped_examples": 2}
    recipe.check_equal(tmp_path, "first", 0, [{"steps": 2, "tokens": 10}, regrouped])
    with pytest.raises(AssertionError, match="3 tokens apart"):
        recipe.check_equal(tmp_path, "first", 0, [{"steps": 2, "tokens": 10}, {**regrouped, "tokens": 9}])


def test_a_work_directory_holds_one_study(tmp_path: Path):
    study.open_work(tmp_path / "work", {"steps": 4, "rates": (1, 2)})
    study.open_work(tmp_path / "work", {"steps": 4, "rates": (1, 2)})
    with pytest.raises(InvalidInput, match="steps 4, not 5"):
        study.open_work(tmp_path / "work", {"steps": 5, "rates": (1, 2)})
    assert study.chosen(["any*", "small-2"], ["dense", "any", "any-need", "small-2"]) == ["any", "any-need", "small-2"]
    with pytest.raises(InvalidInput, match="no arm is called 'bny'; there are: any, dense"):
        study.chosen(["bny"], ["any", "dense"])
    clock = study.Clock(tmp_path / "seconds.json")
    clock.tick()
    assert study.Clock(tmp_path / "seconds.json").seconds == pytest.approx(clock.seconds, abs=1e-3)
    assert json.loads((tmp_path / "seconds.json").read_text(encoding="utf-8")) >= 0


def test_packed_arms_come_back_where_the_settings_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    works = [tmp_path / name for name in ("first", "same", "other")]
    for work, steps in zip(works, (10, 10, 20), strict=True):
        study.open_work(work, {"steps": steps})
    first, same, other = works
    (first / "arms").mkdir()
    study.write_json(first / "arms" / "any-dev-seed0.json", {"arm": "any", "rows": [{"depth": 1.0, "texts": ["a"]}]})
    study.write_json(first / "budget-seed0.json", {"steps": 10})
    study.pack("recipe", first, leave_out=("texts",))
    for work in works:
        study.unpack("recipe", work)
    assert study.read_json(first / "arms" / "any-dev-seed0.json")["rows"] == [{"depth": 1.0, "texts": ["a"]}]
    assert study.read_json(same / "arms" / "any-dev-seed0.json")["rows"] == [{"depth": 1.0}]
    assert study.read_json(same / "budget-seed0.json") == {"steps": 10}
    assert not (other / "arms").exists()
