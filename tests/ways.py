"""The ways to run a model on a CPU, and their logits along the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compared_runs import Job
from shoal import Engine
from shoal.engine.drafting import Drafting
from shoal.models.checkpoint import load_checkpoint
from shoal.models.decoder import Decoder
from shoal.models.executor import Executor
from shoal.models.native.decoder import NativeDecoder
from shoal.models.native.library import Library, library

WAYS = ("plain", "native attention", "native")
"""PyTorch alone, PyTorch's products around the kernel's attention of decode passes, whole passes by the kernel."""
NO_KERNEL = "the CPU kernel was not built, or this processor cannot run it"

needs_kernel = pytest.mark.skipif(library() is None, reason=NO_KERNEL)


def kernel() -> Library:
    """The kernel; the test is skipped where there is none."""
    loaded = library()
    if loaded is None:
        pytest.skip(NO_KERNEL)
    return loaded


def decoder_of(way: str, directory: Path, dtype: str = "auto") -> Executor:
    """The checkpoint's decoder, one of `WAYS`, whatever this machine would choose."""
    config, weights = load_checkpoint(directory, dtype=dtype)
    match way:
        case "plain":
            return Decoder(config, weights)
        case "native attention":
            return Decoder(config, weights, kernel())
        case _:
            return NativeDecoder(config, weights, kernel())


@dataclass
class Guide:
    """A logits processor that keeps what it sees and leaves one token to choose: the next of a given completion."""

    completion: Sequence[int]
    rows: list[Tensor]

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, -torch.inf)
        forced[self.completion[len(self.rows)]] = 0
        self.rows.append(logits.clone())
        return forced


def logits_along(
    engine: Engine, jobs: Sequence[Job], completions: Sequence[Sequence[int]], drafts: Sequence[Drafting] | None = None
) -> list[Tensor]:
    """float32 [generated, V] of each job, all in one call, while every job is made to emit its given completion."""
    guides = [Guide(completion, []) for completion in completions]
    prompts, samplings, plans = (list(column) for column in zip(*jobs, strict=True))
    guided: list[Callable[..., Tensor]] = list(guides)
    samplings = [replace(one, processor=guide) for one, guide in zip(samplings, guided, strict=True)]
    generations = engine.generate(prompts, samplings, plans, draft=drafts)
    assert [g.token_ids for g in generations] == [tuple(completion) for completion in completions]
    return [torch.stack(guide.rows) for guide in guides]
