"""Depth-aware fine-tuning with transformers' Trainer: an ordinary checkpoint comes out, with `depth_plan.json` beside it."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from shoal.depth.checkpoint import TunedDepth, fit_horizon
from shoal.depth.plan import Dense, DepthPlan
from shoal.depth.skipdecode import SkipDecode
from shoal.errors import CheckpointError, InvalidInput, MissingExtra
from shoal.train.data import Example, LengthGrouped, collate, prompt_columns, read_examples
from shoal.train.depth_context import decoder_layers, depth_context


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How to tune. Two runs with the same config, data, model and machine give the same weights."""

    depths: tuple[float, ...] = (1.0, 1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
    """Depths to tune for, one drawn per batch; a depth named twice is drawn twice as often."""
    horizon: int | None = None
    """Clocks over which depth falls; None takes the median completion length of the data, in tokens."""
    warmup_layers: int = 1
    """Bottom layers that always run."""
    epochs: float = 1.0
    """Passes over the data; a fraction is fine."""
    learning_rate: float = 3e-4
    """Peak of AdamW's learning rate, which warms up over 3% of the steps and then falls along a cosine."""
    batch_size: int = 64
    """Examples per optimizer step."""
    accumulate: int = 1
    """Micro-batches that a batch is split into, to save memory."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    seed: int = 0
    """Seed of data order, plan order and dropout."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16 (autocast); weights stay float32 during training."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute layers in the backward pass."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank instead of all weights; they are merged into the checkpoint at the end."""
    save_every: int = 200
    """Optimizer steps between checkpoints."""

    def __post_init__(self) -> None:
        if not self.depths:
            raise InvalidInput("depths must name at least one depth, such as 1 or 0.5")
        for name in ("epochs", "learning_rate", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) <= 0:
                raise InvalidInput(f"{name} must be above 0, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise InvalidInput(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise InvalidInput(f"lora_rank must be 1 or more, got {self.lora_rank}")


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What a run did."""

    output: Path
    """The checkpoint."""
    num_examples: int
    """Examples in the data."""
    steps: int
    """Optimizer steps, those before a resume included."""
    final_loss: float
    """Mean training loss per completion token since the last log line, or over the run where it was shorter."""
    horizon: int
    """Horizon that was used."""
    seconds: float
    """Wall time of training in this process (after a resume: of the rest only)."""


def plans_for(depths: Sequence[float], num_layers: int, *, horizon: int, warmup_layers: int) -> list[DepthPlan]:
    """The plan of each depth; 1 is dense. Raises `InvalidPlan` with the allowed range."""
    return [
        Dense().plan(num_layers)
        if depth == 1
        else SkipDecode(depth=depth, horizon=horizon, warmup_layers=warmup_layers).plan(num_layers)
        for depth in depths
    ]


def plan_at(plans: Sequence[DepthPlan], batch: int, *, seed: int) -> DepthPlan:
    """The plan of the batch with this number: each run of `len(plans)` batches uses every plan once, in a shuffled order.

    A function of its arguments alone, so a run that resumes (or another process of the same run) draws the same.
    """
    cycle, index = divmod(batch, len(plans))
    order = list(plans)
    random.Random(f"{seed}/{cycle}").shuffle(order)
    return order[index]


class DepthTrainer(transformers.Trainer):
    """A Trainer whose every training step runs under one of `plans`.

    Expects batches made by `shoal.train.data.collate`.
    """

    def __init__(self, *args: Any, plans: Sequence[DepthPlan], sampler: LengthGrouped, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans = plans
        self.sampler = sampler
        self.micro_batch = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return self.sampler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, both within the depth context."""
        plan = plan_at(self.plans, self.state.global_step, seed=self.args.seed)
        with depth_context(model, plan, prompt_columns=prompt_columns(inputs)):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss
