# SPDX-License-Identifier: Apache-2.0
"""Which text is certain by now? Characters are never cut, and stop strings never shown."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from fastattn.models._generation import Generation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "\ufffd"  # what a tokenizer makes of a character's part
MOST_PARTS = 3  # of a character, whose last one is to come
MOST_HELD = 16  # tokens, before it is tried to hold fewer


class TextStream:
    """The text of tokens that come one by one, which goes on behind those that were before.

    It is what decoding adds when a token is added, since what a token gives depends on those before
    it: a space that stands at a text's beginning alone is dropped. Special tokens give none.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._decode, self._ids, self._known = tokenizer.decode, list(before), len(before)
        added = tokenizer.get_added_tokens_decoder()
        self._special = {i for i, x in added.items() if x.special}
        self._given = 0  # characters of the text behind the known tokens

    def add(self, token: int) -> str:
        """Return the text that is certain with that token."""
        if token in self._special:
            return ""
        self._ids.append(token)
        text = self.rest()
        parts = len(text) - len(text.rstrip(UNKNOWN))
        certain = text[: len(text) - min(parts, MOST_PARTS)]
        self._given += len(certain)
        if certain and not parts:
            self._hold(0)
        elif len(self._ids) - self._known > MOST_HELD:
            self._hold(MOST_HELD // 2, text[len(certain) :])
        return certain

    def rest(self) -> str:
        """Return the text that was not yet certain."""
        before, whole = self._decode(self._ids[: self._known]), self._decode(self._ids)
        # A wrong byte makes a tokenizer with bytes for tokens disown right ones before it.
        goes_on = whole.startswith(before)
        text: str = whole[len(before) :] if goes_on else self._decode(self._ids[self._known :])
        return text[self._given :]

    def _hold(self, count: int, open_text: str = "") -> None:
        """Hold so many tokens, if they have the text that is not yet certain."""
        held = self._ids, self._known, self._given
        self._ids, self._given = self._ids[self._known :], 0
        self._known = len(self._ids) - count
        text = self.rest()
        if text.endswith(open_text):
            self._given = len(text) - len(open_text)
        else:
            self._ids, self._known, self._given = held


class StoppedText:
    """The text of a stream until a stop string, which ends it."""

    def __init__(self, stream: TextStream, stop: Sequence[str]) -> None:
        self._stream, self._stop, self._held, self.stopped = stream, stop, "", False

    def add(self, token: int | None, *, ends: bool) -> str:
        """Return the text that is certain with that token, if there is one and if it ends there."""
        text = self._held if token is None else self._held + self._stream.add(token)
        text += self._stream.rest() if ends else ""
        found = [(at + len(x), at) for x in self._stop if (at := text.find(x)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        held = 0 if ends else max((_overlap(text, x) for x in self._stop), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]


def pieces_of(
    generation: Generation, texts: Sequence[StoppedText]
) -> Generator[list[str], None, None]:
    """Yield the pieces of text of all prompts, one each; those that a stop string ends, end."""
    while before := generation.live:
        step, pieces = generation.step(), [""] * len(texts)
        after = set(generation.live)
        for i in before:
            pieces[i] = texts[i].add(step.get(i), ends=i not in after)
        generation.end([i for i in after if texts[i].stopped])
        if any(pieces):
            yield pieces


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at a text's end may begin a stop string."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
