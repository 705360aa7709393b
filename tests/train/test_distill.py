"""Self-distillation: the loss is the one written down, its gradient pulls to the teacher, and the teacher stays what it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

from families import tiny_model
from shoal.depth.skipdecode import SkipDecode
from shoal.train.config import TuneConfig
from shoal.train.data import IGNORED, Example, LengthGrouped, collate, prompt_columns
from shoal.train.depth_context import depth_context
from shoal.train.depths import plans_for
from shoal.train.distill import divergence, make_teacher
from shoal.train.trainer import DepthTrainer, arguments

EXAMPLES = [Example([5, 6, 7][: 1 + i % 3], [9, 8, 7, 6][: 2 + i % 3]) for i in range(8)]


def no_dropout(family: str = "opt"):
    """A tiny random model without dropout."""
    return tiny_model(family, dropout=0.0, attention_dropout=0.0)


def test_divergence_is_the_sum_over_labelled_tokens_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    labels = torch.tensor([[1, 2, IGNORED], [3, IGNORED, IGNORED]])
    expected = 0.0
    for row, column in ((0, 0), (0, 1), (1, 0)):
        p, q = target[row, column].softmax(0), logits[row, column].softmax(0)
        expected += float((p * (p / q).log()).sum())
    assert float(divergence(logits, target, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(logits, logits + 3, labels)) == pytest.approx(0, abs=1e-6)


def test_gradient_is_student_minus_teacher():
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    target = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(2))
    divergence(logits, target, torch.tensor([[1, IGNORED]])).backward()
    expected = logits.detach().softmax(-1) - target.softmax(-1)
    torch.testing.assert_close(logits.grad[0, 0], expected[0, 0])
    assert (logits.grad[0, 1] == 0).all()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_loss_and_gradient_of_a_step_equal_the_reference(tmp_path, accumulate):
    """One step of the Trainer against the formula on the whole batch, under a shallow plan, with a teacher that differs."""
    share = 0.3
    config = TuneConfig(depths=(0.5,), distill=share, batch_size=8, accumulate=accumulate, steps=1, horizon=3)
    plans = plans_for("skipdecode", config.depths, 4, horizon=3, warmup_layers=1)
    model, teacher = no_dropout(), make_teacher(tiny_model("opt", seed=9), "cpu")
    batch = collate(EXAMPLES, pad_token_id=0)

    reference = no_dropout()
    plan = SkipDecode(depth=0.5, horizon=3, warmup_layers=1).plan(4)
    read = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "logits_to_keep")}
    with depth_context(reference, plan, prompt_columns=prompt_columns(batch)):
        logits = reference(**read).logits
        kept = batch["labels"] != IGNORED
        student, taught = logits[kept].log_softmax(-1), teacher(**read).logits[kept].softmax(-1)
        apart = (taught * (taught.log() - student)).sum(-1).mean()
        expected = (1 - share) * F.nll_loss(student, batch["labels"][kept]) + share * apart
        expected.backward()
    expected = float(expected.detach())

    gradients = {}

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    args = arguments(config, tmp_path)
    args.max_grad_norm = 0
    trainer = DepthTrainer(
        model=model, args=args, train_dataset=EXAMPLES, data_collator=lambda e: collate(e, pad_token_id=0),
        callbacks=[Watch()], config=config, plans=plans, teacher=teacher,
        sampler=LengthGrouped(EXAMPLES, batch_size=8, seed=0),
    )  # fmt: skip
    trainer.train()
    assert trainer.recent.mean(0.5) == pytest.approx(expected, rel=1e-4)
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
    untouched = tiny_model("opt", seed=9).state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
