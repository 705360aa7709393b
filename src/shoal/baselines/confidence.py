"""How sure a token may be of itself after a layer: the three measures of CALM (Schuster et al. 2022, arXiv 2207.07061).

Each is a number up to 1 for each row, made of the row's state before and after the layer or of the logits that the head makes of
the latter. Letters: n rows, d hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.depth.shape import ModelShape
from shoal.engine.intake import Prompt, check_length
from shoal.errors import CheckpointError, InvalidInput, MissingExtra
from shoal.files import replaced


class Confidence(Protocol):
    """A measure. `generate` calls it between layers, for the rows that still run."""

    @property
    def reads_logits(self) -> bool:
        """Whether a check needs the head's product, d x V."""
        ...

    def __call__(self, before: Tensor, after: Tensor, logits: Tensor | None) -> Tensor:
        """float32 [n], from states [n, d] before and after a layer, and logits [n, V] where `reads_logits`."""
        ...

    def flops(self, shape: ModelShape) -> int:
        """Floating-point operations of one check of one row, the head's product left out: that is counted where it runs."""
        ...

    def check(self, model: LayerwiseDecoder) -> None:
        """Raises `InvalidInput` where the measure was made for another model."""
        ...


@dataclass(frozen=True)
class SoftmaxGap:
    """The gap between the two largest probabilities at the layer's own logits (final norm and head on its state)."""

    reads_logits: ClassVar[bool] = True

    def __call__(self, before: Tensor, after: Tensor, logits: Tensor | None) -> Tensor:
        """See `Confidence`."""
        assert logits is not None
        top = logits.float().softmax(dim=-1).topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]

    def flops(self, shape: ModelShape) -> int:
        """0: the softmax is left out, it is below 1% of the head's product."""
        return 0

    def check(self, model: LayerwiseDecoder) -> None:
        """Fits every model."""


