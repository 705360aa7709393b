"""`Probe`: a classifier of prompts that reads the states of the pass which answers them, and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shoal.depth.shape import ModelShape
from shoal.errors import CheckpointError, InvalidInput
from shoal.files import replaced
from shoal.models.weights import DecoderConfig
from shoal.signals.operators import Pooling, attend, gate, gate_weights, pool

Operator = Literal["pool", "gate", "attention"]
OPERATORS: tuple[Operator, ...] = ("pool", "gate", "attention")
STATE = "before the final norm"
"""Which state the top level is."""
METADATA = "shoal_probe"
"""Key in the file's header."""
MAX_GATE_SCALE = 64.0
"""Exponentials of scores that |tanh| times this bounds can be summed over a million tokens in float32."""
SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What a probe's file says beside its tensors."""

    name: str
    """Its key in `Generation.labels`."""
    operator: Operator
    """`pool`, `gate` or `attention`, see `operators.py`."""
    classes: tuple[str, ...]
    """Names of the classes. Of two, the second is the positive one and has the only logit."""
    hidden_size: int
    """Width of the states, d."""
    num_levels: int
    """Levels that it reads, from the bottom: the number of layers and one more, or fewer."""
    pooling: Pooling = "mean"
    """Of `pool` and `attention`."""
    gate_scale: float = 1.0
    """Of `gate`: what tanh is multiplied by; 1 in the paper."""
    heads: int = 1
    """Of `attention`."""
    factor: int = 32
    """Of `attention`: d over the width inside."""
    max_prompt_tokens: int | None = None
    """Longest prompt that `attention` takes, because it keeps a row of every token; None for the others, which keep none."""
    threshold: float = 0.5
    """Probability of the positive class from which on it is the label; of more than two classes the most probable one is."""
    temperature: float = 1.0
    """What logits are divided by, so that probabilities mean what they say."""
    shape: ModelShape
    """Sizes of the model that it was trained on."""
    fingerprint: str = ""
    """Of that model's weights, as in `DecoderConfig`."""
    state: str = STATE
    """Which state the top level is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        attention = self.operator == "attention"
        for name in ("hidden_size", "num_levels", "heads", "factor"):
            if type(getattr(self, name)) is not int:
                raise InvalidInput(f"{name} of a probe must be a whole number, got {getattr(self, name)!r}")
        rules = {
            "name": (isinstance(self.name, str) and bool(self.name.strip()), "a name"),
            "operator": (self.operator in OPERATORS, f"one of {', '.join(OPERATORS)}"),
            "classes": (
                len(set(self.classes)) == len(self.classes) > 1 and all(isinstance(one, str) for one in self.classes),
                "two names or more, all different",
            ),
            "hidden_size": (self.hidden_size == self.shape.hidden_size, f"the model's, {self.shape.hidden_size}"),
            "num_levels": (1 <= self.num_levels <= self.shape.num_layers + 1, f"1 to {self.shape.num_layers + 1}"),
            "pooling": (self.pooling in ("mean", "max"), "mean or max"),
            "gate_scale": (0 < self.gate_scale <= MAX_GATE_SCALE, f"above 0, at most {MAX_GATE_SCALE:g}"),
            "factor": (not attention or 1 <= self.factor <= self.hidden_size, f"1 to {self.hidden_size}"),
            "heads": (
                not attention or (self.heads >= 1 and self.width % self.heads == 0),
                f"a divisor of {self.width}, d / factor",
            ),
            "max_prompt_tokens": (
                (self.max_prompt_tokens is not None) == attention,
                "a number of tokens for attention, None for the other operators",
            ),
            "threshold": (0 <= self.threshold <= 1, "0 to 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "state": (self.state == STATE, repr(STATE)),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} of a probe must be {allowed}, got {getattr(self, name)!r}")

    @property
    def width(self) -> int:
        """Width inside attention, h."""
        return self.hidden_size // self.factor if self.factor else 0

    @property
    def num_logits(self) -> int:
        """One for two classes."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each trained tensor: the token stage's for every level, the layer stage's, the head's."""
        levels, d, h = self.num_levels, self.hidden_size, self.width
        stages: dict[str, tuple[int, ...]] = {}
        if self.operator == "gate":
            stages = {"token_gate": (levels, d), "layer_gate": (d,)}
        elif self.operator == "attention":
            stages = {
                "token_qkv": (levels, d, 3 * h),
                "token_out": (levels, h, d),
                "layer_qkv": (d, 3 * h),
                "layer_out": (h, d),
            }
        return stages | {"head": (self.num_logits, d), "head_bias": (self.num_logits,)}


