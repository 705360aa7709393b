"""Traces with labels and slices, read from JSON Lines: ours, or log-probabilities that any OpenAI-compatible server returned.

A line is what `shoal generate --entropy` wrote, with a field `trace`; or a response as it came from `/v1/chat/completions` or
`/v1/completions`, asked for with log-probabilities of k top tokens, by itself or in a field `response`. Beside it may stand

    "correct": 0 or 1      the label (also true or false)
    "slice": "german"      the slice it belongs to; "all" where there is none

A server lists k top tokens per token, and vLLM the sampled one behind them where it is not among them: the k most probable count,
the 21st of 20 does not. Lists that are missing, cut or of different lengths are refused, never guessed at. What `shoal generate`
wrote of a request that failed or was blocked is no answer: it is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.engine.entropy import EntropyTrace, TopK
from shoal.errors import InvalidInput
from shoal.jsonl import parse_jsonl

DEFAULT_SLICE = "all"
MOST_NATS = 1e9
"""Of an entropy or a log-probability: what servers write for minus infinity is less, and sums stay far from float32's end."""
FAILED = ("error", "blocked")
"""What `finish_reason` says where there is no answer."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One response."""

    trace: EntropyTrace
    slice: str
    """Its name."""
    correct: bool | None
    """The label, where there is one."""


def read_traces(
    path: Path, *, top_k: int | None = None, warn: Callable[[str], None] = lambda message: None
) -> list[Traced]:
    """All responses of a file; `top_k`: what a server was asked for, None to find out; `warn`: hears of requests that had failed.

    Raises `InvalidInput` with the line's number; also where lines differ in k, or there are none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as UTF-8 text: {error}") from error
    left_out: list[int] = []
    traced = list(parse_traces(text, str(path), top_k=top_k, left_out=left_out))
    if left_out:
        warn(
            f"{path}: {len(left_out)} requests had failed or were blocked, the first in line {left_out[0]}: they are left out"
        )
    if not traced:
        raise InvalidInput(f"{path} has no traces")
    one_top_k([one.trace for one in traced], str(path))
    return traced


def parse_traces(
    text: str, name: str, *, top_k: int | None = None, left_out: list[int] | None = None
) -> Iterator[Traced]:
    """The responses of a file's text, one or more per line; lines without an answer go to `left_out`.

    Raises `InvalidInput` with the line's number.
    """
    for number, row in parse_jsonl(text, name):
        if row.get("finish_reason") in FAILED:
            if left_out is not None:
                left_out.append(number)
            continue
        where = f"{name}, line {number}"
        label = row.get("correct")
        if label not in (None, 0, 1):
            raise InvalidInput(f"{where}: 'correct' must be 0 or 1, got {label!r}")
        slice_name = row.get("slice", DEFAULT_SLICE)
        if not isinstance(slice_name, str) or not slice_name.strip():
            raise InvalidInput(f"{where}: 'slice' must be a name, got {slice_name!r}")
        for trace in traces_of(row, where, top_k):
            yield Traced(trace=trace, slice=slice_name, correct=None if label is None else bool(label))


def one_top_k(traces: Sequence[EntropyTrace], where: str) -> TopK:
    """The k of all traces. Raises `InvalidInput` where they differ: their entropies are not comparable."""
    counts = Counter(trace.top_k for trace in traces)
    if len(counts) > 1:
        listed = ", ".join(f"top {k} in {count}" for k, count in counts.most_common())
        raise InvalidInput(
            f"{where}: entropies over different numbers of tokens ({listed}): ask for the same everywhere"
        )
    return next(iter(counts))


def traces_of(row: Mapping[str, Any], where: str, top_k: int | None) -> list[EntropyTrace]:
    """The traces of a line: one of ours, or one per choice of a server's response. Raises `InvalidInput`."""
    if "trace" in row:
        found = [own_trace(row["trace"], where, top_k)]
    else:
        response = row.get("response", row)
        if isinstance(response, dict) and (ours := traces_of_server(response)):
            found = [own_trace(one, where, top_k) for one in ours]
        else:
            found = traces_of_choices(response, row, where, top_k)
    if len(found) > 1 and row.get("correct") is not None:
        raise InvalidInput(f"{where}: one label for {len(found)} choices: write a line for each")
    if any(not trace.entropies for trace in found):
        raise InvalidInput(f"{where}: a response without tokens has no trace: leave it out")
    return found


