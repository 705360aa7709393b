"""Drafting in bfloat16 by PyTorch's products, whose sums may depend on how many tokens a pass brings: tokens change at ties only.

The same weights in float32 are the referee. How far bfloat16 is from it without drafting, E for logits and D for cumulative
distributions, is what rounding does to this model: no more than as many independent roundings explain. Two runs that err so much
can only part where

    greedy      the referee's logits of the two tokens are at most 2 E apart
    sampled     the noise falls within 2 D of where the referee's cumulative distribution goes from one token to the other

How often they part is printed (`-s`), beside how often another batch size makes them part. SHOAL_LOSSLESS_TOKENS: tokens per case.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compared_runs import Job
from families import CONFIGS, save, tiny_model
from near_ties import cumulative
from shoal import Dense, Engine, Sampling
from shoal.depth.early_termination import EarlyTermination
from shoal.draft import NGram, SelfDraft, Suffix
from shoal.engine.drafting import DraftStats
from shoal.engine.sampling import uniform_noise
from shoal.models.checkpoint import load_checkpoint
from shoal.models.decoder import Decoder
from ways import logits_along

NUM_TOKENS = int(os.environ.get("SHOAL_LOSSLESS_TOKENS", "150"))
NUM_LAYERS = 6
BATCH, OTHER_BATCH = 32, 8
ROUNDINGS_PER_LAYER = 13
"""On a token's way through a layer: norm, qkv, rotation, scores, softmax, weighted sum, out, residual, norm, up, activation, down,
residual; then the final norm and the head."""
DRAFTS = (
    NGram(match_tokens=1, tokens=5),
    Suffix(tokens=8),
    SelfDraft(plan=EarlyTermination(min_layers=5, max_layers=5), tokens=4),
    SelfDraft(plan=Dense(), tokens=3),
)


def random_jobs(seed: str, temperature: float) -> list[Job]:
    """NUM_TOKENS or more, of prompts that have something to copy."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    total = 0
    while total < NUM_TOKENS:
        prompt = ([rng.randrange(256) for _ in range(rng.choice([1, 3, 8]))] * 12)[: rng.choice([5, 17, 40])]
        count = rng.randint(8, 60)
        sampling = Sampling(max_new_tokens=count, ignore_eos=True, temperature=temperature, seed=rng.randrange(2**63))
        jobs.append((prompt, sampling, Dense()))
        total += count
    return jobs


@dataclass(frozen=True)
class Errors:
    """What bfloat16 does to one model along texts that it wrote without drafting."""

    exact: list[Tensor]
    """Per text the referee's logits [tokens, V]."""
    logit: float
    """E: the largest difference of a logit from the referee's."""
    cumulative: float
    """D: the largest difference of a cumulative probability, at temperature 1."""
    relative: float
    """Root mean square of the logits' differences over the standard deviation of the logits."""


def measure(rounded: Engine, referee: Engine, jobs: Sequence[Job], completions: Sequence[Sequence[int]]) -> Errors:
    exact, got = logits_along(referee, jobs, completions), logits_along(rounded, jobs, completions)
    every_exact, every_got = torch.cat(exact), torch.cat(got)
    off = every_got - every_exact
    return Errors(
        exact=exact,
        logit=float(off.abs().max()),
        cumulative=float((cumulative(every_got) - cumulative(every_exact)).abs().max()),
        relative=float(off.square().mean().sqrt() / every_exact.std()),
    )


