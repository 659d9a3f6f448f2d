# SPDX-License-Identifier: Apache-2.0
"""Which tokens are words, times and orders? What Whisper's tokenizer means, and the rules of times.

The model writes <|time|> words <|time|> for each sentence; the next one begins with a time again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastattn.models._log_mel import FRAMES
from fastattn.nn import Floats

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fastattn.models.whisper import Config

FRAMES_OF_TIME = 2  # from one time that can be written to the next
FIRST = FRAMES // FRAMES_OF_TIME  # The first sentence begins within a second.
MULTILINGUAL = 51865  # tokens that models of several languages have at least
LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
WITHOUT_SPACES = ("zh", "ja", "th", "lo", "my", "yue")  # languages
BROKEN, BYTES = "\ufffd", 4  # what a part of a character is shown as; a whole one has at most 4


class SpeechTokens:
    """What the tokens of a Whisper model mean.

    Attributes
    ----------
    start, end, silence, no_times, times : int
        The tokens that begin and end a text, the one that says that nobody speaks, the one that
        says that no times follow, and the first time. Tokens below `end` are words.
    prompts : dict of list of int
        What a text begins with, by its language.
    suppressed : tuple of int
        The tokens that are never written.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self._tokenizer = tokenizer
        self.start, self.end = self._id("startoftranscript"), self._id("endoftext")
        self.silence, self.no_times = self._id("nospeech", "nocaptions"), self._id("notimestamps")
        self.times = self.no_times + 1
        if (last := self.times + config.max_source_positions) >= config.vocab_size:
            rule = f"vocab_size must be above {last}, the token of the last time"
            raise ValueError(f"{rule}, got {config.vocab_size}")
        self.prompts = {"en": [self.start]}
        if config.vocab_size >= MULTILINGUAL:
            task, vocabulary = self._id("transcribe"), tokenizer.get_vocab()
            found = [x for name in sorted(vocabulary) if (x := LANGUAGE.fullmatch(name))]
            if not found:
                raise ValueError("the tokenizer must have tokens of languages, as <|en|>, got none")
            self.prompts = {x[1]: [self.start, vocabulary[x[0]], task] for x in found}
        orders = range(self.start, self.times)  # to the model, which writes none
        self.suppressed = tuple({*orders, *(config.suppress_tokens or ())} - {self.end})

    def _id(self, *names: str) -> int:
        """Return the token of one of these names."""
        for name in names:
            if (found := self._tokenizer.token_to_id(f"<|{name}|>")) is not None:
                return int(found)
        raise ValueError(f"the tokenizer must have the token <|{names[0]}|>, and has not")

    def language(self, logits: Floats) -> str:
        """Return the likeliest language, by the logits of what follows `start`."""
        if len(self.prompts) == 1:
            return "en"
        return max(self.prompts, key=lambda x: logits[self.prompts[x][1]])

    def rule(self, texts: Sequence[Sequence[int]], logits: Floats) -> None:
        """Set to -inf what may not follow the beginnings of texts: times are pairs, and ascend."""
        for text, row in zip(texts, logits, strict=True):
            if not text:  # It begins with a time.
                row[: self.times] = row[self.times + FIRST + 1 :] = -np.inf
                continue
            times = [x for x in text if x >= self.times]
            follows_time = text[-1] >= self.times
            is_open = follows_time and len(text) > 1 and text[-2] < self.times
            if follows_time and not is_open:
                row[self.times :] = -np.inf
            elif is_open:
                row[: self.end] = -np.inf
            if times:  # A sentence takes time; the next one may begin at once.
                row[self.times : times[-1] + (not is_open)] = -np.inf
            # Where some time is likelier than any word, one is written.
            if np.logaddexp.reduce(row[self.times :]) > row[: self.times].max():
                row[: self.times] = -np.inf

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without times and orders."""
        found: str = self._tokenizer.decode([x for x in ids if x < self.end])
        return found

    def is_said(self, token: int) -> bool:
        """Tell whether a token has a letter, a digit or a part of a character: marks are silent."""
        return any(x.isalnum() or x == BROKEN for x in self.text([token]))

    def words(self, ids: Sequence[int], language: str) -> list[list[int]]:
        """Return the tokens of words with their marks: each has a token that is said, or all."""
        found: list[list[int]] = [[]]
        character: list[int] = []
        for token in ids:
            character.append(token)
            text = self.text(character)
            if text.endswith(BROKEN) and len(character) < BYTES:
                continue
            begins = text.startswith(" ") or (language in WITHOUT_SPACES and text.isalnum())
            if begins and any(map(self.is_said, found[-1])):
                found.append([])
            found[-1] += character
            character = []
        found[-1] += character
        if len(found) > 1 and not any(map(self.is_said, found[-1])):
            found[-2:] = [found[-2] + found[-1]]
        return found
