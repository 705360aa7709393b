"""Every token and every logit equals the slow reference's, under plans that sit on the edges, in shared batches."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from torch import Tensor

import reference
from families import CONFIGS, EOS, save, tiny_model
from near_ties import assert_same_tokens_up_to_near_ties
from random_plans import random_plan, random_policy, specification
from shoal import Dense, Engine, Sampling
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.engine.intake import Plan
from ways import WAYS, decoder_of

NUM_LAYERS, NUM_REQUESTS = 6, 12


class Recorder:
    """A logits processor that changes nothing and keeps what it sees, in order."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        self.rows.append(logits.clone())
        return logits


def random_requests(rng: random.Random) -> list[tuple[list[int], Plan, int]]:
    """(prompt, plan, max_new_tokens) of each; completions often end on, one before or one after a cutoff."""
    requests: list[tuple[list[int], Plan, int]] = []
    for number in range(NUM_REQUESTS):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 5, 15, 16, 17]))]
        max_new_tokens = rng.randint(1, 18)
        plan: Plan = Dense()
        if number % 4 < 2:
            plan = random_plan(rng, NUM_LAYERS, prompt_tokens=len(prompt), max_new_tokens=max_new_tokens)
            reachable = [cutoff for cutoff in plan.cutoffs if 0 < cutoff < 20]
            if reachable:
                max_new_tokens = max(1, rng.choice(reachable) + rng.choice([0, 1, 2]))
        elif number % 4 == 2:
            plan = random_policy(rng, NUM_LAYERS)
        requests.append((prompt, plan, max_new_tokens))
    return requests


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_equal_the_reference(family: str, way: str, tmp_path: Path) -> None:
    depth = {"n_layer": NUM_LAYERS} if family == "gpt2" else {"num_hidden_layers": NUM_LAYERS}
    model = tiny_model(family, **depth)
    decoder = decoder_of(way, save(model, tmp_path, tokenizer=False))
    engine = Engine(decoder, max_batch=5, max_pass_tokens=12, cache_gib=0.25)
    requests = random_requests(random.Random(f"{family} against the reference"))
    prompts, plans = [prompt for prompt, _, _ in requests], [plan for _, plan, _ in requests]
    greedy = engine.generate(prompts, [Sampling(max_new_tokens=n) for *_, n in requests], plans)
    recorders = [Recorder() for _ in requests]
    recorded = engine.generate(
        prompts,
        [Sampling(max_new_tokens=n, processor=r) for (*_, n), r in zip(requests, recorders, strict=True)],
        plans,
    )
    assert [g.token_ids for g in recorded] == [g.token_ids for g in greedy]

    expected, largest = [], 0.0
    for (prompt, plan, max_new_tokens), recorder, generation in zip(requests, recorders, greedy, strict=True):
        schedule, prompt_layers = specification(plan, NUM_LAYERS, len(prompt))
        decoded = reference.decode(
            model, prompt, schedule, max_new_tokens=max_new_tokens, prompt_layers=prompt_layers, eos_token_ids=[EOS]
        )
        expected.append(decoded)
        for step, (ours, theirs) in enumerate(zip(recorder.rows, decoded.logits, strict=True)):
            difference = float((ours - theirs).abs().max())
            assert difference <= 1e-4 * float(decoded.logits.std())
            largest = max(largest, difference)
            if generation.token_ids[step] != decoded.token_ids[step]:
                break
    assert_same_tokens_up_to_near_ties(
        [g.token_ids for g in greedy],
        [d.token_ids for d in expected],
        [d.logits for d in expected],
        largest_difference=largest,
    )


def test_plans_change_what_is_computed(engine: Engine) -> None:
    """The comparison above would prove little if depth did not matter: each layer's cutoff changes some token."""
    prompt, sampling = list(range(20, 40)), Sampling(max_new_tokens=30, ignore_eos=True)
    dense = engine.generate(prompt, sampling)[0].token_ids
    for layer in range(NUM_LAYERS):
        for cutoff in (0, 8):
            plan = DepthPlan(tuple(cutoff if at == layer else ALWAYS for at in range(NUM_LAYERS)))
            tokens = engine.generate(prompt, sampling, plan)[0].token_ids
            assert tokens[: cutoff + 1] == dense[: cutoff + 1]
            assert tokens != dense


def test_a_prompt_layer_that_never_decodes_still_matters(engine: Engine) -> None:
    """Leaving a layer out of the prompt is another computation than leaving it out of decoding."""
    prompt, sampling = list(range(20, 40)), Sampling(max_new_tokens=12, ignore_eos=True)
    cutoffs = (ALWAYS, 0, ALWAYS, 0, ALWAYS, ALWAYS)
    whole = engine.generate(prompt, sampling, DepthPlan(cutoffs))[0]
    reduced = engine.generate(prompt, sampling, DepthPlan(cutoffs, prompt_layers=(0, 2, 4, 5)))[0]
    assert whole.token_ids != reduced.token_ids
    assert whole.ledger.prompt_layer_tokens == 6 * 20
    assert reduced.ledger.prompt_layer_tokens == 4 * 20
