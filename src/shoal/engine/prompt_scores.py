"""Log-probabilities of a prompt's own tokens, from the pass that reads it.

The logits after token i say what the model thought of token i + 1, so a row that is scored wants logits after each token it
brings. Example: a prompt a b c d, read in chunks a b c and d: the first chunk's three rows of logits score b, c and d; the second
chunk's one row chooses the first new token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.request import Request, TokenLogprobs

MAX_CHUNK_TOKENS = 128
"""Most tokens that a pass reads of a scored prompt: their logits are a whole vocabulary each."""


def score_prompts(logits: Tensor, rows: Sequence[tuple[Request, int, int]], num_logits: Sequence[int]) -> Tensor:
    """Note what a pass says of prompts that are scored. Running a pass again notes the same.

    Args: `logits` [sum of num_logits, V]; `rows`: each row's request, the position of its first token, and its number of tokens
    without drafted ones; `num_logits` per row, of its last tokens.

    Returns the logits that choose tokens.
    """
    choosing: list[Tensor] = []
    for (request, start, count), its_logits in zip(rows, torch.split(logits, list(num_logits)), strict=True):
        if not (num_scoring := num_scored(request, start, count)):
            choosing.append(its_logits)
            continue
        begin = start + count - num_scoring
        following = request.prompt[begin + 1 : start + 1 + count]
        num_top, first = request.sampling.prompt_logprobs, request.first_scored
        assert num_top is not None
        assert first is not None
        request.prompt_logprobs[begin - first :] = row_logprobs(
            its_logits[: len(following)].float(), following, num_top
        )
        choosing.append(its_logits[len(following) :])
    return torch.cat(choosing)


def num_scored(request: Request, start: int, count: int) -> int:
    """After how many last tokens of a row, of `count` from position `start` on, scoring wants logits."""
    first = request.first_scored
    if first is None or start >= len(request.prompt):
        return 0
    return min(count, max(0, start + count - first))


def scores_much(request: Request) -> bool:
    """Whether more is scored than a pass may take."""
    first = request.first_scored
    return first is not None and len(request.prompt) - first > MAX_CHUNK_TOKENS


def row_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of one token per row of float32 logits [n, V], and of each row's `num_top` most probable tokens."""
    if not token_ids:
        return []
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(num_top, logits.shape[1]))
    return [
        TokenLogprobs(logprob=logprob, top=dict(zip(indices, values, strict=True)))
        for logprob, indices, values in zip(chosen, top.indices.tolist(), top.values.tolist(), strict=True)
    ]
