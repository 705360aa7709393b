"""The learned classifier: what it learns, how it is kept, and whose it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import reference
from families import save, tiny_model
from shoal.baselines.calm import Calm, generate
from shoal.baselines.confidence import LinearClassifier, SoftmaxGap, _samples, train_classifier
from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.errors import CheckpointError, InvalidInput, InvalidPrompt

PROMPTS = ["name[The Vaults]", "a pub", "near the river", "cheap food", "five stars"]


@pytest.fixture(scope="module")
def completions(model: LayerwiseDecoder) -> list[tuple[int, ...]]:
    run = generate(model, PROMPTS, Calm(threshold=2), max_new_tokens=40, ignore_eos=True)
    return [completion.token_ids for completion in run.completions]


@pytest.fixture(scope="module")
def classifier(model: LayerwiseDecoder, completions: list[tuple[int, ...]]) -> LinearClassifier:
    return train_classifier(model, PROMPTS, completions)


def test_samples_are_the_models_own_states(network: PreTrainedModel, model: LayerwiseDecoder) -> None:
    """Token by token against the reference: states after layers 1 to L-1, and whether the head agrees with layer L's."""
    prompt, completion = [5, 80, 12], [7, 9, 200]
    states, labels = _samples(model, prompt, completion)
    states, labels = states.reshape(5, 3, 48), labels.reshape(5, 3)
    for place in range(3):
        token_ids = prompt + completion[: place + 1]
        exits = [6] * (len(token_ids) - 1)
        full, top = reference.frozen_states(network, token_ids, [*exits, 6])
        for layer in range(1, 6):
            _, logits = reference.frozen_states(network, token_ids, [*exits, layer])
            np.testing.assert_allclose(states[layer - 1, place], full[layer], rtol=1e-4, atol=1e-4)
            assert labels[layer - 1, place] == (logits.argmax() == top.argmax())


def test_it_learns(model: LayerwiseDecoder, completions: list[tuple[int, ...]], classifier: LinearClassifier) -> None:
    """Confident states agree with the last layer more often than others, on what it was trained on."""
    pairs = [_samples(model, prompt, completion) for prompt, completion in zip(PROMPTS, completions, strict=True)]
    states = torch.from_numpy(np.concatenate([one for one, _ in pairs]))
    agree = np.concatenate([labels for _, labels in pairs])
    scores = classifier(states, states, None).numpy()
    assert scores[agree].mean() > scores[~agree].mean() + 0.1
    assert scores.mean() == pytest.approx(agree.mean(), abs=0.01), "a logistic regression is calibrated in the mean"


def test_it_decides_exits_and_is_cheap(model: LayerwiseDecoder, classifier: LinearClassifier) -> None:
    run = generate(model, PROMPTS, Calm(threshold=0.3, confidence=classifier), max_new_tokens=12)
    gaps = generate(model, PROMPTS, Calm(threshold=0.3, confidence=SoftmaxGap()), max_new_tokens=12)
    assert run.cost.check_flops == run.cost.checks * 2 * 48
    assert run.cost.check_flops / run.cost.checks < gaps.cost.check_flops / gaps.cost.checks / 50
    assert 1 < run.cost.ledger.mean_layers < 6


def test_kept_and_read_again(model: LayerwiseDecoder, classifier: LinearClassifier, tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    classifier.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["classifier.safetensors"]
    read = LinearClassifier.load(path)
    assert torch.equal(read.weight, classifier.weight)
    assert (read.bias, read.fingerprint, read.model) == (classifier.bias, classifier.fingerprint, classifier.model)
    read.check(model)
    with pytest.raises(InvalidInput, match="is not a directory"):
        classifier.save(tmp_path / "none" / "classifier.safetensors")


def test_the_same_weights_in_bfloat16_are_the_same_model(checkpoint: Path, classifier: LinearClassifier) -> None:
    classifier.check(LayerwiseDecoder.from_pretrained(checkpoint, dtype="bfloat16"))


def test_another_model_is_refused(classifier: LinearClassifier, network: PreTrainedModel, tmp_path: Path) -> None:
    other = LayerwiseDecoder.from_pretrained(save(tiny_model("opt"), tmp_path / "opt"))
    with pytest.raises(InvalidInput, match=r"qwen3, 6 layers of width 48.*opt, 4 layers.*train one on this model"):
        generate(other, "a", Calm(threshold=0.5, confidence=classifier))
    tuned = tiny_model("qwen3", num_hidden_layers=6)
    with torch.no_grad():
        tuned.model.layers[4].self_attn.q_proj.weight.mul_(1.01)
    with pytest.raises(InvalidInput, match="other weights"):
        classifier.check(LayerwiseDecoder.from_pretrained(save(tuned, tmp_path / "tuned")))


def test_files_that_are_no_classifiers(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    for path in (tmp_path / "none", tmp_path / "text", checkpoint / "model.safetensors"):
        with pytest.raises(CheckpointError, match="is not a classifier"):
            LinearClassifier.load(path)


@pytest.mark.parametrize(
    ("prompts", "completions", "error", "message"),
    [
        ([], [], InvalidInput, "one at least"),
        (["a"], [], InvalidInput, "got 1 and 0"),
        (["a", ""], ["b", "c"], InvalidPrompt, "example 1: the prompt is empty"),
        (["a", "b"], ["b", ""], InvalidPrompt, "example 1: the completion is empty"),
        (["a"], ["b" * 300], InvalidPrompt, "exceed the model's 256 positions"),
    ],
)
def test_bad_examples(
    prompts: list[str], completions: list[str], error: type[Exception], message: str, model: LayerwiseDecoder
) -> None:
    with pytest.raises(error, match=message):
        train_classifier(model, prompts, completions)


def test_nothing_to_tell_apart(tmp_path: Path) -> None:
    """Layers that compute nothing agree with the last one always."""
    network = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    with pytest.raises(InvalidInput, match="all predict the last layer's token"):
        train_classifier(LayerwiseDecoder.from_pretrained(save(network, tmp_path)), ["a"], ["bc"])
    one = LayerwiseDecoder.from_pretrained(save(tiny_model("llama", num_hidden_layers=1), tmp_path / "one"))
    with pytest.raises(InvalidInput, match="one layer"):
        train_classifier(one, ["a"], ["b"])
