"""How long passes take on this machine, learnt from the engine's own: what admission, forecasts and draft lengths ask.

The seconds of a pass are what it does, times what each thing costs. What it does is its *work*, eight numbers:

    passes          1: Python, sampling, reading the head
    layers          layers that ran: their weights are read once, whoever needs them
    few tokens      tokens served, summed over layers, the first 8 in each layer: products that wait for memory
    more tokens     the next 56 in each layer
    many tokens     those beyond: products that wait for arithmetic
    keys            cached positions that attention reads, summed over rows and layers
    pairs           (query, key) pairs beyond those, where a row brings several tokens
    logits          rows whose logits are wanted

Work adds up, so a whole schedule costs what the sum of its passes' work costs. No price is below 0, hence more work never takes
less time. The prices per token may rise or fall from one stretch to the next: a processor decides which.

Example, two rows in a pass of a model with 2 layers; both layers serve the first row, at position 9, one the second, at position 4:
1 pass, 2 layers, 3 few tokens, 10 + 10 + 5 = 25 keys, 2 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.depth.plan import DepthPlan
from shoal.errors import InvalidInput
from shoal.models.passes import Ints

Work = NDArray[np.float64]
"""[8], see `KINDS`."""

KINDS = ("passes", "layers", "few tokens", "more tokens", "many tokens", "keys", "pairs", "logits")
"""What work is counted in."""
FEW, MORE = 8, 64
"""Tokens in a layer at which the price of the next one may change."""
MEMORY = 256
"""Passes after which an older one counts for 1/e."""
ENOUGH = 4
"""Passes of its kind that a prediction has to be worth."""
REFIT = 64
"""Most passes between two fits."""


class StepTime:
    """Prices of work, in seconds. Belongs to an engine (`Engine.step_time`), is learnt anew by each, and is saved nowhere.

    Least squares of the *relative* error, so that a pass of a millisecond counts as much as one of a second. That also makes the
    fit robust: a pass that took r times too long pulls with (1 - 1/r) / r, at most as much as an error of a quarter, and less the
    slower it was, as when another process took the core.

    What is kept of the past is a matrix of 8 x 9 sums over passes, and older passes fade, so that the fit follows a machine that
    slows down. Kinds of passes that have long not run fade into "not measured".
    """

    def __init__(self) -> None:
        self.num_passes = 0
        """Passes seen."""
        self._sums = np.zeros((len(KINDS), len(KINDS) + 1))  # X'X and X'1, rows of X being work / seconds
        self._prices = np.zeros(len(KINDS))
        self._scale: NDArray[Any] = np.ones(len(KINDS))
        self._inverse: NDArray[Any] = np.eye(len(KINDS))
        self._next_fit = 1
        self._recent: tuple[float, ...] = (
            0.0,
        ) * 5  # fading sums: 1, |relative error|, squared error, seconds, squared seconds

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a pass that did `work` in `seconds`; one too short for the clock teaches nothing."""
        if seconds <= 0:
            return
        if (predicted := self.seconds(work)) is not None:
            self._score(predicted, seconds)
        self.num_passes += 1
        relative = np.ones(len(KINDS) + 1)
        np.divide(work, seconds, out=relative[:-1])
        self._sums *= 1 - 1 / MEMORY
        self._sums += relative[:-1, None] * relative
        if self.num_passes == self._next_fit:
            self._fit()
            self._next_fit += min(self.num_passes, REFIT)

    def seconds(self, work: Work) -> float | None:
        """Seconds that `work` takes, or None where the passes seen say less about it than `ENOUGH` passes of its kind would.

        Example: an engine that has only run dense passes can tell nothing about half the layers.
        """
        seconds = float(work @ self._prices)
        if seconds <= 0:
            return None
        # The variance of what least squares predicts is x' inverse(X'X) x, in units of one pass's own.
        relative = work * self._scale / seconds
        return seconds if relative @ self._inverse @ relative * ENOUGH <= 1 else None

    def predict(self, *, rows: int, layers: int, context: int, tokens: int = 1) -> float | None:
        """Seconds of a pass in which `rows` rows bring `tokens` tokens each to `layers` layers; None while not measured.

        `context`: positions that a row's last token sees, its own included. Raises `InvalidInput` for sizes that no pass has.
        """
        if min(rows, layers, tokens) < 1 or context < tokens:
            raise InvalidInput(
                "a pass has 1 or more rows, layers and tokens, and its context holds its tokens, got "
                f"{rows=}, {layers=}, {context=}, {tokens=}"
            )
        counts = np.full(rows, tokens)
        return self.seconds(pass_work(np.full((rows, layers), tokens), context - counts, counts, rows))

    def forecast(self, plan: DepthPlan, *, prompt_tokens: int, new_tokens: int, batch: int = 1) -> float | None:
        """Seconds of `batch` equal requests that start together under `plan`, their prompts read in one pass; None while not
        measured. Raises `InvalidInput` where a number is below 1."""
        if min(prompt_tokens, new_tokens, batch) < 1:
            raise InvalidInput(
                f"prompt_tokens, new_tokens and batch must be 1 or more, got {prompt_tokens}, {new_tokens}, {batch}"
            )
        courses = Courses(
            prompt_tokens=np.full(batch, prompt_tokens),
            clocks=np.full(batch, -1),
            num_passes=np.full(batch, new_tokens),
            cutoffs=np.array([plan.cutoffs] * batch),
            runs_prompt=np.array([plan.runs_prompt] * batch),
        )
        return self.seconds(courses.work([0] * batch))

    @property
    def prices(self) -> dict[str, float]:
        """Seconds per unit of each kind of work; kinds that always come together share theirs in some way. All 0 at first."""
        return dict(zip(KINDS, self._prices.tolist(), strict=True))

    @property
    def relative_error(self) -> float | None:
        """Mean |predicted / measured - 1| of recent passes, each predicted before it ran; None before one was."""
        weight, error = self._recent[:2]
        return error / weight if weight else None

    @property
    def r2(self) -> float | None:
        """Share of the variance of recent passes' seconds that was predicted before they ran: 1 is perfect.

        Where passes are alike there is nothing to explain, and it is near 0 or below. None before there is any variance.
        """
        weight, _, squared_error, total, squares = self._recent
        variation = squares - total**2 / weight if weight else 0
        return 1 - squared_error / variation if variation > 0 else None

    def _score(self, predicted: float, seconds: float) -> None:
        """Hold a prediction against what was measured."""
        error = seconds - predicted
        now = (1, abs(error) / seconds, error**2, seconds, seconds**2)
        self._recent = tuple(old * (1 - 1 / MEMORY) + new for old, new in zip(self._recent, now, strict=True))

    def _fit(self) -> None:
        """Prices from the sums, and what certainty needs: the inverse of X'X with every kind scaled to 1."""
        squares, products = self._sums[:, :-1], self._sums[:, -1]
        scale = 1 / np.sqrt(np.maximum(np.diag(squares), 1e-12))
        # The last term gives what was never seen an inverse, too, a huge one.
        scaled = scale[:, None] * squares * scale + 1e-9 * np.eye(len(KINDS))
        self._inverse, self._scale = np.linalg.inv(scaled), scale
        self._prices = scale * nonnegative_least_squares(scaled, products * scale)


