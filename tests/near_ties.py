"""Comparing the greedy tokens of two ways to compute the same model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


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
