"""What the kernel promises: a token's logits depend on nothing but its own row, to the last bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compared_runs import engine_over, random_jobs, run
from families import save, tiny_model
from random_trees import random_tree
from shoal.depth.shape import ModelShape
from shoal.engine.batch import Rows, build_pass
from shoal.engine.trees import TreeTokens
from shoal.models.executor import Executor
from shoal.models.passes import Pass
from ways import decoder_of, needs_kernel

pytestmark = needs_kernel
MOST_ROWS = 40


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt_neox", "opt"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gated and not, with norms of heads, with parallel residuals, with learned positions."""
    return save(tiny_model(request.param), tmp_path_factory.mktemp(request.param), tokenizer=False)


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def decoder(request: pytest.FixtureRequest, directory: Path) -> Executor:
    """The kernel's decoder in each kind of weight."""
    return decoder_of("native", directory, request.param)


@dataclass
class Caches:
    """Random keys and values."""

    shape: ModelShape
    dtype: torch.dtype
    capacity: int
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (MOST_ROWS + 1, self.shape.num_kv_heads, self.capacity, self.shape.head_dim)
        tensors = [torch.randn(size, generator=generator).to(self.dtype) for _ in range(2 * self.shape.num_layers)]
        self.keys, self.values = tensors[::2], tensors[1::2]


def decode_pass(slots: list[int], shape: ModelShape) -> Pass:
    """One token in each slot; a slot's number says which token, where, and which layers serve it."""
    served = np.array([[(slot >> layer) % 3 > 0 for layer in range(shape.num_layers)] for slot in slots]).astype(int)
    rows = Rows(
        slots=np.array(slots), starts=np.array([7 * slot % 64 for slot in slots]), num_tokens=np.ones_like(slots), served=served
    )  # fmt: skip
    return build_pass(rows, [11 * slot % 256 for slot in slots], np.ones(len(slots), dtype=np.int64))


def test_any_number_of_rows(decoder: Executor) -> None:
    """1 to 40 rows in any order, of which each layer serves some: each row's logits are those that it has alone."""
    shape, rng = decoder.config.shape, random.Random("rows")
    caches = Caches(shape, decoder.dtype, 64)
    alone = torch.cat([decoder(decode_pass([slot], shape), caches).clone() for slot in range(MOST_ROWS)])
    for count in range(1, MOST_ROWS + 1):
        slots = rng.sample(range(MOST_ROWS), count)
        assert torch.equal(decoder(decode_pass(slots, shape), caches), alone[slots])


def test_any_chunks_of_a_prompt(decoder: Executor) -> None:
    """230 tokens, beyond the rows that a thread takes at once: logits and cache of the whole prompt, however it is cut."""
    shape, rng = decoder.config.shape, random.Random("chunks")
    tokens = [rng.randrange(256) for _ in range(230)]

    def read(cuts: list[int]) -> tuple[Tensor, Caches]:
        caches, logits = Caches(shape, decoder.dtype, 256), []
        for start, end in pairwise(cuts):
            count = np.array([end - start])
            served = np.repeat(count[None], shape.num_layers, axis=1)
            rows = Rows(slots=np.array([3]), starts=np.array([start]), num_tokens=count, served=served)
            one = build_pass(rows, tokens[start:end], np.array([1]))
            logits.append(decoder(replace(one, logit_tokens=np.arange(end - start)), caches).clone())
        return torch.cat(logits), caches

    logits, caches = read([0, 230])
    for number in (1, 2, 5, 30):
        cut_logits, cut_caches = read([0, *sorted(rng.sample(range(1, 230), number)), 230])
        assert torch.equal(cut_logits, logits)
        for whole, cut in zip(caches.keys + caches.values, cut_caches.keys + cut_caches.values, strict=True):
            assert torch.equal(whole, cut)


def test_paths_of_a_tree(decoder: Executor) -> None:
    """Random trees after 37 cached positions, whole or a depth at a time: logits, keys and values along each path are those of the
    path as a chain."""
    shape, rng = decoder.config.shape, random.Random("trees")
    start = 37

    def run(token_ids: list[int], first: int, caches: Caches, parents: list[int] | None = None) -> Tensor:
        """Logits of a row's tokens from number `first` on."""
        count = np.array([len(token_ids)])
        served = np.repeat(count[None], shape.num_layers, axis=1)
        trees = {} if parents is None else {3: TreeTokens.of(start, parents, first)}
        trees = {
            slot: replace(tree, depths=tree.depths[: count[0]], lineages=tree.lineages[: count[0]])
            for slot, tree in trees.items()
        }
        rows = Rows(slots=np.array([3]), starts=np.array([start + first]), num_tokens=count, served=served, trees=trees)
        return decoder(build_pass(rows, token_ids, count), caches).clone()

    for size in (1, 2, 7, 32):
        tokens, parents = random_tree(rng, rng.choices(range(256), k=size), range(256))
        tokens = [17, *tokens]
        depths = TreeTokens.of(start, parents).depths
        whole, levels = Caches(shape, decoder.dtype, 128), Caches(shape, decoder.dtype, 128)
        logits = run(tokens, 0, whole, parents)
        cuts = [0, *(np.flatnonzero(np.diff(depths)) + 1).tolist(), size + 1]
        by_level = [run(tokens[first:end], first, levels, parents) for first, end in pairwise(cuts)]
        assert torch.equal(torch.cat(by_level), logits)
        for leaf in sorted({*range(1, size + 1)} - set(parents)):
            path = [leaf]
            while path[0]:
                path.insert(0, parents[path[0] - 1])
            chain = Caches(shape, decoder.dtype, 128)
            assert torch.equal(run([tokens[token] for token in path], 0, chain), logits[path])
            written = start + np.array(path)
            for ours, plain in zip(whole.keys + whole.values, chain.keys + chain.values, strict=True):
                assert torch.equal(ours[3, :, written], plain[3, :, start : start + len(path)])


def test_one_thread_or_two(decoder: Executor) -> None:
    """Requests of every kind through an engine, chunks and mixed plans among them."""
    jobs, threads = random_jobs(decoder.config.shape.num_layers), torch.get_num_threads()
    try:
        runs = []
        for number in (1, 2):
            torch.set_num_threads(number)
            runs.append(run(engine_over(decoder), jobs))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    one, two = runs
    assert one.generations == two.generations
    assert one.logits.keys() == two.logits.keys()
    assert all(torch.equal(one.logits[tokens], two.logits[tokens]) for tokens in one.logits)
