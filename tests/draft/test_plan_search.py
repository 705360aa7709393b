"""What a draft plan promises is what drafting does; a search finds the layers that do nothing, and goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from families import save, tiny_model
from shoal import Dense, DepthPlan, Engine, Sampling
from shoal.depth.plan import ALWAYS
from shoal.draft import SelfDraft
from shoal.draft.agreement import DRAFT_TOKENS, Text, WrittenTexts
from shoal.draft.plan_search import PlanSearch, Promise, SearchConfig, plan_of
from shoal.engine.batch import Rows, build_pass
from shoal.engine.cache import KVCache
from shoal.errors import InvalidInput, InvalidPlan
from shoal.models.executor import Executor

IDLE = (1, 3, 4)
"""Layers of the model that add nothing."""
PROMPTS = [[7, 1, 4, 250 - n, 30, n] for n in range(8)]


@pytest.fixture(scope="module")
def idle_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, three of which leave every state as it is."""
    model = tiny_model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for layer in IDLE:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    return save(model, tmp_path_factory.mktemp("idle"))


@pytest.fixture(scope="module")
def idle(idle_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(idle_checkpoint, cache_gib=0.1)


def written(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS, max_new_tokens: int = 23) -> list[Text]:
    done = engine.generate(list(prompts), Sampling(max_new_tokens=max_new_tokens))
    return [(prompt, one.token_ids) for prompt, one in zip(prompts, done, strict=True)]


def drafted_anew(decoder: Executor, text: Text, plan: DepthPlan) -> list[int]:
    """What `plan` drafts of a text, a token per pass, every draft on a cache that was read for it alone."""
    shape, (prompt, tokens) = decoder.config.shape, text
    drafted: list[int] = []
    for clock in range(len(tokens) - 1):
        if clock % DRAFT_TOKENS == 0:
            cache = KVCache(shape, dtype=decoder.dtype, device=decoder.device, num_slots=1, budget_bytes=2**40)
            cache.reserve(len(prompt) + len(tokens))
            step(decoder, cache, [*prompt, *tokens[:clock]], 0, [True] * shape.num_layers)
        runs = [clock < cutoff for cutoff in plan.cutoffs]
        drafted.append(step(decoder, cache, [tokens[clock]], len(prompt) + clock, runs))
    return drafted


def step(decoder: Executor, cache: KVCache, token_ids: list[int], start: int, runs: list[bool]) -> int:
    """The most probable token after some."""
    count = np.array([len(token_ids)])
    rows = Rows(slots=np.array([0]), starts=np.array([start]), num_tokens=count, served=count[:, None] * np.array(runs))
    return int(decoder(build_pass(rows, token_ids, np.array([1])), cache).argmax())


def test_agreement_is_that_of_drafts_one_by_one(engine: Engine) -> None:
    """Texts of different lengths, plans that get shallower on the way; and a measurement leaves no trace."""
    texts = [text for n in (2, 5, 6, 23) for text in written(engine, PROMPTS[: n % 3 + 1], n)]
    decoder = engine.runner.decoder
    measured = WrittenTexts(decoder, texts)
    plans = [
        Dense().plan(6),
        DepthPlan((ALWAYS, ALWAYS, 0, 0, 0, ALWAYS)),
        DepthPlan((ALWAYS, 9, 6, 3, 1, ALWAYS)),
        DepthPlan((0, 0, 0, 0, 0, ALWAYS)),
    ]
    shares = []
    for plan in plans:
        drafts = [drafted_anew(decoder, text, plan) for text in texts]
        right = [
            a == b for text, draft in zip(texts, drafts, strict=True) for a, b in zip(text[1][1:], draft, strict=True)
        ]
        assert len(right) == measured.num_drafted
        shares.append(sum(right) / len(right))
    assert [measured.agreement(plan) for plan in plans] == shares
    assert [measured.agreement(plan) for plan in reversed(plans)] == shares[::-1]
    assert shares[0] == 1 > max(shares[1:])


def test_promises() -> None:
    """By hand: 1.8 / 1.3, 2.44 / 1.6, 2.952 / 1.9, 3.3616 / 2.2; a draft that is always right is as long as it may be."""
    best = Promise.of(0.8, 0.3)
    assert (best.draft_tokens, best.tokens_per_pass) == (3, pytest.approx(2.952))
    assert best.gain == pytest.approx(2.952 / 1.9)
    assert (Promise.of(1, 0.5).draft_tokens, Promise.of(1, 0.5).gain) == (8, 9 / 5)
    assert Promise.of(0, 0.5).gain == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("num_layers", [None, 3])
def test_layers_that_do_nothing_are_left_out(idle: Engine, num_layers: int | None, tmp_path: Path) -> None:
    out = tmp_path / "draft_plan.json"
    config = SearchConfig(num_layers=num_layers, trials=15 if num_layers else 30)
    result = PlanSearch(idle, written(idle), config, model="idle").run(out)
    assert result.found.plan.active(0) == (0, 2, 5)
    assert result.found.searched.agreement == result.found.held_out.agreement == 1
    assert result.found.held_out.gain > result.usual.held_out.gain
    assert DepthPlan.load(out) == result.found.plan
    prompts = [[9, 9, n] for n in range(5)]
    plain = idle.generate(prompts, Sampling(max_new_tokens=30))
    drafted = idle.generate(prompts, Sampling(max_new_tokens=30), draft=SelfDraft(plan=DepthPlan.load(out), tokens=4))
    for one, other in zip(plain, drafted, strict=True):
        assert one.token_ids == other.token_ids
        assert other.drafting is not None
        assert other.drafting.accepted == other.drafting.drafted > 0


def test_promised_cost_is_the_ledgers(idle: Engine) -> None:
    """A request at the plan's depth spends the promised share of a dense one's decode FLOPs."""
    search = PlanSearch(idle, written(idle), SearchConfig(), model="idle")
    plan = plan_of((0, 2, 5), 6)
    prompt, sampling = [1] * search.prompt_tokens, Sampling(max_new_tokens=search.new_tokens, ignore_eos=True)
    spent = [idle.generate(prompt, sampling, one)[0].ledger.decode_flops for one in (plan, Dense())]
    assert search.cost(plan) == pytest.approx(spent[0] / spent[1])


def test_a_stopped_search_goes_on(idle: Engine, tmp_path: Path) -> None:
    texts, config = written(idle), SearchConfig(trials=25, seed=4)
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    PlanSearch(idle, texts, config, model="idle").run(whole)

    def stop(done: int, best: Promise) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PlanSearch(idle, texts, config, model="idle").run(stopped, report=stop)
    partial = json.loads(stopped.read_text())
    assert len(partial["scores"]) == 10
    assert DepthPlan.load(stopped) == DepthPlan.from_dict(partial["plan"])
    search = PlanSearch(idle, texts, config, model="idle")
    search.resume(stopped)
    seen = search.seen.agreement
    measured: list[DepthPlan] = []
    search.seen.agreement = lambda plan: (measured.append(plan), seen(plan))[1]  # type: ignore[method-assign,func-returns-value]
    search.run(stopped)
    assert len(measured) == 15 + 2  # what was found and the usual plan at the end
    assert stopped.read_text() == whole.read_text()


def test_refused(idle: Engine, tmp_path: Path) -> None:
    texts, out = written(idle), tmp_path / "draft_plan.json"
    with pytest.raises(InvalidInput, match="trials must be 1 or more"):
        SearchConfig(trials=0)
    for num_layers in (0, 6):
        with pytest.raises(InvalidInput, match="must be 1 to 5 of the model's 6"):
            PlanSearch(idle, texts, SearchConfig(num_layers=num_layers), model="idle")
    with pytest.raises(InvalidInput, match="2 texts or more"):
        PlanSearch(idle, [texts[0], (PROMPTS[1], [5])], SearchConfig(), model="idle")
    PlanSearch(idle, texts, SearchConfig(trials=1), model="idle").run(out)
    with pytest.raises(InvalidInput, match="another texts"):
        PlanSearch(idle, texts[1:], SearchConfig(), model="idle").resume(out)
    with pytest.raises(InvalidInput, match="another model"):
        PlanSearch(idle, texts, SearchConfig(), model="other").resume(out)
    out.write_text("[]")
    with pytest.raises(InvalidInput, match="not a draft plan to go on with"):
        PlanSearch(idle, texts, SearchConfig(), model="idle").resume(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no plan can be read"),
        ("{", "no plan can be read"),
        ("[]", "no plan can be read"),
        ('{"cutoffs": [null]}', "no field 'plan'"),
        ('{"plan": {"cutoffs": [3]}}', "at least one layer must always run"),
    ],
)
def test_files_without_a_plan(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidPlan, match=message):
        DepthPlan.load(path)
