"""Voids (LAC, "Void in Language Models", arXiv 2505.14467): which layers add little to a token, found after all have run.

Layer l (counted from 0, as in plans) adds d_l to a token: the L2 norm of its output less that of its input. It is a *void* where

    d_l < t_l,   t_l = alpha (max_{j<l} d_j - min_{j<l} d_j),   and 0 for the first layer

Example, alpha 0.8, norms 1 3 4 4.5 9: d = 2 1 0.5 4.5 and t = 0 0 0.8 1.2, so layer 2 alone is a void. There is no early stop:
every layer is judged, also after a void.

This is a probe and saves nothing: d_l is known once layer l has run. (In the paper's public code, too, every layer runs.) What it
is good for: choosing layers that a depth plan may leave out, whose loss is then measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.engine.intake import check_length
from shoal.errors import InvalidInput, MissingExtra
from shoal.files import replaced
from shoal.models.passes import Ints


@dataclass(frozen=True, kw_only=True)
class VoidCounts:
    """Voids of one part (prompts, or responses), added up over prompts position by position."""

    void: Ints
    """[L, positions]: tokens of which the layer is a void."""
    tokens: Ints
    """[positions]: tokens there are; texts differ in length."""

    @property
    def by_layer(self) -> NDArray[np.float64]:
        """[L]: share of void tokens in each layer (NaN without tokens)."""
        total = int(self.tokens.sum())
        share: NDArray[np.float64] = self.void.sum(axis=1) / total if total else np.full(len(self.void), np.nan)
        return share

    @property
    def by_position(self) -> NDArray[np.float64]:
        """[L, positions]: the same at each position."""
        share: NDArray[np.float64] = self.void / self.tokens
        return share

    @property
    def share(self) -> float:
        """Of all layers of all tokens (NaN without tokens)."""
        return float(self.by_layer.mean())


@dataclass(frozen=True, kw_only=True)
class VoidMap:
    """Voids of some prompts and of their responses, apart: their active layers differ."""

    alpha: float
    """Share of the range of earlier layers' growth below which a layer is a void."""
    prompt: VoidCounts
    """Prompts, aligned at their ends: the last column is every prompt's last token."""
    response: VoidCounts
    """Responses, aligned at their beginnings: the first column is every response's first token."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.prompt.void)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: shares by layer, and void counts [L][positions] with the tokens at each position."""
        return {
            "alpha": self.alpha,
            "num_layers": self.num_layers,
            **{
                name: {
                    "share": None if np.isnan(part.share) else part.share,
                    "share_by_layer": [None if np.isnan(share) else share for share in part.by_layer.tolist()],
                    "tokens": part.tokens.tolist(),
                    "void": part.void.tolist(),
                }
                for name, part in (("prompt", self.prompt), ("response", self.response))
            },
        }


def voids_of(norms: Tensor, alpha: float) -> Tensor:
    """bool [L, N] from the norms [L + 1, N] of N tokens' states before the first layer and after each."""
    growth = norms[1:] - norms[:-1]
    highest, lowest = growth.cummax(dim=0).values, growth.cummin(dim=0).values
    threshold = torch.zeros_like(growth)
    threshold[1:] = alpha * (highest - lowest)[:-1]
    return growth < threshold


def trace(
    model: LayerwiseDecoder, texts: Sequence[tuple[Sequence[int], Sequence[int]]], *, alpha: float = 0.8
) -> VoidMap:
    """Read prompts with their responses through every layer, one after the other, and judge each layer of each token.

    Args: `texts`: token ids of a prompt, and of the part of its response that decode passes consume; that may be empty.
    Raises `InvalidInput` for an alpha outside 0 to 1, no texts, or (with its number) one that is empty or too long.
    """
    if not 0 <= alpha <= 1:
        raise InvalidInput(f"alpha must be 0 to 1, got {alpha}")
    if not texts:
        raise InvalidInput("there is nothing to trace: give at least one prompt")
    prompts, responses = [], []
    for index, (prompt, response) in enumerate(texts):
        if not prompt:
            raise InvalidInput(f"prompt {index} is empty: give at least one token")
        check_length(len(prompt), len(response), model.config)
        judged = voids_of(_norms(model, [*prompt, *response]), alpha).cpu().numpy()
        prompts.append(judged[:, : len(prompt)])
        responses.append(judged[:, len(prompt) :])
    backwards = _add([judged[:, ::-1] for judged in prompts])
    prompt_counts = VoidCounts(void=backwards.void[:, ::-1], tokens=backwards.tokens[::-1])
    return VoidMap(alpha=alpha, prompt=prompt_counts, response=_add(responses))


@torch.inference_mode()
def _norms(model: LayerwiseDecoder, token_ids: list[int]) -> Tensor:
    """float32 [L + 1, N]."""
    zero = np.zeros(1, dtype=np.int64)
    states = model.states(model.work([token_ids], zero, zero), model.new_cache(1, len(token_ids)))
    return torch.stack([x.float().norm(dim=-1) for x in states])


def _add(judged: Sequence[NDArray[np.bool_]]) -> VoidCounts:
    """Counts of voids [L, n_i] whose first columns stand together."""
    longest = max(one.shape[1] for one in judged)
    void, tokens = np.zeros((len(judged[0]), longest), dtype=np.int64), np.zeros(longest, dtype=np.int64)
    for one in judged:
        void[:, : one.shape[1]] += one
        tokens[: one.shape[1]] += 1
    return VoidCounts(void=void, tokens=tokens)


def draw(voids: VoidMap, path: Path, *, title: str) -> None:
    """Write a heat map as an image: layers upward, positions to the right, prompt and response beside each other.

    Raises `MissingExtra` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a heat map needs matplotlib: pip install 'shoal[plot]'") from error
    parts = [("prompt, position from its end", voids.prompt, -len(voids.prompt.tokens))]
    if len(voids.response.tokens):
        parts.append(("response, position from its beginning", voids.response, 0))
    longest = max(len(part.tokens) for _, part, _ in parts)
    widths = [max(len(part.tokens), longest / 4) for _, part, _ in parts]
    figure = Figure(figsize=(10, max(3.0, 1.5 + 0.18 * voids.num_layers)), layout="constrained")
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, (label, part, first) in zip(panels, parts, strict=True):
        image = panel.imshow(
            part.by_position,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmin=0,
            vmax=1,
            extent=(first - 0.5, first + len(part.tokens) - 0.5, -0.5, voids.num_layers - 0.5),
        )
        panel.set_xlabel(label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.yaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="share of tokens of which the layer is a void")
    figure.suptitle(title)
    with replaced(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png", dpi=150)


def emptiest(voids: VoidMap, count: int = 3) -> list[int]:
    """The layers that are voids of most response tokens, of prompt tokens where there is no response."""
    part = voids.response if len(voids.response.tokens) else voids.prompt
    ranked = sorted(enumerate(part.by_layer.tolist()), key=lambda layer: -layer[1])
    return [layer for layer, share in ranked[:count] if share > 0]
