"""Training on problems that are made on the fly: a curriculum over steps, under the plans of an arm, until the loss is flat.

Problems take up to `level` steps, from 0, where the answer is copied from the question: to find the question is learnt before any
step is. The next level comes when 95% of the hardest answers are right at the arm's first plan, which is dense (a mean that forgets
a fifth with each such batch). Plans take turns from the first batch on, one per batch. Trained dense first, a deep model may
take its steps where it writes as well as where it reads; only shallow plans tell these apart.

Every answer is asked for twice, where it is written and at the end of its question in the prompt. The second loss (training only,
the same for all arms) says directly that a prompt's own states should hold the answer; without it a deep model stood at chance for
a thousand batches.

The learning rate is constant after a short warm-up. A run ends at its steps, or once the loss is flat: the mean over a window has
not fallen by 1% below the best earlier one of the level for `PATIENCE` windows. In the last steps the rate falls to 0 in a line.

State is saved between batches: a run that was stopped goes on to the same weights, because a batch is a function of (seed, step).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from reading_tasks import Task
from shoal.depth.plan import DepthPlan
from shoal.train.depth_context import depth_context
from shoal.train.depths import even

WARMUP_STEPS = 100
WINDOW = 300
"""Steps of one mean loss."""
PATIENCE = 4
"""Windows without a new best one that make a loss flat."""
REACHED = 0.95
"""Share of right answers at which the curriculum goes on."""
SAVE_EVERY = 200


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all arms of a study have in common."""

    width: int = 64
    heads: int = 4
    init_std: float = 0.1
    """Of random weights."""
    batch_size: int = 64
    learning_rate: float = 2e-3
    steps: int = 4000
    """Most steps, those below included."""
    fall_steps: int = 400
    """Steps at the end in which the learning rate falls."""


@dataclass(kw_only=True)
class Progress:
    """Where a run is; all of it is saved."""

    step: int = 0
    level: int = 0
    """Most steps that a question needs."""
    accuracy: float = 0.0
    """Recent share of right answers at `level` and full depth."""
    windows: list[float] = field(default_factory=list)
    """Mean losses of this level."""
    losses: list[float] = field(default_factory=list)
    """Of the window that is open."""
    falling_since: int | None = None
    """Step at which the learning rate began to fall."""
    history: list[list[float]] = field(default_factory=list)
    """(step, level, mean loss, accuracy at the level) of every window."""
    seconds: float = 0.0


def network(task: Task, num_layers: int, recipe: Recipe, *, seed: int) -> transformers.OPTForCausalLM:
    """A random OPT without dropout."""
    transformers.set_seed(seed)
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=len(task.vocabulary),
            hidden_size=recipe.width,
            word_embed_proj_dim=recipe.width,
            num_hidden_layers=num_layers,
            num_attention_heads=recipe.heads,
            ffn_dim=4 * recipe.width,
            max_position_embeddings=task.prompt_tokens + task.num_answers,
            init_std=recipe.init_std,
            dropout=0.0,
            attention_dropout=0.0,
            do_layer_norm_before=True,
            pad_token_id=len(task.vocabulary) - 1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train(
    task: Task,
    num_layers: int,
    plans: Sequence[DepthPlan],
    recipe: Recipe,
    *,
    seed: int,
    state: Path,
    stop_at: float = float("inf"),
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[transformers.OPTForCausalLM, Progress] | None:
    """Train a model under `plans`, the dense one first; None where `time.perf_counter()` passed `stop_at` before the end, the state
    being saved in the file."""
    model = network(task, num_layers, recipe, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    progress = Progress()
    if state.is_file():
        saved: dict[str, Any] = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
    model.train()
    last = time.perf_counter()
    while not done(progress, recipe):
        place = even(len(plans), progress.step, seed=seed)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(progress, recipe)
        loss, right = one_step(model, optimizer, task, plans[place], progress, recipe, seed=seed)
        advance(progress, loss, right if place == 0 else None, task, recipe)
        now = time.perf_counter()
        progress.seconds, last = progress.seconds + now - last, now
        if not progress.losses:
            report(progress)
        if progress.step % SAVE_EVERY == 0 or now > stop_at:
            save_state(state, model, optimizer, progress)
            if now > stop_at and not done(progress, recipe):
                return None
    return model.eval(), progress


def rate(progress: Progress, recipe: Recipe) -> float:
    """The learning rate as a share of its peak."""
    warm = min(1.0, (progress.step + 1) / WARMUP_STEPS)
    if progress.falling_since is None:
        return warm
    return warm * (1 - (progress.step - progress.falling_since) / recipe.fall_steps)


def one_step(
    model: transformers.OPTForCausalLM,
    optimizer: torch.optim.Optimizer,
    task: Task,
    plan: DepthPlan,
    progress: Progress,
    recipe: Recipe,
    *,
    seed: int,
) -> tuple[float, float | None]:
    """One optimizer step: its loss, and the share of right answers among those of `progress.level` steps."""
    batch = task.batch(recipe.batch_size, max_hops=progress.level, seed=(seed, progress.step))
    prompts, answers = torch.from_numpy(batch.prompts), torch.from_numpy(batch.answers)
    with depth_context(model, plan, prompt_columns=task.prompt_tokens):
        read, logits = answer_logits(model, task, prompts, answers)
        loss = (cross_entropy(read, answers) + cross_entropy(logits, answers)) / 2
        optimizer.zero_grad()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    hardest = torch.from_numpy(batch.hops) == progress.level
    right = (logits.argmax(-1) == answers)[hardest].float()
    return float(loss.detach()), float(right.mean()) if len(right) else None


def answer_logits(
    model: transformers.OPTForCausalLM, task: Task, prompts: Tensor, answers: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [B, A, vocabulary] of the answers [B, A] behind the prompts [B, P], teacher-forced: at the ends of the questions, and
    where the answers are written."""
    ids = torch.cat([prompts, answers[:, :-1]], dim=1)
    logits: Tensor = model(ids, use_cache=False).logits
    return logits[:, task.question_ends], logits[:, -answers.shape[1] :]


def cross_entropy(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean over all answers."""
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten())


def advance(progress: Progress, loss: float, right: float | None, task: Task, recipe: Recipe) -> None:
    """Book a step: close a window, go on to the next level, begin the end."""
    progress.step += 1
    progress.losses.append(loss)
    if right is not None:
        progress.accuracy = 0.8 * progress.accuracy + 0.2 * right
    if len(progress.losses) == WINDOW:
        mean = sum(progress.losses) / WINDOW
        progress.windows.append(mean)
        progress.history.append([progress.step, progress.level, round(mean, 4), round(progress.accuracy, 4)])
        progress.losses = []
    if progress.falling_since is not None:
        return
    if progress.accuracy >= REACHED and progress.level < task.max_hops:
        progress.level, progress.accuracy, progress.windows = progress.level + 1, 0.0, []
    if progress.step >= recipe.steps - recipe.fall_steps or flat(progress.windows):
        progress.falling_since = progress.step


def done(progress: Progress, recipe: Recipe) -> bool:
    """Whether the learning rate has fallen to 0."""
    return progress.falling_since is not None and progress.step - progress.falling_since >= recipe.fall_steps


def flat(windows: Sequence[float]) -> bool:
    """Whether the last `PATIENCE` mean losses are all above 99% of the best one before them."""
    return len(windows) > PATIENCE and min(windows[-PATIENCE:]) > 0.99 * min(windows[:-PATIENCE])


def save_state(
    path: Path, model: transformers.OPTForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write the state; the file is whole or as it was."""
    partial = path.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}, partial
    )
    os.replace(partial, path)
