"""Self-distillation: what the starting model says at full depth, beside the next token, is what the shallow passes learn.

The teacher is a frozen copy of the starting model, run densely. The tuned network's own dense pass would need no copy, but it
moves: depths share its weights, and a teacher that gives in to its students takes the loss of quality at full depth with it. The
copy costs its weights in memory (no gradients, no optimizer state) and a forward pass per batch; either teacher costs the latter.

    loss = (1 - w) cross-entropy + w KL(teacher || student)         both means over completion tokens, in nats

Another checkpoint may teach instead: one that drafts for it then agrees with it more often (DistillSpec, Zhou et al. 2024, arXiv
2310.08461, with the forward KL on given completions; let the teacher write them, and they are its own).

The shares add up to 1 so that gradient clipping means the same with and without. No temperature: the student has the
teacher's vocabulary, there is nothing to soften. Dense batches are distilled too, which holds full depth near its start.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from shoal.errors import InvalidInput
from shoal.train.data import IGNORED
from shoal.train.start import load

READ = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
"""What a teacher is shown of a batch made by `shoal.train.data.collate`."""


def other_teacher(teacher: str, student: Any, tokenizer: Any) -> nn.Module:
    """The network of the checkpoint `teacher`. Raises `CheckpointError`, and `InvalidInput` where its tokens are others."""
    network, its_tokenizer = load(teacher)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InvalidInput(f"teacher {teacher}: its tokenizer is another one, so tokens would mean different things")
    sizes = network.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InvalidInput(f"teacher {teacher}: it has logits for {sizes[0]} tokens, the model to tune for {sizes[1]}")
    return network


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
