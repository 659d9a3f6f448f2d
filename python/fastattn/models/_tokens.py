# SPDX-License-Identifier: Apache-2.0
"""Texts and tokens that a user gives, and tokens that the package tokenizers makes of texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastattn._arguments import as_array
from fastattn.models._file import needed
from fastattn.nn import Integers

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


def unicode_texts(name: str, texts: Any) -> list[str]:
    """Return a sequence of texts as a list."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        found = "a str: give [text]" if isinstance(texts, str) else type(texts).__name__
        raise TypeError(f"{name} must be a sequence of str, got {found}")
    return [unicode_text(f"{name}[{i}]", text) for i, text in enumerate(texts)]


def tokens_of(name: str, ids: ArrayLike, vocab_size: int) -> Integers:
    """Return tokens that a user gives, which must be of the vocabulary."""
    array = as_array(name, ids, "integers")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one axis, got {name}.shape={array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    for wrong in array[(array < 0) | (array >= vocab_size)][:1]:
        raise ValueError(f"{name} must be within 0..{vocab_size - 1}, the vocabulary, got {wrong}")
    return array.astype(np.int64)


def fitting(name: str, ids: Sequence[int] | Integers, most: int) -> Integers:
    """Return tokens, which must be some and fit into a context of so many."""
    if not len(ids):
        raise ValueError(f"{name} must be at least 1 token, got 0")
    if len(ids) > most:
        rule = f"at most {most} tokens, the model's context"
        raise ValueError(f"{name} must be {rule}, got {len(ids)}")
    return np.asarray(ids, np.int64)


def encoded(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Return the ids of each text's tokens, with or without those that the tokenizer adds."""
    with refused("the tokenizer must make tokens of any text, and does not"):
        if len(texts) == 1:  # It is not given to threads, for which a later fork would warn.
            return [tokenizer.encode(texts[0], add_special_tokens=special).ids]
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=special)
    return [x.ids for x in found]


def tokenizer_from(content: bytes) -> Tokenizer:
    """Return the tokenizer that a tokenizer.json says."""
    with refused("it must be of the format of tokenizers"):
        tokenizer: Tokenizer = needed("tokenizers").Tokenizer.from_buffer(content)
        tokenizer.encode("a")  # Some parts that do not fit together show here.
    return tokenizer


@contextlib.contextmanager
def refused(rule: str) -> Iterator[None]:
    """Let what tokenizers raises, or a panic, which is no Exception, be a ValueError."""
    try:
        yield
    except (ModuleNotFoundError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{rule}: {error}") from error
