# SPDX-License-Identifier: Apache-2.0
"""Tokens become words: whose pieces they are, where each word begins, which word is meant."""

from __future__ import annotations

import codecs
import difflib
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn._arguments import is_integer, whole_number

# Tokens that stand for no word. The unknown and the masked token stand for one, and are none.
SPECIAL = re.compile(r"\[(CLS|SEP|PAD)\]|</?s>|<(pad|bos|eos|cls|sep)>|<[|\uff5c].+[|\uff5c]>")
# What a model lists as special, and yet stands for a word.
WORDLIKE = re.compile(r"\[(UNK|MASK)\]|<(unk|mask)>", re.IGNORECASE)
JOINERS = "\u200c\u200d\u2060"  # invisible, between characters of one word
# An ideograph or kana, which may begin a word; what repeats or lengthens the one before it is none.
CJK = re.compile(
    "[\u3007\u3041-\u3096\u309f\u30a1-\u30fa\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff6f\uff71-\uff9d\U00020000-\U0003ffff]"
)
LONGEST = 32  # characters of a name in the sentence about sinks
CONTEXT = 8  # tokens before one that decide how it is decoded
MOST_BYTES = 4  # of a character

Bools = NDArray[np.bool_]
Choice = str | int | tuple[str, int]


class Words(NamedTuple):
    """The words of a text, each some tokens in succession."""

    words: tuple[str, ...]
    starts: tuple[int, ...]  # the first token of each
    special: frozenset[int]  # the words that are special tokens
    first: str  # the text of the first token


def checked(name: str, tokens: Any) -> list[str]:
    """Return tokens, which must be some texts."""
    if isinstance(tokens, str) or not hasattr(tokens, "__iter__"):
        got = "a str" if isinstance(tokens, str) else type(tokens).__name__
        raise TypeError(f"{name} must be a sequence of str, got {got}")
    found = list(tokens)
    for i, x in enumerate(found):
        if not isinstance(x, str):
            raise TypeError(f"{name}[{i}] must be a str, not {type(x).__name__}")
    return found


def special_of(tokens: Sequence[str], given: Sequence[bool] | None) -> list[bool]:
    """Return which tokens stand for no word: those that are given, or that look like it."""
    if given is None:
        return [bool(SPECIAL.fullmatch(x)) for x in tokens]
    try:
        found = list(given)
    except TypeError:
        got = type(given).__name__
        raise TypeError(f"is_special must be a sequence of bool, not {got}") from None
    for i, x in enumerate(found):
        if isinstance(x, (str, bytes, list, tuple)) or np.ndim(x):
            raise TypeError(f"is_special[{i}] must be a bool, not {type(x).__name__}")
    if len(found) != len(tokens):
        raise ValueError(f"is_special must be as many as the keys, {len(tokens)}, got {len(found)}")
    return [bool(x) for x in found]


def rows_with_choice(special: Bools, is_causal: bool) -> Bools:
    """Return which tokens' rows count where attention is shared out: all, if none could.

    Those of special tokens stand for no word, and the first one of a causal map sees itself alone.
    """
    found = ~special
    found[:1] &= not is_causal
    return found if found.any() else np.ones_like(found)


def merged(pieces: Sequence[str], special: Sequence[bool]) -> Words:
    """Return the words of pieces that make up a text.

    A word begins where a space does, at a special token and behind it, where letters turn into
    punctuation or back, and at an ideograph or kana. An empty piece is a part of the character
    before it; a mark on a letter, and an apostrophe between letters, are parts of their word. A
    piece that is only a space leads the next one.
    """
    starts: list[int] = []
    before, leads = "", False  # the kind of the piece before; whether it leads this one
    for i, piece in enumerate(pieces):
        if not piece and not special[i]:
            if not starts:
                starts.append(i)
            continue
        kind = _kind(pieces, special, i)
        if kind == "part":
            if begins := before in ("", "special", "space") and not leads:
                before = "other"
        else:
            is_led = leads or (before in ("word", "other") and _is_mark(piece[:1]))
            begins = kind != before or piece[:1].isspace() or bool(CJK.match(piece))
            begins = kind == "special" or (begins and not is_led)
            before = kind
        if begins or not starts:
            starts.append(i)
        leads = kind == "space" and "\n" not in piece
    words = ["".join(pieces[a:b]) for a, b in pairwise([*starts, len(pieces)])]
    shown = tuple(" ".join(x.split()) or _space(x) for x in words)
    marked = frozenset(k for k, i in enumerate(starts) if special[i])
    first = "".join(pieces[:1])
    return Words(shown, tuple(starts), marked, first.strip() or (first and _space(first)))


def pieces_of_tokens(tokens: Sequence[str]) -> list[str]:
    """Return the text of tokens as tokenizers spell them, by the marks that they have.

    Spaces are Ġ in byte-level BPE and ▁ in SentencePiece; WordPiece has ## where there is none.
    Where no token has such a mark or begins with a space, each is a word.
    """
    if any("Ġ" in x for x in tokens):
        return _of_bytes(tokens, _byte_level)
    if any("▁" in x for x in tokens):
        return _of_bytes(tokens, _sentence_piece)
    if any(x[:1].isspace() for x in tokens):
        return list(tokens)
    return [x[2:] if x.startswith("##") and len(x) > 2 else f" {x}" for x in tokens]


