"""Reading prompts with several probes at once, level by level, as passes compute them.

Pooling and the gate are sums over tokens, so a prompt may come in any chunks, and no state is kept:

    gate        sum of e^s x, and sum of e^s, with s = scale tanh(w . x)       |s| is bounded: no running maximum is needed
    mean        the same with w = 0
    maximum     of each value

Attention needs all rows of a prompt together: it keeps them down-cast, up to the probe's limit of tokens. Letters: R prompts in a
pass, n tokens of theirs, d the width of states, J sums per level and prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shoal.engine.observing import Findings, Label
from shoal.errors import CheckpointError, InvalidInput, InvalidPrompt, RequestFailed
from shoal.files import replaced
from shoal.signals.probe import Probe

BLOCK_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens that are read together. On CPUs their states in float32 stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What probes have read of the first tokens of a prompt: a value that can be kept, and gone on from."""

    version: str
    """Of the probes; others cannot go on from it."""
    num_tokens: int
    """How many tokens those are."""
    sums: Tensor
    """float32 [levels, J, d], the sums of e^s x."""
    weights: Tensor
    """float32 [levels, J], the sums of e^s."""
    maxima: Tensor
    """float32 [levels, d]; [levels, 0] where no probe asks for them."""
    rows: Tensor
    """float32 [levels, tokens, columns], down-cast for attention; no columns where no probe attends."""

    def then(self, more: Prefix) -> Prefix:
        """This, and `more` of the same prompt after it."""
        return replace(
            self,
            num_tokens=self.num_tokens + more.num_tokens,
            sums=self.sums + more.sums,
            weights=self.weights + more.weights,
            maxima=torch.maximum(self.maxima, more.maxima),
            rows=torch.cat((self.rows, more.rows), dim=1),
        )

    def save(self, path: Path) -> None:
        """Write it as a safetensors file."""
        tensors = {name: getattr(self, name).contiguous().cpu() for name in ("sums", "weights", "maxima", "rows")}
        with replaced(path) as partial:
            partial.write_bytes(save(tensors, {"version": self.version, "num_tokens": str(self.num_tokens)}))

    @classmethod
    def load(cls, path: Path) -> Prefix:
        """Read a file of `save`. Raises `CheckpointError`."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                tensors = [file.get_tensor(name) for name in ("sums", "weights", "maxima", "rows")]
            return cls(header["version"], int(header["num_tokens"]), *tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{path} holds nothing that probes have read: {error!r}") from error


class ProbeReading:
    """What probes have read of one request's prompt."""

    def __init__(self, observer: ProbeSet, prompt_tokens: int, prefix: Prefix | None) -> None:
        self.observer, self.prompt_tokens = observer, prompt_tokens
        self.read = prefix
        self.flops = 0
        self.findings: Findings | RequestFailed | None = None

    def add(self, part: Prefix) -> bool:
        """Go on with the next tokens; whether that was the whole prompt."""
        self.read = self.read.then(part) if self.read else part
        return self.read.num_tokens >= self.prompt_tokens

    def go_on(self, prefix: Prefix) -> None:
        """As in `Reading`."""
        self.read = prefix

    def prefix(self) -> Prefix:
        """What has been read so far, for other prompts that begin with the same tokens. Raises `InvalidInput` for attention."""
        if self.read is None:
            raise InvalidInput("nothing of the prompt has been read yet: there is no prefix to keep")
        if self.observer.columns:
            raise InvalidInput(
                "attention needs a row of every token, so what it has read of a prefix is not kept: use a pooling or gate probe"
            )
        return self.read


