"""Attention of a pass's active tokens over one layer's cache, which is read in place, whatever rows are active."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.models.layout import Layout, Run


def attend(queries: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Causal attention, grouped queries included.

    Args:
        queries: [A, H_q, D], the layer's active tokens; their keys and values are in the cache already.
        keys, values: [slots, H_kv, S, D], one layer's cache.
        layout: which slots and positions the tokens belong to.

    Returns [A, H_q * D].
    """
    if layout.slot_order is not None:
        queries = queries[layout.slot_order]
    out = torch.empty_like(queries)
    for run in layout.runs:
        last = run.first_token + run.num_rows * run.tokens_per_row
        q = queries[run.first_token : last]
        k = keys[run.first_slot : run.first_slot + run.num_rows]
        v = values[run.first_slot : run.first_slot + run.num_rows]
        decode = run.tokens_per_row == 1
        out[run.first_token : last] = _attend_one(q, k, v, run) if decode else _attend_many(q, k, v, run)
    if layout.slot_order is not None:
        out = torch.empty_like(out).index_copy_(0, layout.slot_order, out)
    return out.flatten(1)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    """One token per row: q [n, H_q, D], k and v [n, H_kv, S, D], to [n, H_q, D].

    Written as three batched products because the library's fused kernel is several times slower for a single query in bfloat16
    on CPUs. The H_q / H_kv query heads of a group share their keys, so they stand as rows of one product.
    """
    n, num_heads, head_dim = q.shape
    num_kv_heads, capacity = k.shape[1:3]
    grouped = q.reshape(n * num_kv_heads, num_heads // num_kv_heads, head_dim)
    k = k.view(n * num_kv_heads, capacity, head_dim)[:, : run.num_keys]
    v = v.view(n * num_kv_heads, capacity, head_dim)[:, : run.num_keys]
    scores = torch.baddbmm(q.new_empty(1, 1, 1), grouped, k.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
    if run.bias is not None:
        scores.view(n, num_kv_heads, -1, run.num_keys).add_(run.bias)
    return torch.bmm(scores.softmax(dim=-1), v).view(n, num_heads, head_dim)


def _attend_many(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    """Several tokens per row (prefill, drafts): q [n T, H_q, D], to the same shape."""
    num_heads, head_dim = q.shape[1:]
    q = q.view(run.num_rows, run.tokens_per_row, num_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q,
        k[:, :, : run.num_keys],
        v[:, :, : run.num_keys],
        attn_mask=run.bias,
        is_causal=run.causal,
        enable_gqa=num_heads != k.shape[1],
    )
    return out.transpose(1, 2).reshape(-1, num_heads, head_dim)
