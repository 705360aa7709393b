"""transformers' Trainer, with a depth plan per batch, self-distillation, and an end to a run whose loss is not finite."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from shoal.depth.plan import DepthPlan
from shoal.errors import InvalidInput, TuningDiverged
from shoal.train.config import TuneConfig
from shoal.train.data import IGNORED, LengthGrouped, prompt_columns
from shoal.train.depth_context import depth_context
from shoal.train.depths import RecentLosses, by_need, even
from shoal.train.distill import READ, divergence
from shoal.train.state import newest_checkpoint


class DepthTrainer(transformers.Trainer):
    """A Trainer whose every training step runs under one of `plans`.

    Expects batches made by `shoal.train.data.collate`. Raises `TuningDiverged` where a batch's loss or gradient is not finite,
    before the weights are touched.
    """

    def __init__(
        self,
        *args: Any,
        config: TuneConfig,
        plans: Sequence[DepthPlan],
        sampler: LengthGrouped,
        teacher: nn.Module | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.config, self.plans, self.sampler, self.teacher = config, plans, sampler, teacher
        self.batch_loss = 0.0  # of the micro-batches so far
        self.add_callback(RecentLosses())

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return self.sampler

    @property
    def recent(self) -> RecentLosses:
        """Recent losses by depth; looked up, because the Trainer makes a new one when it resumes."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, RecentLosses))

    def draw(self) -> int:
        """The place in `plans` of this batch's depth."""
        depths, batch, seed = self.config.depths, self.state.global_step, self.config.seed
        if self.config.depth_sampling == "need":
            return by_need(depths, self.recent, batch, seed=seed)
        return even(len(depths), batch, seed=seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, both within the depth context; then what the whole batch's loss is good for."""
        place = self.draw()
        with depth_context(model, self.plans[place], prompt_columns=prompt_columns(inputs)):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.batch_loss += float(self.accelerator.gather(loss.detach()).mean())
        if self.accelerator.sync_gradients:  # the last micro-batch
            self.check_finite(model, self.config.depths[place])
            self.recent.add(self.config.depths[place], self.batch_loss)
            self.batch_loss = 0.0
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's cross-entropy, with the share of self-distillation that `config.distill` says."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                target = self.teacher(**{name: inputs[name] for name in READ}).logits
            # The divisor of the cross-entropy: completion tokens of all micro-batches and processes; the processes' mean follows.
            tokens = (inputs["labels"] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
            scale = self.accelerator.num_processes if shared else 1
            apart = divergence(outputs.logits, target, inputs["labels"]) * scale / tokens
            loss = (1 - self.config.distill) * loss + self.config.distill * apart
        return (loss, outputs) if return_outputs else loss

    def check_finite(self, model: nn.Module, depth: float) -> None:
        """Raise `TuningDiverged` where the batch's loss or gradient is not finite; what `--resume` would find is good."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(self.accelerator.gather(torch.nn.utils.get_total_norm(gradients)).sum())
        if math.isfinite(self.batch_loss) and math.isfinite(norm):
            return
        state, step = Path(str(self.args.output_dir)), self.state.global_step
        if self.accelerator.is_main_process:  # weights whose very first loss is not finite are not worth going on from
            shutil.rmtree(state / f"checkpoint-{step}", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        newest = newest_checkpoint(state)
        kept = f"{newest} is from before it" if newest else "no state had been saved before it"
        raise TuningDiverged(
            f"step {step}, depth {depth:.4g}: the loss is {self.batch_loss:.4g} and the gradient's norm {norm:.4g}, so tuning "
            f"stopped; {kept}. The same settings lead here again: start anew with a learning rate below "
            f"{self.config.learning_rate:g}"
        )


class Progress(transformers.TrainerCallback):
    """Calls `report(step, num_steps, loss)` whenever the Trainer logs a loss."""

    def __init__(self, report: Callable[[int, int, float], None]) -> None:
        self.report = report
        self.loss = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Pass the mean loss since the last log line on; the last line of all has the mean over the run instead."""
        if logs and "loss" in logs:
            self.loss = logs["loss"]
            if state.is_world_process_zero:
                self.report(state.global_step, state.max_steps, self.loss)
        elif logs and "train_loss" in logs and math.isnan(self.loss):
            self.loss = logs["train_loss"]


def arguments(config: TuneConfig, state: Path) -> transformers.TrainingArguments:
    """The Trainer's settings for `config`; a batch is divided among the processes that `accelerate launch` started."""
    parts = config.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % parts:
        raise InvalidInput(f"batch_size {config.batch_size} must be a multiple of accumulate x processes = {parts}")
    # transformers is renaming this argument; the old name warns, the new one is missing from earlier releases.
    names = transformers.TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    args = transformers.TrainingArguments(
        output_dir=str(state),
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        per_device_train_batch_size=config.batch_size // parts,
        gradient_accumulation_steps=config.accumulate,
        bf16=config.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # those of layers that a plan skips
        seed=config.seed,
        save_steps=config.save_every,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        include_num_input_tokens_seen="non_padding",
        logging_steps=20,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **{checkpointing: config.gradient_checkpointing},  # type: ignore[arg-type]
    )
    # The Trainer would copy the network to each GPU in every step; a copy does not have the `forward`s of the depth context.
    if args.n_gpu > 1:
        raise InvalidInput(
            f"one process cannot tune on {args.n_gpu} GPUs: run `accelerate launch -m shoal.cli.main tune ...`, a process per "
            "GPU, or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    return args
