"""Run a transformers model under a depth plan: a layer computes only the columns that it will serve when decoding.

Prompts are padded on the left and completions on the right, so that all prompts end at one column P. The token at column P is
the first generated one and is consumed at clock 0, hence layer `l` serves columns `[:P + cutoff[l]]` and the rest pass through
it unchanged. Example, P = 3, cutoffs (ALWAYS, 0, 2), 6 columns; `x` computed, `.` passed through:

    column     0 1 2 | 3 4 5
    layer 2    x x x | x x .
    layer 1    x x x | . . .
    layer 0    x x x | x x x

What runs is a prefix in time, so causal attention needs no new mask: hidden states, mask, position ids and rotary tables are cut
together, and what is cut is never computed. Each layer's `forward` is replaced on the instance and put back afterwards; hooks,
`__call__` wrappers, FSDP, PEFT and accelerate see the module that they know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoal.depth.plan import DepthPlan
from shoal.errors import InvalidInput, InvalidPlan, UnsupportedArchitecture

LAYER_CLASSES = {
    "GPT2Block": "GPT-2",
    "GPTNeoXLayer": "GPT-NeoX",
    "LlamaDecoderLayer": "Llama",
    "MistralDecoderLayer": "Mistral",
    "OPTDecoderLayer": "OPT",
    "Qwen2DecoderLayer": "Qwen2",
    "Qwen3DecoderLayer": "Qwen3",
}
"""Decoder layer classes of transformers that are known to be causal, to return a tensor, and to take what `cut` can cut."""

PASSED_ON = {
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "num_items_in_batch",
    "is_causal",
    "shift_labels",
}
"""Arguments of a layer that do not depend on the number of columns."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of `model`, bottom first, also inside PEFT, DDP and FSDP wrappers.

    Raises `UnsupportedArchitecture` where there is none of a known family.
    """
    # FSDP2 turns a layer's class into a subclass of it, so the bases are looked at too.
    layers = [m for m in model.modules() if any(c.__name__ in LAYER_CLASSES for c in type(m).__mro__)]
    if not layers:
        families = ", ".join(LAYER_CLASSES.values())
        raise UnsupportedArchitecture(
            f"no decoder layers found in {type(model).__name__}; supported families: {families}"
        )
    return layers


@contextmanager
def depth_context(model: nn.Module, plan: DepthPlan, *, prompt_columns: int) -> Iterator[None]:
    """Within it, forward passes of `model` run `plan`.

    Args:
        model: a causal language model of transformers (families of `LAYER_CLASSES`), wrapped or not.
        plan: the depth plan; its number of layers must be the model's.
        prompt_columns: P, the width of the left-padded prompts; 0 means that every column was generated.

    The input's rows must read "left padding, tokens, right padding"; packed sequences and caches are refused with `InvalidInput`.
    For training, enter it around forward *and* backward (`Trainer.training_step`): gradient checkpointing may run layers again.
    """
    layers = decoder_layers(model)
    if len(layers) != plan.num_layers:
        raise InvalidPlan(f"the plan is for {plan.num_layers} layers, the model has {len(layers)}")
    if prompt_columns < 0:
        raise InvalidInput(f"prompt_columns must be 0 or more, got {prompt_columns}")

    replaced: list[tuple[nn.Module, Any]] = []
    check = model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
    try:
        for layer, cutoff, runs_prompt in zip(layers, plan.cutoffs, plan.runs_prompt, strict=True):
            replaced.append((layer, layer.__dict__.get("forward")))
            layer.forward = _on_prefix(layer, prompt_columns + cutoff if runs_prompt else 0)
        yield
    finally:
        check.remove()
        for layer, own_forward in replaced:
            if own_forward is None:
                del layer.forward
            else:  # accelerate's hooks had put one there
                layer.forward = own_forward


def _on_prefix(layer: nn.Module, columns: int) -> Callable[..., Tensor]:
    """`layer.forward` that computes hidden states `[:, :columns]` only and passes on the others."""
    forward = layer.forward
    names = list(inspect.signature(type(layer).forward).parameters)[2:]  # without self and hidden_states

    def on_prefix(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.update(zip(names, args, strict=False))
        width = hidden_states.shape[1]
        if columns >= width:
            return forward(hidden_states, **kwargs)  # type: ignore[no-any-return]
        if columns == 0:
            return hidden_states
        kwargs = {name: cut(name, value, columns, width) for name, value in kwargs.items()}
        computed = forward(hidden_states[:, :columns], **kwargs)
        return torch.cat([computed, hidden_states[:, columns:]], dim=1)

    return on_prefix


def cut(name: str, value: Any, columns: int, width: int) -> Any:
    """The layer argument `name`, restricted to the first `columns` of `width` columns.

    Attention masks: None (causal by itself), `[batch or 1, 1, width, width]` boolean or additive (eager, sdpa), `[batch, width]`
    (flash attention). Raises `InvalidInput` for anything whose columns are not known, such as the block mask of flex attention.
    """
    if value is None or isinstance(value, (bool, int, float, str)) or name in PASSED_ON:
        return value
    if isinstance(value, tuple) and name == "position_embeddings":  # rotary cos and sin, each [batch or 1, width, dim]
        return tuple(table[:, :columns] for table in value)
    if isinstance(value, Tensor):
        if name == "attention_mask" and value.dim() == 4 and value.shape[-2:] == (width, width):
            return value[..., :columns, :columns]
        if name in ("attention_mask", "position_ids") and value.dim() == 2 and value.shape[1] == width:
            return value[:, :columns]
        if name == "cache_position" and value.shape == (width,):
            return value[:columns]
    shape = tuple(value.shape) if isinstance(value, Tensor) else ""
    raise InvalidInput(
        f"cannot run a depth plan with {name} given as {type(value).__name__}{shape}: use attn_implementation 'sdpa', 'eager' "
        "or 'flash_attention_2', one sequence per row and no cache"
    )


def _check_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refuse inputs for which "the first columns" would not mean "the earliest tokens"; switch the cache off."""
    if kwargs.get("past_key_values") is not None:
        raise InvalidInput("a depth context runs whole sequences: call the model without past_key_values")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise InvalidInput("a depth context needs attention_mask as [batch, columns] of 0 and 1, or none")
        if mask.shape[1] > 1 and not bool((mask.bool().int().diff(dim=1).ne(0).sum(dim=1) <= 2).all()):
            raise InvalidInput(
                "attention_mask must read 'left padding, tokens, right padding' in every row; packed rows do not"
            )
        runs = mask.bool()
        # 0 1 0 has two changes, but so has 1 0 1: a gap inside the row, which is not padding.
        if bool((runs[:, 0] & runs[:, -1] & ~runs.all(dim=1)).any()):
            raise InvalidInput(
                "attention_mask must read 'left padding, tokens, right padding' in every row; one has a gap"
            )
    if positions is not None and positions.dim() == 2 and positions.shape[1] > 1:
        falls = positions.diff(dim=1) < 1
        if mask is not None:
            falls = falls & (mask[:, 1:].bool() & mask[:, :-1].bool())
        if bool(falls.any()):
            raise InvalidInput(
                "position_ids start again within a row: packed sequences cannot run a depth plan, unpack them"
            )
    kwargs["use_cache"] = False
    return args, kwargs
