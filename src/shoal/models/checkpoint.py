"""Loading a Hugging Face checkpoint of any family into the canonical form of `weights.py`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.errors import CheckpointError, InvalidInput, nearest
from shoal.models.directory import read_config, resolve
from shoal.models.families import Family, configure
from shoal.models.memory import drop_mapped
from shoal.models.tensors import TensorFiles
from shoal.models.weights import DecoderConfig, DecoderWeights, LayerWeights, LinearWeights, NormWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that a checkpoint can be loaded in, by name."""
INT8 = "int8"
"""Name of the dtype that quantises the weights of products to int8 as they are packed; all else is bfloat16."""
TABLES = re.compile(r"(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|decoder\.version)$")
"""What old checkpoints store beside their weights: frequencies and masks, which the decoder makes itself."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A tokenizer needs one of these."""


def load_checkpoint(
    path_or_hub_id: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> tuple[DecoderConfig, DecoderWeights]:
    """Load a checkpoint of one of the families in `families.FAMILIES`.

    Every name and shape is checked first. Then files are memory-mapped and copied tensor by tensor into the canonical
    weights, in their dtype and on their device, each layer when `DecoderWeights.layers` comes to it (once): there is
    never a second whole copy.

    Args: `path_or_hub_id`, `revision` and `token` as in `directory.resolve`; `dtype` is `"float32"`, `"bfloat16"`,
    `"float16"`, `"int8"` (bfloat16 weights that the decoder quantises), or `"auto"` for that of the stored weights.
    Raises `CheckpointError` (also as `UnsupportedArchitecture`, `PickledCheckpoint`) with the file and the tensor's
    name; `InvalidInput` for an unknown dtype or a device that is not there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise InvalidInput(f"device {str(device)!r} cannot be used: {reason}") from error
    checkpoint = Checkpoint.open(resolve(path_or_hub_id, revision=revision, token=token), dtype=dtype)
    checkpoint.check()
    return checkpoint.config, checkpoint.weights(device)


def load_tokenizer(
    path_or_hub_id: str | Path, *, revision: str | None = None, token: str | None = None
) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer, as transformers reads it; code that comes with it is never run.

    Raises `CheckpointError` where there is none.
    """
    from transformers import AutoTokenizer

    directory = resolve(path_or_hub_id, revision=revision, token=token, weights=None)
    if not any((directory / file).is_file() for file in TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)} (with merges.txt); "
            "copy the tokenizer's files from the model that the weights were trained from"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # malformed files raise errors of several libraries
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from error
    return tokenizer


def read_sizes(directory: Path, *, dtype: str = "auto") -> tuple[DecoderConfig, Family, torch.dtype]:
    """What config.json alone says: canonical config, family, and the dtype of the weights (where it names none, float32).

    Raises as `load_checkpoint` does.
    """
    raw = read_config(directory)
    name = (raw.get("dtype") or raw.get("torch_dtype")) if dtype == "auto" else dtype
    target = DTYPES["bfloat16"] if dtype == INT8 else DTYPES.get(str(name), torch.float32)
    config, family = configure(raw, bytes_per_value=target.itemsize)
    return _quantized(config, dtype == INT8), family, target


def _quantized(config: DecoderConfig, quantized: bool) -> DecoderConfig:
    return replace(config, shape=replace(config.shape, quantized=quantized))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint directory: what its config and the headers of its files say. No weight has been read."""

    config: DecoderConfig
    """Canonical config."""
    family: Family
    """The family's row, options looked up."""
    files: TensorFiles
    """Mapped weight files."""
    prefix: str
    """How much of the family's prefix this checkpoint's tensor names have, e.g. `"model.decoder."`."""
    dtype: torch.dtype
    """Dtype that the weights are loaded in."""

    @classmethod
    def open(cls, directory: Path, *, dtype: str = "auto") -> Checkpoint:
        """Read config.json and the headers of the weight files. Raises as `load_checkpoint` does."""
        if dtype not in ("auto", INT8, *DTYPES):
            raise InvalidInput(f"unknown dtype {dtype!r}: {nearest(dtype, [*DTYPES, INT8, 'auto'])}")
        config, family = configure(read_config(directory))
        config, dtype = _quantized(config, dtype == INT8), "bfloat16" if dtype == INT8 else dtype
        files = TensorFiles(directory)
        parts = family.prefix.split(".")
        prefixes = [".".join(parts[start:]) for start in range(len(parts))]
        prefix = next((p for p in prefixes if f"{p}{family.embedding}.weight" in files), family.prefix)
        shape = (config.shape.vocab_size, config.shape.hidden_size)
        stored = files.read(f"{prefix}{family.embedding}.weight", shape).dtype
        if dtype == "auto" and stored not in DTYPES.values():
            raise CheckpointError(f"{directory} is stored in {stored}: choose a dtype, one of {', '.join(DTYPES)}")
        target = DTYPES.get(dtype, stored)
        shape_here = replace(config.shape, bytes_per_value=target.itemsize)
        config = replace(config, shape=shape_here, fingerprint=files.fingerprint())
        return cls(config=config, family=family, files=files, prefix=prefix, dtype=target)

    def weights(self, device: str | torch.device) -> DecoderWeights:
        """The canonical weights, copied from the mapped files; each layer when the iteration over `layers` comes to it."""
        return _Reader(self, torch.device(device)).decoder()

    def check(self) -> int:
        """Check the name and shape of every tensor without reading a value, and count the parameters.

        Raises `CheckpointError` for a missing or mis-shaped tensor, and for tensors that the architecture has no place
        for (more layers than the config says, adapters, quantisation scales): leaving them out would change the result.
        """
        reader = _Reader(self, torch.device("meta"))
        for _ in reader.decoder().layers:
            pass
        heads = {f"{name}.weight" for name in self.family.head} if self.family.tied else set()
        unknown = sorted(name for name in self.files.names() - reader.sizes.keys() - heads if not TABLES.search(name))
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise CheckpointError(
                f"{self.files.directory} holds tensors that a {self.config.family} model of this config "
                f"has no place for: {unknown[0]}{more}"
            )
        return sum(reader.sizes.values())


