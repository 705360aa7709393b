"""What `draft=` means, what is refused, and when drafting keeps out of the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import save, tiny_model
from shoal import Engine, Sampling, SkipDecode, TunedDepth
from shoal.depth.plan import DepthPlan
from shoal.draft import NGram, SelfDraft, SmallModel, Suffix, Trigram
from shoal.draft.acceptance import Acceptance
from shoal.errors import InvalidDraft

LONG = Sampling(max_new_tokens=60, ignore_eos=True)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("sufix", "one of auto, self, ngram, suffix, trigram"),
        (3, "got 3"),
        (object, "a class of shoal.draft"),
        (SelfDraft(plan=DepthPlan((1, 2**31))), "2 layers, the model has 6"),
        (Trigram(corpus="/nowhere/corpus.txt"), "cannot be read"),
    ],
)
def test_refused(make_engine: Callable[..., Engine], draft: object, message: str) -> None:
    with pytest.raises(InvalidDraft, match=message):
        make_engine().generate("a", draft=draft)


@pytest.mark.parametrize("make", [lambda: NGram(match_tokens=0), lambda: Suffix(tokens=0), lambda: Suffix(tokens=33)])
def test_refused_settings(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidDraft):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": (3, 0)}, "1 or more, one per depth"),
        ({"branches": ()}, "1 or more, one per depth"),
        ({"branches": 4}, "1 or more, one per depth"),
        ({"branches": (3, 3, 3)}, "a tree of 39 tokens, at most 32"),
        ({"branches": (2,), "tokens": 2}, "either tokens or branches"),
        ({"branches": (2,), "coupled": True}, "leave coupled out"),
    ],
)
def test_refused_branches(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidDraft, match=message):
        SelfDraft(**options)
    with pytest.raises(InvalidDraft, match=message):
        SmallModel(path="anywhere", **options)


def test_another_tokenizer_is_refused(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    small = save(tiny_model("llama"), tmp_path / "small")
    tokenizer = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (small / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InvalidDraft, match="its tokenizer is another one"):
        make_engine().generate("a", draft=SmallModel(path=str(small)))


def test_bottom_layers_leave_nothing_to_run_again(make_engine: Callable[..., Engine]) -> None:
    """A draft by the two bottom layers, accepted or not: no token runs them twice, so what drafting adds is known."""
    engine = make_engine(max_batch=1)
    bottom = DepthPlan((2**31, 2**31, 0, 0, 0, 0))
    before = [layer.num_tokens_run for layer in engine.runner.decoder.layers]
    (got,) = engine.generate([1, 2, 3], LONG, draft=SelfDraft(plan=bottom, tokens=3))
    ran = [layer.num_tokens_run - start for layer, start in zip(engine.runner.decoder.layers, before, strict=True)]
    stats = got.drafting
    assert stats is not None
    # Each token that a pass consumed ran every layer once, whichever pass ran it.
    consumed = 3 + 59 + stats.taken_back
    assert ran == [consumed] * 6
    assert got.ledger.draft_layer_tokens == 6 * stats.taken_back


def test_a_warm_up_layer_is_kept(make_engine: Callable[..., Engine]) -> None:
    """SkipDecode's draft under SkipDecode's plan: the one layer that both begin with is not run again."""
    engine = make_engine(max_batch=1)
    before = [layer.num_tokens_run for layer in engine.runner.decoder.layers]
    plan, draft = SkipDecode(min_layers=4, max_layers=6, horizon=20), SkipDecode(min_layers=2, max_layers=2, horizon=1)
    (got,) = engine.generate([1, 2, 3], LONG, plan, draft=SelfDraft(plan=draft, tokens=2))
    (plain,) = engine.generate([1, 2, 3], LONG, plan)
    ran = engine.runner.decoder.layers[0].num_tokens_run - before[0] - (3 + 59)
    assert got.token_ids == plain.token_ids
    assert got.drafting is not None
    assert ran == 3 + 59 + got.drafting.taken_back


def test_self_means_the_checkpoints_policy(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch=2)
    engine.tuned = TunedDepth(horizon=8, depths=(1.0, 0.5))
    (got,) = engine.generate([1, 2, 3], LONG, draft=SelfDraft(tokens=2))
    assert got.drafting is not None
    assert got.drafting.drafted > 40
    assert got.ledger.draft_layer_tokens < 6 * got.drafting.drafted + 6 * got.drafting.taken_back


def test_nothing_to_copy(make_engine: Callable[..., Engine]) -> None:
    """A reason stands with the request."""
    (got,) = make_engine().generate([1], Sampling(max_new_tokens=3, ignore_eos=True), draft=NGram(match_tokens=9))
    assert got.drafting is not None
    assert got.drafting.off == {"nothing to copy": 1, "only one token left": 1}
    assert got.drafting.acceptance is None


def test_acceptance_is_calibrated() -> None:
    """From the prior to what is seen."""
    acceptance = Acceptance((0.5, 0.9))
    assert acceptance.chances([0, 1]) == pytest.approx([0.5, 0.45])
    for trial in range(2000):
        acceptance.learn(0, trial % 4 == 0)
    assert acceptance.chance(0) == pytest.approx(0.25, abs=0.02)
    assert acceptance.chance(1) == pytest.approx(0.9)
