"""From logits to tokens."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.engine.request import Request, TokenLogprobs
from shoal.engine.sampling import Sampling, uniform_noise
from shoal.errors import RequestFailed

COIN = 0xC0E5CED
"""Makes of a request's seed the seed of the coins that accept drafts by coupling."""
TOP_P_PREFIX = 1024
"""Most probable tokens looked at before a whole vocabulary is sorted for top-p."""


class Sampled(NamedTuple):
    """One row's next token."""

    token: int
    logprobs: TokenLogprobs | None
    """Where the request asks for them."""


def sample(logits: Tensor, requests: Sequence[Request]) -> list[Sampled | RequestFailed]:
    """The next token of each row, or why its request fails; the others go on. Changes nothing.

    Args: logits [R, V] in the model's dtype, one row per request.
    """
    return [one for (one,) in verify(logits, requests, [()] * len(requests))]


def verify(
    logits: Tensor,
    requests: Sequence[Request],
    drafts: Sequence[Sequence[int]],
    proposals: Mapping[int, Sequence[Tensor]] = MappingProxyType({}),
) -> list[list[Sampled | RequestFailed]]:
    """The next tokens of each request: those of its draft that it would have chosen itself, and one more. Changes nothing.

    Ends with the first token that differs from the draft (recovered), that ends the request, or that cannot be chosen.

    Args: logits [rows, V] in the model's dtype, per request one row after its last token and one after each drafted token;
    `proposals`: by index of a request, where its draft is to be accepted by coupled distributions, those that its tokens were drawn
    from, each float32 [V] and normalised.
    """
    best, finite = greedy(logits)
    tokens: list[list[Sampled | RequestFailed]] = []
    row = 0
    for index, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
        coupled = proposals.get(index, ())
        taken: list[Sampled | RequestFailed] = []
        text = copy.copy(request.text) if draft and request.text.stop else None
        for num_ahead in range(len(draft) + 1):
            at = row + num_ahead
            proposal = (draft[num_ahead], coupled[num_ahead]) if num_ahead < len(coupled) else None
            one = next_token(logits[at], best[at], finite[at], request, draft[:num_ahead], proposal)
            taken.append(one)
            if isinstance(one, RequestFailed) or one.token in request.stop_token_ids:
                break
            if num_ahead == len(draft) or one.token != draft[num_ahead]:
                break
            if text:  # a stop string may end in the middle of the draft
                text.push([one.token])
                if text.stopped:
                    break
        tokens.append(taken)
        row += len(draft) + 1
    return tokens


def next_token(
    logits: Tensor,
    most_probable: int,
    finite: bool,
    request: Request,
    ahead: Sequence[int],
    proposal: tuple[int, Tensor] | None,
) -> Sampled | RequestFailed:
    """What the request emits after its output and the accepted tokens `ahead`, from logits [V].

    Args: `proposal`: a drafted token and the distribution that it was drawn from, to be accepted by coupling.
    """
    if not finite:
        where = f"prompt {request.index}, after {len(request.output) + len(ahead)} new tokens"
        return RequestFailed(f"logits are not finite ({where}): the weights or the dtype's range are at fault")
    try:
        token = most_probable if request.sampling.plain_greedy else choose(logits.float(), request, ahead, proposal)
    except RequestFailed as error:
        return error
    num_top = request.sampling.logprobs
    return Sampled(token, None if num_top is None else token_logprobs(logits.float(), token, num_top))


