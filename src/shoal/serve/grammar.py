"""Completions of a given form, by masks of the tokens that may come next (llguidance)."""

from __future__ import annotations

import json
import re
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor

from shoal.engine.engine import Engine
from shoal.serve.errors import ApiError
from shoal.serve.schema import ResponseFormat

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=50_000, max_lexer_states=50_000, verbose_errors=False
)
"""A quarter of theirs: a token of one request may not take long in the thread that all share. Errors repeat no text."""


class Grammars:
    """Compiles formats for one engine's tokenizer. One thread at a time may call it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._tokens: llguidance.LLTokenizer | None = None

    def processor(self, form: ResponseFormat, prompt_tokens: int) -> Constrained | None:
        """A logits processor for one request, None where any text will do.

        Raises `ApiError` for a format that cannot be compiled.
        """
        if form.type == "text":
            return None
        if self._tokens is None:  # takes a second with a large vocabulary
            config = self.engine.config
            self._tokens = llguidance.hf.from_tokenizer(
                self.engine.tokenizer, n_vocab=config.shape.vocab_size, eos_token=list(config.eos_token_ids) or None
            )
        matcher = llguidance.LLMatcher(self._tokens, grammar_of(form), log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # a form too large shows here, seconds late: not while the model's thread waits for it
        if matcher.is_error():
            raise ApiError(400, f"response_format: {matcher.get_error()}", param="response_format")
        return Constrained(matcher, prompt_tokens)


def grammar_of(form: ResponseFormat) -> str:
    """The format in llguidance's terms."""
    if form.type == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(form.regex or ""))
    if form.type == "choice":
        return str(llguidance.LLMatcher.grammar_from_regex("|".join(map(re.escape, form.choice or ()))))
    schema: dict[str, Any] = {"type": "object"}
    if form.json_schema is not None:
        if not form.json_schema.strict:
            raise ApiError(
                400, "response_format.json_schema.strict: a schema is always enforced", param="response_format"
            )
        schema = form.json_schema.json_schema
    try:
        return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    except ValueError as error:
        raise ApiError(400, f"response_format: {error}", param="response_format") from error


class Constrained:
    """A logits processor that follows what has been emitted, drafts that are taken back and other samples included."""

    def __init__(self, matcher: llguidance.LLMatcher, prompt_tokens: int) -> None:
        self.matcher, self.prompt_tokens = matcher, prompt_tokens
        self._consumed: list[int] = []

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """float32 [V]: -inf for tokens that the format does not allow next."""
        output = token_ids[self.prompt_tokens :]
        same = 0
        for ours, theirs in zip(self._consumed, output, strict=False):
            if ours != theirs:
                break
            same += 1
        if same < len(self._consumed):
            self.matcher.rollback(len(self._consumed) - same)
        self.matcher.consume_tokens(output[same:])
        self._consumed = output
        if self.matcher.is_error():
            raise ValueError(self.matcher.get_error())
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool))
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)
