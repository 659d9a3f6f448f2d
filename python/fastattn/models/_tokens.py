# SPDX-License-Identifier: Apache-2.0
"""A text becomes tokens, by the package tokenizers, whose errors have no type or are panics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastattn.models._file import needed

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def unicode_text(name: str, text: str) -> str:
    """Return a text, which must be Unicode."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be Unicode, got {text[error.start]!r}") from None
    return text


def encoded(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Return the ids of each text's tokens, with or without those that the tokenizer adds."""
    with _refused("the tokenizer must make tokens of any text, and does not"):
        if len(texts) == 1:  # It is not given to threads, for which a later fork would warn.
            return [tokenizer.encode(texts[0], add_special_tokens=special).ids]
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=special)
    return [x.ids for x in found]


def tokenizer_from(content: bytes) -> Tokenizer:
    """Return the tokenizer that a tokenizer.json says."""
    with _refused("it must be of the format of tokenizers"):
        tokenizer: Tokenizer = needed("tokenizers").Tokenizer.from_buffer(content)
        tokenizer.encode("a")  # Some parts that do not fit together show here.
    return tokenizer


@contextlib.contextmanager
def _refused(rule: str) -> Iterator[None]:
    """Let what tokenizers raises, or a panic, which is no Exception, be a ValueError."""
    try:
        yield
    except (ModuleNotFoundError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{rule}: {error}") from error
