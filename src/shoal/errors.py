"""Every error that Shoal raises on purpose.

    ShoalError
    ├── InvalidInput (ValueError)      a value given by the user is outside what is allowed
    │   ├── InvalidPlan                a depth plan or policy that this model cannot run
    │   ├── InvalidDraft               a way to draft that this engine does not have or that does not fit the model
    │   ├── InvalidPrompt              empty, too long, not text
    │   └── CacheBudgetExceeded        a request that cannot fit the KV cache budget, even alone
    ├── CheckpointError                a checkpoint that cannot be read
    │   ├── UnsupportedArchitecture    not one of the families in `shoal.models.families`
    │   └── PickledCheckpoint          weights are pickles: run `shoal convert` first
    ├── RequestFailed                  a request ended early; the others did not (e.g. NaN logits)
    ├── LanguageModelError             a model that was asked through `shoal.lm` failed, after all retries
    │   └── NoLogprobs                 a server that was asked for log-probabilities answered without them
    ├── TuningDiverged                 a loss or gradient that is not finite ended a tuning run
    └── MissingExtra                   an optional dependency is absent; the message names the extra

The command line prints the message alone and exits with 2 (`InvalidInput`, `CheckpointError`, `MissingExtra`) or 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShoalError(Exception):
    """Base of all errors raised on purpose."""


class InvalidInput(ShoalError, ValueError):
    """A value is outside what is allowed; the message names the value, the range and what to do."""


class InvalidPlan(InvalidInput):
    """A depth plan or policy does not fit the model."""


class InvalidDraft(InvalidInput):
    """A way to draft is unknown or does not fit the model."""


class InvalidPrompt(InvalidInput):
    """A prompt is empty, too long for the model, or not text."""


class CacheBudgetExceeded(InvalidInput):
    """A request needs more KV cache than the whole budget; the message says what would fit."""


class CheckpointError(ShoalError):
    """A checkpoint is missing, truncated, or does not match its config."""


class UnsupportedArchitecture(CheckpointError):
    """The checkpoint's architecture is not in the family table."""


class PickledCheckpoint(CheckpointError):
    """The checkpoint holds pickled weights only, which are never loaded outside `shoal convert`."""


class RequestFailed(ShoalError):
    """One request ended early while its company went on (NaN logits, a user's processor that raised)."""


class LanguageModelError(ShoalError):
    """A language model failed to answer, after all retries; what it answered before is in the cache, where there is one."""


class NoLogprobs(LanguageModelError):
    """A server that was asked for log-probabilities answered without them."""


class TuningDiverged(ShoalError):
    """Tuning stopped at a loss or gradient that is not finite; the last good state is on the disk."""


class MissingExtra(ShoalError):
    """An optional dependency is not installed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint for an unknown name: `did you mean 'depth'?`, or the whole list where nothing is near.

    >>> nearest("dept", ["depth", "plan"])
    "did you mean 'depth'?"
    """
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
