"""`TuneConfig`: how a checkpoint is tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shoal.depth.policies import POLICIES
from shoal.errors import InvalidInput, nearest


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How to tune. Two runs with the same config, data, model and machine give the same weights."""

    policy: str = "skipdecode"
    """Policy whose plans are trained, a name in `shoal.depth.policies.POLICIES`."""
    depths: tuple[float, ...] = (1.0, 1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
    """Depths to tune for, one drawn per batch; a depth named twice is drawn twice as often."""
    depth_sampling: Literal["even", "need"] = "even"
    """How a batch's depth is drawn: each as often as it is named, or more often where the loss exceeds the dense one by more
    (`shoal.train.depths`)."""
    horizon: int | None = None
    """Clocks over which depth falls; None takes the median completion length of the data, in tokens."""
    warmup_layers: int = 1
    """Bottom layers that always run; for policies that have no such setting 1, which is what they do."""
    from_scratch: bool = False
    """Start from random weights: of the checkpoint, config and tokenizer alone are read."""
    num_layers: int | None = None
    """Layers of a model from scratch; None takes the config's. Fewer of them make the small dense model to compare with."""
    distill: float = 0.0
    """Share w of distillation in the loss, from 0 to 1: (1 - w) cross-entropy + w KL(teacher || model), see
    `shoal.train.distill`."""
    teacher: str | None = None
    """Checkpoint that teaches, with the same tokenizer: the model that the tuned one shall draft for. None: the start itself."""
    epochs: float = 1.0
    """Passes over the data; a fraction is fine."""
    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    learning_rate: float = 3e-4
    """Peak of AdamW's learning rate, which warms up over 3% of the steps and then falls along a cosine."""
    batch_size: int = 64
    """Examples per optimizer step."""
    accumulate: int = 1
    """Micro-batches that a batch is split into, to save memory."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    seed: int = 0
    """Seed of data order, plan order, dropout, and of random weights."""
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
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InvalidInput(f"{name} must be above 0, got {value}")
        for name in ("horizon", "steps", "num_layers", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name} must be 1 or more, got {value}")
        if self.batch_size % self.accumulate:
            raise InvalidInput(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        self._check_depth()
        self._check_start()

    def _check_depth(self) -> None:
        if self.policy not in POLICIES:
            raise InvalidInput(f"unknown policy {self.policy!r}: {nearest(self.policy, POLICIES)}")
        settings = POLICIES[self.policy].__dataclass_fields__
        if self.warmup_layers < 0:
            raise InvalidInput(f"warmup_layers must be 0 or more, got {self.warmup_layers}")
        if self.warmup_layers != 1 and "warmup_layers" not in settings:
            raise InvalidInput(f"the policy {self.policy!r} has no warmup_layers: leave it at 1")
        if self.horizon is not None and "horizon" not in settings:
            raise InvalidInput(f"the policy {self.policy!r} has no horizon: leave it out")
        if self.depth_sampling not in ("even", "need"):
            raise InvalidInput(f"depth_sampling must be 'even' or 'need', got {self.depth_sampling!r}")
        if self.depth_sampling == "need" and 1 not in self.depths:
            raise InvalidInput("depth_sampling 'need' compares losses with the dense one: add the depth 1 to depths")

    def _check_start(self) -> None:
        if not 0 <= self.distill <= 1:
            raise InvalidInput(f"distill is a share of the loss, from 0 to 1, got {self.distill}")
        if self.teacher is not None and not self.distill:
            raise InvalidInput("teacher needs a share of the loss: give distill, such as 0.5")
        if self.from_scratch and self.distill and self.teacher is None:
            raise InvalidInput(
                "distill needs a model to learn from, and from_scratch has none: name a teacher, or leave one out"
            )
        if self.from_scratch and self.lora_rank:
            raise InvalidInput("lora_rank adapts a model, and from_scratch has none: leave one of them out")
        if self.num_layers is not None and not self.from_scratch:
            raise InvalidInput("num_layers is for random weights: it needs from_scratch")