def traces_of_choices(response: Any, row: Mapping[str, Any], where: str, top_k: int | None) -> list[EntropyTrace]:
    """One per choice of a server's response, in a line `row`. Raises `InvalidInput`."""
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices:
        raise InvalidInput(
            f"{where}: neither a 'trace' (shoal generate --entropy) nor a response with 'choices'; "
            f"the line has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return [response_trace(choice, f"{where}, choice {place}", top_k) for place, choice in enumerate(choices)]


def traces_of_server(response: Mapping[str, Any]) -> list[Any]:
    """What Shoal's own server puts under `usage.shoal.traces` where a body says `entropy: true`; empty for other servers."""
    usage = response.get("usage")
    shoal = usage.get("shoal") if isinstance(usage, dict) else None
    traces = shoal.get("traces") if isinstance(shoal, dict) else None
    return traces if isinstance(traces, list) else []


def own_trace(trace: Any, where: str, asked: int | None) -> EntropyTrace:
    """As `shoal generate --entropy` writes it. Raises `InvalidInput`, also where it is not over the k that was `asked` for."""
    if not isinstance(trace, dict) or not {"top_k", "entropies", "nlls"} <= trace.keys():
        raise InvalidInput(f"{where}: a 'trace' has the fields top_k, entropies and nlls")
    top_k, lists = trace["top_k"], [trace["entropies"], trace["nlls"]]
    if top_k != "full" and not (type(top_k) is int and top_k >= 1):
        raise InvalidInput(f"{where}: top_k must be 1 or more, or 'full', got {top_k!r}")
    if asked is not None and top_k != asked:
        raise InvalidInput(f"{where}: the trace is over the top {top_k}, not over {asked}")
    if not all(isinstance(values, list) and are_numbers(values, -1e-3, MOST_NATS) for values in lists):
        raise InvalidInput(
            f"{where}: entropies and nlls are lists of numbers that are not negative, at most {MOST_NATS:g}"
        )
    if len(lists[0]) != len(lists[1]):
        raise InvalidInput(f"{where}: {len(lists[0])} entropies but {len(lists[1])} nlls")
    return EntropyTrace(top_k=top_k, entropies=tuple(lists[0]), nlls=tuple(lists[1]))


def response_trace(choice: Any, where: str, top_k: int | None) -> EntropyTrace:
    """Of one choice of a chat or a text completion. Raises `InvalidInput` where its log-probabilities are not all there."""
    given = choice.get("logprobs") if isinstance(choice, dict) else None
    if not given:
        raise InvalidInput(
            f"{where}: no log-probabilities: ask the server for them (chat: logprobs=true, top_logprobs=20; "
            "text: logprobs=20), and check that it does not drop them"
        )
    try:
        if "content" in given:
            content = given["content"] or []
            sampled = [one.get("logprob") for one in content]
            tops = [[top.get("logprob") for top in one.get("top_logprobs") or ()] for one in content]
        else:
            sampled = list(given.get("token_logprobs") or ())
            tops = [list((top or {}).values()) for top in given.get("top_logprobs") or ()]
    except (TypeError, AttributeError) as error:
        raise InvalidInput(f"{where}: its log-probabilities are not laid out as OpenAI's API has them") from error
    if len(tops) != len(sampled):
        raise InvalidInput(f"{where}: {len(sampled)} tokens but {len(tops)} lists of top log-probabilities")
    for place, values in enumerate([sampled, *tops]):
        if not are_numbers(values, -MOST_NATS, 1e-3):
            raise InvalidInput(
                f"{where}: {f'token {place - 1}' if place else 'the tokens'} has log-probabilities that are no numbers below 0"
            )
    k = min(map(len, tops), default=0) if top_k is None else top_k
    for place, top in enumerate(tops):
        if not k <= len(top) <= k + 1 or not top:
            raise InvalidInput(
                f"{where}: token {place} lists {len(top)} top tokens where {k or 'some'} were expected: the server dropped them "
                "(text completions drop tokens that are written alike: ask for chat completions)"
            )
    return EntropyTrace(
        top_k=max(k, 1),
        entropies=tuple(entropy(top, k) for top in tops),
        nlls=tuple(max(0.0, -float(value)) for value in sampled),
    )


def are_numbers(values: Sequence[Any], low: float, high: float) -> bool:
    """Whether all are numbers, from `low` to `high`."""
    return all(type(value) in (int, float) and low <= value <= high for value in values)


def entropy(logprobs: Sequence[float], k: int) -> float:
    """-sum p log p over the k most probable, as they are.

    >>> round(entropy([-0.6931472, -1.3862944, -9999.0], 2), 4)
    0.6931
    """
    kept = np.sort(np.asarray(logprobs, float))[::-1][:k]
    return max(0.0, -math.fsum(np.exp(kept) * np.maximum(kept, -1e4)))
