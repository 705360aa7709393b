"""Routers: what they read, that their plan is the one that runs, and that nobody else changes it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import reference
from shoal import DepthPlan, Engine, Sampling
from shoal.depth.dr_llm import HIDDEN, DrLLMRouter, router_logits
from shoal.depth.first import FirstRouter
from shoal.depth.layer_router import LayerRouter
from shoal.depth.plan import ALWAYS
from shoal.depth.routers import ROUTERS, load_router
from shoal.depth.shape import ModelShape
from shoal.errors import CheckpointError, InvalidPlan
from shoal.models.checkpoint import load_checkpoint
from shoal.models.decoder import Decoder
from shoal.models.executor import Executor
from shoal.models.graphs import GraphDecoder
from ways import WAYS, decoder_of


class Listening:
    """A router that keeps what it was given; all layers run, or those of `kept`."""

    def __init__(self, num_windows: int, kept: set[int] | None = None) -> None:
        self.num_windows, self.kept = num_windows, kept
        self.heard: list[NDArray[np.float32]] = []

    def plan(self, num_layers: int, *, prompt_tokens: int = 0, max_new_tokens: int = 64) -> DepthPlan:
        return DepthPlan((ALWAYS,) * num_layers)

    def check(self, shape: ModelShape) -> None:
        pass

    def route(self, states: NDArray[np.float32]) -> DepthPlan:
        self.heard.append(states.copy())
        layers = range(len(states) - 1)
        return DepthPlan(tuple(ALWAYS if self.kept is None or layer in self.kept else 0 for layer in layers))


def random_router(kind: type[LayerRouter], shape: ModelShape, *, bias: float | None = None) -> LayerRouter:
    """Random weights; with `bias`, none, and every score is the bias."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(size, generator=generator) for name, size in kind.sizes(shape).items()}
    if bias is not None:
        tensors = {name: torch.zeros(size) for name, size in kind.sizes(shape).items()}
        if kind is FirstRouter:
            tensors["bias"] += bias
        else:
            tensors["down_bias"][:, 1] += bias
    return kind(shape=shape, tensors=tensors)


@pytest.fixture(params=WAYS)
def decoder_by(request: pytest.FixtureRequest, checkpoint: Path) -> Executor:
    """The decoder, each of the ways to run it."""
    return decoder_of(request.param, checkpoint)


def engine_over(decoder: Executor, **sizes: int) -> Engine:
    return Engine(decoder, cache_gib=0.1, **{"max_batch": 4, **sizes})


PROMPTS = [[5, 9, 200, 31, 7], [77], [1 + i % 250 for i in range(41)], [3, 4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("num_windows", [1, 3, 8])
def test_it_reads_the_mean_states_of_windows(num_windows: int, decoder_by: Executor, model: PreTrainedModel) -> None:
    """As transformers has them: before every layer and after the last, with prompts in chunks and other requests beside."""
    routers = [Listening(num_windows) for _ in PROMPTS]
    engine_over(decoder_by, max_pass_tokens=7).generate(PROMPTS, Sampling(max_new_tokens=6), routers)
    for prompt, router in zip(PROMPTS, routers, strict=True):
        (heard,) = router.heard
        windows = min(num_windows, len(prompt))
        expected = transformers_states(model, prompt)
        assert heard.shape == (len(expected), windows, expected.shape[-1])
        for window in range(windows):
            inside = [t for t in range(len(prompt)) if t * windows // len(prompt) == window]
            np.testing.assert_allclose(heard[:, window], expected[:, inside].mean(axis=1), rtol=1e-3, atol=1e-4)


def transformers_states(model: PreTrainedModel, prompt: list[int]) -> NDArray[np.float32]:
    """[L + 1, P, d] before each layer, and after the last without the final norm."""
    seen = []
    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, __, output: seen.append(output)))
    try:
        with torch.inference_mode():
            model(torch.tensor([prompt]))
    finally:
        for hook in hooks:
            hook.remove()
    states: NDArray[np.float32] = torch.cat([s[0] if isinstance(s, tuple) else s for s in seen]).float().numpy()
    return states


def test_the_plan_that_it_makes_is_the_one_that_runs(decoder_by: Executor, model: PreTrainedModel) -> None:
    """Tokens of the reference under the routed plan, in a batch of rows that run other layers; the ledger counts that plan."""
    kept = [{0, 2}, {1, 3, 5}, {5}, {0, 1, 2, 3, 4, 5}]
    routers = [Listening(2, layers) for layers in kept]
    generations = engine_over(decoder_by).generate(PROMPTS, Sampling(max_new_tokens=9, ignore_eos=True), routers)
    for prompt, layers, generation in zip(PROMPTS, kept, generations, strict=True):
        assert {layer for layer, cutoff in enumerate(generation.plan.cutoffs) if cutoff == ALWAYS} == layers
        schedule = reference.from_cutoffs([math.inf if layer in layers else 0 for layer in range(6)])
        decoded = reference.decode(model, prompt, schedule, max_new_tokens=9)
        assert list(generation.token_ids) == decoded.token_ids
        shape = decoder_by.config.shape
        cost = generation.plan.cost(shape, prompt_tokens=len(prompt), new_tokens=9)
        assert generation.ledger.decode_layer_tokens == cost.decode_layer_tokens
        assert generation.ledger.prompt_layer_tokens == cost.prompt_layer_tokens
        assert generation.ledger.mean_layers == len(layers)


@pytest.mark.parametrize("kind", ROUTERS.values(), ids=ROUTERS)
def test_forced_open_it_is_dense_and_forced_shut_it_is_the_kept_layer(
    kind: type[LayerRouter], decoder_by: Executor
) -> None:
    shape, engine = decoder_by.config.shape, engine_over(decoder_by)
    sampling = Sampling(max_new_tokens=8, ignore_eos=True)
    dense = engine.generate(PROMPTS, sampling)
    opened = engine.generate(PROMPTS, sampling, random_router(kind, shape, bias=1))
    assert [g.token_ids for g in opened] == [g.token_ids for g in dense]
    assert [g.ledger for g in opened] == [g.ledger for g in dense]
    shut = engine.generate(PROMPTS, sampling, random_router(kind, shape, bias=-1))
    alone = engine.generate(PROMPTS, sampling, DepthPlan((ALWAYS, *[0] * (shape.num_layers - 1))))
    assert [g.token_ids for g in shut] == [g.token_ids for g in alone]


@pytest.mark.parametrize("kind", ROUTERS.values(), ids=ROUTERS)
def test_company_and_chunks_change_nothing(kind: type[LayerRouter], decoder_by: Executor) -> None:
    """Not a bit of what is read; plans differ from prompt to prompt, so that something is decided."""
    router = random_router(kind, decoder_by.config.shape)
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(20)]
    sampling = Sampling(max_new_tokens=5, ignore_eos=True)
    together = engine_over(decoder_by, max_pass_tokens=9).generate(prompts, sampling, router)
    alone = [engine_over(decoder_by).generate([prompt], sampling, router)[0] for prompt in prompts]
    assert [g.plan for g in together] == [g.plan for g in alone]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert len({g.plan for g in together}) > 1


