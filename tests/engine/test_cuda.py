"""The same code on a CUDA device: the CPU's tokens, and graphs that compute what the plain path computes."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from pathlib import Path

import pytest
import torch

from compared_runs import assert_same, engine_over, run
from compared_runs import random_jobs as greedy_jobs
from families import CONFIGS, save, tiny_model
from random_plans import random_plan, random_policy
from shoal import Engine, Sampling
from shoal.engine.intake import Plan
from shoal.models import graphs
from shoal.models.checkpoint import load_checkpoint
from shoal.models.decoder import Decoder
from shoal.models.graphs import GraphDecoder, StaticDecode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none")

BOUND = 1e-4
"""Of the logits' standard deviation: float32 with TF32 off, by other kernels in another order."""


def random_jobs(num_layers: int) -> list[tuple[list[int], Sampling, Plan]]:
    """Prompts of all lengths with plans and samplings of their own."""
    rng = random.Random("cuda")
    jobs: list[tuple[list[int], Sampling, Plan]] = []
    for number in range(40):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 17, 40, 90]))]
        sampling = Sampling(max_new_tokens=rng.choice([1, 5, 16]), ignore_eos=True, temperature=number % 3, seed=number)
        plan: Plan = random_policy(rng, num_layers)
        if number % 2:
            plan = random_plan(rng, num_layers, prompt_tokens=len(prompt), max_new_tokens=sampling.max_new_tokens)
        jobs.append((prompt, sampling, plan))
    return jobs


def graph_decoder(directory: Path) -> GraphDecoder:
    """What an engine on the device uses."""
    decoder = Engine.from_pretrained(directory, device="cuda", cache_gib=0.1).runner.decoder
    assert isinstance(decoder, GraphDecoder)
    return decoder


def plain_decoder(directory: Path) -> Decoder:
    """The same on the device, without graphs."""
    return Decoder(*load_checkpoint(directory, device="cuda"))


def static(decoder: GraphDecoder) -> StaticDecode:
    """Its graphs."""
    assert decoder._static is not None
    return decoder._static


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped queries and rotary positions."""
    return save(tiny_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_of_the_cpu(family: str, tmp_path: Path) -> None:
    """float32 with TF32 off, chunked prompts, a queue; and the same alone as in company."""
    directory = save(tiny_model(family), tmp_path)
    cpu = Engine.from_pretrained(directory, cache_gib=0.1)
    cuda = Engine.from_pretrained(directory, device="cuda", max_batch=7, max_pass_tokens=50, cache_gib=0.1)
    jobs = random_jobs(cpu.shape.num_layers)
    arguments = [list(column) for column in zip(*jobs, strict=True)]
    expected, got = cpu.generate(*arguments), cuda.generate(*arguments)
    same = sum(a.token_ids == b.token_ids for a, b in zip(expected, got, strict=True))
    assert same >= len(jobs) - 1, "at most one near-tie"
    assert [g.ledger for g in got] == [g.ledger for g in expected]
    assert cuda.runner.cache.blocks_in_use == 0
    alone = [cuda.generate(*job)[0].token_ids for job in jobs]
    assert sum(a == b.token_ids for a, b in zip(alone, got, strict=True)) >= len(jobs) - 1


@pytest.mark.parametrize("family", CONFIGS)
def test_graphs_compute_what_the_plain_path_does(family: str, tmp_path: Path) -> None:
    """Mixed plans at staggered clocks, among them passes whose rows share their layers; twice, the second time replayed only."""
    directory = save(tiny_model(family), tmp_path)
    decoder, plain = graph_decoder(directory), plain_decoder(directory)
    engine, jobs = engine_over(decoder), greedy_jobs(len(plain.layers))
    expected = run(engine_over(plain), jobs)
    assert_same(run(engine, jobs), expected, bound=BOUND, near_ties=1)
    graphs_before = static(decoder), dict(static(decoder)._passes), dict(static(decoder)._steps)
    assert graphs_before[1]
    assert graphs_before[2]
    assert_same(run(engine, jobs), expected, bound=BOUND, near_ties=1)
    assert (static(decoder), static(decoder)._passes, static(decoder)._steps) == graphs_before
    assert [layer.num_tokens_run for layer in decoder.layers] == [2 * layer.num_tokens_run for layer in plain.layers]


def test_one_clock_is_one_graph(directory: Path) -> None:
    """Dense rows that enter together: a graph for 64 positions and one for 128, and none of a layer."""
    decoder = graph_decoder(directory)
    jobs = [([token] * 50, Sampling(max_new_tokens=40, ignore_eos=True), None) for token in range(5)]
    engine = Engine(decoder, max_batch=8, cache_gib=0.1)
    assert_same(run(engine, jobs), run(Engine(plain_decoder(directory), cache_gib=0.1), jobs), bound=BOUND, near_ties=1)
    assert len(static(decoder)._passes) == 2
    assert not static(decoder)._steps


def test_the_cache_grows_under_graphs(directory: Path) -> None:
    """They are recorded anew, and the old cache's memory is not kept; an idle cache shrinks, and the same holds."""
    decoder, plain = graph_decoder(directory), plain_decoder(directory)
    engine, reference = engine_over(decoder), engine_over(plain)
    for length in (10, 150, 10, 150):
        jobs = [([token] * length, Sampling(max_new_tokens=40, ignore_eos=True), None) for token in (1, 2, 3)]
        before = weakref.ref(engine.runner.cache.keys[0])
        assert_same(run(engine, jobs), run(reference, jobs), bound=BOUND, near_ties=1)
        gc.collect()
        assert before() is None, "each length needs another capacity"
        assert static(decoder).is_over(engine.runner.cache)