@dataclass(frozen=True)
class Saturation:
    """The cosine between the states before and after the layer: near 1, the layer has changed nothing but the length."""

    reads_logits: ClassVar[bool] = False

    def __call__(self, before: Tensor, after: Tensor, logits: Tensor | None) -> Tensor:
        """See `Confidence`."""
        return F.cosine_similarity(before.float(), after.float(), dim=-1)

    def flops(self, shape: ModelShape) -> int:
        """Three inner products of d values."""
        return 6 * shape.hidden_size

    def check(self, model: LayerwiseDecoder) -> None:
        """Fits every model."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearClassifier:
    """The probability, by a logistic regression on the state, that this layer's most probable token is the last layer's.

    One classifier for all layers, as in the paper; made by `train_classifier`.
    """

    weight: Tensor
    """float32 [d]."""
    bias: float
    """Added to the product of weight and state."""
    fingerprint: str
    """`LayerwiseDecoder.fingerprint` of the model that it was trained on."""
    model: str
    """That model in words, for error messages."""

    reads_logits: ClassVar[bool] = False

    def __call__(self, before: Tensor, after: Tensor, logits: Tensor | None) -> Tensor:
        """See `Confidence`."""
        return (after.float() @ self.weight.to(after.device) + self.bias).sigmoid()

    def flops(self, shape: ModelShape) -> int:
        """One inner product of d values."""
        return 2 * shape.hidden_size

    def check(self, model: LayerwiseDecoder) -> None:
        """Raises `InvalidInput` for another model than it was trained on, be it another tuning of the same."""
        if self.fingerprint != model.fingerprint:
            raise InvalidInput(
                f"the classifier was trained on other weights ({self.model}) than this model's ({_in_words(model)}): "
                "train one on this model with train_classifier"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors, whole or not at all. Raises `InvalidInput` where there is no such directory."""
        path = Path(path)
        if not path.parent.is_dir():
            raise InvalidInput(f"{path} cannot be written: {path.parent} is not a directory")
        metadata = {"bias": repr(self.bias), "fingerprint": self.fingerprint, "model": self.model}
        with replaced(path) as partial:
            save_file({"weight": self.weight.contiguous()}, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearClassifier:
        """Read what `save` wrote. Raises `CheckpointError` for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                return cls(
                    weight=file.get_tensor("weight"),
                    bias=float(metadata["bias"]),
                    fingerprint=metadata["fingerprint"],
                    model=metadata["model"],
                )
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{os.fspath(path)} is not a classifier that was saved here: {error}") from error


def train_classifier(
    model: LayerwiseDecoder, prompts: Sequence[Prompt], completions: Sequence[Prompt]
) -> LinearClassifier:
    """Train the classifier on the model's own states, the model frozen, as the paper does.

    Every completion is read after its prompt through all layers. A sample is the state of one of its tokens after layer
    l = 1 .. L-1; its label is whether the head makes the same token most probable there as after layer L. All layers count
    alike. Takes (L - 1) x completion tokens x d values of memory: some thousand tokens are enough.

    Args:
        prompts: text, or token ids.
        completions: one for each; text is tokenised without special tokens. The model's own outputs, or references.

    Raises `InvalidInput` where the counts differ, the model has one layer, or all labels are the same; `InvalidPrompt` for an
    empty one; `MissingExtra` without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("training a classifier needs scikit-learn: pip install 'shoal[baselines]'") from error
    if len(prompts) != len(completions) or not prompts:
        raise InvalidInput(
            f"give a completion for each prompt, and one at least: got {len(prompts)} and {len(completions)}"
        )
    if model.num_layers < 2:
        raise InvalidInput("a model of one layer has no earlier exit to learn")
    samples, labels = [], []
    for index, pair in enumerate(zip(prompts, completions, strict=True)):
        try:
            states, agrees = _samples(model, *pair)
        except InvalidInput as error:
            raise type(error)(f"example {index}: {error}") from error
        samples.append(states)
        labels.append(agrees)
    x, y = np.concatenate(samples), np.concatenate(labels)
    if y.all() or not y.any():
        raise InvalidInput(
            f"of {len(y)} states {'all' if y.all() else 'none'} predict the last layer's token: there is nothing to tell apart; "
            "give more examples"
        )
    trained: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
    scaler, regression = trained[0], trained[1]
    # weight ((x - mean) / scale) + bias, multiplied out.
    weight = regression.coef_[0] / scaler.scale_
    return LinearClassifier(
        weight=torch.tensor(weight, dtype=torch.float32),
        bias=float(regression.intercept_[0] - weight @ scaler.mean_),
        fingerprint=model.fingerprint,
        model=_in_words(model),
    )


@torch.inference_mode()
def _samples(
    model: LayerwiseDecoder, prompt: Prompt, completion: Prompt
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """float32 [(L-1) C, d] states of C completion tokens after each layer but the last, and bool [(L-1) C] labels."""
    prompt_ids, completion_ids = model.encode_one(prompt), model.encode_completion(completion)
    check_length(len(prompt_ids), len(completion_ids), model.config)
    token_ids = prompt_ids + completion_ids
    zero = np.zeros(1, dtype=np.int64)
    states, best = [], []
    work, cache = model.work([token_ids], zero, zero), model.new_cache(1, len(token_ids))
    for x in itertools.islice(model.states(work, cache), 1, None):
        states.append(x[len(prompt_ids) :].to(torch.float32, copy=True))  # x itself goes on changing
        best.append(model.decoder.logits(x[len(prompt_ids) :]).max(dim=-1).indices)
    labels = torch.cat([here == best[-1] for here in best[:-1]])
    return torch.cat(states[:-1]).cpu().numpy(), labels.cpu().numpy()


def _in_words(model: LayerwiseDecoder) -> str:
    return f"{model.config.family}, {model.num_layers} layers of width {model.config.shape.hidden_size}"
