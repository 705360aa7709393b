"""Decode passes in static shapes compute what the plain decoder computes; `engine/test_cuda.py` tests their recording."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compared_runs import NUM_SLOTS, assert_same, engine_over, random_jobs, run
from families import CONFIGS, VARIANTS, save, tiny_model
from shoal import Sampling
from shoal.depth.shape import ModelShape
from shoal.models import graphs
from shoal.models.checkpoint import load_checkpoint
from shoal.models.decoder import Decoder
from shoal.models.graphs import DecodeRows, GraphDecoder, window_around


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_decoders_logits(variant: str, tmp_path: Path) -> None:
    family, options = VARIANTS[variant]
    directory = save(tiny_model(family, **options), tmp_path, tokenizer=False)
    plain, static = Decoder(*load_checkpoint(directory)), GraphDecoder(*load_checkpoint(directory))
    jobs = random_jobs(len(plain.layers))
    assert_same(run(engine_over(static), jobs), run(engine_over(plain), jobs))
    assert static._static is not None
    assert static._static._passes, "some passes have all rows in the same layers"
    assert static._static._steps, "some have not"
    assert [layer.num_tokens_run for layer in static.layers] == [layer.num_tokens_run for layer in plain.layers]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped queries and rotary positions."""
    return save(tiny_model("llama"), tmp_path_factory.mktemp("llama"), tokenizer=False)


