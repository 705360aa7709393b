"""From logits to tokens."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.engine.drafting import Draft, DrawnTokens
from shoal.engine.entropy import TopK, token_uncertainty
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
    uncertainty: tuple[float, float] | None = None
    """Entropy and negative log-probability, in nats, where the request asks for its trace."""


def sample(logits: Tensor, requests: Sequence[Request]) -> list[Sampled | RequestFailed]:
    """The next token of each row, or why its request fails; the others go on. Changes nothing.

    Args: logits [R, V] in the model's dtype, one row per request.
    """
    return [one for (one,) in verify(logits, requests, [None] * len(requests))]


def verify(
    logits: Tensor, requests: Sequence[Request], drafts: Sequence[Draft | None]
) -> list[list[Sampled | RequestFailed]]:
    """The next tokens of each request: those of its draft that it would have chosen itself, and one more. Changes nothing.

    Ends with the first token that no drafted one is (recovered), that ends the request, or that cannot be chosen.

    Args: logits [rows, V] in the model's dtype, per request one row after its last token and one after each drafted token.
    """
    best, finite = greedy(logits)
    tokens: list[list[Sampled | RequestFailed]] = []
    traced: dict[TopK, list[tuple[list[Sampled | RequestFailed], int, int]]] = {}
    first = 0
    for request, draft in zip(requests, drafts, strict=True):
        taken: list[Sampled | RequestFailed] = []
        ahead: list[int] = []
        text = copy.copy(request.text) if draft and request.text.stop else None
        at: int | None = 0
        while at is not None:
            row, proposal = first + at, draft.proposal(at) if draft else None
            one = next_token(logits[row], best[row], finite[row], request, ahead, proposal)
            taken.append(one)
            if request.sampling.entropy_top_k is not None and isinstance(one, Sampled):
                traced.setdefault(request.sampling.entropy_top_k, []).append((taken, len(taken) - 1, row))
            if draft is None or isinstance(one, RequestFailed) or one.token in request.stop_token_ids:
                break
            if text:  # a stop string may end in the middle of the draft
                text.push([one.token])
                if text.stopped:
                    break
            ahead.append(one.token)
            at = draft.child(at, one.token)
        tokens.append(taken)
        first += 1 + (len(draft.tokens) if draft else 0)
    for top_k, places in traced.items():
        note_uncertainty(logits, places, top_k)
    return tokens


def note_uncertainty(
    logits: Tensor, places: Sequence[tuple[list[Sampled | RequestFailed], int, int]], top_k: TopK
) -> None:
    """Add to tokens how unsure the model was, all of them in one go: each is given as its list, its place there, and its row of
    logits [rows, V]."""
    rows = [row for _, _, row in places]
    if len(rows) < len(logits):
        logits = logits[rows]
    tokens = [taken[place] for taken, place, _ in places]
    token_ids = [one.token for one in tokens if isinstance(one, Sampled)]
    for (taken, place, _), one, uncertainty in zip(
        places, tokens, token_uncertainty(logits, token_ids, top_k), strict=True
    ):
        assert isinstance(one, Sampled)
        taken[place] = one._replace(uncertainty=uncertainty)


def next_token(
    logits: Tensor,
    most_probable: int,
    finite: bool,
    request: Request,
    ahead: Sequence[int],
    proposal: DrawnTokens | None,
) -> Sampled | RequestFailed:
    """What the request emits after its output and the accepted tokens `ahead`, from logits [V].

    Args: `proposal`: drafted tokens and the distribution that they were drawn from, to be accepted by coupling.
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


def choose(logits: Tensor, request: Request, ahead: Sequence[int] = (), proposal: DrawnTokens | None = None) -> int:
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
    coins = [
        uniform_noise(sampling.seed ^ COIN, request.sample, sibling_draw(len(output), sibling))
        for sibling in range(len(proposal[0]))
    ]
    return couple(probabilities / probabilities.sum(), *proposal, coins=coins, noise=noise)


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


def couple(p: Tensor, drafted: Sequence[int], q: Tensor, *, coins: Sequence[float], noise: float) -> int:
    """A token distributed as `p` [V], given some drawn from `q` [V] without replacement: recursive rejection (Jeon et al. 2024,
    arXiv 2402.14160), which for one token is section 2.3 of Leviathan et al. 2023.

    Each drafted token in turn is kept with probability min(1, p/q). Where it is not, p becomes what it has more than q, and q loses
    the token; where none is, a token is drawn from what is left of p. `coins`, one per drafted token, and `noise`, in [0, 1), are
    independent of the draws from q.

    Example: p = (0.5, 0.5), q = (1, 0): token 0 was drafted, is kept half of the time, and replaced by token 1 otherwise.
    """
    q = F.pad(q, (0, len(p) - len(q)))  # a smaller model's vocabulary may be filled up less
    for token, coin in zip(drafted, coins, strict=True):
        if coin * float(q[token]) < float(p[token]):
            return token
        more = (p - q).clamp(min=0)
        total = float(more.sum())
        if total > 0:  # otherwise p is q, and only rounding has rejected
            p = more / total
        q = without(q, token)
    return draw(p, noise)


def without(q: Tensor, token: int) -> Tensor:
    """The distribution `q` [V] of a token that is not `token`; zeros where there is no other."""
    rest = q.clone()
    rest[token] = 0
    return rest / rest.sum().clamp(min=torch.finfo(q.dtype).tiny)


def sibling_draw(position: int, sibling: int) -> int:
    """The word of `uniform_noise` for one of several draws at a position, in the place of the position; the first draw's is the
    position itself."""
    return position + (sibling << 32)


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
