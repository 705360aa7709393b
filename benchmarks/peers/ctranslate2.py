"""CTranslate2: the model is converted once by its converter for transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .protocol import Loaded, Unsupported, check_lengths, converted, serve


def import_library() -> None:
    """Import what a user of CTranslate2 imports."""
    import ctranslate2  # noqa: F401


def convert(checkpoint: Path, dtype: str, cache: Path) -> None:
    """Convert to CTranslate2's format, int8 or float32; loading casts to what the processor can do."""
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    if dtype not in ("bfloat16", "float32", "int8"):
        raise Unsupported(f"no {dtype}")
    # CTranslate2 takes prompts as words, so the model gets a vocabulary in which every token is the word of its id.
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    words = Tokenizer(WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0"))

    def renamed(path: Path) -> None:
        path.mkdir()
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            (path / file).symlink_to(checkpoint / file)
        special = {"unk_token": "0", "bos_token": "0", "eos_token": "1"}
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)

    source = converted(cache / f"{checkpoint.name}-words", renamed)
    quantization = "int8" if dtype == "int8" else "float32"
    converter = TransformersConverter(str(source))
    converted(
        _converted(checkpoint, dtype, cache), lambda path: converter.convert(str(path), quantization=quantization)
    )


def load(checkpoint: Path, dtype: str, cache: Path, threads: int) -> Loaded:
    """Load the converted model."""
    import ctranslate2

    computed = dtype if dtype in ctranslate2.get_supported_compute_types("cpu") else "float32"
    generator = ctranslate2.Generator(
        str(_converted(checkpoint, dtype, cache)),
        device="cpu",
        compute_type=computed,
        inter_threads=1,
        intra_threads=threads,
    )
    return Loaded(
        engine=Generate(generator),
        version=ctranslate2.__version__,
        note=f"computes in {computed}" + ("" if computed == dtype else f": it has no {dtype} on this processor"),
    )


class Generate:
    """`Generator.generate_batch`."""

    def __init__(self, generator: Any) -> None:
        """`generator` is a `ctranslate2.Generator`."""
        self._generator = generator

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """As the protocol's `Engine.time`."""
        words = [[str(token) for token in prompt] for prompt in prompts]
        firsts: list[float] = []

        def note_time(step: Any) -> bool:
            if step.step == 0:
                firsts.append(time.perf_counter())
            return False

        began = time.perf_counter()
        results = self._generator.generate_batch(
            words,
            beam_size=1,
            sampling_topk=1,
            min_length=new_tokens,
            max_length=new_tokens,
            include_prompt_in_result=False,
            callback=note_time,
        )
        whole = time.perf_counter() - began
        check_lengths([len(result.sequences_ids[0]) for result in results], new_tokens)
        return firsts[-1] - began, whole


def _converted(checkpoint: Path, dtype: str, cache: Path) -> Path:
    return cache / f"{checkpoint.name}-{'int8' if dtype == 'int8' else 'float32'}-ctranslate2"


if __name__ == "__main__":
    serve(import_library, load, convert)
