"""Routers in training: gates equal depth plans, what is read equals what the engine reads, the search and the budget."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from families import save, tiny_model
from shoal import DepthPlan, Engine, Sampling
from shoal.depth.dr_llm import DrLLMRouter
from shoal.depth.first import FirstRouter
from shoal.depth.plan import ALWAYS
from shoal.depth.routers import load_router
from shoal.depth.shape import ModelShape
from shoal.engine.routing import PromptStates
from shoal.errors import InvalidInput
from shoal.models.checkpoint import load_tokenizer
from shoal.train.config import TuneConfig
from shoal.train.data import IGNORED, Example, collate, prompt_columns
from shoal.train.depth_context import depth_context
from shoal.train.dr_llm import focal_loss, prompt_states, rewards
from shoal.train.gates import gated_context, window_means
from shoal.train.layer_search import Search, search
from shoal.train.recover import RoutedTrainer, recover
from shoal.train.route import RouteConfig, train_router

NUM_LAYERS = 6
SHAPE = ModelShape(
    num_layers=1,
    hidden_size=3,
    num_heads=1,
    num_kv_heads=1,
    head_dim=3,
    intermediate_size=3,
    gated_mlp=False,
    vocab_size=3,
)
EXAMPLES = [
    Example([5, 9, 31, 7], [40, 41, 42, 43, 2]),
    Example([77], [50, 51, 2]),
    Example([1 + i for i in range(19)], [60, 61, 62, 63, 64, 65, 2]),
]


@pytest.fixture(scope="module")
def network() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=NUM_LAYERS).eval()


@pytest.fixture(scope="module")
def checkpoint(network: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(network, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine.from_pretrained(checkpoint, max_batch=4)


def test_gates_of_zero_and_one_are_depth_plans(network: PreTrainedModel) -> None:
    """Each row under gates of its own, against the row alone under the plan without those layers."""
    skipped = [{1, 3}, set(), {0, 2, 4, 5}]
    batch = collate(EXAMPLES, pad_token_id=0)
    with torch.no_grad():
        gate = lambda layer, states: torch.tensor([float(layer not in one) for one in skipped])  # noqa: E731
        with gated_context(network, gate, prompt_columns=prompt_columns(batch)):
            gated = network(**batch).logits
        for row, (example, layers) in enumerate(zip(EXAMPLES, skipped, strict=True)):
            plan = DepthPlan(tuple(0 if layer in layers else ALWAYS for layer in range(NUM_LAYERS)))
            alone = collate([example], pad_token_id=0)
            with depth_context(network, plan, prompt_columns=prompt_columns(alone)):
                expected = network(**alone).logits[0]
            torch.testing.assert_close(gated[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_windows", [1, 4, 8])
def test_training_reads_what_the_engine_reads(network: PreTrainedModel, engine: Engine, num_windows: int) -> None:
    class Listening:
        def __init__(self) -> None:
            self.num_windows, self.heard = num_windows, np.zeros(0)

        def plan(self, num_layers: int, *, prompt_tokens: int, max_new_tokens: int) -> DepthPlan:
            return DepthPlan((ALWAYS,) * num_layers)

        def check(self, shape: ModelShape) -> None:
            pass

        def route(self, states: np.ndarray) -> DepthPlan:
            self.heard = states
            return DepthPlan((ALWAYS,) * NUM_LAYERS)

    routers = [Listening() for _ in EXAMPLES]
    engine.generate([e.prompt for e in EXAMPLES], Sampling(max_new_tokens=2), routers)
    states, present = prompt_states(network, collate(EXAMPLES, pad_token_id=0), num_windows)
    for row, there, router in zip(states, present, routers, strict=True):
        assert int(there.sum()) == router.heard.shape[1]
        np.testing.assert_allclose(row[:, there].numpy(), router.heard[:-1], rtol=1e-3, atol=1e-4)


def test_windows_are_those_of_the_engine() -> None:
    states = torch.randn(2, 9, 3)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9])
    means, present = window_means(states, mask, 4)
    for row, length in ((0, 5), (1, 9)):
        windows = PromptStates.windows
        router = type("R", (), {"num_windows": 4})()
        sums = PromptStates(
            router,
            ModelShape(
                num_layers=1,
                hidden_size=3,
                num_heads=1,
                num_kv_heads=1,
                head_dim=3,
                intermediate_size=3,
                gated_mlp=False,
                vocab_size=3,
            ),
            length,
        )
        place = windows(sums, 0, length)
        for window in range(4):
            inside = states[row, 9 - length :][torch.from_numpy(place == window)]
            assert present[row, window] == (len(inside) > 0)
            torch.testing.assert_close(means[row, window], inside.mean(dim=0))


def test_the_search_finds_the_layers_that_matter() -> None:
    """Reward 1 as long as layers 0, 4 and 7 of 8 run: a few hundred tries find most of the others."""
    needed = {0, 4, 7}
    one = Search(8, kept_layers=(0,), seed="a")
    search([one], lambda sets: [float(not needed & skipped) for skipped in sets], simulations=200)
    assert one.best is not None
    assert not needed & one.best
    assert len(one.best) >= 4
    assert one.rewards[frozenset()] == 1, "the full model is the first thing that is tried"
    again = Search(8, kept_layers=(0,), seed="a")
    search([again], lambda sets: [float(not needed & skipped) for skipped in sets], simulations=200)
    assert again.rewards == one.rewards


def test_a_search_over_few_layers_ends() -> None:
    one = Search(2, kept_layers=(0,), seed="b")
    search([one], lambda sets: [0.0 for _ in sets], simulations=30)
    assert one.best is None
    assert set(one.rewards) == {frozenset(), frozenset({1})}


def test_rewards_are_greedy_answers(network: PreTrainedModel, engine: Engine) -> None:
    """1 exactly where the engine, under the plan, says the completion."""
    prompts = [e.prompt for e in EXAMPLES]
    sets = [frozenset({1}), frozenset({2, 3}), frozenset[int]()]
    plans = [DepthPlan(tuple(0 if layer in s else ALWAYS for layer in range(NUM_LAYERS))) for s in sets]
    said = engine.generate(prompts, Sampling(max_new_tokens=4, ignore_eos=True), plans)
    right = [Example(prompt, list(g.token_ids)) for prompt, g in zip(prompts, said, strict=True)]
    batch = collate(right, pad_token_id=0)
    assert rewards(network, batch, sets) == [1, 1, 1]
    batch["labels"][1, 2] = (batch["labels"][1, 2] + 1) % 200
    batch["labels"][2, 3:] = IGNORED
    assert rewards(network, batch, sets) == [1, 0, 1]


def test_focal_loss_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    weights = torch.tensor([0.5, 2.0])
    p = logits.softmax(dim=-1)[:, 0]
    expected = ((1 - p) ** 2 * -p.log()).mean()  # equal weights cancel
    torch.testing.assert_close(focal_loss(logits, labels, weights), expected)


@pytest.fixture
def data(tmp_path: Path, checkpoint: Path, engine: Engine) -> Path:
    """Prompts with what the model itself says, so that there are right answers to search for."""
    tokenizer = load_tokenizer(checkpoint)
    lines = []
    for number in itertools.count():
        prompt = f"prompt {number} {'ab' * (number % 7)}"
        (said,) = engine.generate(prompt, Sampling(max_new_tokens=3))
        again = tokenizer(said.text, add_special_tokens=False)["input_ids"]
        if said.text.strip() and again == list(said.token_ids):
            lines.append({"prompt": prompt, "completion": said.text})
        if len(lines) == 12 or number > 300:
            break
    lines = lines or [{"prompt": "a", "completion": "b"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_first_meets_its_budget_and_is_used(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "router"
    config = RouteConfig(kind="first", depth=0.5, steps=6, batch_size=4, learning_rate=0.05)
    router = train_router(str(checkpoint), data, out, config)
    assert isinstance(router, FirstRouter)
    assert router.tensors["weight"].abs().sum() > 0, "it has learnt something"
    prompts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    engine = Engine.from_pretrained(checkpoint)
    generations = engine.generate(prompts, Sampling(max_new_tokens=3, ignore_eos=True), load_router(out))
    mean = sum(g.ledger.mean_layers for g in generations) / len(generations)
    assert mean == pytest.approx(0.5 * NUM_LAYERS, abs=0.5 + NUM_LAYERS / len(generations))
    with pytest.raises(InvalidInput, match="exists already"):
        train_router(str(checkpoint), data, out, config)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # PEFT asks in the old words
def test_recovery_writes_a_checkpoint_with_its_router(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    config = RouteConfig(kind="first", depth=0.7, steps=2, batch_size=4)
    router = train_router(str(checkpoint), data, tmp_path / "router", config)
    assert isinstance(router, FirstRouter)
    tuning = TuneConfig(lora_rank=2, steps=2, batch_size=4)
    done = recover(str(checkpoint), router, data, tmp_path / "recovered", tuning, depth=0.7)
    assert (done.steps, done.horizon) == (2, None)
    assert done.tokens > 0
    engine = Engine.from_pretrained(tmp_path / "recovered")
    (before,) = Engine.from_pretrained(checkpoint).generate("abc", Sampling(max_new_tokens=1, logprobs=1))
    (after,) = engine.generate("abc", Sampling(max_new_tokens=1, logprobs=1), load_router(tmp_path / "recovered"))
    assert before.logprobs != after.logprobs, "the adapters were merged"
    with pytest.raises(InvalidInput, match="leave depths out"):
        recover(str(checkpoint), router, data, tmp_path / "x", TuneConfig(lora_rank=2, depths=(0.5,)), depth=0.7)
    with pytest.raises(InvalidInput, match="give lora_rank"):
        recover(str(checkpoint), router, data, tmp_path / "x", TuneConfig(), depth=0.7)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_recovery_keeps_to_the_budget(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each batch, and at its end: adapters change the states that the router reads, and would open its gates if they could."""
    router = train_router(
        str(checkpoint), data, tmp_path / "router", RouteConfig(kind="first", depth=0.5, steps=2, batch_size=4)
    )
    assert isinstance(router, FirstRouter)
    decided: list[torch.Tensor] = []
    decide = RoutedTrainer.decide

    def listening(self: RoutedTrainer, *args: Any) -> torch.Tensor:
        decided.append(decide(self, *args))
        return decided[-1]

    monkeypatch.setattr(RoutedTrainer, "decide", listening)
    tuning = TuneConfig(lora_rank=4, steps=6, batch_size=4, learning_rate=0.05)
    recover(str(checkpoint), router, data, tmp_path / "recovered", tuning, depth=0.5)
    assert [float(runs.mean()) for runs in decided] == pytest.approx([0.5] * 6, abs=1 / NUM_LAYERS)
    assert not any(runs.requires_grad for runs in decided)
    prompts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    recovered = load_router(tmp_path / "recovered")
    engine = Engine.from_pretrained(tmp_path / "recovered")
    generations = engine.generate(prompts, Sampling(max_new_tokens=3, ignore_eos=True), recovered)
    mean = sum(g.ledger.mean_layers for g in generations) / len(generations)
    assert mean == pytest.approx(0.5 * NUM_LAYERS, abs=0.5 + NUM_LAYERS / len(generations))


def test_dr_llm_needs_answers_that_are_right(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"prompt": "abc", "completion": "never what it says, not by chance either"}\n', encoding="utf-8")
    config = RouteConfig(kind="dr-llm", depth=0.5, steps=2, simulations=3)
    with pytest.raises(InvalidInput, match="nothing to learn from"):
        train_router(str(checkpoint), path, tmp_path / "router", config)
    assert not (tmp_path / "router").exists()


def test_dr_llm_learns_its_labels(network: PreTrainedModel, engine: Engine) -> None:
    """From states to labels that are a function of them."""
    from shoal.train.dr_llm import train_dr_llm

    shape = engine.shape
    torch.manual_seed(0)
    states = torch.randn(64, NUM_LAYERS, 8, shape.hidden_size)
    labels = (states.mean(dim=2)[..., 0] > 0).long()
    present = torch.ones(64, 8, dtype=torch.bool)
    router = train_dr_llm(shape, states, present, labels, steps=150, batch_size=32, learning_rate=1e-2)
    assert isinstance(router, DrLLMRouter)
    right = torch.stack([(router.scores(one) > 0).long() for one in states]) == labels
    assert right.float().mean() > 0.9