def pieces_of_text(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Return the part of a text that each token adds, by the characters that it stands for.

    What no token stands for, as accents that the model leaves out, is a part of the token before
    it, up to the next space.
    """
    pieces: list[str] = []
    end = last = 0  # where the text said so far ends; the last token that said any
    for i, (begin, until) in enumerate([*offsets, (len(text), len(text))]):
        if end and begin > end and (left_out := re.match(r"\S+", text[end:begin])):
            pieces[last] += left_out[0]
            end += len(left_out[0])
        pieces.append(text[end:until])
        last = i if until > end else last
        end = max(end, until)
    return pieces[:-1]


def pieces_of_ids(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], first: int
) -> list[str]:
    """Return the text that tokens add, from the first one asked for on.

    All of a character is said at its first token: what follows of it is empty.
    """
    pieces: list[str] = []
    begun = first  # the first token of a character that is not complete
    for i in range(first, len(ids)):
        begin = max(begun - CONTEXT, 0)
        known, text = decode(ids[begin:begun]), decode(ids[begin : i + 1])
        pieces.append("")
        pieces[begun - first] = text.removeprefix(known)
        if not text.endswith("\ufffd") or i - begun >= MOST_BYTES:
            begun = i + 1
    return pieces


def sink_names(first: str | None, special: Sequence[str]) -> str:
    """Return what is apart in a map, in words: the first token, if it is, and special tokens."""
    names = [] if first is None else [f'the first token, "{_cut(first)}"']
    names += dict.fromkeys(map(_cut, special))
    if len(names) > 3:
        names[2:] = ["other special tokens"]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def place(words: Sequence[str], word: Any, name: str = "word") -> int:
    """Return the index of the word that is meant: a str, a pair of it and a number, or an index."""
    if is_integer(word):
        if not 0 <= whole_number(name, word) < len(words):
            raise ValueError(f"{name} must be within 0..{len(words) - 1}, the words, got {word}")
        return int(word)
    number = None
    if isinstance(word, tuple) and len(word) == 2:
        word, number = word[0], whole_number(f"the number of {name}", word[1])
    if not isinstance(word, str):
        rule = "a word, an index, or a pair of a word and which one it is"
        raise TypeError(f"{name} must be {rule}, not {type(word).__name__}")
    found = [i for i, x in enumerate(words) if x == word]
    found = found or [i for i, x in enumerate(words) if x.lower() == word.lower()]
    if not found:
        near = difflib.get_close_matches(word, sorted(set(words)), n=3, cutoff=0.5)
        hint = f"; near it: {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"{name} must be a word of the text, got {word!r}, which is none{hint}")
    if number is None and len(found) > 1:
        rule = f"say which of {len(found)}: ({word!r}, 1) is the first"
        raise ValueError(f"{name} must {rule}, got {word!r}")
    if number is not None and not 1 <= number <= len(found):
        rule = f"within 1..{len(found)}, as often as {word!r} occurs"
        raise ValueError(f"the number of {name} must be {rule}, got {number}")
    return found[0 if number is None else number - 1]


def _of_bytes(tokens: Sequence[str], spelt: Callable[[str], bytes]) -> list[str]:
    """Return the text of tokens that may be parts of characters in UTF-8.

    All of a character is said where it begins: what follows of it is empty.
    """
    contents = [spelt(x) for x in tokens]
    lead = [x[:1] and 0x80 <= x[0] < 0xC0 for x in contents]
    pieces, i = [], 0
    while i < len(tokens):
        end = i + 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(contents[i])
        while decoder.getstate()[0] and end < len(tokens) and lead[end]:
            text += decoder.decode(contents[end])
            end += 1
        pieces += [text + decoder.decode(b"", True), *[""] * (end - i - 1)]
        i = end
    return pieces


def _byte_level(token: str) -> bytes:
    """Return the bytes that a token of byte-level BPE is spelt by."""
    if all(x in BYTES for x in token):
        return bytes(BYTES[x] for x in token)
    return token.encode("utf-8", "replace")


def _sentence_piece(token: str) -> bytes:
    """Return the bytes of a token of SentencePiece, which spells some of them as <0x0A>."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[1:-1], 16)])
    return token.replace("▁", " ").encode("utf-8", "replace")


def _bytes() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE (GPT-2): the visible ones are their own.

    All others have the characters from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [x for x in range(256) if x not in visible]
    return {chr(x): x for x in visible} | {chr(256 + i): x for i, x in enumerate(others)}


def _kind(pieces: Sequence[str], special: Sequence[bool], i: int) -> str:
    """Return what a piece is, a part being of the word before it, whatever that is."""
    piece = pieces[i]
    if special[i]:
        return "special"
    if piece.isspace():
        return "space"
    if all(map(_is_mark, piece)) or (piece in ("'", "\u2019") and _is_within(pieces, special, i)):
        return "part"
    return "word" if re.search(r"\w", piece) else "other"


def _is_mark(x: str) -> bool:
    """Return whether a character is one with that before it: an accent, a vowel sign, a joiner."""
    return bool(x) and (x in JOINERS or unicodedata.category(x).startswith("M"))


def _is_within(pieces: Sequence[str], special: Sequence[bool], i: int) -> bool:
    """Return whether letters are on both sides of a piece."""
    sides = []
    for places, at in ((range(i - 1, -1, -1), -1), (range(i + 1, len(pieces)), 0)):
        k = next((k for k in places if pieces[k]), None)
        if k is None or special[k]:
            return False
        sides.append(pieces[k][at])
    return (sides[0].isalpha() or _is_mark(sides[0])) and sides[1].isalpha()


def _cut(text: str) -> str:
    """Return a name of bounded length, without what a terminal would obey."""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    return "".join(x if x.isprintable() or x in JOINERS else "?" for x in text)


def _space(text: str) -> str:
    """Return what is shown of a word without visible characters."""
    return "\\n" * text.count("\n") or "' '"


BYTES = _bytes()
