"""The curve of Entropy Adaptive Decoding: its ends are the two models, and each point is what its threshold makes both write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from families import edit_json, save, tiny_model
from shoal import Engine
from shoal.baselines.entropy_adaptive import AdaptiveConfig, adaptive_decode
from shoal.errors import InvalidInput
from shoal.evaluate.adaptive_curve import ADAPTIVE_SHARES, adaptive_curve
from shoal.evaluate.bootstrap import Statistics
from shoal.evaluate.cascade import answers
from shoal.evaluate.metrics import METRICS
from shoal.evaluate.tasks import Task, TaskInput

TASK = Task(name="made", file="", read=lambda path: [], metrics=("chrf",), max_new_tokens=20)
INPUTS = [
    TaskInput(prompt=text, references=("by the river",), completion="")
    for text in ("a pub", "an inn", "The Mill is a", "food[French]")
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small model and a large one."""
    return [
        save(tiny_model("llama", num_hidden_layers=layers, seed=layers), tmp_path_factory.mktemp("model"))
        for layers in (2, 5)
    ]


def test_curve(paths: list[Path]) -> None:
    small, large = (Engine.from_pretrained(path, cache_gib=0.1) for path in paths)
    told: list[tuple[int, int]] = []
    points = adaptive_curve(
        small, large, TASK, INPUTS, "chrf", report=lambda what, done, total: told.append((done, total))
    )
    assert told == [(done, 24) for done in range(1, 25)]
    assert tuple(point.share for point in points) == ADAPTIVE_SHARES
    alone = answers(small, TASK, INPUTS, "chrf")
    assert points[0].by_large == 0
    assert points[0].flops == alone.flops.mean()
    assert points[0].score.value == pytest.approx(Statistics(alone.counts, METRICS["chrf"].formula).score().value)
    thresholds = [point.threshold_bits for point in points]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[-1] < 0
    for point in points:
        config = AdaptiveConfig(threshold_bits=point.threshold_bits, max_new_tokens=20)
        texts = [
            adaptive_decode(small.runner.decoder, large.runner.decoder, small.tokenizer(one.prompt).input_ids, config)
            for one in INPUTS
        ]
        assert point.by_large == np.mean(np.concatenate([text.by_large for text in texts]))
        assert point.flops == np.mean([text.flops for text in texts])
    assert points[-1].by_large == 1 - len(INPUTS) / sum(len(text.token_ids) for text in texts)
    assert all(0 < point.by_large < 1 for point in points[1:])


def test_two_tokenizers(paths: list[Path], tmp_path: Path) -> None:
    small = Engine.from_pretrained(paths[0], cache_gib=0.1)
    other = save(tiny_model("llama"), tmp_path)
    edit_json(other / "tokenizer_config.json", eos_token="<end>")
    with pytest.raises(InvalidInput, match="must share a tokenizer"):
        adaptive_curve(small, Engine.from_pretrained(other, cache_gib=0.1), TASK, INPUTS, "chrf")
