"""The comparison lets near-ties pass, and nothing else."""

from __future__ import annotations

import pytest
import torch

from near_ties import assert_same_tokens_up_to_near_ties

LOGITS = torch.zeros(1000, 4)
LOGITS[:, 1] = 1.0
LOGITS[:, 2] = 1.0 - 1e-5


@pytest.mark.parametrize(
    ("got", "largest_difference", "message"),
    [
        ([1] * 1000, 0.0, None),
        ([1] * 500 + [2] + [3] * 499, 1e-5, None),  # a near-tie; the text after it is another
        ([1] * 500 + [2] + [1] * 499, 1e-6, "not a near-tie"),
        ([1] * 500 + [3] + [1] * 499, 1.0, "not one of the two"),
        ([1] * 999, 1.0, "999 tokens against 1000"),
    ],
)
def test_one_row(got: list[int], largest_difference: float, message: str | None) -> None:
    def compare() -> None:
        assert_same_tokens_up_to_near_ties([got], [[1] * 1000], [LOGITS], largest_difference=largest_difference)

    if message is None:
        compare()
    else:
        with pytest.raises(AssertionError, match=message):
            compare()


def test_near_ties_stay_rare() -> None:
    """Three in 3000 tokens may be near-ties, three in 2700 not."""
    tied = [1] * 999 + [2]
    near = {"expected_logits": [LOGITS] * 3, "largest_difference": 1e-5}
    assert_same_tokens_up_to_near_ties([tied] * 3, [[1] * 1000] * 3, **near)
    with pytest.raises(AssertionError, match="near-ties are more than"):
        assert_same_tokens_up_to_near_ties(
            [tied[-900:]] * 3, [[1] * 900] * 3, [LOGITS[-900:]] * 3, largest_difference=1e-5
        )
