"""The operators of in-pass probes (Meyoyan and Del Corro 2026, arXiv 2601.13288, section 3): from rows [N, d] to one vector [d].

A probe applies one of them twice: to the tokens of every level, each level with parameters of its own, then to the levels. Level l
is the input of layer l, level L the output of the last layer before the final norm. Letters: N rows, d their width, h the width
inside attention, all behind any number of leading dimensions; masked rows count for nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Pooling = Literal["mean", "max"]


def pool(x: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """The mean or the largest of each value over the rows.

    Args: x [..., N, d]; mask bool [..., N], True for rows that count. Returns [..., d].
    """
    there = mask.unsqueeze(-1)
    if pooling == "max":
        return x.masked_fill(~there, -torch.inf).amax(dim=-2)
    return (x * there).sum(dim=-2) / there.sum(dim=-2)


def gate_weights(x: Tensor, gate: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale tanh(w . x)) over the rows; the paper's scale is 1.

    With it no weight can exceed e^2 / (e^2 + N - 1): a soft mean, by design.

    Args: x [..., N, d]; gate [..., d], that is w; mask bool [..., N]. Returns [..., N].
    """
    scores = scale * torch.tanh((x @ gate.unsqueeze(-1)).squeeze(-1))
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)


def gate(x: Tensor, gate: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The rows' mean under `gate_weights`. Returns [..., d]."""
    return (gate_weights(x, gate, mask, scale).unsqueeze(-2) @ x).squeeze(-2)


def attend(qkv: Tensor, out: Tensor, mask: Tensor, *, heads: int, pooling: Pooling) -> Tensor:
    """Full multi-head self-attention among the rows, brought back to d and pooled; no residual, norm, bias, or order of rows.

    Args: qkv [..., N, 3 h]: the down-cast queries, keys and values; out [..., h, d]; mask bool [..., N]. Returns [..., d].
    """
    *lead, num_rows, width = qkv.shape
    # One batch dimension: with more of them PyTorch takes the slow way, which writes every score to memory.
    by_head = qkv.reshape(-1, num_rows, 3, heads, width // (3 * heads))
    q, k, v = by_head.movedim(-3, 0).transpose(-3, -2)
    there = mask.expand(*lead, num_rows).reshape(-1, 1, 1, num_rows)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=there)
    rows = attended.transpose(-3, -2).reshape(*lead, num_rows, width // 3)
    if pooling == "mean":  # of the narrow rows: the product with `out` is linear
        return (pool(rows, mask, "mean").unsqueeze(-2) @ out).squeeze(-2)
    return pool(rows @ out, mask, "max")
