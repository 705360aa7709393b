"""Teacher-forced logits under the depth context equal the engine's step-by-step logits under the same plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import CONFIGS, save, tiny_model
from shoal import Engine, Sampling, SkipDecode
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.train.depth_context import depth_context

NEW_TOKENS = 12
PROMPTS = [[5, 9, 30, 41, 7], [100, 3], [61, 62, 63]]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_training_and_decoding_agree(family: str, tmp_path: Path):
    model = tiny_model(family)
    num_layers = model.config.num_hidden_layers
    engine = Engine.from_pretrained(save(tiny_model(family), tmp_path), dtype="float32")
    vocab = model.config.vocab_size
    plans = [
        DepthPlan((ALWAYS, 0, 2, ALWAYS)[:num_layers]),
        DepthPlan((ALWAYS, 1, 5, 8)[:num_layers]),
        DepthPlan((ALWAYS, 0, ALWAYS, 3)[:num_layers], prompt_layers=tuple(i for i in range(num_layers) if i != 1)),
        SkipDecode(depth=0.75, horizon=6, warmup_layers=1).plan(num_layers),
    ]
    for plan in plans:
        sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=vocab)
        completions = engine.generate(PROMPTS, sampling=sampling, plan=plan)
        columns = max(map(len, PROMPTS))
        ids = torch.zeros(len(PROMPTS), columns + NEW_TOKENS - 1, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
            start = columns - len(prompt)
            ids[row, start:] = torch.tensor([*prompt, *completion.token_ids[:-1]])
            mask[row, start:] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with depth_context(model, plan, prompt_columns=columns), torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=NEW_TOKENS).logits
        logprobs = logits.log_softmax(-1)
        for row, completion in enumerate(completions):
            assert completion.logprobs is not None
            stepwise = torch.tensor([[step.top[token] for token in range(vocab)] for step in completion.logprobs])
            torch.testing.assert_close(stepwise, logprobs[row], rtol=1e-4, atol=1e-4)
