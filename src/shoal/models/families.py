"""The family table: how each architecture's config and tensor names map to the canonical decoder of `weights.py`.

A family is data. Anything Llama-like is one more row: `"qwen2": replace(LLAMA, qkv_bias=True)`. transformers' config
classes supply every family's defaults and read config.json as transformers 4 and 5 write it (`rope_theta` and
`rope_scaling`, or `rope_parameters`; `torch_dtype` or `dtype`). An option that would change the result is honoured or
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from shoal.depth.shape import ModelShape
from shoal.errors import CheckpointError, UnsupportedArchitecture
from shoal.models.weights import DecoderConfig, Rotary

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row. Where a field takes a string for a number or a truth value, the string names an option of config.json.

    Tensor names are those of transformers' causal language models, without `prefix` and without `.weight` or `.bias`.
    """

    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Kind of every norm; layer norms have a bias."""
    norm_eps: str | float = "rms_norm_eps"
    """Added to the variance."""
    activation: str = "hidden_act"
    """Option that names the activation."""
    intermediate_size: str = "intermediate_size"
    """Option with the MLP's width (4 d where it is null)."""
    gated_mlp: bool = True
    """Whether the MLP has a gate product beside the up product."""
    rotary: bool = True
    """Rotary positions; otherwise learned ones, in the tensor `positions`."""
    position_offset: int = 0
    """Rows of the learned table before position 0."""
    parallel_residual: str | bool = False
    """Whether attention and MLP both read the layer's input."""
    qkv_bias: str | bool = False
    """Whether query, key and value products have a bias."""
    out_bias: str | bool = False
    """Whether the attention's output product has one."""
    mlp_bias: str | bool = False
    """Whether the MLP's products have one."""
    tied: str | bool = "tie_word_embeddings"
    """Whether the head is the embedding."""
    required: Mapping[str, str | bool] = field(default_factory=dict)
    """Options that only one value is supported of; a string names the option that they must equal."""

    prefix: str = "model."
    """What precedes every name but the head's; checkpoints of the bare model leave it out, whole or in part."""
    transposed: bool = False
    """Whether the layers' matrices are stored [in, out] (GPT-2's `Conv1D`)."""
    embedding: str = "embed_tokens"
    """[V, d]."""
    positions: str = ""
    """[P + position_offset, d]."""
    layer: str = "layers"
    """The layers' list; names below are inside `{layer}.{index}.`."""
    attention_norm: str = "input_layernorm"
    """[d], before attention."""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three tensors, or one that holds all queries, all keys, all values in this order."""
    qkv_by_head: bool = False
    """Whether the one `qkv` tensor goes head by head instead: query, key, value of head 0, then of head 1
    (GPT-NeoX)."""
    qk_norm: tuple[str, str] | None = None
    """[D], norms on each head of queries and of keys."""
    out: str = "self_attn.o_proj"
    """[d, H_q D]."""
    mlp_norm: str = "post_attention_layernorm"
    """[d], before the MLP."""
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up, or one tensor that holds the gate's rows first; up alone without a gate."""
    down: str = "mlp.down_proj"
    """[d, I]."""
    final_norm: str = "norm"
    """[d], after the last layer."""
    head: tuple[str, ...] = ("lm_head",)
    """[V, d], the names that transformers' versions have given it; not looked for where it is tied to the embedding."""


LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
PLAIN = Family()

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": PLAIN,
    "qwen2": replace(PLAIN, qkv_bias=True),
    "qwen3": replace(
        PLAIN,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    ),
    "opt": Family(
        norm="layernorm",
        norm_eps=1e-5,
        activation="activation_function",
        intermediate_size="ffn_dim",
        gated_mlp=False,
        rotary=False,
        position_offset=2,
        qkv_bias="enable_bias",
        out_bias="enable_bias",
        mlp_bias="enable_bias",
        # OPT-350m alone has its norms after each block and embeddings narrower than the residual stream.
        required={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": "hidden_size",
        },
        prefix="model.decoder.",
        positions="embed_positions",
        attention_norm="self_attn_layer_norm",
        out="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up=("fc1",),
        down="fc2",
        final_norm="final_layer_norm",
    ),
    "gpt2": Family(
        norm="layernorm",
        norm_eps="layer_norm_epsilon",
        activation="activation_function",
        intermediate_size="n_inner",
        gated_mlp=False,
        rotary=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        required={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        prefix="transformer.",
        transposed=True,
        embedding="wte",
        positions="wpe",
        layer="h",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        mlp_norm="ln_2",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        final_norm="ln_f",
    ),
    "gpt_neox": Family(
        norm="layernorm",
        norm_eps="layer_norm_eps",
        gated_mlp=False,
        parallel_residual="use_parallel_residual",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        prefix="gpt_neox.",
        embedding="embed_in",
        qkv=("attention.query_key_value",),
        qkv_by_head=True,
        out="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        final_norm="final_layer_norm",
        head=("lm_head", "embed_out"),
    ),
}
"""Families by `model_type` of config.json."""

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names for the activations of `DecoderConfig`."""


def family_of(raw: Mapping[str, Any]) -> Family:
    """The row for a parsed config.json. Raises `UnsupportedArchitecture` with the supported list."""
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        architectures = ", ".join(raw.get("architectures") or ()) or "no architecture named"
        raise UnsupportedArchitecture(
            f"model type {model_type!r} ({architectures}) is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def configure(raw: Mapping[str, Any], *, bytes_per_value: int = 4) -> tuple[DecoderConfig, Family]:
    """A parsed config.json in canonical form, and its family's row with truth values in place of option names.

    Args: `bytes_per_value` of the dtype that the weights are to be loaded in.
    Raises `UnsupportedArchitecture` for another family, or an option whose effect the decoder does not have;
    `CheckpointError` for sizes that do not fit together.
    """
    family = family_of(raw)
    hf = _transformers_config(raw)
    _check_required(family, hf)
    flags = ("parallel_residual", "qkv_bias", "out_bias", "mlp_bias", "tied")
    looked_up: dict[str, Any] = {name: bool(_option(hf, getattr(family, name))) for name in flags}
    family = replace(family, **looked_up)
    heads, kv_heads = hf.num_attention_heads, getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads
    if min(hf.num_hidden_layers, hf.hidden_size, hf.vocab_size, heads, kv_heads) < 1:
        raise CheckpointError("config.json: numbers of layers and heads, hidden_size and vocab_size must be 1 or more")
    head_dim = getattr(hf, "head_dim", None)
    if head_dim is None and hf.hidden_size % heads:
        raise CheckpointError(f"config.json: hidden_size {hf.hidden_size} is not a multiple of {heads} attention heads")
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
    head_dim = head_dim or hf.hidden_size // heads
    activation = getattr(hf, family.activation)
    if activation not in ACTIVATIONS:
        raise UnsupportedArchitecture(f"{family.activation} {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    eos = hf.eos_token_id
    config = DecoderConfig(
        family=str(raw["model_type"]),
        shape=ModelShape(
            num_layers=hf.num_hidden_layers,
            hidden_size=hf.hidden_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=getattr(hf, family.intermediate_size) or 4 * hf.hidden_size,
            gated_mlp=family.gated_mlp,
            vocab_size=hf.vocab_size,
            bytes_per_value=bytes_per_value,
        ),
        max_positions=hf.max_position_embeddings,
        norm=family.norm,
        norm_eps=float(_option(hf, family.norm_eps)),
        activation=ACTIVATIONS[activation],
        rotary=_rotary(hf.rope_parameters, head_dim) if family.rotary else None,
        position_offset=family.position_offset,
        parallel_residual=bool(family.parallel_residual),
        sliding_window=_sliding_window(hf),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )
    return config, family


def _option(hf: Any, value: str | float) -> Any:
    """`value` itself, or the config's option of that name if it is a string."""
    return getattr(hf, value) if isinstance(value, str) else value


def _transformers_config(raw: Mapping[str, Any]) -> Any:
    """config.json as transformers' class of the family, which fills in defaults and brings old names up to date."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    except Exception as error:  # the classes check their fields and raise errors of several libraries
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json does not describe a {raw['model_type']} model: {reason}") from error


def _check_required(family: Family, hf: Any) -> None:
    """Refuse, by name, options whose effect the decoder does not have."""
    for name, value in family.required.items():
        needed, got = _option(hf, value), getattr(hf, name)
        if got != needed:
            needed_text = f"{value} = {needed}" if isinstance(value, str) else str(needed)
            raise UnsupportedArchitecture(
                f"{hf.model_type} with {name} = {got} is not supported: must be {needed_text}"
            )
    if getattr(hf, "quantization_config", None) is not None:
        raise UnsupportedArchitecture(
            "quantised checkpoints (quantization_config) are not supported: take float32, bfloat16 or float16 weights"
        )


def _sliding_window(hf: Any) -> int | None:
    """The window where any layer has one; full attention is exact for sequences up to it."""
    layer_types = set(getattr(hf, "layer_types", None) or ())
    other = layer_types - {"full_attention", "sliding_attention"}
    if other:
        raise UnsupportedArchitecture(f"layer_types with {sorted(other)[0]!r} are not supported")
    if layer_types == {"full_attention"}:
        return None
    window: int | None = getattr(hf, "sliding_window", None)
    return window


def _rotary(parameters: Mapping[str, Any], head_dim: int) -> Rotary:
    """Inverse frequencies base^(-2i/dim), scaled as `rope_parameters` says.

    Computed in float32 in transformers' order of operations: at position 100,000 the last bit of a frequency is 0.006
    rad. Raises `UnsupportedArchitecture` for scalings other than `linear` and `llama3`.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedArchitecture(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3")
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    try:
        inv_freq = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        if kind == "linear":
            inv_freq = inv_freq / parameters["factor"]
        elif kind == "llama3":
            inv_freq = _llama3_scaling(inv_freq, parameters)
    except KeyError as error:  # rope_parameters may also be given per type of layer
        raise UnsupportedArchitecture(f"rope_parameters without {error} of their own are not supported") from error
    return Rotary(inv_freq=tuple(inv_freq.tolist()))


def _llama3_scaling(inv_freq: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)
