"""How much each layer changes the residual stream, against hidden states that transformers reports itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from families import tiny_model
from shoal.evaluate.layer_change import layer_changes
from shoal.train.data import Example
from shoal.train.depth_context import decoder_layers

EXAMPLES = [Example([5, 9, 30, 41, 7], [11, 12, 13, 256]), Example([100, 3], [61, 62, 63, 64, 65, 256])]


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen3", "gpt_neox"])
def test_means_over_tokens(family: str) -> None:
    """Each example alone and without padding; the last layer's output is reported behind the final norm, so it is left out."""
    network = tiny_model(family, num_hidden_layers=4)
    found = layer_changes(network, EXAMPLES)
    assert len(found) == 4
    for layer in range(3):
        cosines: dict[str, list[float]] = {"prompt": [], "completion": []}
        changes: dict[str, list[float]] = {"prompt": [], "completion": []}
        for example in EXAMPLES:
            ids = torch.tensor([example.prompt + example.completion[:-1]])
            with torch.no_grad():
                states = network(ids, output_hidden_states=True).hidden_states
            for position, (x, y) in enumerate(zip(states[layer][0], states[layer + 1][0], strict=True)):
                part = "prompt" if position < len(example.prompt) else "completion"
                cosines[part].append(float(F.cosine_similarity(x, y, dim=0)))
                changes[part].append(float((y - x).norm() / max(x.norm(), y.norm())))
        assert len(cosines["completion"]) == 3 + 5
        for part in ("prompt", "completion"):
            cosine, change = getattr(found[layer], f"{part}_cosine"), getattr(found[layer], f"{part}_change")
            assert cosine == pytest.approx(sum(cosines[part]) / len(cosines[part]), abs=1e-5)
            assert change == pytest.approx(sum(changes[part]) / len(changes[part]), abs=1e-5)


def test_a_layer_that_adds_nothing() -> None:
    network = tiny_model("opt", do_layer_norm_before=True)
    idle = decoder_layers(network)[1]
    with torch.no_grad():
        for product in (idle.self_attn.out_proj, idle.fc2):
            product.weight.zero_()
            product.bias.zero_()
    found = layer_changes(network, EXAMPLES)
    assert found[1].prompt_change == found[1].completion_change == 0
    assert found[1].completion_cosine == pytest.approx(1)
    assert found[0].completion_change > 0.1
    assert not any(layer._forward_hooks for layer in decoder_layers(network)), "hooks are taken away again"
