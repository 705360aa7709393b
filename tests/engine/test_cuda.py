"""The same code on a CUDA device: the CPU's tokens, requests of every kind in one batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from families import CONFIGS, save, tiny_model
from random_plans import random_plan, random_policy
from shoal import Engine, Sampling
from shoal.engine.intake import Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs(dtype: str, tmp_path: Path) -> None:
    directory = save(tiny_model("llama"), tmp_path)
    engine = Engine.from_pretrained(directory, dtype=dtype, device="cuda", max_batch=8, cache_gib=0.1)
    jobs = random_jobs(4)
    generations = engine.generate(*[list(column) for column in zip(*jobs, strict=True)])
    assert [len(g.token_ids) for g in generations] == [sampling.max_new_tokens for _, sampling, _ in jobs]
    assert all(g.error is None for g in generations)
