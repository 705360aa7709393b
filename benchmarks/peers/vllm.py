"""vLLM's CPU build, its engine in this process (no server), compiled as by default, with its OpenMP preloaded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .protocol import Loaded, Unsupported, check_lengths, serve

CACHE_GIB = 2
PROMPT_TOKENS_PER_PASS = 8192
"""So many that the prompts of a batch run in one pass, and its first tokens come together."""


def preload() -> None:
    """Start again with Intel's OpenMP, which vLLM's wheel brings and its manual asks for, before anything else is loaded."""
    library = Path(sys.prefix, "lib", "libiomp5.so")
    if library.exists() and "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
        os.execv(sys.executable, [sys.executable, "-m", "peers.vllm", *sys.argv[1:]])


def import_library() -> None:
    """Import what a user of vLLM imports."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GIB)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM  # noqa: F401


def load(checkpoint: Path, dtype: str, cache: Path, threads: int) -> Loaded:
    """Load and compile the model; what was compiled is kept in the cache folder."""
    import torch
    from vllm import LLM

    if dtype not in ("bfloat16", "float32"):
        raise Unsupported(f"no weights in {dtype} without a checkpoint that was quantised before")
    os.environ["VLLM_CACHE_ROOT"] = str(cache / "vllm")
    torch.set_num_threads(threads)
    llm = LLM(
        str(checkpoint),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=128,
        max_num_batched_tokens=PROMPT_TOKENS_PER_PASS,
        enable_prefix_caching=False,
    )
    return Loaded(
        engine=Steps(llm.llm_engine),
        version=version("vllm-cpu"),
        note=f"weights, cache and products in {dtype}, compiled, one process, {CACHE_GIB} GiB of cache, no prefix caching",
    )


class Steps:
    """vLLM's engine, driven step by step."""

    def __init__(self, engine: Any) -> None:
        """`engine` is the `LLMEngine`."""
        self._engine = engine
        self._requests = 0

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """As the protocol's `Engine.time`."""
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        lengths: dict[str, int] = {}
        first = None
        began = time.perf_counter()
        for prompt in prompts:
            self._requests += 1
            self._engine.add_request(str(self._requests), {"prompt_token_ids": list(prompt)}, settings)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                lengths[output.request_id] = len(output.outputs[0].token_ids)
            if first is None and len(lengths) == len(prompts):
                first = time.perf_counter() - began
        whole = time.perf_counter() - began
        check_lengths(list(lengths.values()), new_tokens)
        return first or whole, whole


if __name__ == "__main__":
    preload()
    serve(import_library, load)
