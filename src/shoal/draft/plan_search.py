"""Which layers of a model should draft for it? A search on what the model itself writes, after SWIFT (arXiv 2410.06916).

A set of layers is worth the speed-up that it promises. With agreement a (`agreement.py`), cost c of a drafted token over one at
full depth, and k tokens drafted, a pass emits 1 + a + ... + a^k tokens in the time of 1 + k c (Leviathan et al. 2023, theorem
3.8), so

    gain = max over k of (1 + a + ... + a^k) / (1 + k c)

c is the ratio of the decode FLOPs that the ledger would count, head included; that of weight bytes is about the same. A pass that
verifies k tokens is taken to cost as much as one: true where weights are what a pass reads. What a draft shares with the verifying
pass is not taken off. Example: a = 0.8, c = 0.3: 1.8 / 1.3 = 1.38 for k = 1, 2.44 / 1.6 = 1.53 for 2, 2.95 / 1.9 = 1.55 for 3.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from shoal.depth.plan import ALWAYS, Dense, DepthPlan
from shoal.draft.agreement import Text, WrittenTexts
from shoal.draft.layer_sets import Layers, best_layers
from shoal.draft.resolve import own_policy
from shoal.engine.engine import Engine
from shoal.engine.intake import resolve_plan
from shoal.errors import InvalidInput
from shoal.files import write_json

LONGEST = 8
"""Most tokens of a draft whose gain is looked at, as in the engine."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What to search."""

    num_layers: int | None = None
    """Layers that draft; None searches their number, too."""
    trials: int = 300
    """Sets of layers to measure."""
    seed: int = 0
    """Of the random sets and of the order of neighbours."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InvalidInput(f"trials must be 1 or more, got {self.trials}")


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a plan promises as a draft."""

    agreement: float
    """Share of tokens that it drafts as they were written, each given those before it."""
    cost: float
    """Of a drafted token: decode FLOPs over those at full depth."""
    draft_tokens: int
    """The length of a draft that promises most."""
    tokens_per_pass: float
    """Expected at that length, if tokens agree independently."""
    gain: float
    """Expected tokens at the cost of one at full depth."""

    @classmethod
    def of(cls, agreement: float, cost: float) -> Promise:
        """The best length for this agreement and cost."""
        promises = []
        for count in range(1, LONGEST + 1):
            tokens = sum(agreement**ahead for ahead in range(count + 1))
            gain = tokens / (1 + count * cost)
            promises.append(cls(agreement=agreement, cost=cost, draft_tokens=count, tokens_per_pass=tokens, gain=gain))
        return max(promises, key=lambda promise: promise.gain)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A plan on both halves of the texts."""

    plan: DepthPlan
    """What drafts."""
    searched: Promise
    """On the texts that the search saw: too good for a plan that was chosen by them."""
    held_out: Promise
    """On the others."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What the search found."""

    found: Measured
    """The best of the trials."""
    usual: Measured
    """What `draft="self"` uses without being told."""
    num_tokens: tuple[int, int]
    """Drafted for each measurement, on the texts of the search and on the others."""