class _Reader:
    """Copies one checkpoint's tensors into canonical weights; `sizes` collects the values under each name it has used."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.family, self.config = checkpoint.family, checkpoint.config
        self.files, self.prefix = checkpoint.files, checkpoint.prefix
        self.dtype, self.device = checkpoint.dtype, device
        self.sizes: dict[str, int] = {}

    def decoder(self) -> DecoderWeights:
        family, shape = self.family, self.config.shape
        vocab, d = shape.vocab_size, shape.hidden_size
        embedding = self.copy(f"{self.prefix}{family.embedding}.weight", vocab, d)
        positions = None
        if not family.rotary:
            rows = self.config.max_positions + family.position_offset
            positions = self.copy(f"{self.prefix}{family.positions}.weight", rows, d)
        if family.tied:
            head = embedding
        else:
            name = next((name for name in family.head if f"{name}.weight" in self.files), family.head[0])
            head = self.copy(f"{name}.weight", vocab, d)
        return DecoderWeights(
            embedding=embedding,
            positions=positions,
            layers=(self.layer(f"{self.prefix}{family.layer}.{i}.") for i in range(shape.num_layers)),
            final_norm=self.norm(self.prefix + family.final_norm, d),
            head=LinearWeights(head),
        )

    def layer(self, at: str) -> LayerWeights:
        """The layer whose tensor names begin with `at`."""
        family, shape = self.family, self.config.shape
        d, width, heads_width = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        qkv_rows = [heads_width, kv_width, kv_width] if len(family.qkv) == 3 else [heads_width + 2 * kv_width]
        up_rows = [width] * len(family.up) if len(family.up) == 1 + family.gated_mlp else [2 * width]
        q_norm, k_norm = (
            (NormWeights(self.copy(f"{at}{name}.weight", shape.head_dim)) for name in family.qk_norm)
            if family.qk_norm
            else (None, None)
        )
        return LayerWeights(
            attention_norm=self.norm(at + family.attention_norm, d),
            qkv=self.linear(at, family.qkv, qkv_rows, d, bias=family.qkv_bias, by_head=family.qkv_by_head),
            q_norm=q_norm,
            k_norm=k_norm,
            out=self.linear(at, (family.out,), [d], heads_width, bias=family.out_bias),
            mlp_norm=self.norm(at + family.mlp_norm, d),
            up=self.linear(at, family.up, up_rows, d, bias=family.mlp_bias),
            down=self.linear(at, (family.down,), [d], width, bias=family.mlp_bias),
        )

    def linear(
        self,
        at: str,
        names: tuple[str, ...],
        rows: list[int],
        width_in: int,
        *,
        bias: str | bool,
        by_head: bool = False,
    ) -> LinearWeights:
        """The products `names`, of `rows` outputs each, stacked into one: weight [sum(rows), width_in], bias
        [sum(rows)]."""
        weight = self.empty(sum(rows), width_in)
        biases = self.empty(sum(rows)) if bias else None
        for name, part in zip(names, torch.split(weight, rows), strict=True):
            stored = (width_in, part.shape[0]) if self.family.transposed else tuple(part.shape)
            source = self.view(f"{at}{name}.weight", *stored)
            part.copy_(self.ordered(source.T if self.family.transposed else source, by_head=by_head))
            drop_mapped(source)
        if biases is not None:
            for name, part in zip(names, torch.split(biases, rows), strict=True):
                part.copy_(self.ordered(self.view(f"{at}{name}.bias", *part.shape), by_head=by_head))
        return LinearWeights(weight, biases)

    def ordered(self, qkv: Tensor, *, by_head: bool) -> Tensor:
        """Rows q0 k0 v0 q1 k1 v1 (per head, D rows each) brought into the order q0 q1 k0 k1 v0 v1."""
        if not by_head:
            return qkv
        shape = self.config.shape
        return qkv.view(shape.num_heads, 3, shape.head_dim, -1).transpose(0, 1).reshape(qkv.shape)

    def norm(self, name: str, size: int) -> NormWeights:
        bias = self.copy(f"{name}.bias", size) if self.family.norm == "layernorm" else None
        return NormWeights(self.copy(f"{name}.weight", size), bias)

    def view(self, name: str, *shape: int) -> Tensor:
        self.sizes[name] = math.prod(shape)
        return self.files.read(name, shape)

    def copy(self, name: str, *shape: int) -> Tensor:
        source = self.view(name, *shape)
        copied = self.empty(*shape).copy_(source)
        drop_mapped(source)
        return copied

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
