"""`Sampling`: how one request chooses its tokens and when it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from shoal.engine.entropy import TopK
from shoal.errors import InvalidInput

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
"""`processor(token_ids, logits) -> logits`: prompt and output so far, and float32 [V]; returns float32 [V]."""

OPTIONAL = ("top_k", "top_p", "min_p", "logprobs", "prompt_logprobs", "prompt_logprobs_last")
"""Numbers that may be None."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of one request. Every field is honoured; values outside their range raise `InvalidInput`."""

    max_new_tokens: int = 64
    """Most tokens to emit, the end-of-sequence token included."""
    min_new_tokens: int = 0
    """Tokens to emit before end-of-sequence is allowed."""
    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens whose probabilities reach p."""
    min_p: float | None = None
    """Keep tokens whose probability is at least this share of the most probable one's."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens seen in prompt or output (Keskar et al. 2019); 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token seen in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; -inf bans one."""
    stop: str | tuple[str, ...] = ()
    """Strings that end the completion; they are not part of its text. May be special tokens, such as `<|im_end|>`."""
    ignore_eos: bool = False
    """Whether to go on past end-of-sequence tokens."""
    seed: int = 0
    """Key of the noise: the same request with the same seed gives the same tokens, whatever company it runs in. Prompts that
    share a seed share their noise; for independent draws give each prompt a seed of its own."""
    n: int = 1
    """Completions of the prompt; with temperature above 0 each draws noise of its own."""
    logprobs: int | None = None
    """Report log-probabilities of the chosen token and of this many most probable ones, from logits as the model gave them."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens from the second on, by the layers that the prompt runs."""
    prompt_logprobs_last: int | None = None
    """Of that many last tokens of the prompt only, with `prompt_logprobs`; None is all of them."""
    entropy_top_k: TopK | None = None
    """Report the entropy trace (`shoal.engine.entropy`): per token the entropy over this many most probable tokens, or over all
    with "full", and the emitted token's negative log-probability, from logits as the model gave them. 20 is what is usual."""
    processor: LogitsProcessor | None = None
    """The user's own change of the logits, after penalties and bias, before temperature."""

    def __post_init__(self) -> None:
        if not isinstance(self.stop, str | tuple | list):
            raise InvalidInput(f"stop must be a string or several, got {self.stop!r}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        counts = ("max_new_tokens", "min_new_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs")
        for name in (*counts, "prompt_logprobs_last"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (value is None and name in OPTIONAL):
                raise InvalidInput(f"{name} must be a whole number, got {value!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and not (value is None and name in OPTIONAL):
                raise InvalidInput(f"{name} must be a number, got {value!r}")
        biases = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, 0.0)]
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, f"0 to {self.max_new_tokens}"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
            "presence_penalty": (abs(self.presence_penalty) < float("inf"), "a finite number"),
            "frequency_penalty": (abs(self.frequency_penalty) < float("inf"), "a finite number"),
            "logit_bias": (
                all(isinstance(token, int) and bias < float("inf") for token, bias in biases),
                "a mapping from token ids to numbers below infinity (-inf bans a token)",
            ),
            "stop": (all(isinstance(text, str) and text for text in self.stop), "strings that are not empty"),
            "seed": (0 <= self.seed < 2**64, "0 to 2**64 - 1"),
            "n": (self.n >= 1, "1 or more"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
            "entropy_top_k": (
                self.entropy_top_k in (None, "full") or (type(self.entropy_top_k) is int and self.entropy_top_k >= 1),
                "1 or more, or 'full'",
            ),
            "prompt_logprobs": (self.prompt_logprobs is None or self.prompt_logprobs >= 0, "0 or more"),
            "prompt_logprobs_last": (
                self.prompt_logprobs_last is None
                or (self.prompt_logprobs_last >= 1 and self.prompt_logprobs is not None),
                "1 or more, beside prompt_logprobs",
            ),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def plain_greedy(self) -> bool:
        """Whether the token is just the argmax of the model's logits."""
        penalised = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        changed = penalised or self.logit_bias or self.min_new_tokens or self.processor is not None
        return self.temperature == 0 and not changed


def uniform_noise(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) for one draw, a function of its arguments alone (splitmix64 finaliser, Steele et al. 2014).

    Keyed by position, so neither the batch's company nor tokens drafted and taken back change a later draw.
    """
    mask = 2**64 - 1
    z = seed
    for word in (sample, position):
        z = (z + 0x9E3779B97F4A7C15 * (word + 1)) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return (z >> 11) / 2**53