def greedy(logits: Tensor) -> tuple[list[int], list[bool]]:
    """The largest of each row of logits [R, V], the first of equal ones, and whether it is finite.

    NaN beats every number, so a finite maximum means that nothing is NaN or +inf.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        values = logits.numpy()  # its argmax is ten times faster than PyTorch's
        best = values.argmax(axis=1)
        return best.tolist(), np.isfinite(values[np.arange(len(best)), best]).tolist()
    # `max`, not `argmax`: the same index, seven times faster in bfloat16 on CPUs.
    largest, indices = logits.max(dim=-1)
    return indices.tolist(), largest.isfinite().tolist()


def choose(
    logits: Tensor, request: Request, ahead: Sequence[int] = (), proposal: tuple[int, Tensor] | None = None
) -> int:
    """One token from float32 logits [V]: penalties, bias, the user's processor, temperature, top-k, top-p, min-p, the draw.

    Args: `ahead`: accepted tokens that are not in the request's output yet; `proposal`: see `next_token`.

    Raises `RequestFailed` if the user's processor raises, returns something else than logits or leaves nothing to choose from.
    """
    sampling = request.sampling
    output = [*request.output, *ahead] if ahead else request.output
    logits = adjust(logits.clone(), request, output)
    if not logits.max().isfinite():
        raise RequestFailed(f"prompt {request.index}: penalties, bias or processor left no finite logit to choose from")
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = distribution(logits, sampling)
    noise = uniform_noise(sampling.seed, request.sample, len(output))
    if proposal is None:
        return draw(probabilities, noise)
    coin = uniform_noise(sampling.seed ^ COIN, request.sample, len(output))
    return couple(probabilities / probabilities.sum(), *proposal, coin=coin, noise=noise)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from, [V] and not normalised: from float32 logits [V] by temperature (above 0), top-k, top-p, min-p."""
    # From the largest logit down, so that a tiny temperature gives -inf for the others and not inf - inf.
    logits = (logits - logits.max()) / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        probabilities[probabilities < nucleus_floor(probabilities, sampling.top_p)] = 0
    if sampling.min_p:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    return probabilities


def draw(probabilities: Tensor, noise: float) -> int:
    """The token at `noise` in [0, 1) of the cumulative distribution of `probabilities` [V], normalised or not."""
    cumulative = probabilities.double().cumsum(dim=-1)
    # First token whose cumulative probability exceeds the draw; a token of probability 0 never does so first.
    return int(torch.searchsorted(cumulative, noise * cumulative[-1:], right=True).clamp(max=len(probabilities) - 1))


def couple(p: Tensor, drafted: int, q: Tensor, *, coin: float, noise: float) -> int:
    """A token distributed as `p` [V], given one drawn from `q` [V]: that one with probability min(1, p/q), otherwise one of what p
    has more than q (Leviathan et al. 2023, section 2.3). `coin` and `noise`, in [0, 1), are independent of the draw from q.

    Example: p = (0.5, 0.5), q = (1, 0): token 0 was drafted, is kept half of the time, and replaced by token 1 otherwise.
    """
    if coin * float(q[drafted]) < float(p[drafted]):
        return drafted
    more = (p - F.pad(q, (0, len(p) - len(q)))).clamp(min=0)  # a smaller model's vocabulary may be filled up less
    return draw(more if float(more.sum()) > 0 else p, noise)


def adjust(logits: Tensor, request: Request, output: list[int]) -> Tensor:
    """Apply penalties, bias, the minimum length and the user's processor to float32 logits [V] after `output`, in place where
    possible."""
    sampling = request.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*request.prompt, *output}), device=logits.device)
        scores = logits[seen]
        logits[seen] = torch.where(
            scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty
        )
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        for token, count in Counter(output).items():
            logits[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if len(output) < sampling.min_new_tokens:
        logits[list(request.eos_token_ids)] = -torch.inf
    if sampling.processor is not None:
        vocab_size = logits.shape
        try:
            logits = sampling.processor([*request.prompt, *output], logits)
        except Exception as error:
            raise RequestFailed(f"prompt {request.index}: the logits processor raised {error!r}") from error
        if not isinstance(logits, Tensor) or logits.shape != vocab_size:
            returned = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else repr(logits)
            raise RequestFailed(
                f"prompt {request.index}: the logits processor must return logits of shape {list(vocab_size)}, "
                f"it returned {returned}"
            )
        logits = logits.float()
    return logits


def nucleus_floor(probabilities: Tensor, top_p: float) -> Tensor:
    """Lowest probability [] inside the smallest set of most probable tokens that reaches `top_p`.

    Example: (0.5, 0.3, 0.15, 0.05) and 0.7: 0.5 is not enough, 0.5 + 0.3 is, so 0.3.
    """
    ranked = probabilities.topk(min(TOP_P_PREFIX, len(probabilities))).values
    if ranked.sum() < top_p:
        ranked = probabilities.sort(descending=True).values
    before = ranked.cumsum(dim=-1) - ranked
    return ranked[int((before < top_p).sum()) - 1]


def token_logprobs(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of `token` and of the `num_top` most probable tokens, from float32 logits [V]."""
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprobs(
        logprob=float(logprobs[token]), top=dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
