"""Shoal as a model of lm-evaluation-harness: local tasks, the scores of transformers, and what a plan takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import save, tiny_model
from shoal import SkipDecode
from shoal.errors import InvalidInput, InvalidPlan
from shoal.train.depth_context import depth_context

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra harness)")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from shoal.evaluate.harness import ShoalLM, sampling_of

pytestmark = pytest.mark.filterwarnings("default")  # the harness and what it loads warn of themselves
LAYERS, HORIZON = 6, 8
CHOICES = [
    {"question": "The mill is", "choices": [" a pub by the river", " shut", " an expensive restaurant"], "label": 0},
    {"question": "Food? ", "choices": ["French", "Chinese or Indian", "none at all"], "label": 1},
    {"question": "", "choices": ["One", "Two words", "Three"], "label": 2},
]
TEXTS = [{"text": "A pub near the river serves food."}, {"text": "b"}, {"text": "long " * 80}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT of 6 layers and 256 positions whose tokens are bytes, in float32."""
    return save(tiny_model("opt", num_hidden_layers=LAYERS), tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Local tasks: choices of several letters and of one, whole texts, and answers to be written."""
    directory = tmp_path_factory.mktemp("tasks")
    letters = [{"question": question, "choices": ["a", "b", "c"], "label": 0} for question in ("The mill is", "Food?")]

    def task(name: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(directory / f"{name}.jsonl")}, "cache_dir": str(directory / "cache")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **settings}

    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
              "doc_to_target": "label", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
               "metric_list": [{"metric": "word_perplexity"}]}  # fmt: skip
    answer = {"output_type": "generate_until", "doc_to_text": "{{question}}?", "doc_to_target": "{{choices[label]}}",
              "metric_list": [{"metric": "bypass"}],
              "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12}}  # fmt: skip
    made = {
        "choices": task("choices", CHOICES, **choice),
        "letters": task("letters", letters, **choice),
        "texts": task("texts", TEXTS, **rolling),
        "answers": task("answers", CHOICES, **answer),
    }
    # The way of users: a YAML file in a folder that is given to the harness.
    import yaml

    (directory / "choices.yaml").write_text(yaml.safe_dump(made["choices"]))
    made["directory"] = str(directory)
    return made


def responses(model: Any, task: dict[str, Any]) -> list[Any]:
    """What the model answered to every request of a task, through the harness's own evaluation."""
    loaded = TaskManager(include_defaults=False).load([task])
    result = lm_eval.evaluate(lm=model, task_dict=loaded, bootstrap_iters=0)
    samples = sorted(result["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for one in sample["resps"] for response in one]


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    """The harness's own model over transformers, in float32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=4, max_length=255)


@pytest.fixture
def make(checkpoint: Path) -> Callable[..., ShoalLM]:
    """A model of Shoal's with settings of its own."""

    def shoal(**settings: Any) -> ShoalLM:
        return ShoalLM(str(checkpoint), **{"dtype": "float32", "batch_size": 4, **settings})

    return shoal


@pytest.mark.parametrize("task", ["choices", "letters", "texts"])
def test_dense_scores_are_those_of_transformers(make: Callable[..., ShoalLM], theirs: Any, tasks: Any, task: str):
    model = make()
    ours, expected = responses(model, tasks[task]), responses(theirs, tasks[task])
    assert len(ours) == len(expected) >= 3
    if task == "texts":
        assert ours == pytest.approx(expected, abs=1e-3, rel=1e-5)
    else:
        assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    cost = model.get_model_info()["shoal"]["tasks"][task]
    assert cost["mean_layers_of_scored_tokens"] == LAYERS
    assert cost["truncated_contexts"] == 0


def test_dense_answers_are_those_of_transformers(make: Callable[..., ShoalLM], theirs: Any, tasks: Any):
    assert responses(make(), tasks["answers"]) == responses(theirs, tasks["answers"])


def test_scores_under_a_plan_are_those_of_teacher_forcing(make: Callable[..., ShoalLM], checkpoint: Path):
    """The context is the prompt, the continuation is generated: layers and log-probabilities as in a depth context."""
    model = make(depth="1/2", horizon=HORIZON)
    context, continuation = "The mill is", " a pub by the river"
    (scored,) = model.loglikelihood([request("loglikelihood", context, continuation)], disable_tqdm=True)

    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    plan = SkipDecode(depth=1 / 2, horizon=HORIZON).plan(LAYERS)
    prompt, target = model.tok_encode(context), model.tok_encode(continuation)
    with torch.inference_mode(), depth_context(network, plan, prompt_columns=len(prompt)):
        logits = network(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(target)), target].sum()
    assert scored[0] == pytest.approx(float(expected), abs=1e-3)
    (dense,) = make().loglikelihood([request("loglikelihood", context, continuation)], disable_tqdm=True)
    assert abs(dense[0] - scored[0]) > 0.1, "the plan changes the score"

    cost = model.get_model_info()["shoal"]["tasks"]["mine"]
    layers = [LAYERS] + [plan.depth(clock) for clock in range(len(target) - 1)]
    assert cost["mean_layers_of_scored_tokens"] == pytest.approx(sum(layers) / len(layers))
    assert (cost["scored_tokens"], cost["scored_by_prompt"]) == (len(target), 1)


def test_greedy_continuations_are_known_as_such(make: Callable[..., ShoalLM]):
    model = make(depth="1/2", horizon=HORIZON)
    prompt = model.tok_encode("The mill")
    (written,) = model.engine.generate(prompt, plan=model.policy)
    pairs = [(None, prompt, list(written.token_ids[:5])), (None, prompt, [*written.token_ids[:4], 7])]
    (_, first), (_, second) = model._loglikelihood_tokens(pairs, tasks=["mine"] * 2, disable_tqdm=True)
    assert first
    assert second == (written.token_ids[4] == 7)


def test_a_plan_that_cannot_act_is_refused(make: Callable[..., ShoalLM], tasks: Any):
    model = make(depth="1/2", horizon=HORIZON)
    with pytest.raises(InvalidPlan, match="task 'letters': depth cannot act"):
        responses(model, tasks["letters"])
    assert model.costs["letters"].requests == 0
    # Also where it comes with a task that the plan acts on, and where the plan has not fallen yet.
    mixed = [request("loglikelihood", "a", " long answer"), request("loglikelihood", "a", "b", task="letters")]
    with pytest.raises(InvalidPlan, match="task 'letters'"):
        model.loglikelihood(mixed)
    with pytest.raises(InvalidPlan, match="runs every layer"):
        make(depth=0.9, horizon=100).loglikelihood([request("loglikelihood", "a", "bcd")])

    shallow = make(depth="1/2", horizon=HORIZON, prompt="max_layers")
    responses(shallow, tasks["letters"])
    cost = shallow.get_model_info()["shoal"]["tasks"]["letters"]
    assert cost["mean_layers_of_scored_tokens"] == SkipDecode(depth=1 / 2).bounds(LAYERS)[1]


def test_choices_of_several_lengths_share_one_decay(make: Callable[..., ShoalLM], tasks: Any):
    with pytest.raises(InvalidInput, match="scoring needs horizon"):
        responses(make(depth="1/2"), tasks["choices"])
    assert len(responses(make(depth="1/2"), tasks["answers"])) == len(CHOICES), "answers have the task's max_gen_toks"


def test_contexts_that_do_not_fit_lose_their_left_end(make: Callable[..., ShoalLM], theirs: Any):
    asked = [request("loglikelihood", "left " * 80, "right")]
    model = make()
    (ours,), (expected,) = model.loglikelihood(asked), theirs.loglikelihood(asked)
    assert ours[0] == pytest.approx(expected[0], abs=1e-3)
    assert model.costs["mine"].truncated_contexts == 1
    with pytest.raises(InvalidInput, match="leave no room"):
        model.generate_until([request("generate_until", "a", {"max_gen_toks": 256})])


def test_settings_are_honoured_or_refused(make: Callable[..., ShoalLM]):
    for wrong, message in {
        "depth": "written as 0.5 or 1/2",
        "policy": "give it a depth",
        "horizon": "give it a depth",
        "warmup_layers": "give it a depth",
        "warm_layers": "did you mean 'warmup_layers'",
        "batch_size": "a number of requests or auto",
    }.items():
        value: Any = {"policy": "unified", "horizon": 8, "warmup_layers": 1}.get(wrong, "x")
        with pytest.raises(InvalidInput, match=message):
            make(**{wrong: value})
    with pytest.raises(InvalidPlan, match="has no horizon"):
        make(depth=0.5, policy="unified", horizon=8)
    assert make(batch_size="auto", max_batch_size=3).engine.runner.cache.num_slots == 3


def test_generation_settings():
    greedy = sampling_of({"until": ["\n", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 9}, 5)
    assert (greedy.temperature, greedy.stop, greedy.max_new_tokens) == (0.0, ("\n",), 9)
    drawn = sampling_of({"until": "Q:", "do_sample": True, "temperature": 0.7, "top_p": 0.9}, 5)
    assert (drawn.temperature, drawn.top_p, drawn.stop, drawn.max_new_tokens) == (0.7, 0.9, ("Q:",), 256)
    assert drawn.seed != sampling_of({"do_sample": True, "temperature": 0.7}, 6).seed, "repeats of a request differ"
    with pytest.raises(InvalidInput, match="'num_beams' is not supported"):
        sampling_of({"num_beams": 4}, 0)


def test_by_name_with_a_task_file(checkpoint: Path, tasks: Any):
    """As its command line does it: a registered name, arguments as one string, a folder of task files. Results hold the layers."""
    results = lm_eval.simple_evaluate(
        model="shoal",
        model_args=f"pretrained={checkpoint},dtype=float32,depth=1/2,horizon={HORIZON}",
        batch_size="auto",
        tasks=["choices"],
        task_manager=TaskManager(include_path=tasks["directory"], include_defaults=False),
        bootstrap_iters=0,
    )
    assert 0 <= results["results"]["choices"]["acc,none"] <= 1
    told = json.loads(json.dumps(results["config"]["shoal"]))
    assert (told["depth"], told["num_layers"]) == (0.5, LAYERS)
    cost = told["tasks"]["choices"]
    assert cost["requests"] == cost["scored_by_prompt"] == 3 * len(CHOICES)
    assert LAYERS / 3 < cost["mean_layers_of_scored_tokens"] < LAYERS


def request(kind: Any, *arguments: Any, task: str = "mine") -> Instance:
    """A request as the harness makes it."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(task, 0, 1))
