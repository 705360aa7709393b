"""Training probes on extracted states (arXiv 2601.13288, section 4): AdamW along a cosine, early stopping, a small search.

Weights are trained in units of the states: a gate's and the down-cast's in the root mean square of their level, the head's in mean
and deviation of its input at the start. What is written is in the paper's form; in these units one learning rate suits all levels,
whose states differ in size a hundredfold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.errors import InvalidInput, nearest
from shoal.models.passes import Ints
from shoal.models.weights import DecoderConfig
from shoal.signals.extract import Report, States
from shoal.signals.familiarity import familiar
from shoal.signals.labelled import check_split
from shoal.signals.operators import Pooling
from shoal.signals.probe import OPERATORS, Operator, Probe, ProbeSettings
from shoal.signals.quality import Quality, best_threshold, quality

WINDOW = 16
"""Batches whose prompts are sorted by length together, so that few rows are padding."""
READ_TOGETHER = 64
"""Prompts that are read together where nothing is learnt."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train a probe. What has several values is searched."""

    operator: Operator = "gate"
    """`pool`, `gate` or `attention`."""
    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """Peaks of AdamW's."""
    poolings: tuple[Pooling, ...] = ("mean", "max")
    """Of `pool` and `attention`."""
    heads: tuple[int, ...] = (1, 2)
    """Of `attention`; those that do not divide its width are left out."""
    factor: int = 32
    """Of `attention`: the states' width over the width inside."""
    gate_scale: float = 1.0
    """Of `gate`."""
    num_levels: int | None = None
    """Levels to read, from the bottom; None for all."""
    epochs: int = 10
    """Most passes over the data."""
    patience: int = 3
    """Passes without a better score on the validation part before training stops."""
    batch_size: int = 32
    """Prompts per step."""
    weight_decay: float = 0.01
    """AdamW's."""
    validation: float = 0.15
    """Share of the prompts that decides when to stop, which trial is best, and the threshold."""
    seed: int = 0
    """Of the split, the order and random weights."""

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise InvalidInput(f"unknown operator {self.operator!r}: {nearest(self.operator, OPERATORS)}")
        for name in ("epochs", "patience", "batch_size", "factor"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise InvalidInput(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise InvalidInput(f"seed must be 0 to 2^32 - 1, got {self.seed}")
        if not self.learning_rates or not all(0 < rate < 1 for rate in self.learning_rates):
            raise InvalidInput(f"learning_rates must be above 0 and below 1, got {self.learning_rates}")
        if not 0 < self.validation < 1:
            raise InvalidInput(f"validation is a share of the prompts, above 0 and below 1, got {self.validation}")

    def trials(
        self, model: DecoderConfig, *, classes: tuple[str, ...], name: str, max_prompt_tokens: int
    ) -> list[tuple[dict[str, Any], ProbeSettings]]:
        """What the search tries, and the probe's settings with it. Arguments as for `fit`; raises `InvalidInput`."""
        shape, attends = model.shape, self.operator == "attention"
        base = ProbeSettings(
            name=name,
            operator=self.operator,
            classes=classes,
            hidden_size=shape.hidden_size,
            num_levels=shape.num_layers + 1 if self.num_levels is None else self.num_levels,
            max_prompt_tokens=max_prompt_tokens if attends else None,
            shape=shape,
            fingerprint=model.fingerprint,
        )
        return [
            (one, replace(base, **{key: value for key, value in one.items() if key != "learning_rate"}))
            for one in self._searched(shape.hidden_size)
        ]

    def _searched(self, hidden_size: int) -> list[dict[str, Any]]:
        """Settings of the operator, and a learning rate."""
        rates = [{"learning_rate": rate} for rate in self.learning_rates]
        if self.operator == "gate":
            return [{"gate_scale": self.gate_scale, **rate} for rate in rates]
        poolings = [{"pooling": pooling} for pooling in self.poolings]
        if self.operator == "pool":
            return [{**pooling, **rate} for pooling, rate in itertools.product(poolings, rates)]
        width = hidden_size // self.factor
        heads = [{"factor": self.factor, "heads": count} for count in self.heads if width and width % count == 0]
        if not heads:
            raise InvalidInput(
                f"none of the heads {self.heads} divides the width of attention, {hidden_size} / {self.factor}"
            )
        return [{**a, **b, **c} for a, b, c in itertools.product(heads, poolings, rates)]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a search."""

    settings: Mapping[str, Any]
    """What it tried."""
    score: float
    """On the validation part: F1 of the positive class, or accuracy where there are more than two."""
    loss: float
    """There, in nats."""
    epochs: int
    """Passes that it made."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Fitted:
    """A trained probe and how it came about."""

    probe: Probe
    trials: Sequence[Trial] = field(repr=False)
    """All of the search."""
    chosen: Trial
    """The best."""
    validation: Quality
    """Of the probe on the validation part, with its threshold and temperature chosen there."""


def fit(
    states: States,
    labels: Ints,
    train: Ints,
    validation: Ints,
    *,
    classes: tuple[str, ...],
    name: str,
    model: DecoderConfig,
    max_prompt_tokens: int,
    config: FitConfig,
    report: Report = lambda what, done, total: None,
) -> Fitted:
    """Search, train, calibrate.

    Args: `labels` [prompts]: index of each prompt's class; `train`, `validation`: places of prompts; `max_prompt_tokens`: limit of
    an attention probe. Raises `InvalidInput` as `check_split` and `FitConfig.trials` do.
    """
    check_split(labels, train, validation, classes)
    wanted = config.trials(model, classes=classes, name=name, max_prompt_tokens=max_prompt_tokens)
    data = Data(states, torch.from_numpy(labels), train, validation)
    tried: list[tuple[Trial, Probe]] = []
    for number, (trial, settings) in enumerate(wanted):
        report(f"trial {number + 1} of {len(wanted)}", number, len(wanted))
        tried.append(train_one(data, settings, trial, config))
    report("trials", len(wanted), len(wanted))
    best, probe = max(tried, key=lambda pair: (pair[0].score, -pair[0].loss))
    probe = calibrated(probe, data)
    held_out = vectors_of(probe, data, data.validation)
    known = familiar(vectors_of(probe, data, data.train), data.labels[data.train], held_out, len(classes))
    probe = replace(probe, tensors={**probe.tensors, **known})
    held = probe.probabilities(probe.logits(held_out))
    scores = quality(held.numpy(), labels[data.validation], threshold=probe.settings.threshold)
    return Fitted(probe=probe, trials=[trial for trial, _ in tried], chosen=best, validation=scores)


@dataclass(frozen=True, eq=False)
class Data:
    """Extracted states with their labels, split."""

    states: States
    labels: Tensor
    """int64 [prompts]."""
    train: Ints
    """Places of prompts."""
    validation: Ints
    """Places of prompts."""

    def of(self, places: Ints, settings: ProbeSettings) -> tuple[Tensor, Tensor]:
        """What a probe reads of some prompts: states [levels, B, T, d], and which of them are tokens [B, T].

        A pooled vector stands for the tokens that it was pooled from, and T is 1.
        """
        if settings.operator == "pool":
            pooled = self.states.pooled[torch.from_numpy(places), ("mean", "max").index(settings.pooling)]
            rows = pooled[:, : settings.num_levels].transpose(0, 1).unsqueeze(2)
            return rows, torch.ones(len(places), 1, dtype=torch.bool)
        x, mask = self.states.padded(places)
        return x[: settings.num_levels], mask

    def shuffled(self, size: int, generator: np.random.Generator) -> list[Ints]:
        """The training prompts in batches: prompts of one batch are about equally long, batches come in random order."""
        order = generator.permutation(self.train)
        windows = [order[at : at + WINDOW * size] for at in range(0, len(order), WINDOW * size)]
        lengths = self.states.lengths
        ordered = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
        batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        generator.shuffle(batches)
        return batches


@torch.inference_mode()
def vectors_of(probe: Probe, data: Data, places: Ints) -> Tensor:
    """Prompts' vectors [n, d]."""
    batches = [places[at : at + READ_TOGETHER] for at in range(0, len(places), READ_TOGETHER)]
    return torch.cat([probe.layer_stage(probe.token_stage(*data.of(batch, probe.settings))) for batch in batches])


class Trainee:
    """A probe under training: raw parameters, and the units that turn them into a probe's tensors."""

    def __init__(self, data: Data, settings: ProbeSettings, generator: torch.Generator) -> None:
        self.settings = settings
        d, h, sizes = settings.hidden_size, settings.width, settings.sizes()
        some = data.train[: READ_TOGETHER * 4]
        levels = data.states.pooled[torch.from_numpy(some), 0, : settings.num_levels]
        size = levels.square().mean(dim=(0, 2)).sqrt().clamp(min=1e-6)
        self.units = {
            "token_gate": size[:, None].reciprocal(),
            "layer_gate": levels.square().mean().rsqrt(),
            "token_qkv": size[:, None, None].reciprocal(),
        }
        spread = {
            "token_qkv": d**-0.5,
            "layer_qkv": d**-0.5,
            "token_out": max(1, h) ** -0.5,
            "layer_out": max(1, h) ** -0.5,
        }
        self.raw = {
            name: (torch.randn(of, generator=generator) * spread.get(name, 0.0)).requires_grad_()
            for name, of in sizes.items()
        }
        self.centre, self.deviation = torch.zeros(d), torch.ones(d)
        with torch.no_grad():
            vectors = vectors_of(self.probe(), data, some).clone()
            self.centre, self.deviation = vectors.mean(dim=0), vectors.std(dim=0).clamp(min=1e-6)

    def probe(self) -> Probe:
        """The probe now; gradients go through it."""
        tensors = {name: raw * self.units.get(name, 1.0) for name, raw in self.raw.items()}
        tensors["head"] = tensors["head"] / self.deviation
        tensors["head_bias"] = tensors["head_bias"] - tensors["head"] @ self.centre
        return Probe(self.settings, tensors)


def train_one(data: Data, settings: ProbeSettings, trial: Mapping[str, Any], config: FitConfig) -> tuple[Trial, Probe]:
    """One training run; the probe is that of its best epoch."""
    trainee = Trainee(data, settings, torch.Generator().manual_seed(config.seed))
    generator = np.random.default_rng(config.seed)
    optimizer = torch.optim.AdamW(
        trainee.raw.values(), lr=trial["learning_rate"], betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    total = config.epochs * math.ceil(len(data.train) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    best: tuple[float, float] = (-math.inf, -math.inf)
    best_epoch, probe = 0, trainee.probe()
    for epoch in range(1, config.epochs + 1):
        for batch in data.shuffled(config.batch_size, generator):
            now = trainee.probe()
            logits = now.logits(now.layer_stage(now.token_stage(*data.of(batch, settings))))
            optimizer.zero_grad()
            loss_of(logits, data.labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            now = trainee.probe()
            logits = now.logits(vectors_of(now, data, data.validation))
            labels = data.labels[data.validation]
            found = quality(now.probabilities(logits).numpy(), labels.numpy(), threshold=0.5)
            score = found.f1 if len(settings.classes) == 2 else found.accuracy
            reached = (score, -float(loss_of(logits, labels)))
        if reached > best:
            best, best_epoch = reached, epoch
            probe = Probe(settings, {name: tensor.detach().clone() for name, tensor in now.tensors.items()})
        elif epoch - best_epoch >= config.patience:
            break
    return Trial(settings=dict(trial), score=best[0], loss=-best[1], epochs=epoch), probe


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, C]; with one logit, that of the positive class."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    return F.cross_entropy(logits, labels)


def calibrated(probe: Probe, data: Data) -> Probe:
    """With the temperature of the least loss on the validation part, and of two classes the threshold of the best F1 there."""
    logits, labels = probe.logits(vectors_of(probe, data, data.validation)), data.labels[data.validation]
    temperatures = torch.logspace(-1, 2, 121)
    losses = torch.stack([loss_of(logits / temperature, labels) for temperature in temperatures])
    probe = replace(probe, settings=replace(probe.settings, temperature=float(temperatures[losses.argmin()])))
    if len(probe.settings.classes) > 2:
        return probe
    threshold = best_threshold(probe.probabilities(logits)[:, 1].numpy(), labels.numpy())
    return replace(probe, settings=replace(probe.settings, threshold=threshold))
