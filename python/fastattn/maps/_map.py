# SPDX-License-Identifier: Apache-2.0
"""A map: how much each word looks at each word, in each head; its strongest links, its files."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastattn._arguments import whole_number
from fastattn.maps import _html, _terminal
from fastattn.maps._terminal import percent
from fastattn.maps._words import Choice, place
from fastattn.nn import Floats

CAUSE = "A map shows where a head looks, not why the model says what it says"
CHECK = f"{CAUSE}: take the head away and see what changes."


class Link(NamedTuple):
    """How much a word looks at another one, in one head.

    Attributes
    ----------
    query, key : str
        The word that looks, and the one that it looks at.
    layer, head : int
        The numbers of the head.
    share : float
        Of the attention of `query`, from 0 to 1.
    """

    query: str
    key: str
    layer: int
    head: int
    share: float


@dataclass(frozen=True, eq=False, repr=False)
class Map:
    """How much each word of a text looks at each word, in each head, as `show` makes it.

    Printed, it is its strongest links and a picture; a notebook shows its page.

    Attributes
    ----------
    queries, keys : tuple of str
        The words that look, and those that are looked at. In a causal map without special tokens,
        the first token is a key apart: a longer word that it begins follows without it.
    weights : ndarray of shape (layers, heads, len(queries), len(keys)) and dtype float32
        A word's row is the mean of its tokens' rows, its column the sum of their columns.
    layers, heads : tuple of int
        Their numbers in the model.
    special : tuple of int
        The indices of the keys that are special tokens, and of the first token in a causal map:
        all can see it, and heads that have nothing to look at look there.
    special_queries : tuple of int
        The indices of the queries that are special tokens.
    sink : ndarray of shape (layers, heads) and dtype float32
        The share of all attention that goes to `special`: the mean over the rows that have a
        choice, without those of special tokens and without the first row of a causal map.
    sink_names : str
        What `special` is, in words.
    positions : tuple of int or None
        The index of each query's word among the keys; None between two texts.
    is_causal : bool
        Whether no word sees a later one.
    generated : int
        How many of the queries, the last ones, the model wrote. The row of such a word is what the
        model looked at when it wrote it.
    word : int or None
        The index of the query that was asked about.
    shown : tuple of int or None
        The layer and the head, by number, with which the page opens and which a picture shows; by
        default those of the strongest link of `word`.
    title : str
        The heading of the page.
    code : str
        The line of Python that takes a head away.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    weights: Floats
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    special: tuple[int, ...] = ()
    special_queries: tuple[int, ...] = ()
    sink: Floats | None = None
    sink_names: str = ""
    positions: tuple[int, ...] | None = None
    is_causal: bool = False
    generated: int = 0
    word: int | None = None
    shown: tuple[int, int] | None = None
    title: str = ""
    code: str = ""

    def links(
        self, word: Choice | None = None, count: int = 10, *, to: Choice | None = None
    ) -> list[Link]:
        """Return the strongest links between words, the strongest first.

        Each two words are listed once, with the head that links them most. A word's link with
        itself and those with `special` are left out.

        Parameters
        ----------
        word : str, int or (str, int), optional
            The word that looks: itself, its index among `queries`, or ``("he", 2)``, the second of
            them. By default the one that `show` was asked about, or else all words.
        count : int
            How many links at most, 1 or more.
        to : str, int or (str, int), optional
            The word that is looked at: every head is listed, so that this ranks the heads. It is
            neither in `special` nor the word that looks.

        Returns
        -------
        list of Link

        Raises
        ------
        TypeError, ValueError
            A word does not occur, or several times without saying which; `to` is left out; or
            `count` is no int of 1 or more.
        """
        count = at_least_1("count", count)
        row = self.word if word is None else place(self.queries, word)
        column = None if to is None else self._column(row, to)
        shares = np.array(self.weights if row is None else self.weights[:, :, row : row + 1])
        shares[..., list(self.special)] = 0
        rows = range(len(self.queries)) if row is None else [row]
        for i, k in enumerate(rows):
            if self.positions is not None:
                shares[:, :, i, self.positions[k]] = 0
            if k in self.special_queries and row is None:
                shares[:, :, i] = 0
        flat = shares.reshape(-1, *shares.shape[2:])
        if column is None:  # Of each two words, all heads but the best are left out.
            best = flat.argmax(axis=0)[None]
            others = np.ones(flat.shape, bool)
            np.put_along_axis(others, best, False, axis=0)
        else:
            others = np.ones(flat.shape, bool)
            others[..., column] = False
        flat[others] = 0
        order = np.argsort(-flat, axis=None, kind="stable")[:count]
        found = (np.unravel_index(x, flat.shape) for x in order[flat.ravel()[order] > 0])
        return [
            Link(
                self.queries[rows[i]],
                self.keys[k],
                self.layers[head // len(self.heads)],
                self.heads[head % len(self.heads)],
                float(flat[head, i, k]),
            )
            for head, i, k in found
        ]

    def _column(self, row: int | None, to: Choice) -> int:
        """Return the index of the key that is asked about, whose links must not be left out."""
        column = place(self.keys, to, "to")
        if column in self.special:
            said = self.sink_text() or "it is apart"
            if row is not None:
                share = percent(self.weights[:, :, row, column].mean())
                said = f"{share} of the attention of {self.queries[row]!r} goes there"
            raise ValueError(f"to must be a word that is not left out, got {to!r}: {said}")
        if row is not None and self.positions is not None and self.positions[row] == column:
            raise ValueError(f"to must be another word than the one that looks, got {to!r}")
        return column

    def sink_text(self) -> str:
        """Return the sentence that says how much goes to `special`; "" where there are none."""
        if self.sink is None or not self.special:
            return ""
        return f"{percent(self.sink.mean())} of the attention goes to {self.sink_names}"

    def chosen(self) -> tuple[int, int] | None:
        """Return the indices of the layer and the head that are shown first, if one is to be."""
        links = self.links(count=1) if self.word is not None else []
        shown = self.shown or (links[0][2:4] if links else None)
        if shown is None:
            return (0, 0) if self.weights.shape[:2] == (1, 1) else None
        return self.layers.index(shown[0]), self.heads.index(shown[1])

    def __repr__(self) -> str:
        """Return what it is, in a line."""
        sizes = f"{len(self.queries)} x {len(self.keys)} words"
        return f"<Map: {sizes}, {len(self.layers)} x {len(self.heads)} heads>"

    def __str__(self) -> str:
        """Return what a terminal shows."""
        return _terminal.render(self)

    def data(self) -> dict[str, Any]:
        """Return what the page is made of, which JSON can hold."""
        chosen = self.chosen()
        shares = [] if self.sink is None else self.sink.astype(float).round(3).tolist()
        return {
            "kind": "map",
            "title": self.title,
            "queries": list(self.queries),
            "keys": list(self.keys),
            "positions": None if self.positions is None else list(self.positions),
            "causal": self.is_causal,
            "layers": list(self.layers),
            "heads": list(self.heads),
            "weights": _html.pack(self.weights, _html.BUDGET),
            "special": list(self.special),
            "special_queries": list(self.special_queries),
            "sink": {"text": self.sink_text(), "shares": shares} if self.special else None,
            "word": self.word,
            "layer": chosen[0] if chosen else None,
            "head": chosen[1] if chosen else None,
            "generated": self.generated,
            "check": {"text": CHECK, "code": self.code},
        }

    def html(self) -> str:
        """Return the page: one file of HTML that needs no network.

        Raises
        ------
        ValueError
            It would be above its bound of 1 MB.
        """
        return _html.page(self.data())

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return in_notebook(self.html())

    def save(
        self, path: str | os.PathLike[str], *, layer: int | None = None, head: int | None = None
    ) -> None:
        """Write the page, or a picture: what the suffix says, .html or .png.

        What is there is replaced when all is written: nothing half-written stays.

        Parameters
        ----------
        path : str or path
        layer, head : int, optional
            Of a picture, the number of the layer whose heads it shows, and of the one head. By
            default it is `shown`, or the head with the strongest link of `word`, or else all heads.

        Raises
        ------
        ValueError
            The suffix is another one, the layer or head is not there, or the page would be above
            its bound.
        ImportError
            A picture needs matplotlib.
        OSError
            The file cannot be written.
        """
        suffix = suffix_of(path, (".html", ".png"))
        for name, given, known in (("layer", layer, self.layers), ("head", head, self.heads)):
            if given is not None and given not in known:
                raise ValueError(f"{name} must be one of the map's, {_list(known)}, got {given}")
        if suffix == ".html":
            write(path, self.html().encode())
            return
        from fastattn.maps import _png

        write(path, _png.picture(self, layer, head))


def at_least_1(name: str, number: int) -> int:
    """Return a number, which must be an int of 1 or more."""
    if whole_number(name, number) < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return int(number)


def in_notebook(page: str) -> str:
    """Return a page as a frame of another one."""
    text = page.replace("&", "&amp;").replace('"', "&quot;")
    style = "width:100%;height:640px;border:0"
    return f'<iframe title="attention map" style="{style}" srcdoc="{text}"></iframe>'


def suffix_of(path: str | os.PathLike[str], known: Sequence[str]) -> str:
    """Return the suffix of a path, which must be a known one."""
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        raise ValueError(f"the file must end in {' or '.join(known)}, got {os.fspath(path)!r}")
    return suffix


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place, then put it there, with the mode of the one before it."""
    target = Path(path).resolve()
    beside = target.with_name(f".{secrets.token_hex(16)}")
    try:
        with beside.open("xb") as file:
            with contextlib.suppress(OSError):  # There is none before it, or modes mean nothing.
                beside.chmod(target.stat().st_mode & 0o777)
            file.write(content)
        beside.replace(target)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _list(numbers: Sequence[int]) -> str:
    """Return numbers, in short."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))
