"""Voids as the paper's code counts them, on states that transformers' model gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import reference
from families import CONFIGS, save, tiny_model
from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.baselines.voids import emptiest, trace, voids_of
from shoal.errors import InvalidInput, InvalidPrompt


def expected_voids(model: PreTrainedModel, token_ids: list[int], alpha: float) -> list[list[bool]]:
    """[token][layer], each token's states from a pass that ends with it: a loop over the definition."""
    voids = []
    num_layers = model.config.num_hidden_layers
    for end in range(1, len(token_ids) + 1):
        states, _ = reference.frozen_states(model, token_ids[:end], [num_layers] * end)
        growth: list[float] = []
        row = []
        for layer in range(num_layers):
            d = float(states[layer + 1].norm() - states[layer].norm())
            bar = alpha * (max(growth) - min(growth)) if growth else 0.0
            row.append(d < bar)
            growth.append(d)
        voids.append(row)
    return voids


def test_the_example_of_the_docstring() -> None:
    norms = torch.tensor([[1.0], [3.0], [4.0], [4.5], [9.0]])
    assert voids_of(norms, 0.8).flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("family", CONFIGS)
def test_counts_equal_the_definition(family: str, alpha: float, tmp_path: Path) -> None:
    """Prompts are aligned at their ends and responses at their beginnings."""
    network = tiny_model(family)
    model = LayerwiseDecoder.from_pretrained(save(network, tmp_path))
    texts = [([5, 80, 12, 200], [9, 9, 31]), ([7, 2], [1]), ([250], [])]
    found = trace(model, texts, alpha=alpha)
    num_layers = network.config.num_hidden_layers
    prompt, response = np.zeros((num_layers, 4), dtype=int), np.zeros((num_layers, 3), dtype=int)
    for ids, answer in texts:
        judged = np.array(expected_voids(network, ids + answer, alpha)).T
        prompt[:, 4 - len(ids) :] += judged[:, : len(ids)]
        response[:, : len(answer)] += judged[:, len(ids) :]
    np.testing.assert_array_equal(found.prompt.void, prompt)
    np.testing.assert_array_equal(found.response.void, response)
    assert found.prompt.tokens.tolist() == [1, 1, 2, 3]
    assert found.response.tokens.tolist() == [2, 1, 1]
    np.testing.assert_allclose(found.prompt.by_layer, prompt.sum(axis=1) / 7)
    np.testing.assert_allclose(found.response.by_position, response / [2, 1, 1])


def test_a_layer_that_does_nothing_is_a_void(tmp_path: Path) -> None:
    """d = 0, while the layers below have grown the state by different amounts."""
    network = tiny_model("llama")
    with torch.no_grad():
        network.model.layers[3].self_attn.o_proj.weight.zero_()
        network.model.layers[3].mlp.down_proj.weight.zero_()
    found = trace(LayerwiseDecoder.from_pretrained(save(network, tmp_path)), [([1, 2, 3], [4, 5])])
    assert found.response.by_layer[3] == 1
    assert found.response.by_layer[emptiest(found)[0]] == 1


def test_no_response_at_all(model: LayerwiseDecoder) -> None:
    found = trace(model, [([1, 2, 3], [])])
    assert found.response.void.shape == (6, 0)
    assert np.isnan(found.response.share)
    assert found.to_dict()["response"]["share"] is None


@pytest.mark.parametrize(
    ("texts", "alpha", "error", "message"),
    [
        ([], 0.8, InvalidInput, "nothing to trace"),
        ([([1], [2]), ([], [2])], 0.8, InvalidInput, "prompt 1 is empty"),
        ([([1] * 200, [2] * 60)], 0.8, InvalidPrompt, "exceed the model's 256 positions"),
        ([([1], [2])], -0.1, InvalidInput, "alpha must be 0 to 1"),
        ([([1], [2])], float("nan"), InvalidInput, "alpha must be 0 to 1"),
    ],
)
def test_bad_input(
    texts: list[tuple[list[int], list[int]]],
    alpha: float,
    error: type[Exception],
    message: str,
    model: LayerwiseDecoder,
) -> None:
    with pytest.raises(error, match=message):
        trace(model, texts, alpha=alpha)
