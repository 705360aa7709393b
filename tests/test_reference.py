"""The reference is the measure of everything else, so it is held against what needs no belief at all."""

from __future__ import annotations

import math

import pytest
import torch

import reference
from families import CONFIGS, tiny_model

PROMPT = [5, 80, 12, 200, 31]


@pytest.mark.parametrize("family", CONFIGS)
def test_dense_is_the_model_itself(family: str) -> None:
    model = tiny_model(family)
    decoded = reference.decode(model, PROMPT, reference.dense(model.config.num_hidden_layers), max_new_tokens=6)
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert decoded.token_ids == expected[0, len(PROMPT) :].tolist()
    with torch.no_grad():
        logits = model(expected).logits[0, len(PROMPT) - 1 : -1]
    torch.testing.assert_close(decoded.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_layer_that_never_runs_is_no_layer(family: str) -> None:
    """Switched off at every position, a layer has the same effect as one that was cut out of the model."""
    model = tiny_model(family)
    num_layers = model.config.num_hidden_layers
    rest = [layer for layer in range(num_layers) if layer != 1]
    decoded = reference.decode(model, PROMPT, lambda clock: set(rest), max_new_tokens=6, prompt_layers=rest)

    shorter = tiny_model(family)
    layers = next(m for m in shorter.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num_layers)
    del layers[1]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    shorter.config.num_hidden_layers -= 1
    expected = reference.decode(shorter, PROMPT, reference.dense(num_layers - 1), max_new_tokens=6)
    assert decoded.token_ids == expected.token_ids
    torch.testing.assert_close(decoded.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_a_skipped_position_is_invisible_to_the_layer() -> None:
    """What a position holds does not matter to a layer that it did not run: only its own later layers see it.

    Layer 0 and 1 run everywhere but position 3, the others nowhere. Then position 3 keeps its embedding, and changing its
    token changes no logits but its own.
    """
    model = tiny_model("llama")
    ran = torch.zeros(4, 6, dtype=torch.bool)
    ran[:2] = True
    ran[:, 3] = False
    before = reference.logits(model, [1, 2, 3, 4, 5, 6], ran)
    after = reference.logits(model, [1, 2, 3, 99, 5, 6], ran)
    same = [0, 1, 2, 4, 5]
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[3], after[3])
    ran[1, 3] = True
    assert not torch.equal(reference.logits(model, [1, 2, 3, 99, 5, 6], ran)[4], after[4])


def test_skipdecode_worked_example() -> None:
    """L = 6, W = 1, m = 2, M = 4, N = 5: exit points 4 3.5 3 2.5 2, halves rounded up, so 4 4 3 3 2, then 2 for ever."""
    layers = reference.skipdecode(6, min_exit=2, max_exit=4, length=5)
    assert [layers(clock) for clock in range(6)] == [
        {0, 3, 4, 5},
        {0, 3, 4, 5},
        {0, 4, 5},
        {0, 4, 5},
        {0, 5},
        {0, 5},
    ]
    shifted = reference.skipdecode(6, min_exit=2, max_exit=4, length=5, first_clock=3)
    assert [shifted(clock) for clock in range(2)] == [{0, 4, 5}, {0, 5}]


def test_table_from_cutoffs() -> None:
    table = reference.ran_table(3, 2, 5, reference.from_cutoffs([math.inf, 0, 2]), prompt_layers=[0, 2])
    assert table.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]


def test_exits_for_depth_table() -> None:
    """The rule's table for 24 and 32 layers: depth 1/2, 1/3, 1/4, 1/5."""
    assert [reference.exits_for_depth(24, 1 / s) for s in (2, 3, 4, 5)] == [(6, 18), (4, 12), (3, 9), (3, 7)]
    assert [reference.exits_for_depth(32, 1 / s) for s in (2, 3, 4, 5)] == [(8, 24), (5, 16), (4, 12), (3, 10)]
