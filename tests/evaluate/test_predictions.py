"""Predictions along given completions: the engine's numbers in one pass, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from families import save, tiny_model
from shoal import Dense, Engine, Sampling
from shoal.depth.policies import POLICIES, policy_at
from shoal.errors import CheckpointError, InvalidPlan
from shoal.evaluate.predictions import LOGITS_AT_ONCE, ROWS_AT_ONCE, batches, predict
from shoal.train.data import Example
from ways import logits_along

EXAMPLES = [
    Example([5, 9, 30, 41, 7], [11, 12, 13, 14, 15, 16, 17, 18, 256]),
    Example([100, 3], [61, 256]),
    Example([61, 62, 63], [7]),
    Example([90], [8, 33, 2, 71, 250, 3]),
]


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "qwen3"])
def test_predictions_are_those_of_the_engine(family: str, tmp_path: Path) -> None:
    """The engine is made to emit the completions, under each policy in one mixed batch; loss and argmax are from its logits."""
    network = tiny_model(family, num_hidden_layers=6)
    engine = Engine.from_pretrained(save(tiny_model(family, num_hidden_layers=6), tmp_path), dtype="float32")
    plans = [Dense().plan(6)]
    plans += [policy_at(name, 0.6).plan(6, prompt_tokens=0, max_new_tokens=6) for name in POLICIES]
    for plan in plans:
        jobs = [
            (example.prompt, Sampling(max_new_tokens=len(example.completion), ignore_eos=True), plan)
            for example in EXAMPLES
        ]
        stepwise = logits_along(engine, jobs, [example.completion for example in EXAMPLES])
        for example, ours, logits in zip(EXAMPLES, predict(network, EXAMPLES, plan), stepwise, strict=True):
            expected = -logits.log_softmax(-1)[range(len(example.completion)), example.completion]
            np.testing.assert_allclose(ours.losses, expected.numpy(), atol=1e-4)
            assert ours.tokens.tolist() == logits.argmax(-1).tolist()


def test_company_changes_nothing() -> None:
    network = tiny_model("opt")
    plan = policy_at("skipdecode", 0.7).plan(4, prompt_tokens=0, max_new_tokens=5)
    together = predict(network, EXAMPLES, plan)
    for example, ours in zip(EXAMPLES, together, strict=True):
        (alone,) = predict(network, [example], plan)
        np.testing.assert_allclose(ours.losses, alone.losses, atol=1e-5)
        assert ours.tokens.tolist() == alone.tokens.tolist()


def test_batches_hold_every_example_once_within_the_limits() -> None:
    examples = [Example([5] * (1 + i * 7 % 13), [6] * (1 + i * 5 % 11)) for i in range(200)]
    for vocab_size in (100, LOGITS_AT_ONCE // 50, LOGITS_AT_ONCE):
        groups = list(batches(examples, vocab_size=vocab_size))
        assert sorted(index for group in groups for index in group) == list(range(200))
        for group in groups:
            logits = len(group) * max(len(examples[index].completion) for index in group) * vocab_size
            assert len(group) == 1 or (len(group) <= ROWS_AT_ONCE and logits <= LOGITS_AT_ONCE)


def test_logits_that_are_not_finite_and_other_models_plans_are_refused() -> None:
    network = tiny_model("opt")
    with pytest.raises(InvalidPlan, match="for 3 layers, the model has 4"):
        predict(network, EXAMPLES, Dense().plan(3))
    with torch.no_grad():
        network.model.decoder.layers[1].fc2.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        predict(network, EXAMPLES, Dense().plan(4))
