"""OpenVINO GenAI: the model is exported once by optimum-intel, then run by both of GenAI's pipelines, the faster per batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .protocol import Engine, Fastest, Loaded, Unsupported, check_lengths, converted, serve

HINTS = {"bfloat16": "bf16", "float32": "f32", "int8": "bf16"}
"""What activations are computed in; the plugin takes float32 where the processor has no bfloat16 products."""

CACHE_GIB = 2
PROMPT_TOKENS_PER_PASS = 8192
"""So many that the prompts of a batch run in one pass, and its first tokens come together."""


def import_library() -> None:
    """Import what a user of GenAI imports."""
    import openvino_genai  # noqa: F401


def convert(checkpoint: Path, dtype: str, cache: Path) -> None:
    """Export to OpenVINO's format: weights in `dtype`, int8 by optimum's default (per channel, asymmetric, weights only)."""
    if dtype not in HINTS:
        raise Unsupported(f"no weights in {dtype}")

    def export(path: Path) -> None:
        import torch
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        how: dict[str, Any] = (
            {"quantization_config": OVWeightQuantizationConfig(bits=8)}
            if dtype == "int8"
            else {"load_in_8bit": False, "torch_dtype": getattr(torch, dtype)}
        )
        OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, **how).save_pretrained(path)

    converted(_exported(checkpoint, dtype, cache), export)


def load(checkpoint: Path, dtype: str, cache: Path, threads: int) -> Loaded:
    """Load the exported model."""
    import openvino
    import openvino_genai

    path = _exported(checkpoint, dtype, cache)
    properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": HINTS[dtype]}
    candidates: dict[str, Callable[[], Engine]] = {
        "continuous batching": partial(ContinuousBatching, path, properties),
        "stateful LLMPipeline": partial(Stateful, path, properties),
    }
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    activations = "bfloat16" if HINTS[dtype] == "bf16" and "BF16" in capabilities else "float32"
    return Loaded(
        engine=Fastest(candidates),
        version=openvino_genai.__version__.split("-")[0],
        note=f"weights {dtype}, computes in {activations}, default cache precision, no prefix caching; "
        "the faster of its two pipelines per batch size",
    )


class ContinuousBatching:
    """`ContinuousBatchingPipeline`: paged attention, driven step by step."""

    def __init__(self, path: Path, properties: dict[str, Any]) -> None:
        """`path` is the exported model."""
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_batched_tokens = PROMPT_TOKENS_PER_PASS
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """As the protocol's `Engine.time`."""
        import numpy as np
        import openvino

        settings = _settings(new_tokens)
        tensors = [openvino.Tensor(np.array([prompt])) for prompt in prompts]
        lengths = [0] * len(prompts)
        first = None
        began = time.perf_counter()
        handles = [self._pipeline.add_request(row, tensor, settings) for row, tensor in enumerate(tensors)]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for row, handle in enumerate(handles):
                if handle.can_read():
                    lengths[row] += sum(len(output.generated_ids) for output in handle.read().values())
            if first is None and all(lengths):
                first = time.perf_counter() - began
        whole = time.perf_counter() - began
        check_lengths(lengths, new_tokens)
        return first or whole, whole


class Stateful:
    """`LLMPipeline` on its stateful model: one padded batch."""

    def __init__(self, path: Path, properties: dict[str, Any]) -> None:
        """`path` is the exported model."""
        import openvino_genai

        self._pipeline = openvino_genai.LLMPipeline(path, "CPU", ATTENTION_BACKEND="SDPA", **properties)

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """As the protocol's `Engine.time`; the time of the first token is GenAI's own."""
        import numpy as np
        import openvino
        import openvino_genai

        ids = np.array(prompts)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        began = time.perf_counter()
        results = self._pipeline.generate(inputs, _settings(new_tokens))
        whole = time.perf_counter() - began
        check_lengths([len(row) for row in results.tokens], new_tokens)
        return results.perf_metrics.get_ttft().mean / 1e3, whole


def _settings(new_tokens: int) -> Any:
    """Greedy, and exactly `new_tokens`."""
    import openvino_genai

    settings = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
    settings.set_eos_token_id(1)  # has to be some token; ignored
    return settings


def _exported(checkpoint: Path, dtype: str, cache: Path) -> Path:
    return cache / f"{checkpoint.name}-{dtype}-openvino"


if __name__ == "__main__":
    serve(import_library, load, convert)
