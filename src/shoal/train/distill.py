"""Self-distillation: what the starting model says at full depth, beside the next token, is what the shallow passes learn.

The teacher is a frozen copy of the starting model, run densely. The tuned network's own dense pass would need no copy, but it
moves: depths share its weights, and a teacher that gives in to its students takes the loss of quality at full depth with it. The
copy costs its weights in memory (no gradients, no optimizer state) and a forward pass per batch; either teacher costs the latter.

    loss = (1 - w) cross-entropy + w KL(teacher || student)         both means over completion tokens, in nats

The shares add up to 1 so that gradient clipping means the same with and without. No temperature: the student has the teacher's
size and vocabulary, there is nothing to soften. Dense batches are distilled too, which holds full depth near its start.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from shoal.train.data import IGNORED

READ = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
"""What a teacher is shown of a batch made by `shoal.train.data.collate`."""


def make_teacher(network: nn.Module, device: Any) -> nn.Module:
    """A copy of `network` on `device` that neither learns nor drops out."""
    teacher = copy.deepcopy(network).to(device).eval()
    teacher.requires_grad_(False)
    return teacher


def divergence(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || student), summed over the tokens that have a label.

    Args: `logits` and `target` [batch, C, vocabulary] of student and teacher, any float dtype; `labels` [batch, C].
    Returns a float32 scalar in nats.
    """
    kept = labels != IGNORED
    student, teacher = (each[kept].float().log_softmax(-1) for each in (logits, target))
    return F.kl_div(student, teacher, reduction="sum", log_target=True)
