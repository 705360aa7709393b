"""Models with random weights, made by transformers and saved as checkpoints, so that every engine loads the same ones."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()

_NO_EOS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}

MODELS: dict[str, PreTrainedConfig] = {
    "OPT-125M": OPTConfig(**_NO_EOS),
    "Llama-300M": LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        tie_word_embeddings=False,
        **_NO_EOS,
    ),
    "Llama-500M": LlamaConfig(
        hidden_size=1280,
        intermediate_size=3456,
        num_hidden_layers=22,
        num_attention_heads=20,
        num_key_value_heads=20,
        vocab_size=32000,
        tie_word_embeddings=False,
        dtype="bfloat16",
        **_NO_EOS,
    ),
    "OPT-10M": OPTConfig(
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=2048,
        max_position_embeddings=512,
        **_NO_EOS,
    ),
    "OPT-125M-2": OPTConfig(**_NO_EOS, num_hidden_layers=2),
    "OPT-quick": OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=12,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        **_NO_EOS,
    ),
    "Llama-quick": LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        **_NO_EOS,
    ),
}
"""Shapes by name. OPT-125M is 12 x 768 with a vocabulary of 50,272, Llama-300M 24 x 1024 with 32,000, Llama-500M 22 x 1280 with
32,000 (1 GB in bfloat16), OPT-125M-2 is OPT-125M with 2 layers, OPT-10M 12 x 256 with 2,048 (the shape of the
model that ships with Shoal); the quick ones only show that
a benchmark runs. No token ends a completion."""


def random_checkpoint(name: str, directory: Path, *, words: bool = False) -> Path:
    """Save the model `name` with random weights (seed 0) in its config's dtype, float32 where it names none, under `directory`,
    once; returns its directory. With `words` every token is a word of its own, so that what is generated has a text."""
    path = directory / (f"{name}-words" if words else name)
    if not path.exists():
        config = MODELS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        # Prompts are token ids, so one word will do where nobody reads.
        vocabulary = {f"w{token}": token for token in range(config.vocab_size if words else 1)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")))
        partial = path.with_name(f"{path.name}.partial")  # what an interrupted run leaves is never taken for whole
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        partial.rename(path)
    return path


def random_prompts(vocab_size: int, *, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Token ids drawn evenly from the vocabulary, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    tokens: list[list[int]] = torch.randint(vocab_size, (num_prompts, num_tokens), generator=generator).tolist()
    return tokens
