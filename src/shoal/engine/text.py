"""From tokens to text as they come: whole characters only, stop strings found across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer prints for bytes that do not make a character yet."""


class TextStream:
    """Grows the text of one completion token by token.

    Example with stop string "END" and tokens "a E", "N", "D b": after the first "a " is certain ("E" may begin the stop string),
    after the second nothing more, after the third the stream has stopped and its text is "a ".
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], *, streaming: bool) -> None:
        """`tokenizer`: anything with transformers' `decode`; None where there is none and text stays empty. Without `streaming`
        and stop strings, tokens are decoded once, at the end."""
        self.tokenizer = tokenizer
        self.eager = streaming or bool(stop)
        self.stop = tuple(stop)
        self.text = ""
        self.stopped = False
        self._tokens: list[int] = []
        self._window = 0  # first token of the window that is decoded together: two steps back is enough context
        self._done = 0  # tokens whose text is in `text`
        self._ahead = 0  # characters in `text` beyond those tokens: what stands before an incomplete one
        self._emitted = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; returns the text that became certain. Sets `stopped` when a stop string is complete."""
        self._tokens += token_ids
        if self.tokenizer is None or self.stopped or not self.eager:
            return ""
        before = self._decode(self._tokens[self._window : self._done])
        now = self._decode(self._tokens[self._window :])
        whole = now.rstrip(REPLACEMENT)
        new = whole[len(before) + self._ahead :]
        if whole == now:
            self._window, self._done, self._ahead = self._done, len(self._tokens), 0
        else:
            self._ahead += len(new)
        self.text += new
        self._cut_at_stop(len(new))
        return self._emit(len(self.text) - (0 if self.stopped else self._held_back()))

    def __copy__(self) -> TextStream:
        """A stream that goes on by itself."""
        other = object.__new__(TextStream)
        vars(other).update(vars(self), _tokens=list(self._tokens))
        return other

    def finish(self) -> str:
        """No more tokens will come: returns what was held back."""
        if self.tokenizer is not None and not self.stopped and self._done < len(self._tokens):
            before = self._decode(self._tokens[self._window : self._done])
            rest = self._decode(self._tokens[self._window :])[len(before) + self._ahead :]
            self.text += rest
            self._cut_at_stop(len(rest))
        return self._emit(len(self.text))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)) if token_ids else ""

    def _cut_at_stop(self, num_new: int) -> None:
        """Cut `text` before the first stop string that ends within its last `num_new` characters."""
        found = [at for s in self.stop if (at := self.text.find(s, max(0, len(self.text) - num_new - len(s) + 1))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max(map(len, self.stop), default=0) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self.stop):
                return length
        return 0

    def _emit(self, upto: int) -> str:
        piece = self.text[self._emitted : upto]
        self._emitted = max(self._emitted, upto)
        return piece
