"""The sentinel on traces whose accuracies are known; what it says of strangers; its file; a file that grows."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from made_traces import TRAINING, made_slice
from shoal.engine.entropy import EntropyTrace
from shoal.errors import InvalidInput
from shoal.signals.dashboard import render, write_dashboard
from shoal.signals.sentinel import FEWEST, Sentinel, SentinelConfig
from shoal.signals.slices import (
    DRIFT_ALARM,
    Affine,
    Known,
    SliceEstimate,
    atc_threshold,
    errors_of,
    estimate_slice,
    estimate_slices,
    interval,
    label_next,
    leave_one_out,
)
from shoal.signals.traces import Traced
from shoal.signals.watch import Watch, WatchMetrics


@pytest.fixture(scope="module")
def sentinel() -> Sentinel:
    return Sentinel.fit(TRAINING)


def lines(traced: list[Traced]) -> str:
    """As a file of traces has them."""
    return "".join(
        json.dumps(
            {
                "slice": one.slice,
                "trace": {"top_k": one.trace.top_k, "entropies": one.trace.entropies, "nlls": one.trace.nlls},
            }
        )
        + "\n"
        for one in traced
    )


@pytest.mark.parametrize("classifier", ["forest", "logistic", "mlp"])
def test_known_accuracies_are_recovered(classifier: Literal["forest", "logistic", "mlp"]) -> None:
    """Slices with other accuracies than any in training lie within the stated interval; one in six may not. The small network,
    which learns least from few responses, comes near."""
    fitted = Sentinel.fit(TRAINING, SentinelConfig(classifier=classifier))
    accuracies = (0.15, 0.3, 0.4, 0.6, 0.8, 0.95)
    unseen = [one for accuracy in accuracies for one in made_slice(f"a {accuracy}", accuracy, 200, seed=2)]
    found = estimate_slices(fitted, unseen)
    assert [one.count for one in found] == [200] * 6
    assert [one.accuracy for one in found] == pytest.approx(accuracies)
    inside = sum(one.low <= accuracy <= one.high for one, accuracy in zip(found, accuracies, strict=True))
    assert inside >= (3 if classifier == "mlp" else 5)
    errors = errors_of(found)
    assert errors["sentinel"].mean_absolute_error < 0.08
    assert errors["sentinel"].rank_correlation > 0.9
    assert errors["length alone"].mean_absolute_error > 0.15, "lengths say nothing here"


def test_balancing_does_not_move_the_estimate() -> None:
    """Nine of ten are right: the mean of P stays there, because calibration sees the answers as they are."""
    skewed = made_slice("s", 0.9, 600, seed=5)
    for balance in (True, False):
        for classifier in ("forest", "mlp"):
            fitted = Sentinel.fit(skewed, SentinelConfig(balance=balance, classifier=classifier))  # type: ignore[arg-type]
            assert fitted.probabilities(fitted.values).mean() == pytest.approx(0.9, abs=0.04)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("count", [20, 100])
def test_the_small_network_learns_with_any_seed(seed: int, count: int) -> None:
    """It does not fall back to saying the base rate of everything."""
    training = [one for name, accuracy in (("a", 0.8), ("b", 0.3)) for one in made_slice(name, accuracy, count, seed=1)]
    fitted = Sentinel.fit(training, SentinelConfig(classifier="mlp", seed=seed))
    found = fitted.probabilities(fitted.values)
    assert found.std() > 0.3
    assert ((found > 0.5) == fitted.correct).mean() > 0.9


def test_slices_that_cannot_be_left_out_are_passed_over() -> None:
    """All wrong answers are in one slice: without it there is nothing to learn from."""
    training = [
        *made_slice("mixed", 0.5, 60, seed=1),
        *made_slice("b", 1.0, 30, seed=1),
        *made_slice("c", 1.0, 30, seed=1),
    ]
    assert [one.name for one in leave_one_out(Sentinel.fit(training))] == ["b", "c"]


def test_chance_raises_no_alarm() -> None:
    """Few answers, drawn from the training itself: their means lie outside those of whole slices, as they would by chance."""
    fitted = Sentinel.fit(TRAINING, SentinelConfig(classifier="logistic"))
    rng, known = np.random.default_rng(0), Known(fitted)
    for count in (1, 3, 10):
        drawn = [fitted.values[rng.choice(len(TRAINING), count)] for _ in range(100)]
        found = [estimate_slice(known, "x", values, np.full(count, np.nan)) for values in drawn]
        assert sum(one.drift > DRIFT_ALARM for one in found) > sum(one.alarm for one in found)
        assert sum(one.alarm for one in found) <= 8
        (far,) = estimate_slices(fitted, made_slice("far", 0.6, count, seed=1, labelled=False, scale=10))
        assert far.alarm


def test_a_statistic_that_never_varied() -> None:
    """Of traces that are all alike there is no standard deviation to measure in."""
    same = [replace(one, trace=EntropyTrace(top_k=20, entropies=(1.0, 1.0), nlls=(1.0, 1.0))) for one in TRAINING[:200]]
    fitted = Sentinel.fit(same)
    here, there = estimate_slices(fitted, [replace(same[0], slice="x"), *made_slice("y", 0.5, 10, seed=0)])
    assert not here.alarm
    assert there.alarm
    assert there.drift == 1000
    assert "did not vary in training" in there.drift_said


def test_leaving_one_slice_out(sentinel: Sentinel) -> None:
    found = leave_one_out(sentinel)
    assert [one.name for one in found] == ["easy", "good", "fair", "hard"]
    assert errors_of(found)["sentinel"].mean_absolute_error < 0.1
    with pytest.raises(InvalidInput, match="three slices or more, there are 2"):
        leave_one_out(sentinel.without("easy", "good"))


def test_strangers_raise_an_alarm(sentinel: Sentinel) -> None:
    """Ten times the entropy is nothing that it knows; the next slice to label is that one."""
    near, far = (
        made_slice("near", 0.6, 200, seed=3, labelled=False),
        made_slice("far", 0.6, 200, seed=3, labelled=False, scale=10),
    )
    here, there = estimate_slices(sentinel, [*near, *far])
    assert (here.alarm, there.alarm) == (False, True)
    assert here.outside < 0.1 < 0.5 < there.outside
    assert there.accuracy is None
    assert label_next([here, there]) == "far"


def test_what_to_label_next(sentinel: Sentinel) -> None:
    (one,) = estimate_slices(sentinel, made_slice("a", 0.5, 50, seed=1, labelled=False))
    narrow, wide = (
        replace(one, name="narrow", low=0.5, high=0.6, drift=0.4),
        replace(one, name="wide", low=0.3, high=0.8, drift=0.0),
    )
    assert label_next([narrow, wide]) == "wide"
    assert label_next([narrow, replace(wide, accuracy=0.5)]) == "narrow"
    assert label_next([replace(narrow, drift=1.0), wide]) == "narrow"
    assert label_next([replace(wide, accuracy=0.5)]) is None


def test_a_file_says_the_same(sentinel: Sentinel, tmp_path: Path) -> None:
    """JSON, no pickle; whatever else is in a file is refused."""
    path = tmp_path / "sentinel.json"
    sentinel.save(path)
    again = Sentinel.load(path)
    unseen = made_slice("u", 0.5, 100, seed=9)
    values = sentinel.read([one.trace for one in unseen])
    assert again.config == sentinel.config
    assert again.probabilities(values) == pytest.approx(sentinel.probabilities(values), abs=0.02)  # 7 digits were kept
    data = json.loads(path.read_text())
    for changed in (
        {"format": "other"},
        {"correct": [1]},
        {"values": data["values"][:-1]},
        {"config": {"depth": 3}},
        {"config": {"seed": -3}},
        {"values": [[1e39] * 18] * 600},
        {"values": [[-1] * 18] * 600},
        {"correct": ["x"] * 600},
        {"top_k": "abc"},
    ):
        path.write_text(json.dumps({**data, **changed}))
        with pytest.raises(InvalidInput, match="is not a sentinel"):
            Sentinel.load(path)
    for text in ("", "[]", "\x80\x04K\x01.", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InvalidInput, match="is not a sentinel"):
            Sentinel.load(path)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(InvalidInput, match=f"a sentinel learns from {FEWEST} of each"):
        Sentinel.fit(made_slice("a", 0.99, 100, seed=0))
    with pytest.raises(InvalidInput, match="50 of 50 responses have no label"):
        Sentinel.fit(made_slice("a", 0.5, 50, seed=0, labelled=False))
    with pytest.raises(InvalidInput, match="unknown features '10'"):
        SentinelConfig(features="10")


def test_another_k_is_refused(sentinel: Sentinel) -> None:
    other = [replace(one, trace=replace(one.trace, top_k=5)) for one in made_slice("a", 0.5, 5, seed=0)]
    with pytest.raises(InvalidInput, match="over the top 5, the sentinel was fitted on the top 20"):
        estimate_slices(sentinel, other)


def estimate_of(estimate: float, accuracy: float | None) -> SliceEstimate:
    return SliceEstimate(
        name="s", count=100, estimate=estimate, low=estimate - 0.1, high=estimate + 0.1, outside=0.0, drift=0.0, drifted="mean",
        length_only=0.5, atc=0.5, accuracy=accuracy, mean_entropy=0.1, mean_nll_sum=1.0,
    )  # fmt: skip


def test_affine_recalibration() -> None:
    """Two slices give factor and offset, one the offset alone."""
    affine = Affine.fit([estimate_of(0.4, 0.5), estimate_of(0.8, 0.7), estimate_of(0.1, None)])
    assert (affine.factor, affine.offset) == pytest.approx((0.5, 0.3))
    moved = affine.apply(estimate_of(0.6, None))
    assert (moved.estimate, moved.low, moved.high) == pytest.approx((0.6, 0.55, 0.65))
    alone = Affine.fit([estimate_of(0.4, 0.6)])
    assert (alone.factor, alone.offset) == pytest.approx((1, 0.2))
    assert alone.apply(estimate_of(0.95, None)).estimate == 1
    with pytest.raises(InvalidInput, match="needs a slice in which every response has a label"):
        Affine.fit([estimate_of(0.4, None)])
    with pytest.raises(InvalidInput, match="contradict the order"):
        Affine.fit([estimate_of(0.4, 0.9), estimate_of(0.8, 0.1)])


def test_intervals_are_as_wide_as_counting_labels() -> None:
    """About 1.96 standard deviations of a binomial share, for sure and for unsure answers."""
    for p in (np.full(400, 0.5), np.repeat([0.0, 1.0], 200)):
        low, high = interval(p)
        assert (low, high) == pytest.approx((0.451, 0.549), abs=0.01)
    assert interval(np.ones(50)) == (1, 1)


def test_atc_has_the_accuracy_of_its_training() -> None:
    scores = np.random.default_rng(0).normal(size=50)
    correct = np.arange(50) < 20
    assert (scores >= atc_threshold(scores, correct)).sum() == 20


# --- A file that grows ------------------------------------------------------------------------------------------------


def test_windows_of_a_growing_file(sentinel: Sentinel, tmp_path: Path) -> None:
    """Lines come in pieces, slices mixed, some are no traces; a file that starts anew is read anew."""
    path, said = tmp_path / "traces.jsonl", []
    path.write_text("")
    watch = Watch(sentinel, path, window=20, warn=said.append)
    assert watch.poll() == []
    a, b = (made_slice(name, accuracy, 50, seed=4, labelled=False) for name, accuracy in (("a", 0.9), ("b", 0.3)))
    text = lines([one for pair in zip(a, b, strict=True) for one in pair])
    pieces = [text[start : start + 3001] for start in range(0, len(text), 3001)]
    windows = []
    for piece in pieces:
        with open(path, "a") as file:
            file.write(piece)
        windows += watch.poll()
    assert [(w.estimate.name, w.number) for w in windows] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert watch.num_responses == {"a": 50, "b": 50}
    (expected,) = estimate_slices(sentinel, a[20:40])
    assert windows[2].estimate == expected
    assert [one.name for one in watch.latest()] == ["a", "b"]
    with open(path, "a") as file:
        file.write('{"trace": 3}\nno json\n' + lines(a[:1]).replace('"top_k": 20', '"top_k": 5'))
    assert watch.poll() == []
    assert watch.num_refused == len(said) == 3
    assert "line 101" in said[0]
    path.write_text(lines(a[:19]))
    assert watch.poll() == [], "what waited has gone with the file that it was in"
    with open(path, "a") as file:
        file.write(lines(a[19:20]).rstrip("\n"))
    assert watch.poll() == []
    assert [(w.estimate.name, w.number) for w in watch.poll(final=True)] == [("a", 2)]
    path.unlink()
    with pytest.raises(InvalidInput, match="cannot be read"):
        watch.poll()


def test_a_file_with_a_byte_order_mark(sentinel: Sentinel, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(lines(made_slice("a", 0.6, 20, seed=4)), encoding="utf-8-sig")
    watch = Watch(sentinel, path, window=20)
    assert len(watch.poll()) == 1
    assert watch.num_refused == 0


def test_numbers_for_prometheus(sentinel: Sentinel, tmp_path: Path) -> None:
    """As Prometheus reads them, over HTTP."""
    import socket

    path = tmp_path / "traces.jsonl"
    path.write_text(lines(made_slice("a", 0.6, 40, seed=4)) + "{}\n")
    watch = Watch(sentinel, path, window=40)
    watch.poll()
    metrics = WatchMetrics(watch)
    metrics.update()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics.serve(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    (one,) = watch.latest()
    assert f'shoal_monitor_estimate{{slice="a"}} {one.estimate}' in text
    assert 'shoal_monitor_responses{slice="a"} 40.0' in text
    assert 'shoal_monitor_alarm{slice="a"} 0.0' in text
    assert "shoal_monitor_lines_refused 1.0" in text
    with pytest.raises(InvalidInput, match="cannot be listened on"):
        metrics.serve(port)


def test_the_page(sentinel: Sentinel, tmp_path: Path) -> None:
    """Before the first window, after it, and with names that are markup."""
    path, page = tmp_path / "traces.jsonl", tmp_path / "slices.html"
    path.write_text("")
    watch = Watch(sentinel, path, window=20)
    assert "No window is full yet: 0 responses" in render(watch, refresh_s=5)
    name = "<script>alert(1)</script>"
    path.write_text(lines(made_slice(name, 0.6, 60, seed=4) + made_slice("far", 0.6, 20, seed=4, scale=20)))
    watch.poll()
    write_dashboard(watch, page, refresh_s=5)
    html: Any = page.read_text()
    assert name not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count("<polyline") == 2
    assert "1 of 2 slices have drifted: far" in html
    assert "Label next: <b>far</b>" in html