class PlanSearch:
    """A search on an engine's model, and the file that it goes on from."""

    def __init__(self, engine: Engine, texts: Sequence[Text], config: SearchConfig, *, model: str) -> None:
        """`texts`: prompts and what the model wrote after them, greedily at full depth; every second one is held out. `model`: its
        name, for the file.

        Raises `InvalidInput` for a number of layers that the model does not have, and fewer than 2 texts of 2 written tokens.
        """
        self.num_layers, self.config = engine.shape.num_layers, config
        if config.num_layers is not None and not 1 <= config.num_layers < self.num_layers:
            raise InvalidInput(
                f"the layers that draft must be 1 to {self.num_layers - 1} of the model's {self.num_layers}, "
                f"got {config.num_layers}"
            )
        texts = [text for text in texts if len(text[1]) > 1]
        if len(texts) < 2:
            raise InvalidInput(
                "a search needs 2 texts or more of 2 written tokens each, one to search on and one to check it on; "
                f"got {len(texts)}"
            )
        decoder = engine.runner.decoder
        self.seen, self.held_out = WrittenTexts(decoder, texts[::2]), WrittenTexts(decoder, texts[1::2])
        self.shape = engine.shape
        self.prompt_tokens = round(mean(len(prompt) for prompt, _ in texts))
        self.new_tokens = round(mean(len(written) for _, written in texts))
        self.usual = resolve_plan(
            own_policy(engine), self.prompt_tokens, self.new_tokens, self.num_layers, engine.tuned
        )
        written = json.dumps([[list(prompt), list(tokens)] for prompt, tokens in texts])
        self.settings = {
            "model": model,
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "texts": len(texts),
            "sha256_of_texts": hashlib.sha256(written.encode()).hexdigest(),
        }
        self.scores: dict[Layers, float] = {}

    def resume(self, path: Path) -> None:
        """Take over what an earlier search measured. Raises `InvalidInput` where it was on another model or on other texts."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            settings = data["settings"]
            scores = {tuple(map(int, key.split())): float(score) for key, score in data["scores"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a draft plan to go on with: {error}") from error
        if settings != self.settings:
            other = next(name for name, value in self.settings.items() if settings.get(name) != value)
            raise InvalidInput(
                f"{path} is a search with another {other} ({settings.get(other)!r}, not {self.settings[other]!r}): "
                "leave --resume out and choose another file"
            )
        self.scores = scores

    def run(self, out: Path, *, report: Callable[[int, Promise], None] = lambda done, best: None) -> SearchResult:
        """Search. After every trial `out` holds the best plan so far, and what `resume` needs."""
        tried: set[Layers] = set()
        best: Layers | None = None

        def worth(layers: Layers) -> float:
            nonlocal best
            measured = layers in self.scores
            if not measured:
                self.scores[layers] = self.seen.agreement(plan_of(layers, self.num_layers))
            tried.add(layers)
            gain = self.promise(layers).gain
            if best is None or gain > self.promise(best).gain:
                best = layers
            if not measured:
                write_json(out, self.to_dict(best))
            report(len(tried), self.promise(best))
            return gain

        count = self.config.num_layers
        found = best_layers(
            worth,
            self.num_layers,
            counts=range(1, self.num_layers) if count is None else [count],
            starts=self.starts(),
            trials=self.config.trials,
            seed=self.config.seed,
        )
        result = SearchResult(
            found=self.measure(plan_of(found, self.num_layers)),
            usual=self.measure(self.usual),
            num_tokens=(self.seen.num_drafted, self.held_out.num_drafted),
        )
        write_json(out, self.to_dict(found, result))
        return result

    def starts(self) -> list[Layers]:
        """Sets that are tried first: what would draft without a search, the lowest layers, and evenly spread ones."""
        usual = self.usual.active(0)
        count = self.config.num_layers or len(usual)
        spread = tuple(index * self.num_layers // count for index in range(count))
        starts = (usual, tuple(range(count)), spread)
        return [layers for layers in dict.fromkeys(starts) if len(layers) == count < self.num_layers]

    def cost(self, plan: DepthPlan) -> float:
        """FLOPs of a token that `plan` drafts, over those of one at full depth, in a text of mean length."""
        lengths = {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        dense = Dense().plan(self.num_layers)
        return plan.cost(self.shape, **lengths).decode_flops / dense.cost(self.shape, **lengths).decode_flops

    def promise(self, layers: Layers) -> Promise:
        """Of a set that has been measured."""
        return Promise.of(self.scores[layers], self.cost(plan_of(layers, self.num_layers)))

    def measure(self, plan: DepthPlan) -> Measured:
        """A plan on both halves."""
        cost = self.cost(plan)
        return Measured(
            plan=plan,
            searched=Promise.of(self.seen.agreement(plan), cost),
            held_out=Promise.of(self.held_out.agreement(plan), cost),
        )

    def to_dict(self, best: Layers, result: SearchResult | None = None) -> dict[str, Any]:
        """JSON-ready: the plan, what it promises, and what a search can go on from."""
        data: dict[str, Any] = {
            "plan": plan_of(best, self.num_layers).to_dict(),
            "layers": list(best),
            "searched": asdict(self.promise(best)),
        }
        if result is not None:
            data["held_out"] = asdict(result.found.held_out)
            data["usual"] = {
                "plan": result.usual.plan.to_dict(),
                "searched": asdict(result.usual.searched),
                "held_out": asdict(result.usual.held_out),
            }
        return {
            **data,
            "search": asdict(self.config),
            "settings": self.settings,
            "scores": {" ".join(map(str, layers)): score for layers, score in self.scores.items()},
        }


def plan_of(layers: Layers, num_layers: int) -> DepthPlan:
    """The plan in which these layers draft every token."""
    return DepthPlan(tuple(ALWAYS if layer in layers else 0 for layer in range(num_layers)))