def test_a_request_that_outgrows_the_cache_joins_others(directory: Path) -> None:
    """Rows decode, then a longer request enters and the tensors are replaced under them."""

    def tokens(decoder: Decoder) -> list[tuple[int, ...]]:
        engine = engine_over(decoder)
        for token in (1, 2):
            engine.add([token] * 8, Sampling(max_new_tokens=30, ignore_eos=True), index=token)
        chunks = [chunk for _ in range(10) for chunk in engine.step()]
        engine.add([3] * 150, Sampling(max_new_tokens=30, ignore_eos=True), index=3)
        while engine.has_work:
            chunks += engine.step()
        return [chunk.generation.token_ids for chunk in chunks if chunk.generation is not None]

    assert tokens(graph_decoder(directory)) == tokens(plain_decoder(directory))


@pytest.mark.parametrize(("passes", "steps"), [(0, 2048), (1, 3), (0, 0)])
def test_more_shapes_than_graphs(passes: int, steps: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no graph is left for is launched layer by layer, or kernel by kernel."""
    monkeypatch.setattr(graphs, "MAX_PASS_GRAPHS", passes)
    monkeypatch.setattr(graphs, "MAX_STEP_GRAPHS", steps)
    decoder, jobs = graph_decoder(directory), greedy_jobs(4)
    assert_same(
        run(engine_over(decoder), jobs), run(engine_over(plain_decoder(directory)), jobs), bound=BOUND, near_ties=1
    )
    assert len(static(decoder)._passes) <= passes
    assert len(static(decoder)._steps) <= steps


def test_another_thread_uses_the_device_meanwhile(directory: Path) -> None:
    """What it allocates and launches while graphs are recorded disturbs neither."""
    stop, errors = threading.Event(), []

    def work() -> None:
        try:
            while not stop.is_set():
                x = torch.randn(int(torch.randint(1, 500, ())), 64, device="cuda")
                assert torch.isfinite(x @ x.T).all()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        jobs = greedy_jobs(4)
        got = run(engine_over(graph_decoder(directory)), jobs)
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert_same(got, run(engine_over(plain_decoder(directory)), jobs), bound=BOUND, near_ties=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs(dtype: str, directory: Path) -> None:
    engine = Engine.from_pretrained(directory, dtype=dtype, device="cuda", max_batch=8, cache_gib=0.1)
    jobs = random_jobs(4)
    generations = engine.generate(*[list(column) for column in zip(*jobs, strict=True)])
    assert [len(g.token_ids) for g in generations] == [sampling.max_new_tokens for _, sampling, _ in jobs]
    assert all(g.error is None for g in generations)
