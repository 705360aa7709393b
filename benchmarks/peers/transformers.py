"""transformers: `generate`, greedy, with its default cache. Runs in our own environment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .protocol import Loaded, Unsupported, check_lengths, serve


def import_library() -> None:
    """Import what a user of transformers imports."""
    from transformers import AutoModelForCausalLM  # noqa: F401


def load(checkpoint: Path, dtype: str, cache: Path, threads: int) -> Loaded:
    """Load the model with its weights in `dtype`."""
    import torch
    import transformers

    if dtype not in ("bfloat16", "float32"):
        raise Unsupported(f"no {dtype} on CPUs without another library")
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    return Loaded(
        engine=Generate(model),
        version=transformers.__version__,
        note=f"weights, cache and products in {dtype}, torch {torch.__version__}",
    )


class Generate:
    """`model.generate`."""

    def __init__(self, model: Any) -> None:
        """`model` is a transformers model for causal language modelling."""
        self._model = model

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """As the protocol's `Engine.time`."""
        import torch

        times: list[float] = []

        def note_time(input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        input_ids = torch.tensor(prompts)
        began = time.perf_counter()
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=[note_time],
        )
        whole = time.perf_counter() - began
        check_lengths([output.shape[1] - input_ids.shape[1]], new_tokens)
        return times[0] - began, whole


if __name__ == "__main__":
    serve(import_library, load)
