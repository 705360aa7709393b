"""The search over sets of layers: it climbs to what is planted, asks nothing twice and keeps to its trials."""

from __future__ import annotations

import random
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.draft.layer_sets import Layers, best_layers, neighbours


def hidden(num_layers: int, seed: int) -> dict[int, float]:
    """What each layer is worth."""
    rng = random.Random(seed)
    return {layer: rng.uniform(-1, 1) for layer in range(num_layers)}


@pytest.mark.parametrize("counts", [[6], range(1, 24)])
def test_a_planted_optimum_is_found(counts: list[int]) -> None:
    """24 layers whose values add up: 134,596 sets of six, 16 million of any size, 400 trials."""
    for seed in range(5):
        value = hidden(24, seed)
        asked: list[Layers] = []

        def worth(layers: Layers, value: dict[int, float] = value, asked: list[Layers] = asked) -> float:
            asked.append(layers)
            return sum(value[layer] for layer in layers)

        found = best_layers(worth, 24, counts=counts, starts=[tuple(range(6))], trials=400, seed=seed)
        ranked = sorted(value, key=lambda layer: -value[layer])
        wanted = ranked[:6] if len(counts) == 1 else [layer for layer in ranked if value[layer] > 0]
        assert found == tuple(sorted(wanted))
        assert len(asked) == len(set(asked)) == 400
        assert asked[0] == (0, 1, 2, 3, 4, 5)
        assert all(len(layers) in counts and list(layers) == sorted(set(layers)) for layers in asked)


def test_a_small_space_is_tried_whole() -> None:
    asked: list[Layers] = []

    def worth(layers: Layers) -> float:
        asked.append(layers)
        return -abs(sum(layers) - 9)

    assert best_layers(worth, 6, counts=[2, 3], starts=[], trials=comb(6, 2) + comb(6, 3), seed=0) == (4, 5)
    assert len(set(asked)) == len(asked) == 35


@given(st.integers(2, 9), st.integers(1, 60), st.integers(0, 99), st.data())
def test_any_search_ends(num_layers: int, trials: int, seed: int, data: st.DataObject) -> None:
    """Whatever sets are worth, ties and all: as many trials as were granted or as there are sets, the best of them, and the same
    again."""
    counts = sorted(data.draw(st.sets(st.integers(1, num_layers - 1), min_size=1)))
    runs = []
    for _ in range(2):
        asked: dict[Layers, float] = {}

        def worth(layers: Layers, asked: dict[Layers, float] = asked) -> float:
            assert layers not in asked
            asked[layers] = float(hash((layers, seed)) % 3)
            return asked[layers]

        found = best_layers(
            worth, num_layers, counts=counts, starts=[tuple(range(counts[0]))], trials=trials, seed=seed
        )
        assert len(asked) == min(trials, sum(comb(num_layers, count) for count in counts))
        assert asked[found] == max(asked.values())
        runs.append((found, list(asked)))
    assert runs[0] == runs[1]


@given(st.integers(2, 8), st.data())
def test_neighbours(num_layers: int, data: st.DataObject) -> None:
    """All sets of the allowed sizes that one exchange, one addition or one removal leads to, each once."""
    layers = data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers - 1))
    counts = [len(layers), *data.draw(st.sets(st.integers(1, num_layers - 1)))]
    around = list(neighbours(tuple(sorted(layers)), num_layers, counts))
    every = [{layer for layer in range(num_layers) if bits >> layer & 1} for bits in range(1, 2**num_layers)]
    expected = [
        other
        for other in every
        if len(other) in counts and other != layers and len(layers - other) <= 1 and len(other - layers) <= 1
    ]
    assert sorted(around) == sorted(tuple(sorted(other)) for other in expected)
