"""Comparing the tokens of two ways to compute the same model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoal import Sampling
from shoal.engine.sampling import uniform_noise


def assert_same_tokens_up_to_near_ties(
    got: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    expected_logits: Sequence[Tensor],
    *,
    largest_difference: float,
) -> None:
    """Equal tokens, row by row. Where rows part, it must be at a near-tie; what follows is another text, and not compared.

    A difference is a near-tie only if, at the first divergence, the two top logits are closer than 4x the largest logit
    difference measured between the two ways. Near-ties are printed and stay under 0.1% of all tokens.

    Args:
        got, expected: generated tokens of each row.
        expected_logits: per row [tokens, V], what each expected token was chosen from.
        largest_difference: the largest difference between logits of the two ways, measured on the same tokens.
    """
    near_ties = 0
    for row, (ours, theirs, logits) in enumerate(zip(got, expected, expected_logits, strict=True)):
        if list(ours) == list(theirs):
            continue
        step = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        assert step is not None, f"row {row}: {len(ours)} tokens against {len(theirs)}, equal as far as both go"
        top = logits[step].topk(2)
        gap = float(top.values[0] - top.values[1])
        where = f"row {row}, token {step}: {ours[step]} against {theirs[step]}, top logits {gap:.2e} apart"
        assert ours[step] in top.indices.tolist(), f"{where}, and {ours[step]} is not one of the two"
        assert gap < 4 * largest_difference, f"{where}, not a near-tie: logits differ by {largest_difference:.2e}"
        print(f"near-tie in {where}")
        near_ties += 1
    assert near_ties <= 0.001 * sum(map(len, expected)), f"{near_ties} near-ties are more than 0.1% of tokens"


def cumulative(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Of the distribution of logits [..., V], along token ids."""
    return (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)


def assert_near_tie(
    ours: Sequence[int],
    theirs: Sequence[int],
    sampling: Sampling,
    logits: Tensor,
    same_texts: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> None:
    """Two completions of one request part where rounding decides.

    Greedy: where the logits of the two tokens are closer than 4x the largest difference of a logit between the ways. Sampled: where
    the noise falls as near to the border between the two tokens, measured by their cumulative distributions.

    Args:
        logits: [tokens, V], what the tokens of `theirs` were chosen from.
        same_texts: per text the logits [tokens, V] of both ways along the same tokens.
    """
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    assert at is not None, f"{len(ours)} tokens against {len(theirs)}, equal as far as both go"
    pair, temperature = (ours[at], theirs[at]), sampling.temperature
    if temperature:
        ways = [[cumulative(one, temperature) for one in way] for way in same_texts]
        borders = cumulative(logits[at], temperature)[[min(pair), max(pair) - 1]]
        gap = float((borders - uniform_noise(sampling.seed, 0, at)).abs().max())
    else:
        ways = [list(way) for way in same_texts]
        gap = abs(float(logits[at][pair[0]] - logits[at][pair[1]]))
    largest = max(float((a - b).abs().max()) for a, b in zip(*ways, strict=True))
    assert gap < 4 * largest, f"token {at}: {pair} are {gap:.2e} apart, no near-tie: the ways differ by {largest:.2e}"
