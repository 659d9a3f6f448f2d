# SPDX-License-Identifier: Apache-2.0
"""Which text is certain by now? Characters are never cut, and stop strings never shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "\ufffd"  # what a tokenizer makes of a character's part


class TextStream:
    """The text of tokens that come one by one, which goes on behind those that were before.

    It is what decoding adds when a token is added, since what a token gives depends on those before
    it: a space that stands at a text's beginning alone is dropped. Special tokens give none.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._decode, self._ids, self._known = tokenizer.decode, list(before), len(before)

    def add(self, token: int) -> str:
        """Return the text that is certain with that token, which may end within a character."""
        self._ids.append(token)
        text = self.rest()
        if not text or text.endswith(UNKNOWN):
            return ""
        del self._ids[: self._known]
        self._known = len(self._ids)
        return text

    def rest(self) -> str:
        """Return the text of the tokens that are held back."""
        before, whole = self._decode(self._ids[: self._known]), self._decode(self._ids)
        if whole.startswith(before):
            return whole[len(before) :]
        # A wrong byte makes a tokenizer with bytes for tokens disown right ones before it.
        return self._decode(self._ids[self._known :])


class StoppedText:
    """The text of a stream until a stop string, which ends it."""

    def __init__(self, stream: TextStream, stop: Sequence[str]) -> None:
        self._stream, self._stop, self._held, self.stopped = stream, stop, "", False

    def add(self, token: int | None) -> str:
        """Return the text that is certain with that token; None is the end."""
        text = self._held + (self._stream.rest() if token is None else self._stream.add(token))
        found = [(at + len(x), at) for x in self._stop if (at := text.find(x)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        held = 0 if token is None else max((_overlap(text, x) for x in self._stop), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at a text's end may begin a stop string."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
