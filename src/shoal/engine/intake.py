"""From what a user gives (prompts, sampling, plans: one of each or one per prompt) to checked requests."""

from __future__ import annotations

import bisect
import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar, cast

from shoal.depth.checkpoint import TunedDepth
from shoal.depth.plan import Dense, DepthPlan, DepthPolicy, Router
from shoal.engine.cache import KVCache
from shoal.engine.sampling import Sampling
from shoal.engine.slots import future_blocks
from shoal.errors import CacheBudgetExceeded, InvalidInput, InvalidPlan, InvalidPrompt
from shoal.models.passes import Ints
from shoal.models.weights import DecoderConfig

Prompt = str | Sequence[int]
"""Text, or token ids as they are."""
Plan = DepthPlan | DepthPolicy
"""A plan, or a policy that makes one per request."""

T = TypeVar("T")


def prompts_of(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list. A flat list of integers is one prompt of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
        raise InvalidPrompt(
            f"prompts are a string, a list of token ids, or several of those, got {reprlib.repr(prompts)}"
        )
    listed = list(prompts)
    if listed and all(isinstance(token, Integral) for token in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def one_per_prompt(name: str, given: T | Sequence[T], num_prompts: int) -> list[T]:
    """`given` for every prompt, or one each. Raises `InvalidInput` where the counts differ."""
    if not isinstance(given, list | tuple):
        return [given] * num_prompts  # type: ignore[list-item]
    if len(given) != num_prompts:
        raise InvalidInput(f"got {len(given)} values of {name} for {num_prompts} prompts: give one, or one per prompt")
    return list(given)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt with its sampling and plan, checked."""

    prompt: tuple[int, ...]
    """Token ids."""
    sampling: Sampling
    """As given."""
    plan: DepthPlan
    """Made by the policy, for this model and prompt; where a router decides, the deepest that it may make."""
    router: Router | None
    """Who makes the plan once the prompt has been read."""
    stop_token_ids: frozenset[int]
    """Tokens that end the completion: end of sequence unless ignored, and stop strings that are special tokens."""
    eos_token_ids: frozenset[int]
    """Tokens that may not come before `min_new_tokens`."""
    future_blocks: Ints
    """As in `Request`."""


def check_job(
    prompt: Prompt,
    sampling: Sampling | None,
    plan: Plan | None,
    *,
    config: DecoderConfig,
    tokenizer: Any,
    tuned: TunedDepth | None,
    cache: KVCache,
    draft_tokens: int = 0,
) -> Job:
    """Tokenise, check ids, lengths and cache budget, and make the plan.

    Args: `draft_tokens`: most tokens that a pass will verify for it.

    Raises `InvalidPrompt`, `InvalidPlan`, `CacheBudgetExceeded` or `InvalidInput`.
    """
    sampling = Sampling() if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise InvalidInput(f"sampling must be a Sampling, got {reprlib.repr(sampling)} (plans go into plan=)")
    token_ids = encode(prompt, tokenizer)
    vocab_size = config.shape.vocab_size
    outside = [token for token in (*token_ids, *sampling.logit_bias) if not 0 <= token < vocab_size]
    if outside:
        raise InvalidInput(f"token id {outside[0]} is outside the vocabulary (0 to {vocab_size - 1})")
    if sampling.stop and tokenizer is None:
        raise InvalidInput("stop strings need a tokenizer, and this engine has none")
    check_length(len(token_ids), sampling.max_new_tokens, config)
    made = resolve_plan(plan, len(token_ids), sampling.max_new_tokens, config.shape.num_layers, tuned)
    check_budget(made, len(token_ids), sampling.max_new_tokens, cache, draft_tokens)
    router = cast(Router, plan) if hasattr(plan, "route") else None
    if router is not None:
        router.check(config.shape)
    eos_token_ids = frozenset(config.eos_token_ids)
    return Job(
        prompt=token_ids,
        sampling=sampling,
        plan=made,
        router=router,
        stop_token_ids=special_tokens(sampling.stop, tokenizer)
        | (frozenset() if sampling.ignore_eos else eos_token_ids),
        eos_token_ids=eos_token_ids,
        future_blocks=future_blocks(made, len(token_ids), sampling.max_new_tokens, draft_tokens),
    )


def special_tokens(stop: Sequence[str], tokenizer: Any) -> frozenset[int]:
    """Ids of the stop strings that are special tokens: these never show in decoded text, so they stop by id."""
    if not stop:
        return frozenset()
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special[text] for text in stop if text in special)


def encode(prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts around one."""
    if isinstance(prompt, str):
        if not is_text(prompt):
            raise InvalidPrompt("the prompt holds half of a surrogate pair, which is not text")
        if tokenizer is None:
            raise InvalidPrompt("this checkpoint has no tokenizer: give prompts as lists of token ids")
        token_ids = tuple(tokenizer(prompt).input_ids) if prompt else ()  # not the special tokens alone
    else:
        try:
            if isinstance(prompt, bytes | Mapping):
                raise TypeError
            token_ids = tuple(map(operator.index, prompt))  # NumPy's integers, too
        except TypeError as error:
            got = reprlib.repr(prompt)
            raise InvalidPrompt(f"a prompt is a string or a list of token ids (integers), got {got}") from error
    if not token_ids:
        raise InvalidPrompt("the prompt is empty: give at least one token")
    return token_ids


def is_text(text: str) -> bool:
    """Whether it holds characters only, and no half of a surrogate pair, which tokenizers do not take."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_length(prompt_tokens: int, max_new_tokens: int, config: DecoderConfig) -> None:
    """Raises `InvalidPrompt` where prompt and completion do not fit the positions or the sliding window."""
    wanted = f"{prompt_tokens} prompt tokens + {max_new_tokens} new tokens"
    if prompt_tokens + max_new_tokens > config.max_positions:
        room = config.max_positions - prompt_tokens
        advice = f"max_new_tokens can be at most {room}" if room > 0 else "shorten the prompt"
        raise InvalidPrompt(f"{wanted} exceed the model's {config.max_positions} positions: {advice}")
    if config.sliding_window is not None and prompt_tokens + max_new_tokens > config.sliding_window:
        raise InvalidPrompt(
            f"{wanted} exceed the sliding window of {config.sliding_window} tokens: "
            "longer requests would need windowed attention, which is not supported"
        )


def check_budget(
    plan: DepthPlan, prompt_tokens: int, max_new_tokens: int, cache: KVCache, draft_tokens: int = 0
) -> None:
    """Raises `CacheBudgetExceeded` for a request that would not fit even alone, and says what would."""

    def needed(new_tokens: int) -> int:
        return int(future_blocks(plan, prompt_tokens, new_tokens, draft_tokens)[0])

    def gib(num_blocks: int) -> str:
        return f"{num_blocks * cache.bytes_per_block / 2**30:.3g} GiB"

    wanted = f"{prompt_tokens} prompt tokens + {max_new_tokens} new tokens"
    if needed(max_new_tokens) > cache.budget_blocks:
        fits = bisect.bisect_right(range(1, max_new_tokens + 1), cache.budget_blocks, key=needed)
        raise CacheBudgetExceeded(
            f"{wanted} need {needed(max_new_tokens)} cache blocks ({gib(needed(max_new_tokens))}) and the budget is "
            f"{cache.budget_blocks} ({gib(cache.budget_blocks)}): "
            + (f"max_new_tokens={fits} would fit" if fits else "the prompt alone does not fit")
            + ", or raise cache_gib"
        )
    if not cache.fits_slots(prompt_tokens + max_new_tokens - 1):
        raise CacheBudgetExceeded(
            f"{wanted} in {cache.num_slots} cache slots, which {cache.device.type} allocates whole, exceed the budget of "
            f"{gib(cache.budget_blocks)}: lower max_batch or raise cache_gib"
        )


def resolve_plan(
    plan: Plan | None, prompt_tokens: int, max_new_tokens: int, num_layers: int, tuned: TunedDepth | None
) -> DepthPlan:
    """The plan of one request: open fields of a policy come from the checkpoint's `depth_plan.json`; None is dense."""
    if plan is None:
        plan = Dense()
    if tuned is not None:
        plan = tuned.fill(plan)
    if isinstance(plan, DepthPlan):
        made = plan
    elif hasattr(plan, "plan") and not isinstance(plan, type):
        made = plan.plan(num_layers, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
    else:
        raise InvalidPlan(
            f"plan must be a DepthPlan or a policy such as {Dense()} or SkipDecode(depth=1/2), got {plan!r}"
        )
    if not isinstance(made, DepthPlan):
        raise InvalidPlan(f"{plan!r} made {reprlib.repr(made)} where a DepthPlan was expected")
    if made.num_layers != num_layers:
        raise InvalidPlan(f"the plan is for {made.num_layers} layers, the model has {num_layers}")
    return made