def part(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two completions of one length part."""
    return next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def distance(exact: Tensor, ours: int, theirs: int, sampling: Sampling, at: int, errors: Errors) -> float:
    """How far from a tie two choices at position `at` are, over how far rounding may be; 1 is the limit. `exact`: logits [V]."""
    if not sampling.temperature:
        return abs(float(exact[ours] - exact[theirs])) / (2 * errors.logit)
    noise = uniform_noise(sampling.seed, 0, at)
    borders = cumulative(exact)[[min(ours, theirs), max(ours, theirs) - 1]]  # what lies between is passed over whole
    return float((borders - noise).abs().max()) / (2 * errors.cumulative)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_change_at_ties_only(family: str, temperature: float, tmp_path: Path) -> None:
    depth = {"n_layer": NUM_LAYERS} if family == "gpt2" else {"num_hidden_layers": NUM_LAYERS}
    directory = save(tiny_model(family, **depth), tmp_path, dtype=torch.bfloat16, tokenizer=False)
    decoder = Decoder(*load_checkpoint(directory))
    assert decoder.dtype == torch.bfloat16
    rounded = Engine(decoder, max_batch=BATCH, cache_gib=0.1)
    referee = Engine(Decoder(*load_checkpoint(directory, dtype="float32")), max_batch=BATCH, cache_gib=0.1)
    jobs = random_jobs(f"bfloat16 {family}", temperature)
    prompts, samplings, _ = (list(column) for column in zip(*jobs, strict=True))
    plain = [one.token_ids for one in rounded.generate(prompts, samplings)]
    drafts = [DRAFTS[number % len(DRAFTS)] for number in range(len(jobs))]
    drafted = rounded.generate(prompts, samplings, draft=drafts)
    stats = sum((one.drafting for one in drafted if one.drafting), DraftStats())
    assert stats.drafted > NUM_TOKENS / 2
    assert stats.accepted > 0
    other_batch = Engine(decoder, max_batch=OTHER_BATCH, cache_gib=0.1).generate(prompts, samplings)
    errors = measure(rounded, referee, jobs, plain)

    roundings = ROUNDINGS_PER_LAYER * NUM_LAYERS + 2
    half_step = torch.finfo(torch.bfloat16).eps / 2
    assert errors.relative < half_step * math.sqrt(roundings), "more than independent roundings explain"
    for name, got in (("drafting", drafted), (f"batches of {OTHER_BATCH}", other_batch)):
        distances, same = [], 0
        for number, one in enumerate(got):
            at = part(one.token_ids, plain[number])
            same += len(plain[number]) if at is None else at
            if at is not None:
                choice = one.token_ids[at], plain[number][at]
                distances.append(distance(errors.exact[number][at], *choice, samplings[number], at, errors))
        assert max(distances, default=0) <= 1, (
            f"{name}: tokens differ and were no tie, {max(distances):.2f} of the limit"
        )
        print(
            f"{family}, {'sampled' if temperature else 'greedy'}, {name}: {len(distances)} of {len(jobs)} requests part, "
            f"{1000 * len(distances) / same:.2f} per 1,000 tokens before ({same}); farthest from a tie "
            f"{max(distances, default=0):.2f} of the limit (2 E = {2 * errors.logit:.3f}, 2 D = {2 * errors.cumulative:.4f}, "
            f"relative error {errors.relative:.4f})"
        )


def test_what_is_no_tie() -> None:
    """Logits 0.1 apart are a tie for E = 0.06 and none for 0.04. Of four equal tokens, noise 0.26 takes token 1, and lies 0.01
    beyond the end of token 0: with that one it is a tie for D = 0.006 and none for 0.004. Token 2 begins far away, at 0.5."""
    logits = torch.tensor([1.0, 1.1, -5.0, -5.0])
    for error, tie in ((0.06, True), (0.04, False)):
        errors = Errors(exact=[], logit=error, cumulative=0.0, relative=0.0)
        assert (distance(logits, 0, 1, Sampling(), 0, errors) <= 1) == tie
    seed = next(seed for seed in range(10**6) if abs(uniform_noise(seed, 0, 5) - 0.26) < 1e-4)
    sampling = Sampling(temperature=1, seed=seed)
    for error, other, tie in ((0.006, 0, True), (0.004, 0, False), (0.006, 2, False)):
        errors = Errors(exact=[], logit=0.0, cumulative=error, relative=0.0)
        assert (distance(torch.zeros(4), 1, other, sampling, 5, errors) <= 1) == tie