def nonnegative_least_squares(squares: NDArray[np.float64], products: NDArray[np.float64]) -> NDArray[np.float64]:
    """The b >= 0 with the least |Xb - y|, given X'X [n, n], positive definite, and X'y [n] (Lawson and Hanson 1974, chapter 23)."""
    n = len(products)
    best = np.zeros(n)
    free = np.zeros(n, dtype=bool)
    for _ in range(3 * n):  # their bound in practice; each round frees one more
        gain = np.where(free, 0, products - squares @ best)
        if gain.max() <= 1e-9:
            break
        free[gain.argmax()] = True
        while True:
            trial = np.zeros(n)
            trial[free] = np.linalg.solve(squares[np.ix_(free, free)], products[free])
            below = free & (trial <= 0)
            if not below.any():
                break
            share = (best[below] / (best[below] - trial[below])).min()  # go as far as the first that reaches 0
            best = best + share * (trial - best)
            free &= best > 1e-12
            best[~free] = 0
        best = trial
    return best


def pass_work(served: Ints, starts: Ints, num_tokens: Ints, num_logits: int) -> Work:
    """Work of a pass.

    Args: `served` [R, L], leading tokens of each row that each layer serves; `starts` [R], position of each row's first token;
    `num_tokens` [R] that each brings; `num_logits`: rows whose logits are wanted.
    """
    keys = int((starts + 1) @ served.sum(axis=1))  # right for single tokens
    pairs = 0
    if int(num_tokens.sum()) > len(num_tokens):
        several = num_tokens > 1
        start, part = starts[several, None], served[several]
        read = int(np.where(part > 0, start + part, 0).sum())
        keys += read - int(((start + 1) * part).sum())
        pairs = int((part * start + part * (part + 1) // 2).sum()) - read
    return _work(served.sum(axis=0), passes=1, keys=keys, pairs=pairs, logits=num_logits)


def _work(tokens: Ints, *, passes: int, keys: int, pairs: int, logits: int) -> Work:
    """`tokens`: served by each layer in each pass, of any shape."""
    layers, total = np.count_nonzero(tokens), tokens.sum()
    few, more = np.minimum(tokens, FEW).sum(), np.minimum(tokens, MORE).sum()
    return np.array((passes, layers, few, more - few, total - more, keys, pairs, logits), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Courses:
    """The way that requests still have to go, for forecasts. Clock -1 is the prompt's pass."""

    prompt_tokens: Ints
    """[R] tokens of the prompt."""
    clocks: Ints
    """[R] clock of the next pass, -1 while the prompt has not been read."""
    num_passes: Ints
    """[R] passes still to run, the prompt's included: 1 or more, and at most as many as tokens may still be emitted."""
    cutoffs: Ints
    """[R, L] decode passes that each layer serves."""
    runs_prompt: NDArray[np.bool_]
    """[R, L] layers that run the prompt."""

    def work(self, starts: Sequence[int]) -> Work:
        """Work of all passes when row r runs without a break from pass `starts[r]` on, its prompt read in one.

        A layer serves a row in one stretch of passes, so the two ends of each are noted and summed up.
        """
        start, unread = np.array(starts), self.clocks < 0
        clocks = np.maximum(self.clocks, 0)
        decodes = np.clip(self.cutoffs - clocks[:, None], 0, (self.num_passes - unread)[:, None])  # [R, L] passes
        begin = start + unread
        num_layers = self.cutoffs.shape[1]
        change = np.zeros((int((start + self.num_passes).max()) + 1, num_layers), dtype=np.int64)
        np.add.at(change, begin, 1)
        np.add.at(change, (begin[:, None] + decodes, np.arange(num_layers)), -1)
        tokens = change.cumsum(axis=0)
        prompt = np.where(unread, self.prompt_tokens, 0)
        np.add.at(tokens, start, self.runs_prompt * prompt[:, None])
        keys = decodes * (self.prompt_tokens + clocks)[:, None] + decodes * (decodes + 1) // 2
        prompt_layers = self.runs_prompt.sum(axis=1)
        return _work(
            tokens,
            passes=int(tokens.any(axis=1).sum()),
            keys=int(keys.sum() + prompt_layers @ prompt),
            pairs=int(prompt_layers @ (prompt * (prompt - 1) // 2)),
            logits=int(self.num_passes.sum()),
        )
