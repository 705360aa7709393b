"""Trees of drafted tokens: what they are made of, and that tokens, costs and the last bit of logits are those without them.

`test_coupling.py` has their distributions, `test_lossless.py` every family on the kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from families import CONFIGS, save, tiny_model
from shoal import Dense, Engine, Generation, Sampling
from shoal.depth.early_termination import EarlyTermination
from shoal.depth.skipdecode import SkipDecode
from shoal.draft import SelfDraft, SmallModel
from shoal.draft.choices import tree_tokens
from shoal.draft.trees import draw_different, thinned
from shoal.engine.sampling import uniform_noise
from shoal.engine.trees import TreeTokens
from ways import decoder_of, needs_kernel

BOTTOM = EarlyTermination(min_layers=2, max_layers=2)
DECAYING = SkipDecode(min_layers=2, max_layers=6, horizon=30)


def test_tree_tokens() -> None:
    assert tree_tokens((3, 2, 1)) == 15
    assert thinned((3, 2, 1), 15) == (3, 2, 1)
    assert thinned((3, 2, 1), 7) == (2, 1, 1)
    assert thinned((3, 2, 1), 2) == (1, 1)
    assert thinned((8,), 3) == (3,)
    assert thinned((3, 2, 1), 0) == ()


def test_tokens_of_the_example() -> None:
    """The tree that `engine/trees.py` draws, after position 9; a layer that serves two clocks serves three tokens."""
    tree = TreeTokens.of(9, (0, 0, 1, 1, 2))
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2]
    assert [f"{bits:b}" for bits in tree.lineages] == ["0", "1", "10", "101", "1001", "10010"]
    assert tree.leading(np.array([0, 1, 2, 3, 9])).tolist() == [0, 1, 3, 6, 6]
    assert tree.pairs(np.array([3, 1])) == 10 + 11 + 11 + 10


def test_draws_without_replacement() -> None:
    """Ordered pairs against q_a q_b / (1 - q_a); a false alarm once in 10,000 seeds, and these are fixed."""
    q = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    draws = 5000
    seen = Counter(tuple(draw_different(q, [uniform_noise(seed, 0, one) for one in range(2)])) for seed in range(draws))
    pairs = list(permutations([0, 1, 3, 4], 2))
    expected = [float(q[a] * q[b] / (1 - q[a])) for a, b in pairs]
    assert set(seen) <= set(pairs)
    assert chisquare([seen[pair] for pair in pairs], draws * np.array(expected) / sum(expected)).pvalue > 1e-4
    assert sorted(draw_different(q, [0.9] * 5)) == [0, 1, 3, 4]


@pytest.mark.parametrize("family", CONFIGS)
def test_by_pytorch(family: str, tmp_path: Path) -> None:
    """Greedy requests of one batch with trees, chains and no draft, plans whose layers retire inside trees, and one cancelled."""
    depth = {"n_layer": 6} if family == "gpt2" else {"num_hidden_layers": 6}
    checkpoint = save(tiny_model(family, **depth), tmp_path / family)
    decoder = decoder_of("plain", checkpoint)
    drafts: list[object] = [
        SelfDraft(plan=BOTTOM, branches=(3, 2, 1)),
        SmallModel(path=str(checkpoint), branches=(2, 2, 2)),
        SelfDraft(plan=Dense(), branches=(4, 1, 1)),
        SelfDraft(plan=BOTTOM, tokens=3),
        None,
    ]
    prompts = [[number + 1] * (1 + 5 * number) for number in range(10)]
    sampling = Sampling(max_new_tokens=40)
    plans = [Dense(), DECAYING, DECAYING, DECAYING, Dense()] * 2
    expected = Engine(decoder, max_batch=8, cache_gib=0.25).generate(prompts, sampling, plans)
    engine = Engine(decoder, max_batch=8, max_pass_tokens=90, cache_gib=0.25)
    cancelled = engine.add([1, 2, 3], Sampling(max_new_tokens=100, ignore_eos=True), draft=drafts[0], index=-1)
    engine.step()
    engine.step()
    engine.cancel(*cancelled)
    got = engine.generate(prompts, sampling, plans, draft=drafts * 2)
    assert [g.token_ids for g in got] == [g.token_ids for g in expected]
    for number in (1, 2):  # by as many layers as the plan has: the likeliest token is always there
        stats = got[number].drafting
        assert stats is not None
        assert stats.drafted > stats.accepted > 0
    engine.runner.cache.check_integrity()
    assert not engine.runner.cache.blocks_in_use


@needs_kernel
@pytest.mark.parametrize("plan", [Dense(), DECAYING])
def test_the_same_logits(checkpoint: Path, plan: object) -> None:
    """To the last bit, along what is accepted and after what is not."""
    engine = Engine(decoder_of("native", checkpoint), max_batch=1, cache_gib=0.25)
    seen: list[Tensor] = []

    def processor(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits

    sampling = Sampling(max_new_tokens=50, ignore_eos=True, processor=processor)
    engine.generate([5, 6], sampling, plan)  # type: ignore[arg-type]
    plain, seen[:] = torch.stack(seen), []
    for draft in (SmallModel(path=str(checkpoint), branches=(3, 2, 2)), SelfDraft(plan=BOTTOM, branches=(16, 1))):
        (got,) = engine.generate([5, 6], sampling, plan, draft=draft)  # type: ignore[arg-type]
        assert got.drafting is not None
        assert got.drafting.accepted > 0
        assert torch.equal(torch.stack(seen), plain)
        seen.clear()


@pytest.mark.parametrize("plan", [Dense(), DECAYING])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ledgers(make_engine: Callable[..., Engine], plan: object, temperature: float) -> None:
    """The plan's own spending is that without trees where tokens are the same, and all that ran is counted."""
    engine = make_engine(max_batch=2)
    sampling = Sampling(max_new_tokens=40, ignore_eos=True, temperature=temperature)

    def ran() -> int:
        return sum(layer.num_tokens_run for layer in engine.runner.decoder.layers)

    plain: list[Generation] = engine.generate([5, 6], sampling, plan)  # type: ignore[arg-type]
    before = ran()
    got = engine.generate([5, 6], sampling, plan, draft=SelfDraft(plan=BOTTOM, branches=(3, 2, 1)))  # type: ignore[arg-type]
    assert sum(one.ledger.layer_tokens + one.ledger.draft_layer_tokens for one in got) == ran() - before
    for ours, theirs in zip(got, plain, strict=True):
        assert ours.drafting is not None
        assert ours.ledger.draft_layer_tokens > 0
        cost = replace(ours.ledger, draft_layer_tokens=0, draft_flops=0)
        assert cost == theirs.ledger  # lengths are the same, whatever the tokens
        assert ours.drafting.steps + ours.drafting.accepted in (39, 40)


def test_a_tree_that_is_cut(make_engine: Callable[..., Engine]) -> None:
    """Where a pass has no room for all of a tree its first tokens are verified."""
    engine = make_engine(max_batch=2, max_pass_tokens=9)
    sampling = Sampling(max_new_tokens=30, ignore_eos=True)
    expected = engine.generate([[5, 6], [7]], sampling)
    got = engine.generate([[5, 6], [7]], sampling, draft=SelfDraft(plan=Dense(), branches=(3, 2, 1)))
    assert [g.token_ids for g in got] == [g.token_ids for g in expected]
    assert 0 < engine.drafting.accepted < engine.drafting.drafted <= 7 * engine.drafting.passes
