"""The slow reference that every fast path is compared with: one row, no cache, layers masked by hand.

It runs transformers' own model on the whole sequence again for every token. Which layers ran at which position is a
table of booleans written down from the method's specification; around every layer the table is applied twice:

    a position that did not run a layer keeps its hidden state,       h = where(ran, layer(h), h)
    and is invisible to the layer's other positions,                  key k is masked unless k <= q and ran[k]

Nothing of the library under test is imported here, neither its plans nor its decoder.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Schedule = Callable[[int], set[int]]
"""Clock (0 = the pass that consumes the first generated token) to the layers that run."""


# --- Which layers run -------------------------------------------------------------------------------------------------


def dense(num_layers: int) -> Schedule:
    """Every layer at every clock."""
    return lambda clock: set(range(num_layers))


def from_cutoffs(cutoffs: Sequence[float]) -> Schedule:
    """Layer l serves the first `cutoffs[l]` clocks (`math.inf` for always)."""
    return lambda clock: {layer for layer, cutoff in enumerate(cutoffs) if clock < cutoff}


def skipdecode(
    num_layers: int, *, min_exit: int, max_exit: int, length: int, warmup: int = 1, first_clock: int = 0
) -> Schedule:
    """SkipDecode (arXiv 2307.02628), our reading: exit points fall linearly from `max_exit` to `min_exit` over
    `length`.

    E(i) = M - (M - m) min(i, N-1) / (N-1), rounded halves up, clamped; run the bottom `warmup` layers and the top rest.
    `first_clock` is 0, or the prompt's length where the decay counts columns.
    """

    def layers(clock: int) -> set[int]:
        i = clock + first_clock
        progress = 1.0 if length == 1 else min(i, length - 1) / (length - 1)
        exact = max_exit - (max_exit - min_exit) * progress
        count = min(max(math.floor(exact + 0.5), min_exit), max_exit)
        return set(range(warmup)) | set(range(num_layers - (count - warmup), num_layers))

    return layers


def early_termination(num_layers: int, *, min_exit: int, max_exit: int, length: int) -> Schedule:
    """As many layers as SkipDecode without warm-up, but the lowest ones."""
    as_many = skipdecode(num_layers, min_exit=min_exit, max_exit=max_exit, length=length, warmup=0)
    return lambda clock: set(range(len(as_many(clock))))


def unified(num_layers: int, depth: float) -> Schedule:
    """Unified Layer Skipping (arXiv 2404.06954): first, last, and multiples of int(L / (K-1)) until there are K = int(L depth)."""
    count = int(num_layers * depth + 1e-9)
    kept = [0] if num_layers == 1 else [0, num_layers - 1]
    for layer in range(1, num_layers - 1):
        if len(kept) < count and layer % int(num_layers / (count - 1)) == 0:
            kept.append(layer)
    return lambda clock: set(kept)


def hierarchical(num_layers: int, depth: float, length: int) -> Schedule:
    """Hierarchical Skip Decoding, our reading: the first, the last and every 2^j-th layer; the lower of two neighbouring j until
    the mean over `length` is the depth."""
    sets = [{layer for layer in range(num_layers) if layer % 2**j == 0 or layer == num_layers - 1} for j in range(10)]
    pairs = zip([sets[0], *sets], sets, strict=False)
    deeper, shallower = next(pair for pair in pairs if len(pair[1]) <= num_layers * depth + 1e-9)
    between = len(deeper) - len(shallower)
    step = math.floor(length * (num_layers * depth - len(shallower)) / between + 0.5 + 1e-9) if between else 0
    return lambda clock: deeper if clock < step else shallower


def d3(num_layers: int, *, decay: float, least: int, length: int) -> Schedule:
    """D3 (arXiv 2503.08524): floor(L a^i) layers, the lower half of them from the bottom, the rest from the top."""

    def layers(clock: int) -> set[int]:
        count = max(least, math.floor(num_layers * decay ** min(clock, length - 1) + 1e-9))
        low = count - count // 2
        return {*range(low), *range(num_layers - count // 2, num_layers)}

    return layers


def exits_for_depth(num_layers: int, depth: float, warmup: int = 1) -> tuple[int, int]:
    """(m, M) for a mean depth 1/s: T = round(2L/s), M = min(L, round(1.5L/s)), m = max(W+1, T-M), M = T-m."""
    total = math.floor(2 * num_layers * depth + 0.5)
    max_exit = min(num_layers, math.floor(1.5 * num_layers * depth + 0.5))
    min_exit = max(warmup + 1, total - max_exit)
    return min_exit, total - min_exit


def ran_table(
    num_layers: int,
    prompt_tokens: int,
    num_positions: int,
    schedule: Schedule,
    prompt_layers: Sequence[int] | None = None,
) -> Tensor:
    """bool [num_layers, num_positions]: position P + i is the token that the pass at clock i consumes."""
    table = torch.zeros(num_layers, num_positions, dtype=torch.bool)
    for position in range(num_positions):
        if position < prompt_tokens:
            layers = set(range(num_layers)) if prompt_layers is None else set(prompt_layers)
        else:
            layers = schedule(position - prompt_tokens)
        for layer in layers:
            table[layer, position] = True
    return table


# --- The forward pass -------------------------------------------------------------------------------------------------


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of any family: the one list of modules as long as the config says."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    assert len(lists) == 1
    return list(lists[0])


@contextmanager
def masked_layers(model: PreTrainedModel, ran: Tensor) -> Iterator[None]:
    """Apply `ran` [layers, positions] around every layer of `model` for one forward pass of a single row."""
    layers = layers_of(model)
    originals = [layer.forward for layer in layers]
    num_positions = ran.shape[1]
    causal = torch.ones(num_positions, num_positions, dtype=torch.bool).tril()

    def masked(forward: Callable[..., Tensor], ran_here: Tensor) -> Callable[..., Tensor]:
        # A position may always see itself: a row of only masked keys would be NaN, and `where` drops its result anyway.
        visible = causal & ran_here | torch.eye(num_positions, dtype=torch.bool)
        mask = torch.zeros(num_positions, num_positions).masked_fill(~visible, torch.finfo(torch.float32).min)

        def run(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
            # GPT-2 is called with positional arguments, the other families by keyword.
            call = inspect.signature(forward).bind(hidden_states, *args, **kwargs)
            call.arguments["attention_mask"] = mask[None, None]
            out = forward(*call.args, **call.kwargs)
            out = out[0] if isinstance(out, tuple) else out
            return torch.where(ran_here[None, :, None], out, hidden_states)

        return run

    try:
        for layer, forward, ran_here in zip(layers, originals, ran, strict=True):
            layer.forward = masked(forward, ran_here)
        yield
    finally:
        for layer in layers:
            del layer.forward  # uncovers the class's own method


@torch.no_grad()
def logits(model: PreTrainedModel, token_ids: Sequence[int], ran: Tensor) -> Tensor:
    """[positions, V] of one forward pass over `token_ids` in which `ran` says what runs."""
    with masked_layers(model, ran):
        out = model(torch.tensor([list(token_ids)]), use_cache=False)
    return out.logits[0]


@dataclass(frozen=True)
class Decoded:
    """What the reference generated."""

    token_ids: list[int]
    """Generated tokens, the end token included."""
    logits: Tensor
    """[generated, V], the logits that each token was chosen from."""


def decode(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    schedule: Schedule,
    *,
    max_new_tokens: int,
    prompt_layers: Sequence[int] | None = None,
    eos_token_ids: Sequence[int] = (),
) -> Decoded:
    """Decode greedily, one token per forward pass over everything so far."""
    token_ids, rows = list(prompt_ids), []
    num_layers = model.config.num_hidden_layers
    while len(rows) < max_new_tokens:
        ran = ran_table(num_layers, len(prompt_ids), len(token_ids), schedule, prompt_layers)
        rows.append(logits(model, token_ids, ran)[-1])
        token_ids.append(int(rows[-1].argmax()))
        if token_ids[-1] in eos_token_ids:
            break
    return Decoded(token_ids[len(prompt_ids) :], torch.stack(rows))


def uncertainty(logits: Tensor, token: int, top_k: int) -> tuple[float, float]:
    """Of logits [V], in float64 and nats: -sum p log p over the `top_k` most probable tokens, as they are; -log p of `token`."""
    values = [float(value) for value in logits]
    largest = max(values)
    total = sum(math.exp(value - largest) for value in values)
    probabilities = sorted((math.exp(value - largest) / total for value in values), reverse=True)
    entropy = -sum(p * math.log(p) for p in probabilities[:top_k] if p > 0)
    return entropy, largest + math.log(total) - values[token]


# --- Confidence exits -------------------------------------------------------------------------------------------------

Confidence = Callable[[Tensor, Tensor, Tensor], float]
"""State [d] before a layer, state after it, logits [V] that the head makes of the latter, to how sure the token is."""


@torch.no_grad()
def frozen_states(model: PreTrainedModel, token_ids: Sequence[int], exits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One forward pass in which position p keeps its state from layer `exits[p]` on, and deeper layers see that state.

    A deeper layer makes a key and a value of the state like of any other; only its output is dropped. Returns the last position's
    states [L + 1, d] before the first layer and after each, and its logits [V].
    """
    layers = layers_of(model)
    ran = torch.tensor([[layer < exit_layer for exit_layer in exits] for layer in range(len(layers))])
    seen: list[Tensor] = []

    def keep(forward: Callable[..., Tensor], ran_here: Tensor) -> Callable[..., Tensor]:
        def run(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
            if not seen:
                seen.append(hidden_states[0, -1])
            out = forward(hidden_states, *args, **kwargs)
            out = torch.where(ran_here[None, :, None], out[0] if isinstance(out, tuple) else out, hidden_states)
            seen.append(out[0, -1])
            return out

        return run

    try:
        for layer, ran_here in zip(layers, ran, strict=True):
            layer.forward = keep(layer.forward, ran_here)
        out = model(torch.tensor([list(token_ids)]), use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return torch.stack(seen), out.logits[0, -1]


@dataclass(frozen=True)
class Exited:
    """What the reference generated with exits."""

    token_ids: list[int]
    """Generated tokens, the end token included."""
    exit_layers: list[int]
    """Layers that ran in the pass that each token was chosen in."""
    margin: float
    """The smallest distance of any confidence from its threshold: how near to another exit it ever was."""


def calm(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    confidence: Confidence,
    threshold: float,
    tau: float,
    min_exit_layer: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
) -> Exited:
    """CALM (arXiv 2207.07061), greedy: everything is computed anew for each layer of each token, as if its exit were there."""
    num_layers = model.config.num_hidden_layers
    token_ids, exits, chosen_at, margin = list(prompt_ids), [num_layers] * len(prompt_ids), [num_layers], math.inf
    token_ids.append(int(frozen_states(model, token_ids, exits)[1].argmax()))
    while len(chosen_at) < max_new_tokens and token_ids[-1] not in eos_token_ids:
        clock = len(chosen_at) - 1
        bar = min(max(0.9 * threshold + 0.1 * math.exp(-tau * clock / max_new_tokens), 0), 1)
        for exit_layer in range(min_exit_layer, num_layers + 1):
            states, logits = frozen_states(model, token_ids, [*exits, exit_layer])
            if exit_layer == num_layers:
                break
            sure = confidence(states[exit_layer - 1], states[exit_layer], logits)
            margin = min(margin, abs(sure - bar))
            if sure >= bar:
                break
        exits.append(exit_layer)
        chosen_at.append(exit_layer)
        token_ids.append(int(logits.argmax()))
    return Exited(token_ids[len(prompt_ids) :], chosen_at, margin)


# --- Attention alone --------------------------------------------------------------------------------------------------


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float64 [T, H_q, D] of one row: its last T tokens look at themselves and at all before them, one by one.

    Args: queries [T, H_q, D]; keys and values [S, H_kv, D], of which H_q / H_kv query heads in a row share one.
    """
    queries, keys, values = queries.double(), keys.double(), values.double()
    group = queries.shape[1] // keys.shape[1]
    out = torch.empty_like(queries)
    for token, heads in enumerate(queries):
        seen = len(keys) - len(queries) + token + 1
        for head, query in enumerate(heads):
            weights = (keys[:seen, head // group] @ query / math.sqrt(len(query))).softmax(dim=0)
            out[token, head] = weights @ values[:seen, head // group]
    return out


def normed(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float64: x / sqrt(mean(x^2) + eps) * weight, over the last dimension of heads [T, H, D]."""
    heads = heads.double()
    return heads / (heads.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


def rotated(heads: Tensor, positions: Sequence[int], inv_freq: Sequence[float]) -> Tensor:
    """float64 [T, H, D]: value i and value i + n of the first 2n turn by position * inv_freq[i], as points of a plane."""
    out, half = heads.double().clone(), len(inv_freq)
    for token, position in enumerate(positions):
        for i, frequency in enumerate(inv_freq):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            x, y = out[token, :, i].clone(), out[token, :, half + i].clone()
            out[token, :, i], out[token, :, half + i] = x * cos - y * sin, y * cos + x * sin
    return out


# --- Probes -----------------------------------------------------------------------------------------------------------


def probe_logits(
    states: Tensor,
    tensors: Mapping[str, Tensor],
    operator: str,
    *,
    pooling: str = "mean",
    gate_scale: float = 1.0,
    heads: int = 1,
) -> tuple[Tensor, Tensor]:
    """A two-stage probe (arXiv 2601.13288, section 3) of one prompt's stored states [levels, T, d], in float64.

    Tokens to a vector for each level, then levels to one. Returns that vector [d] and the logits [C].
    """
    given = {name: tensor.double() for name, tensor in tensors.items()}

    def of_rows(rows: Tensor, stage: str, level: int | None) -> Tensor:
        """[N, d] to [d]."""

        def tensor(name: str) -> Tensor:
            whole = given[f"{stage}_{name}"]
            return whole if level is None else whole[level]

        if operator == "pool":
            return rows.mean(dim=0) if pooling == "mean" else rows.max(dim=0).values
        if operator == "gate":
            weights = [math.exp(gate_scale * math.tanh(float(tensor("gate") @ row))) for row in rows]
            return torch.stack([weight / sum(weights) * row for weight, row in zip(weights, rows, strict=True)]).sum(
                dim=0
            )
        q, k, v = (rows @ part for part in tensor("qkv").chunk(3, dim=1))
        width = q.shape[1] // heads
        of_heads = []
        for head in range(heads):
            here = slice(head * width, (head + 1) * width)
            of_heads.append((q[:, here] @ k[:, here].T / math.sqrt(width)).softmax(dim=1) @ v[:, here])
        attended = torch.cat(of_heads, dim=1) @ tensor("out")
        return attended.mean(dim=0) if pooling == "mean" else attended.max(dim=0).values

    levels = torch.stack([of_rows(rows, "token", level) for level, rows in enumerate(states.double())])
    vector = of_rows(levels, "layer", None)
    return vector, given["head"] @ vector + given["head_bias"]
