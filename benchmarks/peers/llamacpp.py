"""llama.cpp through llama-cpp-python's plain bindings: one context per batch size, driven pass by pass.

Llama shapes only: llama.cpp has no OPT. "bfloat16" tries F16 and BF16 and keeps the faster per batch size; int8 is Q8_0.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .protocol import Fastest, Loaded, Unsupported, check_lengths, converted, serve

TYPES = {"bfloat16": ("F16", "BF16"), "float32": ("F32",), "int8": ("Q8_0",)}
PASS_TOKENS = 2048
SLOT_STEP = 256
"""llama.cpp rounds the length of a sequence's cache to this."""


def import_library() -> None:
    """Import what a user of llama.cpp's bindings imports."""
    import llama_cpp  # noqa: F401


def convert(checkpoint: Path, dtype: str, cache: Path) -> None:
    """Write one GGUF file per type."""
    architecture = json.loads((checkpoint / "config.json").read_text())["model_type"]
    if architecture != "llama":
        raise Unsupported(f"no architecture {architecture}")
    if dtype not in TYPES:
        raise Unsupported(f"no {dtype}")
    for name in TYPES[dtype]:
        converted(_converted(checkpoint, name, cache), partial(write_gguf, checkpoint, name))


def write_gguf(checkpoint: Path, type_name: str, path: Path) -> None:
    """Write a Llama checkpoint (safetensors in float32) as GGUF, matrices in `type_name` and vectors in float32; no vocabulary."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        for part, parts in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                # GGUF rotates neighbouring dimensions, transformers those half a head apart.
                weight = weight.reshape(parts, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType[type_name if weight.ndim > 1 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(weight, dtype=np.float32), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(checkpoint: Path, dtype: str, cache: Path, threads: int) -> Loaded:
    """Load the GGUF file of the first type; of the others when the first batch is timed."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    types = TYPES[dtype]
    return Loaded(
        engine=Fastest({name: partial(Model, _converted(checkpoint, name, cache), threads) for name in types}),
        version=llama_cpp.__version__,
        note=f"weights {' or '.join(types)}{', the faster per batch size' * (len(types) > 1)}, cache F16, flash attention on auto",
    )


class Model:
    """A model and the context that the last batch needed."""

    def __init__(self, path: Path, threads: int) -> None:
        """`path` is a GGUF file."""
        import llama_cpp

        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        self._context: Any = None
        self._sizes = 0, 0

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """As the protocol's `Engine.time`."""
        import llama_cpp
        import numpy as np

        ids = np.array(prompts, dtype=np.int32)
        batch, prompt_tokens = ids.shape
        self._make_context(batch, prompt_tokens + new_tokens)
        began = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        tokens = self._run(ids, position=0)
        first = time.perf_counter() - began
        for step in range(new_tokens - 1):
            tokens = self._run(tokens[:, None], position=prompt_tokens + step)
        whole = time.perf_counter() - began
        check_lengths([len(tokens)], batch)
        return first, whole

    def __del__(self) -> None:
        """Give the memory back."""
        import llama_cpp

        if self._context is not None:
            llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _make_context(self, batch: int, length: int) -> None:
        """A context of `batch` sequences of `length` tokens; the last one is kept."""
        import llama_cpp

        sizes = batch, -(-length // SLOT_STEP) * SLOT_STEP
        if sizes == self._sizes:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = batch
        settings.n_ctx = batch * sizes[1]
        settings.n_batch = max(PASS_TOKENS, batch)
        settings.n_threads = settings.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {batch} sequences of {sizes[1]} tokens")
        self._sizes = sizes

    def _run(self, ids: Any, position: int) -> Any:
        """Feed `ids` [rows, tokens] from `position` on, as many rows at once as a pass takes; returns the likeliest next [rows]."""
        import llama_cpp
        import numpy as np

        rows, count = ids.shape
        if count > PASS_TOKENS:
            raise RuntimeError(f"prompts of more than {PASS_TOKENS} tokens")
        rows_at_once = PASS_TOKENS // count
        result = np.empty(rows, dtype=np.int32)
        for start in range(0, rows, rows_at_once):
            part = ids[start : start + rows_at_once]
            total = part.size
            batch = llama_cpp.llama_batch_init(total, 0, 1)
            batch.n_tokens = total
            as_array = np.ctypeslib.as_array
            as_array(batch.token, (total,))[:] = part.reshape(-1)
            as_array(batch.pos, (total,))[:] = np.tile(np.arange(position, position + count), len(part))
            as_array(batch.n_seq_id, (total,))[:] = 1
            for index in range(total):
                batch.seq_id[index][0] = start + index // count
            as_array(batch.logits, (total,))[:] = np.arange(total) % count == count - 1
            if llama_cpp.llama_decode(self._context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            logits = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
            result[start : start + len(part)] = as_array(logits, (len(part), self._vocab_size)).argmax(axis=1)
            llama_cpp.llama_batch_free(batch)
        return result


def _converted(checkpoint: Path, type_name: str, cache: Path) -> Path:
    return cache / f"{checkpoint.name}-{type_name}.gguf"


if __name__ == "__main__":
    serve(import_library, load, convert)
