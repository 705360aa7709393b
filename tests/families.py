"""Tiny random transformers models of every supported family, and ways to save them as real checkpoints look.

Sizes are odd on purpose (a vocabulary of 263, an MLP of 76, 3 or 6 heads), and every parameter is random, biases and
norms too: an identity norm or a zero bias would hide a missing term.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EOS, PAD, VOCAB = 256, 257, 263
"""Tokens 0 to 255 are bytes, in no particular order; 258 to 262 have no text."""

_IDS = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
_ROTARY = {
    **_IDS,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {
        **_IDS,
        "hidden_size": 48,
        "ffn_dim": 76,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "max_position_embeddings": 256,
    },
    "gpt2": {**_IDS, "n_embd": 48, "n_inner": 76, "n_layer": 3, "n_head": 3, "n_positions": 256},
    "llama": {**_ROTARY, "rope_parameters": LLAMA3_SCALING},
    "mistral": {**_ROTARY, "head_dim": 16, "sliding_window": None},
    "qwen2": {**_ROTARY, "tie_word_embeddings": True},
    "qwen3": {**_ROTARY, "head_dim": 24, "tie_word_embeddings": True},
    "gpt_neox": {
        **_IDS,
        "hidden_size": 48,
        "intermediate_size": 76,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
}
"""Config options of one tiny model per family."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in CONFIGS},
    "opt-gelu-without-biases": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    "opt-untied": ("opt", {"tie_word_embeddings": False}),
    "gpt2-default-width": ("gpt2", {"n_inner": None}),
    "llama-unscaled": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 128}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-full-rotary": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ),
    "gpt_neox-without-attention-bias": ("gpt_neox", {"attention_bias": False}),
}
"""Every family, and the config options within one that change what is computed: name -> (family, options)."""


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random transformers model in float32, ready for inference; `overrides` are options of its config."""
    options = {**CONFIGS.get(family, _ROTARY), **overrides}
    config = CONFIG_MAPPING[family](**json.loads(json.dumps(options)))
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, seed)
    return model


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Draw every parameter: products that keep the scale of their input, norms about 1, biases that matter.

    The head has standard deviation 2 / sqrt(d), so that logits, products of it and a normed state, have about 2.
    """
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and parameter.shape[0] == model.config.vocab_size:
                parameter.copy_(noise * 2 / width**0.5)
            elif parameter.dim() == 2:
                parameter.copy_(noise / width**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)


def save(
    model: PreTrainedModel,
    directory: Path,
    *,
    style: Literal[4, 5] = 5,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    tokenizer: bool = True,
) -> Path:
    """Write `model` as transformers `style` does, in files of at most `shard_size`, with a tokenizer of bytes."""
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    model.to(torch.float32)
    if style == 4:
        edit_json(directory / "config.json", **_as_version_4(json.loads((directory / "config.json").read_text())))
    if tokenizer:
        save_tokenizer(directory)
    return directory


def _as_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """The changes that bring a config.json of transformers 5 back to version 4; None stands for an absent key."""
    changes: dict[str, Any] = {"dtype": None, "torch_dtype": config["dtype"], "layer_types": None}
    rope = config.get("rope_parameters")
    if rope is None:
        return changes
    theta, partial = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    changes["rope_parameters"] = None
    if config["model_type"] == "gpt_neox":
        changes |= {"rotary_emb_base": theta, "rotary_pct": partial}
    else:
        changes["rope_theta"] = theta
    if rope["rope_type"] == "linear":
        changes["rope_scaling"] = {"type": "linear", "factor": rope["factor"]}
    elif rope["rope_type"] != "default":
        changes["rope_scaling"] = rope
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        changes["head_dim"] = None
    return changes


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; one set to None is removed."""
    data = {**json.loads(path.read_text()), **changes}
    removed = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in data.items() if key not in removed}))


def save_tokenizer(directory: Path) -> None:
    """A tokenizer whose tokens are bytes, with an end token and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(directory)
