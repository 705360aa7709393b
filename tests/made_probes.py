"""Probes with random weights for any model."""

from __future__ import annotations

from typing import Any

import torch

from shoal.engine.engine import Engine
from shoal.signals.probe import Probe, ProbeSettings

KINDS: dict[str, dict[str, Any]] = {
    "mean": {"operator": "pool", "pooling": "mean"},
    "max": {"operator": "pool", "pooling": "max"},
    "gate": {"operator": "gate"},
    "sharp gate": {"operator": "gate", "gate_scale": 8.0},
    "attention": {"operator": "attention", "factor": 8, "heads": 2, "max_prompt_tokens": 128},
    "attention, max": {"operator": "attention", "factor": 4, "heads": 3, "pooling": "max", "max_prompt_tokens": 128},
    "three classes": {"operator": "gate", "classes": ("a", "b", "c")},
    "lower levels": {"operator": "gate", "num_levels": 3},
}
"""Settings of one probe of each kind, by its name."""


def random_probe(engine: Engine, name: str, *, seed: int = 0, **settings: Any) -> Probe:
    """A probe named `name`, of that kind where it is one of `KINDS`, or with `settings`."""
    shape, config = engine.shape, engine.config
    given = {
        "classes": ("no", "yes"),
        "num_levels": shape.num_layers + 1,
        **KINDS.get(name, {"operator": "gate"}),
        **settings,
    }
    made = ProbeSettings(name=name, hidden_size=shape.hidden_size, shape=shape, fingerprint=config.fingerprint, **given)
    generator = torch.Generator().manual_seed(seed)
    d = shape.hidden_size

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) / d**0.5

    tensors = {key: random(*size) for key, size in made.sizes().items()}
    familiar = {
        "familiar_means": random(len(made.classes), d),
        "familiar_scale": random(d, d),
        "familiar_distances": random(100).abs().sort().values * 20,
    }
    return Probe(made, tensors | familiar)