@dataclass(frozen=True, eq=False)
class Probe:
    """A trained probe."""

    settings: ProbeSettings
    tensors: Mapping[str, Tensor] = field(repr=False)
    """float32: those of `ProbeSettings.sizes`; and where prompts of its kind lie (`familiarity.py`): `familiar_means`
    [classes, d], `familiar_scale` [d, d], `familiar_distances` [quantiles]."""

    def __post_init__(self) -> None:
        self._require(self.settings.sizes())

    def _require(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `InvalidInput` where a tensor of these names and shapes is missing or another."""
        for name, size in sizes.items():
            tensor = self.tensors.get(name)
            if tensor is None or tensor.dtype != torch.float32 or tensor.shape != size:
                got = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                raise InvalidInput(f"probe {self.settings.name!r} needs {name}, torch.float32 {size}, got {got}")

    @property
    def num_parameters(self) -> int:
        """Trained parameters, as the paper counts them."""
        return sum(self.tensors[name].numel() for name in self.settings.sizes())

    @cached_property
    def version(self) -> str:
        """A digest of everything in it: equal versions say the same."""
        digest = hashlib.sha256(json.dumps(asdict(self.settings), sort_keys=True).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode() + self.tensors[name].contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, config: DecoderConfig) -> None:
        """Raise `InvalidInput` where it was trained on another model, or does not know where training prompts lay."""
        self.check_familiar()
        ours, name = self.settings, self.settings.name
        for size in SIZES:
            if getattr(ours.shape, size) != getattr(config.shape, size):
                raise InvalidInput(
                    f"probe {name!r} was trained on another model: its {size} is {getattr(ours.shape, size)}, "
                    f"here it is {getattr(config.shape, size)}"
                )
        if ours.fingerprint and config.fingerprint and ours.fingerprint != config.fingerprint:
            raise InvalidInput(
                f"probe {name!r} was trained on other weights of this shape (fingerprint {ours.fingerprint}, "
                f"here {config.fingerprint}): fit it on this model"
            )

    def check_familiar(self) -> None:
        """Raise `InvalidInput` where what `unfamiliarity` reads is missing."""
        num_classes, d = len(self.settings.classes), self.settings.hidden_size
        known = self.tensors.get("familiar_distances", torch.empty(0)).numel()
        self._require(
            {"familiar_means": (num_classes, d), "familiar_scale": (d, d), "familiar_distances": (max(1, known),)}
        )

    def to(self, device: torch.device) -> Probe:
        """The same on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    # The two stages.

    def token_stage(self, x: Tensor, mask: Tensor) -> Tensor:
        """Levels' vectors [B, levels, d] of B prompts from their states x [levels, B, N, d]; mask bool [B, N]."""
        ours = self.settings
        if ours.operator == "pool":
            return pool(x, mask.expand(x.shape[:-1]), ours.pooling).transpose(0, 1)
        if ours.operator == "gate":
            gates = self.tensors["token_gate"].unsqueeze(1)
            return gate(x, gates, mask.expand(x.shape[:-1]), ours.gate_scale).transpose(0, 1)
        rows = x.flatten(1, 2) @ self.tensors["token_qkv"]  # one product per level for all prompts
        return self.attend_tokens(rows.view(*x.shape[:-1], -1), mask)

    def attend_tokens(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """Levels' vectors [B, levels, d] from down-cast rows [levels, B, N, 3 h]; mask bool [B, N]."""
        ours, out = self.settings, self.tensors["token_out"].unsqueeze(1)
        return attend(qkv, out, mask.expand(qkv.shape[:-1]), heads=ours.heads, pooling=ours.pooling).transpose(0, 1)

    def layer_stage(self, levels: Tensor) -> Tensor:
        """The prompt's vector [..., d] from its levels' [..., levels, d]."""
        ours, mask = self.settings, torch.ones(levels.shape[:-1], dtype=torch.bool, device=levels.device)
        if ours.operator == "pool":
            return pool(levels, mask, ours.pooling)
        if ours.operator == "gate":
            return gate(levels, self.tensors["layer_gate"], mask, ours.gate_scale)
        qkv, out = levels @ self.tensors["layer_qkv"], self.tensors["layer_out"]
        return attend(qkv, out, mask, heads=ours.heads, pooling=ours.pooling)

    def layer_weights(self, levels: Tensor) -> Tensor:
        """How much each level weighs [..., levels] in the prompt's vector: the gate's weights, what attention gives a level on
        average over heads and levels, or equal shares where a mean is taken."""
        ours = self.settings
        if ours.operator == "gate":
            mask = torch.ones(levels.shape[:-1], dtype=torch.bool, device=levels.device)
            return gate_weights(levels, self.tensors["layer_gate"], mask, ours.gate_scale)
        if ours.operator == "attention":
            by_head = (*levels.shape[:-1], ours.heads, ours.width // ours.heads)
            q, k, _ = ((levels @ part).view(by_head) for part in self.tensors["layer_qkv"].chunk(3, dim=-1))
            scores = q.transpose(-3, -2) @ k.transpose(-3, -2).transpose(-2, -1) / by_head[-1] ** 0.5
            weights: Tensor = scores.softmax(dim=-1)
            return weights.mean(dim=(-3, -2))
        return torch.full(levels.shape[:-1], 1 / levels.shape[-2], device=levels.device)

    def logits(self, vectors: Tensor) -> Tensor:
        """[..., logits] from prompts' vectors [..., d]."""
        return vectors @ self.tensors["head"].T + self.tensors["head_bias"]

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., classes], calibrated."""
        logits = logits / self.settings.temperature
        if logits.shape[-1] > 1:
            return logits.softmax(dim=-1)
        return torch.cat((torch.sigmoid(-logits), torch.sigmoid(logits)), dim=-1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Index of the class that is decided for [...], from probabilities [..., classes]."""
        if probabilities.shape[-1] > 2:
            return probabilities.argmax(dim=-1)
        return (probabilities[..., 1] >= self.settings.threshold).long()

    def unfamiliarity(self, vectors: Tensor) -> Tensor:
        """Share of held-out prompts that lay nearer to a class of the training than prompts with these vectors [..., d] do: [...].

        The distance is Mahalanobis's, to the nearest class mean under one covariance (Lee et al. 2018, arXiv 1807.03888).
        """
        means, scale = self.tensors["familiar_means"], self.tensors["familiar_scale"]
        distances = torch.cdist(vectors @ scale, means @ scale).amin(dim=-1)
        known = self.tensors["familiar_distances"]
        return torch.searchsorted(known, distances.contiguous()) / len(known)

    # The file.

    def save(self, path: Path) -> None:
        """Write it as one safetensors file with the settings in its header; whole, or not at all."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()}
        with replaced(path) as partial:
            partial.write_bytes(save(tensors, {METADATA: json.dumps(asdict(self.settings))}))

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read a file of `save`. Raises `CheckpointError` where there is none, or not a probe's."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle is not a mapping)
            if METADATA not in header:
                raise ValueError(f"its header has no {METADATA}")
            settings: dict[str, Any] = json.loads(header[METADATA])
            probe = cls(ProbeSettings(**{**settings, "shape": ModelShape(**settings["shape"])}), tensors)
            probe.check_familiar()
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"{path} holds no probe that can be read: {error}") from error
        return probe
