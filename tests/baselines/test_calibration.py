"""Learn-then-Test: the p-value is one, testing stops where it must, and a calibrated CALM keeps its promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.baselines.calibration import calibrate, hoeffding_bentkus, learn_then_test, textual_inconsistency
from shoal.baselines.calm import Calm, ExitCompletion, generate
from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.errors import InvalidInput

unit = st.floats(0, 1)
inside = st.floats(0.01, 0.99)


@settings(deadline=None)  # SciPy is imported in the first call
@given(mean=unit, other=unit, count=st.integers(1, 500), delta=inside)
def test_p_values(mean: float, other: float, count: int, delta: float) -> None:
    """Within 0..1, lower for lower means, never above CALM's own bound; a mean above delta is no evidence by Hoeffding."""
    p = hoeffding_bentkus(mean, count, delta)
    assert 0 <= p <= 1
    assert p <= math.exp(-2 * count * max(0.0, delta - mean) ** 2) + 1e-12
    low, high = sorted((mean, other))
    assert hoeffding_bentkus(low, count, delta) <= hoeffding_bentkus(high, count, delta) + 1e-12


def test_the_p_value_by_hand() -> None:
    """No loss among 20 at delta 0.5: both bounds are powers of two, 0.5^20 and e 0.5^20."""
    assert hoeffding_bentkus(0.0, 20, 0.5) == pytest.approx(0.5**20)
    # 3 losses of 30: ceil(30 x 0.1) must be 3, though 30 x 0.1 in floats is a little more.
    assert hoeffding_bentkus(0.1, 30, 0.4) == hoeffding_bentkus(3 / 30, 30, 0.4)


@pytest.mark.parametrize("risk", [0.1, 0.3])
def test_a_true_hypothesis_is_seldom_rejected(risk: float) -> None:
    """Losses whose expectation is just delta: at most epsilon of the tests may pass; binary and smooth losses."""
    rng = np.random.default_rng(0)
    binary = (rng.random((4000, 60)) < risk).mean(axis=1)
    smooth = rng.beta(2 * risk, 2 * (1 - risk), size=(4000, 60)).mean(axis=1)
    for means in (binary, smooth):
        assert np.mean([hoeffding_bentkus(mean, 60, risk) <= 0.1 for mean in means]) <= 0.1


def test_testing_stops_at_the_first_that_is_not_rejected() -> None:
    """The fourth threshold would pass, but nobody asks."""
    means = {1.0: 0.0, 0.9: 0.02, 0.8: 0.3, 0.7: 0.0}
    asked = []

    def losses_at(threshold: float) -> list[float]:
        asked.append(threshold)
        return [means[threshold]] * 200

    found = learn_then_test(losses_at, delta=0.1, epsilon=0.05, thresholds=tuple(means))
    assert found.threshold == 0.9
    assert asked == [1.0, 0.9, 0.8] == [test.threshold for test in found.tested]
    assert [test.mean_loss for test in found.tested] == pytest.approx([0, 0.02, 0.3])
    assert found.tested[1].p_value <= 0.05 < found.tested[2].p_value


def test_none_is_certified_by_few_prompts() -> None:
    found = learn_then_test(lambda threshold: [0.0] * 5, delta=0.1, epsilon=0.05)
    assert found.threshold is None
    assert len(found.tested) == 1


def test_every_threshold_may_be_certified() -> None:
    found = learn_then_test(lambda threshold: [0.0] * 100, delta=0.1, epsilon=0.05)
    assert found.threshold == 0.05
    assert len(found.tested) == 20


def test_the_guarantee() -> None:
    """Risk grows as the threshold falls and exceeds delta below 0.5: in few of 500 calibrations is one below 0.5 certified."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(500):
        losses = rng.random(200)
        found = learn_then_test(
            lambda threshold, losses=losses: (losses < 0.2 * (1 - threshold)).astype(float), delta=0.1, epsilon=0.1
        )
        wrong += found.threshold is not None and found.threshold < 0.5 - 1e-9
    assert wrong / 500 <= 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, "delta must be above 0 and below 1"),
        ({"delta": 1.0}, "delta must be above 0 and below 1"),
        ({"delta": 0.1, "epsilon": 0.0}, "epsilon must be above 0"),
        ({"delta": 0.1, "thresholds": ()}, "thresholds must be descending"),
        ({"delta": 0.1, "thresholds": (0.5, 0.6)}, "thresholds must be descending"),
        ({"delta": 0.1, "thresholds": (0.5, 0.5)}, "thresholds must be descending"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        learn_then_test(lambda threshold: [0.0], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("losses", [[], [0.5, 1.5], [-0.1], [math.nan]])
def test_bad_losses(losses: list[float]) -> None:
    with pytest.raises(InvalidInput, match=r"losses must be in 0\.\.1"):
        learn_then_test(lambda threshold: losses, delta=0.1)


def test_a_calibrated_model(model: LayerwiseDecoder) -> None:
    """The losses tested are those of the completions at each threshold against the full model's."""
    prompts = [[byte, 7, byte + 1] for byte in range(30)]
    rule = Calm(threshold=0.0, min_exit_layer=2)

    def share_changed(early: ExitCompletion, full: ExitCompletion) -> float:
        return float(np.mean([a != b for a, b in zip(early.token_ids, full.token_ids, strict=False)]))

    found = calibrate(
        model, prompts, rule, delta=0.5, epsilon=0.1, loss=share_changed, thresholds=(1.0, 0.6, 0.2, 0.01), max_new_tokens=5
    )  # fmt: skip
    full = generate(model, prompts, Calm(threshold=2.0), max_new_tokens=5).completions
    for test in found.tested:
        early = generate(model, prompts, Calm(threshold=test.threshold, min_exit_layer=2), max_new_tokens=5).completions
        assert test.mean_loss == pytest.approx(
            np.mean([share_changed(*pair) for pair in zip(early, full, strict=True)])
        )
    assert found.threshold is not None
    assert found.tested[-1].p_value > 0.1, "the lowest threshold changes too much, or the test shows little"


def test_textual_inconsistency(model: LayerwiseDecoder) -> None:
    full = generate(model, ["the river bank"], Calm(threshold=2.0), max_new_tokens=30).completions[0]
    assert textual_inconsistency(full, full) == 0
    early = generate(model, ["the river bank"], Calm(threshold=0.0), max_new_tokens=30).completions[0]
    assert 0 < textual_inconsistency(early, full) <= 1


def test_texts_need_a_tokenizer(model: LayerwiseDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(InvalidInput, match="no tokenizer"):
        calibrate(model, [[1, 2]], Calm(threshold=0.5), delta=0.1)
