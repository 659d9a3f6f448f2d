# SPDX-License-Identifier: Apache-2.0
"""Which tokens is a text in a folder of Marian's? Pieces as SentencePiece cuts them, by their ids.

source.spm says how a text is cut: Kudo 2018, https://arxiv.org/abs/1804.10959, "Subword
Regularization". It is a message of Protocol Buffers, of whose fields these count:

    1 pieces: 1 its text, 2 its score, 3 its kind
    2 how it was trained: 3 the kind of model, 24 whether spaces end pieces, which begin them here
    3 what becomes of a text before: 2 a table of characters, 3 whether a space is put before it,
      4 whether spaces are joined, 5 whether they are spelt as a sign, as here

vocab.json says which id the model knows a piece by. The package tokenizers cuts.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastattn.models._character_map import CharacterMap
from fastattn.models._file import (
    MOST_ITEMS,
    Natural,
    check,
    content,
    json_object,
    needed,
    shown,
    within,
)
from fastattn.models._tokens import refused

SOURCE, WORDS, TARGET_WORDS = "source.spm", "vocab.json", "target_vocab.json"
SPACE = "\u2581"
UNIGRAM = 1  # of the kinds of models
NORMAL, UNKNOWN, USER_DEFINED, BYTE = FOUND = 1, 2, 4, 6  # kinds of pieces, in a text
SIZES = {1: 8, 5: 4}  # bytes of fields of a kind, where these do not say it
LANGUAGE = re.compile(r">>[^<]*<<")  # the token that says into which language
UNK, END, PAD = "<unk>", "</s>", "<pad>"


class Piece(NamedTuple):
    """What a model knows of a piece."""

    text: str
    score: float
    kind: int | bytes


class Encoding(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    tokens: list[str]  # as they are spelt


class SentencePieces:
    """A tokenizer with the methods of `tokenizers.Tokenizer` that models call.

    Parameters
    ----------
    model : bytes
        What source.spm holds.
    source, target : dict of int
        The ids of the pieces that are read, and of those that are written.
    """

    normalizer = None  # whose letters a configuration could change

    def __init__(self, model: bytes, source: Mapping[str, int], target: Mapping[str, int]) -> None:
        fields = list(_fields(model))
        trained, before = (_message(dict(fields).get(number, b"")) for number in (2, 3))
        if (kind := trained.get(3, UNIGRAM)) != UNIGRAM:
            raise ValueError(f"the kind of its model must be 1, unigram, got {shown.repr(kind)}")
        if trained.get(24, 0):
            raise ValueError("spaces must begin its pieces, and end them")
        if not before.get(5, 1):
            raise ValueError(f"spaces must be spelt {SPACE} in its pieces, and stay spaces")
        pieces = [_piece(x) for number, x in fields if number == 1]
        self._cutter = _cutter(pieces)
        self._prefix, self._joins = SPACE * bool(before.get(3, 1)), before.get(4, 1)
        table = before.get(2, b"")
        if not isinstance(table, bytes):
            raise ValueError(f"its table of characters must be bytes, got {table}")
        kept = [x.text for x in pieces if x.kind == USER_DEFINED]
        self._characters = CharacterMap(table, kept)
        self._source, self._target = source, {i: piece for piece, i in target.items()}
        parts = needed("tokenizers").decoders
        replace, strip = parts.Replace(SPACE, " "), parts.Strip(" ", 1, 0)
        self._decoder = parts.Sequence([replace, parts.ByteFallback(), parts.Fuse(), strip])

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """Return the tokens of a text, of which the first may be a language."""
        language = LANGUAGE.match(text)
        tokens = [language[0]] if language else []
        tokens += self._cut(text[len("".join(tokens)) :])
        tokens += [END] * add_special_tokens
        unknown = self._source[UNK]
        return Encoding([self._source.get(x, unknown) for x in tokens], tokens)

    def _cut(self, text: str) -> list[str]:
        """Return the pieces of a text."""
        text = self._characters(text)
        if self._joins:
            text = " ".join(filter(None, text.split(" "))).rstrip(f" {SPACE}")
        text = text.replace(" ", SPACE)
        tokens: list[str] = self._cutter.encode(self._prefix + text).tokens if text else []
        return tokens

    def encode_batch_fast(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[Encoding]:
        """Return the tokens of each text."""
        return [self.encode(x, add_special_tokens) for x in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens that were written."""
        tokens = [self._target.get(i, "") for i in ids]
        if skip_special_tokens:
            tokens = [x for x in tokens if x not in (UNK, END, PAD)]
        text: str = self._decoder.decode(tokens)
        return text.strip()

    def id_to_token(self, i: int) -> str | None:
        """Return how a token that was written is spelt."""
        return self._target.get(i)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token that is read."""
        return self._source.get(token)

    def get_vocab(self) -> Mapping[str, int]:
        """Return the tokens that are read."""
        return self._source


def sentence_pieces(folder: Path) -> Any:
    """Return the tokenizer of a folder with source.spm: `SentencePieces`."""
    words = _words(folder / WORDS)
    target = folder / TARGET_WORDS
    with within(folder / SOURCE):
        return SentencePieces(
            content(folder / SOURCE), words, _words(target) if target.exists() else words
        )


def _words(path: Path) -> dict[str, int]:
    """Return the ids that a file gives pieces."""
    with within(path):
        found = json_object(path)
        for piece, i in found.items():
            check(shown.repr(piece), i, Natural)
        for piece in (UNK, END):
            if piece not in found:
                raise ValueError(f"it must hold {piece}, and does not")
    return found


def _cutter(pieces: list[Piece]) -> Any:
    """Return the tokenizer that cuts a text into pieces."""
    scores = [x.score for x in pieces if x.kind == NORMAL]
    known = [x for x in pieces if x.kind in FOUND]
    unknown = [i for i, x in enumerate(known) if x.kind == UNKNOWN]
    if not scores or len(unknown) != 1:
        raise ValueError("its pieces must be normal ones, and one that stands for all others")
    vocabulary = []
    for text, score, kind in known:
        if kind == USER_DEFINED:  # It is taken wherever it stands, by this score.
            score = len(text.encode()) * max(scores) - 0.1
        # What stands for unknown characters is in no text.
        vocabulary.append(("\uffff" if kind == UNKNOWN else text, score))
    with refused("its pieces must fit together, and do not"):
        tokenizers, has_bytes = needed("tokenizers"), any(x.kind == BYTE for x in known)
        cutter = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unknown[0], has_bytes))
        cutter.encode("a")  # Some parts that do not fit together show here.
    return cutter


def _piece(message: int | bytes) -> Piece:
    """Return the piece that a message is."""
    fields = _message(message)
    text, score, kind = fields.get(1), fields.get(2, bytes(4)), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError(f"a piece must be a text and a score, got {shown.repr(fields)}")
    (number,) = struct.unpack("<f", score)
    if not math.isfinite(number):
        raise ValueError(f"the score of a piece must be finite, got {number}")
    try:
        return Piece(text.decode(), number, kind)
    except UnicodeDecodeError:
        raise ValueError(f"a piece must be UTF-8, got {shown.repr(text)}") from None


def _message(x: int | bytes) -> dict[int, int | bytes]:
    """Return the fields of a message; of a number that occurs several times, the last one."""
    if not isinstance(x, bytes):
        raise ValueError(f"a field must be a message, got {x}")
    return dict(_fields(x))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a message: an integer, or its bytes."""
    place = 0
    for _ in range(MOST_ITEMS):
        if place == len(message):
            return
        key, place = _integer(message, place)
        if (kind := key & 7) not in (0, 1, 2, 5):
            raise ValueError(f"the kind of a field must be 0, 1, 2 or 5, got {kind}")
        size, place = (SIZES[kind], place) if kind in SIZES else _integer(message, place)
        if kind == 0:
            yield key >> 3, size
            continue
        if size > len(message) - place:
            rule = f"a field must end within the {len(message)} bytes of its message"
            raise ValueError(f"{rule}, got one of {size} bytes at {place}")
        yield key >> 3, message[place : place + size]
        place += size
    raise ValueError(f"a message must be of at most {MOST_ITEMS} fields")


def _integer(message: bytes, place: int) -> tuple[int, int]:
    """Return an integer, of seven bits in each of its bytes, and the place behind it."""
    found = 0
    for i, byte in enumerate(message[place : place + 10]):
        found |= (byte & 127) << 7 * i
        if byte < 128:
            return found, place + i + 1
    raise ValueError(f"an integer must end within 10 bytes and its message, got none at {place}")
