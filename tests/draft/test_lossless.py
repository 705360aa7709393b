"""Drafting with every proposer, family by family: the tokens are those without it, in a batch of 32 where everything is mixed."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from families import CONFIGS, save, tiny_model
from near_ties import assert_near_tie
from random_plans import random_plan, random_policy
from shoal import Dense, Engine, Sampling
from shoal.depth.early_termination import EarlyTermination
from shoal.depth.skipdecode import SkipDecode
from shoal.draft import Auto, NGram, SelfDraft, SmallModel, Suffix, Trigram
from shoal.engine.drafting import DraftStats
from shoal.engine.intake import Plan
from shoal.models.native.decoder import NativeDecoder
from ways import logits_along

TOKENS_PER_PROPOSER = int(os.environ.get("SHOAL_LOSSLESS_TOKENS", "1500"))
NUM_LAYERS = 6


def ways_to_draft(small: Path) -> dict[str, list[object]]:
    """Every proposer, lengths fixed and left to the engine."""
    return {
        "ngram": ["ngram", NGram(match_tokens=1, tokens=5), NGram(match_tokens=2)],
        "suffix": ["suffix", Suffix(tokens=32), Suffix(scope="together", tokens=3)],
        "trigram": ["trigram", Trigram(tokens=4)],
        "self": [
            "self",
            SelfDraft(plan=EarlyTermination(min_layers=2, max_layers=2), tokens=3),
            SelfDraft(plan=SkipDecode(min_layers=2, max_layers=4, horizon=10), tokens=5),
            SelfDraft(plan=Dense(), tokens=2),
        ],
        "small": [str(small), SmallModel(path=str(small), tokens=4)],
        "auto": ["auto", Auto(tokens=2)],
        "trees": [
            SelfDraft(plan=EarlyTermination(min_layers=2, max_layers=2), branches=(3, 2, 1)),
            SelfDraft(plan=SkipDecode(min_layers=2, max_layers=4, horizon=10), branches=(2, 2, 2, 1)),
            SmallModel(path=str(small), branches=(2, 1, 1, 1)),
            SmallModel(path=str(small), branches=(8,)),
        ],
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_the_same(family: str, tmp_path: Path) -> None:
    """SHOAL_LOSSLESS_TOKENS per proposer (1,500): greedy and sampled, any plan, ends in between, and a row that is cancelled."""
    depth = {"n_layer": NUM_LAYERS} if family == "gpt2" else {"num_hidden_layers": NUM_LAYERS}
    big = save(tiny_model(family, **depth), tmp_path / "big")
    small = save(tiny_model(family, **depth), tmp_path / "small")  # itself: another random model would never be right
    rng = random.Random(f"drafting {family}")
    kinds = ways_to_draft(small)
    prompts: list[list[int]] = []
    samplings: list[Sampling] = []
    plans: list[Plan] = []
    drafts: list[object] = []
    names: list[str] = []
    budget = dict.fromkeys(kinds, 0)
    while min(budget.values()) < TOKENS_PER_PROPOSER:
        name = min(budget, key=lambda kind: budget[kind])
        piece = [rng.randrange(256) for _ in range(rng.choice([1, 3, 8]))]
        prompt = (piece * 12)[: rng.choice([1, 5, 17, 40])]  # something to copy
        num_tokens = rng.randint(1, 150)
        sampling = Sampling(
            max_new_tokens=num_tokens,
            ignore_eos=rng.random() < 0.9,
            temperature=0 if name == "trees" else rng.choice([0, 0, 0, 0.3, 1.0]),
            seed=rng.randrange(2**63),
        )
        plan: Plan = rng.choice([Dense(), Dense(), random_policy(rng, NUM_LAYERS)])
        if rng.random() < 0.2:
            plan = random_plan(rng, NUM_LAYERS, prompt_tokens=len(prompt), max_new_tokens=num_tokens)
        prompts.append(prompt)
        samplings.append(sampling)
        plans.append(plan)
        drafts.append(rng.choice(kinds[name]))
        names.append(name)
        budget[name] += num_tokens - 1

    def engine() -> Engine:
        return Engine.from_pretrained(str(big), max_batch=32, max_pass_tokens=500, cache_gib=0.25)

    expected = engine().generate(prompts, samplings, plans)
    drafting = engine()
    cancelled = drafting.add([1, 2, 3], Sampling(max_new_tokens=100, ignore_eos=True), draft="suffix", index=-1)
    drafting.step()
    drafting.step()
    drafting.cancel(*cancelled)
    got = drafting.generate(prompts, samplings, plans, draft=drafts)

    different = [
        i for i, (ours, plain) in enumerate(zip(got, expected, strict=True)) if ours.token_ids != plain.token_ids
    ]
    if different and not isinstance(
        drafting.runner.decoder, NativeDecoder
    ):  # the kernel's sums do not depend on the pass
        chosen = sorted({*different, *range(20)})
        jobs = [(prompts[i], samplings[i], plans[i]) for i in chosen]
        texts = [expected[i].token_ids for i in chosen]
        plain_logits = logits_along(engine(), jobs, texts)
        drafted_logits = logits_along(engine(), jobs, texts, [drafts[i] for i in chosen])
        for i in different:
            at = chosen.index(i)
            assert_near_tie(got[i].token_ids, texts[at], samplings[i], plain_logits[at], (plain_logits, drafted_logits))
        different_share = len(different) / sum(budget.values())
        print(f"{len(different)} near-ties, {different_share:.4%} of tokens")
        assert different_share < 0.001
    else:
        assert not different
    stats = Counter[str]()
    for name, generation in zip(names, got, strict=True):
        assert generation.drafting is not None
        stats[f"{name} drafted"] += generation.drafting.drafted
        stats[f"{name} accepted"] += generation.drafting.accepted
        ledger = replace(generation.ledger, draft_layer_tokens=0, draft_flops=0)
        plain = expected[generation.index].ledger
        assert generation.index in different or ledger == plain
    for name in kinds:
        assert stats[f"{name} drafted"] > stats[f"{name} accepted"] > 0, stats
    print(dict(stats))
    drafting.runner.cache.check_integrity()
    assert not drafting.runner.cache.blocks_in_use
    assert sum((g.drafting for g in got if g.drafting), DraftStats()).drafted <= drafting.drafting.drafted