@pytest.mark.parametrize(("passes", "steps"), [(0, 2048), (1, 3), (0, 0)])
def test_more_shapes_than_graphs(passes: int, steps: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no graph is left for runs layer by layer, or kernel by kernel, and computes the same."""
    monkeypatch.setattr(graphs, "MAX_PASS_GRAPHS", passes)
    monkeypatch.setattr(graphs, "MAX_STEP_GRAPHS", steps)
    static = GraphDecoder(*load_checkpoint(directory))
    jobs = random_jobs(4)
    assert_same(run(engine_over(static), jobs), run(engine_over(Decoder(*load_checkpoint(directory))), jobs))
    assert static._static is not None
    assert len(static._static._passes) <= passes
    assert len(static._static._steps) <= steps


def test_new_cache_tensors_are_noticed(directory: Path) -> None:
    """Longer requests make the cache grow, an idle one shrinks, and two engines share a decoder: no step is kept from before."""
    static, plain = GraphDecoder(*load_checkpoint(directory)), Decoder(*load_checkpoint(directory))
    first, second, reference = engine_over(static), engine_over(static), engine_over(plain)
    seen = set()
    for length in (10, 150, 60, 10):
        jobs = [([token] * length, Sampling(max_new_tokens=40), None) for token in (1, 2, 3)]
        expected = run(reference, jobs)
        for engine in (first, second):
            assert_same(run(engine, jobs), expected)
            seen.add(id(static._static))
            assert static._static is not None
            assert static._static.is_over(engine.runner.cache)
    assert len(seen) > 1


def test_low_precision(directory: Path) -> None:
    """bfloat16: logits within its 8 bits of the plain decoder's."""
    jobs = random_jobs(4, count=6)
    expected = run(engine_over(Decoder(*load_checkpoint(directory, dtype="bfloat16"))), jobs)
    got = run(engine_over(GraphDecoder(*load_checkpoint(directory, dtype="bfloat16"))), jobs)
    assert_same(got, expected, bound=0.15, near_ties=len(jobs))


@dataclass
class Caches:
    """Random keys and values: what a layer must not touch is seen to be as it was."""

    shape: ModelShape
    capacity: int = 64
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (NUM_SLOTS + 1, self.shape.num_kv_heads, self.capacity, self.shape.head_dim)
        tensors = [torch.randn(size, generator=generator) for _ in range(2 * self.shape.num_layers)]
        self.keys, self.values = tensors[::2], tensors[1::2]


def rows_of(served: list[list[int] | None], positions: dict[int, int], *, token: int = 7) -> DecodeRows:
    """A row in each slot of `positions`, with tokens `token`, `token + 1`, ...; `served`: slots per layer."""
    slots = np.array(list(positions))
    return DecodeRows(
        token_ids=token + np.arange(len(slots)),
        slots=slots,
        positions=np.array(list(positions.values())),
        layers=tuple(None if one is None else np.array(one) for one in served),
        emitting=slots,
    )


@pytest.mark.parametrize(
    "served", [[[5, 2]] * 4, [[5, 2], None, [2], [5]], [[2], [2], [5], [5]], [None, None, None, [5, 2]]]
)
def test_only_what_is_served_is_written(served: list[list[int] | None], directory: Path) -> None:
    """Rows 5 and 2 of seven: each layer writes their positions where it serves them, and nothing else but the scratch slot."""
    static = GraphDecoder(*load_checkpoint(directory))
    cache, before = Caches(static.config.shape), Caches(static.config.shape)
    positions = {5: 63, 2: 9}
    logits = static.decode(rows_of(served, positions), cache)
    assert logits.shape == (2, static.config.shape.vocab_size)
    for layer, slots in enumerate(served):
        for now, then in ((cache.keys[layer], before.keys[layer]), (cache.values[layer], before.values[layer])):
            written = (now != then)[:NUM_SLOTS].any(dim=3).any(dim=1).nonzero().tolist()
            assert sorted(written) == sorted([slot, positions[slot]] for slot in slots or [])

    alone = rows_of([[2] if slots and 2 in slots else None for slots in served], {2: 9}, token=8)
    torch.testing.assert_close(static.decode(alone, before)[0], logits[1], rtol=0, atol=1e-5)


def test_steps_are_told_apart(directory: Path) -> None:
    """By slots, layers and positions: whatever was recorded before, a pass computes what it computes on a fresh decoder."""
    static, fresh = (GraphDecoder(*load_checkpoint(directory)) for _ in range(2))
    cache = Caches(static.config.shape, capacity=256)
    passes = [
        (all_or_some, {slot: position, slot + 1: 3})
        for position in (20, 200)
        for slot in (0, 2, 5, 1)
        for all_or_some in ([0, 1, 2, 3], [0, 3], [1, 2], [3])
    ]
    for shared in (True, False):
        for layers, positions in passes:
            both, first = list(positions), list(positions)[:1]
            served = [
                (both if shared or layer == layers[-1] else first) if layer in layers else None for layer in range(4)
            ]
            fresh._static = None
            expected = fresh.decode(rows_of(served, positions), copy.deepcopy(cache))
            torch.testing.assert_close(static.decode(rows_of(served, positions), cache), expected, rtol=0, atol=1e-5)


def test_returned_logits_are_kept(directory: Path) -> None:
    """The next pass overwrites the buffers, not what was handed out."""
    static = GraphDecoder(*load_checkpoint(directory))
    cache = Caches(static.config.shape)
    both = [[0, 1]] * 4
    first = static.decode(rows_of(both, {0: 3, 1: 4}, token=3), cache)
    kept = first.clone()
    assert not torch.equal(static.decode(rows_of(both, {0: 3, 1: 4}, token=9), cache), first)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("num_slots", [1, 7, 8])
def test_windows(num_slots: int) -> None:
    """They hold their slots and no more than twice what the slots' own block needs, and there are few of them."""
    windows = set()
    for first in range(num_slots):
        for last in range(first, num_slots):
            start, stop = window_around(np.array([last, first]), num_slots)
            assert 0 <= start <= first <= last < stop <= num_slots
            windows.add((start, stop))
        assert window_around(np.array([first]), num_slots) == (first, first + 1)
    assert len(windows) < 2 * num_slots
    assert window_around(np.arange(num_slots), num_slots) == (0, num_slots)


@pytest.mark.parametrize("family", CONFIGS)
def test_several_tokens_per_row_run_plainly(family: str, tmp_path: Path) -> None:
    """A prompt alone never meets a recorded step."""
    static = GraphDecoder(*load_checkpoint(save(tiny_model(family), tmp_path, tokenizer=False)))
    engine_over(static).generate([[1, 2, 3], [4, 5]], Sampling(max_new_tokens=1))
    assert static._static is None
