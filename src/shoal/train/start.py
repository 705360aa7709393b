"""The network that tuning starts from: a checkpoint's weights, or random ones of its config; with adapters or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from shoal.errors import CheckpointError, InvalidInput
from shoal.models.checkpoint import Checkpoint, load_tokenizer, read_sizes
from shoal.models.directory import resolve


def load(model: str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The causal language model (float32) and tokenizer of a directory or hub id. Raises `CheckpointError`.

    What the engine could not run afterwards is refused, pickles among it; no code that comes with a checkpoint runs.
    """
    directory = resolve(model)
    Checkpoint.open(directory).check()
    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {model}: {error}") from error
    return network, load_tokenizer(directory)


def from_scratch(
    model: str, *, num_layers: int | None, seed: int
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A network (float32) with the config of `model` and random weights of its family's own kind, and the tokenizer of `model`.

    Weights of `model` are not read and need not be there. `num_layers` takes fewer layers than the config says.
    Raises `CheckpointError`, and `InvalidInput` for more layers than the config has.
    """
    directory: Path = resolve(model, weights=None)
    most = read_sizes(directory)[0].shape.num_layers  # refuses families that the engine does not run
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the config of {model}: {error}") from error
    if num_layers is not None:
        if num_layers > most:
            raise InvalidInput(f"num_layers must be at most {most}, the layers of {model}, got {num_layers}")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    transformers.set_seed(seed)
    network = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    return network, load_tokenizer(directory)


def add_lora(network: nn.Module, rank: int) -> Any:
    """`network` with trainable LoRA adapters of `rank` on all linear layers but the head, everything else frozen."""
    import peft

    return peft.get_peft_model(
        network,
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
