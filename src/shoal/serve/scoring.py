"""`/v1/score`: how probable the model finds given continuations, at any depth.

At full depth one pass reads prompt and continuation. Depth acts on generated tokens, so with less of it the continuation is emitted
token by token, as in `evaluate/continuations.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from shoal.depth.plan import Dense
from shoal.engine.ledger import Ledger
from shoal.engine.request import Generation, Request, TokenLogprobs
from shoal.engine.sampling import Sampling
from shoal.evaluate.continuations import forced
from shoal.serve import schema
from shoal.serve.errors import ApiError
from shoal.serve.intake import Intake
from shoal.serve.replies import failure, spent


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """A request per continuation."""

    continuations: tuple[tuple[int, ...], ...]
    """Token ids."""
    requests: tuple[Request, ...]
    """Each reads its continuation with the prompt, or emits it."""


def scoring_job(intake: Intake, body: schema.Score) -> ScoringJob:
    """The requests of a body. Raises `ApiError`."""
    intake.check_model(body.model)
    intake.check_count(len(body.continuations), "continuations")
    prompt = intake.encode(body.prompt)
    in_one_pass = isinstance(intake.plan(body), Dense)
    continuations, requests = [], []
    for index, given in enumerate(body.continuations):
        tokens = continuation_tokens(intake, body.prompt, prompt, given)
        if not tokens:
            raise ApiError(400, f"continuations[{index}] has no token", param=f"continuations[{index}]")
        read, sampling = prompt, forced(prompt, tokens)
        if in_one_pass:
            read, sampling = (*prompt, *tokens), Sampling(max_new_tokens=1, ignore_eos=True, prompt_logprobs=1)
        requests += intake.prepare(read, sampling, body, index=index, draft=None, timeout_s=body.timeout_s)
        continuations.append(tokens)
    return ScoringJob(continuations=tuple(continuations), requests=tuple(requests))


def continuation_tokens(
    intake: Intake, text: str | Sequence[int], prompt: tuple[int, ...], continuation: str | Sequence[int]
) -> tuple[int, ...]:
    """What a text's tokens have beyond the prompt's: a token may span the border, and then the prompt's last one is another.

    Where the tokenizer ends a prompt with a special token, or its text is not known, a continuation stands by itself.
    """
    if not isinstance(continuation, str):
        return tuple(continuation)
    intake.check_text(continuation, "continuations")

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(intake.engine.tokenizer(text, add_special_tokens=False).input_ids)

    if isinstance(text, str) and prompt[-len(plain := tokens(text)) :] == plain:
        return tokens(text + continuation)[len(plain) :]
    return tokens(continuation)


def scores(job: ScoringJob, done: Sequence[Generation], *, model: str, num_layers: int) -> dict[str, Any]:
    """The answer. Raises `ApiError` where a request failed."""
    data = []
    for tokens, generation in zip(job.continuations, done, strict=True):
        if (error := failure(generation)) is not None:
            raise error
        positions = (generation.prompt_logprobs or generation.logprobs or ())[-len(tokens) :]
        data.append(scored(tokens, positions) | {"index": generation.index})
    ledger = reduce(add, (one.ledger for one in done), Ledger())
    usage = {"scored_tokens": sum(map(len, job.continuations)), "shoal": spent(ledger, num_layers, None)}
    return {"object": "list", "model": model, "data": data, "usage": usage}


def scored(tokens: Sequence[int], positions: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """One continuation's log-probability, and whether greedy decoding would write it."""
    logprobs = [position.logprob for position in positions]
    greedy = all(next(iter(position.top)) == token for position, token in zip(positions, tokens, strict=True))
    return {"logprob": sum(logprobs), "greedy": greedy, "tokens": list(tokens), "token_logprobs": logprobs}