class ProbeSet:
    """Reads prompts for several probes; an `Observer`."""

    def __init__(
        self, probes: Sequence[Probe], guards: Mapping[str, tuple[tuple[str, ...], float | None]] | None = None
    ) -> None:
        """`probes`: on one device, of one model, with names of their own; `guards`: by name of the probe, classes that end a
        request, and the probability from which on they do."""
        self.probes, self.guards = tuple(probes), dict(guards or {})
        settings = [probe.settings for probe in self.probes]
        self.num_levels = max(one.num_levels for one in settings)
        self.hidden_size = settings[0].hidden_size
        self.version = hashlib.sha256(" ".join(probe.version for probe in self.probes).encode()).hexdigest()[:16]
        self.device = self.probes[0].tensors["head"].device
        gates = {i: one for i, one in enumerate(settings) if one.operator == "gate"}
        pooled = [i for i, one in enumerate(settings) if one.operator == "pool" and one.pooling == "mean"]
        self.takes_maxima = any(one.operator == "pool" and one.pooling == "max" for one in settings)
        self.sum_of = {probe: at for at, probe in enumerate(gates)} | {probe: len(gates) for probe in pooled}
        self.num_sums = len(gates) + bool(pooled)
        d = self.hidden_size
        self.gates = torch.zeros(self.num_levels, self.num_sums, d, device=self.device)
        self.scales = torch.zeros(self.num_sums, 1, device=self.device)
        for at, (probe, one) in enumerate(gates.items()):
            self.gates[: one.num_levels, at] = self.probes[probe].tensors["token_gate"]
            self.scales[at] = one.gate_scale
        attends = {i: one for i, one in enumerate(settings) if one.operator == "attention"}
        ends = list(torch.tensor([3 * one.width for one in attends.values()], dtype=torch.int64).cumsum(0).tolist())
        self.columns_of = {
            probe: slice(end - 3 * one.width, end) for (probe, one), end in zip(attends.items(), ends, strict=True)
        }
        self.columns = ends[-1] if ends else 0
        self.down = torch.zeros(self.num_levels, d, self.columns, device=self.device)
        for probe, one in attends.items():
            self.down[: one.num_levels, :, self.columns_of[probe]] = self.probes[probe].tensors["token_qkv"]

    def begin(self, prompt_tokens: int, prefix: Prefix | None = None) -> ProbeReading:
        """A reading for a prompt of so many tokens, of which `prefix` has read the first.

        Raises `InvalidPrompt` for more than an attention probe keeps rows of; `InvalidInput` for a prefix of other probes.
        """
        for probe in self.probes:
            most = probe.settings.max_prompt_tokens
            if most is not None and prompt_tokens > most:
                raise InvalidPrompt(
                    f"the prompt has {prompt_tokens} tokens, and probe {probe.settings.name!r} attends over at most {most}: "
                    "shorten the prompt, leave the probe out, or use a gate, which has no limit"
                )
        if prefix and prefix.version != self.version:
            raise InvalidInput(f"what was read of the prefix is of probes {prefix.version}, these are {self.version}")
        if prefix and self.columns:
            raise InvalidInput("an attention probe reads the whole prompt: it cannot go on from a prefix")
        if prefix and prefix.num_tokens >= prompt_tokens:
            raise InvalidInput(
                f"the prefix has {prefix.num_tokens} tokens, the prompt no more than that: {prompt_tokens}"
            )
        return ProbeReading(self, prompt_tokens, prefix)

    @property
    def shares(self) -> str | None:
        """As in `Observer`: attention needs the rows of a whole prompt."""
        return None if self.columns else self.version

    def watch(self, readings: Sequence[ProbeReading], counts: Sequence[int]) -> ProbeWatch:
        """As in `Observer`."""
        return ProbeWatch(self, readings, counts)

    @torch.inference_mode()
    def find(self, readings: Sequence[ProbeReading]) -> list[Findings | RequestFailed]:
        """What the probes say of prompts that have been read."""
        read = [reading.read for reading in readings if reading.read]
        labels: list[dict[str, Label]] = [{} for _ in read]
        failed: dict[int, RequestFailed] = {}
        for probe, of in enumerate(self.probes):
            ours = of.settings
            vectors = of.layer_stage(self._levels(probe, read))
            probabilities = of.probabilities(of.logits(vectors))
            unfamiliar = of.unfamiliarity(vectors)
            decided = of.decide(probabilities)
            rows = zip(probabilities.tolist(), unfamiliar.tolist(), decided.tolist(), strict=True)
            for row, (shares, distance, label) in enumerate(rows):
                if not all(map(math.isfinite, shares)):
                    failed[row] = RequestFailed(f"probe {ours.name!r} made probabilities that are not finite")
                labels[row][ours.name] = Label(
                    label=ours.classes[label],
                    probabilities=dict(zip(ours.classes, shares, strict=True)),
                    out_of_distribution=distance,
                    probe=of.version,
                )
        return [
            failed.get(row) or Findings(labels=one, blocked_by=self._blocked_by(one)) for row, one in enumerate(labels)
        ]

    def _levels(self, probe: int, read: Sequence[Prefix]) -> Tensor:
        """Levels' vectors [R, levels, d] of what was read."""
        of = self.probes[probe]
        levels = slice(of.settings.num_levels)
        if probe in self.sum_of:
            at = self.sum_of[probe]
            sums = torch.stack([one.sums[levels, at] for one in read])
            return sums / torch.stack([one.weights[levels, at] for one in read]).unsqueeze(-1)
        if probe not in self.columns_of:
            return torch.stack([one.maxima[levels] for one in read])
        columns = self.columns_of[probe]
        alone = [one.rows[levels, :, columns].unsqueeze(1) for one in read]
        whole = [torch.ones(1, one.num_tokens, dtype=torch.bool, device=self.device) for one in read]
        return torch.cat([of.attend_tokens(rows, mask) for rows, mask in zip(alone, whole, strict=True)])

    def _blocked_by(self, labels: Mapping[str, Label]) -> str | None:
        """The first probe whose guard ends the request."""
        for name, (stop_on, threshold) in self.guards.items():
            found = labels[name]
            if threshold is None:
                if found.label in stop_on:
                    return name
            elif sum(found.probabilities[one] for one in stop_on) >= threshold:
                return name
        return None

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations on one token in all levels: a product and a sum for each of J, the down-cast rows."""
        return self.num_levels * self.hidden_size * (4 * self.num_sums + 2 * self.columns)

    def flops_at_the_end(self, prompt_tokens: int) -> int:
        """Floating-point operations once a prompt has been read: attention among its rows, layer stage, head, distance."""
        total = 0
        for probe in self.probes:
            ours, d = probe.settings, self.hidden_size
            levels, h, rows = ours.num_levels, ours.width, prompt_tokens
            if ours.operator == "attention":
                out_rows, top_rows = (rows, levels) if ours.pooling == "max" else (1, 1)
                total += levels * (4 * rows * rows * h + 2 * out_rows * h * d)
                total += levels * 6 * d * h + 4 * levels * levels * h + 2 * top_rows * h * d
            elif ours.operator == "gate":
                total += 4 * levels * d
            total += 2 * d * ours.num_logits + 2 * d * (d + len(ours.classes))
        return total


class ProbeWatch:
    """A `ProbeSet` at work in one pass."""

    def __init__(self, probes: ProbeSet, readings: Sequence[ProbeReading], counts: Sequence[int]) -> None:
        self.probes, self.readings, self.counts = probes, readings, counts
        num_rows, num_tokens, device = len(counts), sum(counts), probes.device
        levels, sums, d = probes.num_levels, probes.num_sums, probes.hidden_size
        self.row_of = torch.repeat_interleave(torch.arange(num_rows), torch.tensor(counts))
        self.sums = torch.zeros(levels, num_rows * sums, d, device=device)
        self.weights = torch.zeros(levels, num_rows * sums, device=device)
        self.maxima = torch.full((levels, num_rows, d if probes.takes_maxima else 0), -torch.inf, device=device)
        self.rows = torch.empty(levels, num_tokens, probes.columns, device=device)
        self.blocks = [self._block(begin, num_tokens) for begin in range(0, num_tokens, self._block_tokens)]

    @property
    def _block_tokens(self) -> int:
        return BLOCK_TOKENS.get(self.probes.device.type, BLOCK_TOKENS["cuda"])

    def _block(self, begin: int, num_tokens: int) -> Block:
        """The tokens from `begin` on that are read together."""
        end = min(begin + self._block_tokens, num_tokens)
        row_of = self.row_of[begin:end]
        first, last = int(row_of[0]), int(row_of[-1])
        mine = torch.arange(first, last + 1).unsqueeze(1) == row_of
        return Block(begin, end, first, last + 1, mine.to(self.probes.device, torch.float32).unsqueeze(1))

    @torch.inference_mode()
    def see(self, level: int, states: Tensor) -> None:
        """As in `WatchedStates`."""
        if level >= self.probes.num_levels:
            return
        for block in self.blocks:
            x = states[block.begin : block.end].float()
            if self.probes.num_sums:
                self._add(level, block, x)
            if self.probes.columns:
                torch.mm(x, self.probes.down[level], out=self.rows[level, block.begin : block.end])
            if self.probes.takes_maxima:
                self._raise(level, block, x)

    def _add(self, level: int, block: Block, x: Tensor) -> None:
        """Add e^s x and e^s of states x [n, d] to their prompts' sums."""
        probes = self.probes
        shares = torch.exp(torch.tanh(probes.gates[level] @ x.T) * probes.scales)
        by_row = (block.mine * shares).flatten(0, 1)  # [prompts J, n], zeros for tokens of other prompts
        places = slice(block.first_row * probes.num_sums, block.end_row * probes.num_sums)
        self.sums[level, places].addmm_(by_row, x)
        self.weights[level, places] += by_row.sum(dim=1)

    def _raise(self, level: int, block: Block, states: Tensor) -> None:
        """Raise the prompts' maxima to those of states [n, d]."""
        ends = block.mine.squeeze(1).sum(dim=1).long().tolist()
        for row, part in enumerate(torch.split(states, ends), start=block.first_row):
            here = self.maxima[level, row]
            torch.maximum(here, part.amax(dim=0), out=here)

    @torch.inference_mode()
    def keep(self) -> None:
        """As in `Watch`; prompts that are whole now get their findings."""
        probes, whole = self.probes, []
        by_row = (len(self.counts), probes.num_sums)
        sums = self.sums.view(probes.num_levels, *by_row, probes.hidden_size)
        weights = self.weights.view(probes.num_levels, *by_row)
        rows = torch.split(self.rows, list(self.counts), dim=1)
        for row, (reading, count) in enumerate(zip(self.readings, self.counts, strict=True)):
            mine = rows[row] if count == reading.prompt_tokens else rows[row].clone()  # not the whole pass's, to keep
            part = Prefix(probes.version, count, sums[:, row], weights[:, row], self.maxima[:, row], mine)
            reading.flops += count * probes.flops_per_token
            if reading.add(part):
                whole.append(reading)
        for reading, findings in zip(whole, probes.find(whole) if whole else (), strict=True):
            reading.findings = findings
            reading.flops += probes.flops_at_the_end(reading.prompt_tokens)
            if probes.columns:
                reading.read = None  # rows of every token: they go with the pass


@dataclass(frozen=True)
class Block:
    """Tokens that are read together."""

    begin: int
    """First token."""
    end: int
    """After the last."""
    first_row: int
    """Prompt of the first token."""
    end_row: int
    """After the prompt of the last."""
    mine: Tensor
    """float32 [prompts, 1, n]: 1 where a token is of that prompt."""
