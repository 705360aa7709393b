"""How far a prompt lies from those that a probe was trained on: Mahalanobis's distance to the nearest class, as a quantile.

The quantiles are those of prompts of the same kind that were *not* trained on. The training prompts themselves lie too near: means
and covariance were fitted to them, the more so the more values a vector has.

A probe is as sure of a prompt that is like nothing it has seen as of any other; what tells is where its vector lies (Lee et al.
2018, arXiv 1807.03888). The covariance is shared by the classes and shrunk (Ledoit and Wolf 2004), because vectors may have more
values than there are prompts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

QUANTILES = 1001
"""Of the held-out prompts' distances, kept."""


def familiar(vectors: Tensor, labels: Tensor, held_out: Tensor, num_classes: int) -> dict[str, Tensor]:
    """What `Probe.unfamiliarity` reads, from training prompts' vectors [n, d] and classes [n], and held-out prompts' [m, d]."""
    from sklearn.covariance import LedoitWolf

    means = torch.stack([vectors[labels == one].mean(dim=0) for one in range(num_classes)])
    within = (vectors - means[labels]).double().numpy()
    precision = LedoitWolf(assume_centered=True).fit(within).precision_
    scale = torch.from_numpy(np.linalg.cholesky(precision)).float()  # (x - m)' P (x - m) = |(x - m) L|^2
    distances = torch.cdist(held_out @ scale, means @ scale).amin(dim=1)
    quantiles = torch.quantile(distances, torch.linspace(0, 1, QUANTILES))
    return {"familiar_means": means, "familiar_scale": scale, "familiar_distances": quantiles}