def test_graphs_leave_prompts_of_one_token_to_the_plain_path(checkpoint: Path) -> None:
    """Such a pass looks like a decode pass, but a router reads its states."""
    decoder = GraphDecoder(*load_checkpoint(checkpoint))
    router, plain = Listening(1), Listening(1)
    engine_over(decoder).generate([77], Sampling(max_new_tokens=3), router)
    engine_over(Decoder(*load_checkpoint(checkpoint))).generate([77], Sampling(max_new_tokens=3), plain)
    np.testing.assert_allclose(router.heard[0], plain.heard[0], rtol=1e-5)


def test_reserved_as_dense_until_the_prompt_has_been_read(decoder_by: Executor) -> None:
    """The books hold: a cache that fits one dense request at a time admits the next only when the routed one leaves room."""
    engine = engine_over(decoder_by, max_batch=3)
    engine.runner.cache.budget_blocks = 6 * 3
    prompts = [[1 + i] * 17 for i in range(3)]  # 2 blocks in each of 6 layers, 3 from position 33 on
    generations = engine.generate(prompts, Sampling(max_new_tokens=25, ignore_eos=True), Listening(1, {0, 5}))
    assert [g.ledger.mean_layers for g in generations] == [2, 2, 2]
    assert engine.stats.peak_cache_bytes <= 18 * engine.runner.cache.bytes_per_block
    assert engine.runner.cache.blocks_in_use == 0


def test_a_router_that_raises_ends_its_request_alone(decoder_by: Executor) -> None:
    class Broken(Listening):
        def route(self, states: NDArray[np.float32]) -> DepthPlan:
            raise ZeroDivisionError("no")

    class TooShort(Listening):
        def route(self, states: NDArray[np.float32]) -> DepthPlan:
            return DepthPlan((ALWAYS,))

    engine = engine_over(decoder_by)
    plans = [Broken(1), TooShort(1), Listening(1), Listening(1)]
    broken, short, *fine = engine.generate(PROMPTS, Sampling(max_new_tokens=3, ignore_eos=True), plans)
    assert broken.finish_reason == short.finish_reason == "error"
    assert "the router raised ZeroDivisionError" in (broken.error or "")
    assert "for 6 layers" in (short.error or "")
    assert all(len(g.token_ids) == 3 for g in fine)


@pytest.mark.parametrize("kind", ROUTERS.values(), ids=ROUTERS)
def test_saved_and_loaded(kind: type[LayerRouter], decoder: Executor, tmp_path: Path) -> None:
    router = random_router(kind, decoder.config.shape)
    router.save(tmp_path / "router")
    loaded = load_router(tmp_path / "router")
    states = np.random.default_rng(0).standard_normal((7, 4, router.shape.hidden_size)).astype(np.float32)
    assert loaded.route(states) == router.route(states)
    with pytest.raises(CheckpointError, match="holds no router"):
        load_router(tmp_path)


def test_a_router_of_another_model_is_refused(decoder: Executor) -> None:
    router = random_router(FirstRouter, replace(decoder.config.shape, num_layers=5))
    with pytest.raises(InvalidPlan, match="its num_layers is 5, here it is 6"):
        engine_over(decoder).generate(PROMPTS, plan=router)
    with pytest.raises(InvalidPlan, match="needs weight of shape"):
        FirstRouter(shape=decoder.config.shape, tensors={"bias": torch.zeros(6)})


def test_dr_llm_averages_logits_over_windows(decoder: Executor) -> None:
    """Against the two products written out, one layer and window at a time."""
    shape = decoder.config.shape
    router = random_router(DrLLMRouter, shape)
    states = torch.randn(shape.num_layers, 3, shape.hidden_size)
    got = router_logits(router.tensors, states)
    for layer in range(shape.num_layers):
        logits = []
        for window in states[layer]:
            window = window / window.square().mean().sqrt()
            hidden = torch.nn.functional.gelu(router.tensors["up"][layer] @ window + router.tensors["up_bias"][layer])
            assert hidden.shape == (HIDDEN,)
            logits.append(router.tensors["down"][layer] @ hidden + router.tensors["down_bias"][layer])
        torch.testing.assert_close(got[layer], torch.stack(logits).mean(dim=0))
