# SPDX-License-Identifier: Apache-2.0
"""Which rank has which positions of the sequence.

A rank's rows are its spans of positions, one after the other. Whatever is cut by a layout (queries,
keys, labels, positions) is cut here, and put together again here.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._arguments import is_integer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

MOST_SHOWN = 8  # ranks whose spans an error or a repr shows


class Piece(NamedTuple):
    """A span of positions, and where it is among a rank's rows."""

    rows: slice
    start: int
    stop: int


class Layout:
    """The positions that each rank has: spans (start, stop) for each, which together are 0..total.

    Parameters
    ----------
    spans : sequence over ranks of sequences of (start, stop)
        A rank's rows are its spans in this order. Each position is in exactly one span. A rank may
        have none, or empty ones.

    Raises
    ------
    TypeError, ValueError
        The spans overlap, miss a position, or are no pairs of integers.

    See Also
    --------
    contiguous, zigzag : the usual ones.

    Examples
    --------
    >>> import numpy as np, fastattn.distributed as fd
    >>> layout = fd.Layout([[(0, 2), (6, 8)], [(2, 6)]])
    >>> layout.positions(0)
    array([0, 1, 6, 7])
    >>> parts = [layout.take(np.arange(8), rank, axis=0) for rank in range(2)]
    >>> layout.join(parts, axis=0)
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """

    __slots__ = ("_spans", "_total")

    def __init__(self, spans: Iterable[Iterable[Sequence[int]]]) -> None:
        given = [_checked(rank, of_rank) for rank, of_rank in enumerate(spans)]
        if not given:
            raise ValueError("spans must be those of 1 rank or more, got none")
        self._spans = tuple(map(_joined, given))
        self._total = _total(self._spans)

    @property
    def spans(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The spans of each rank, without empty ones, neighbours joined."""
        return self._spans

    @property
    def total(self) -> int:
        """How many positions there are."""
        return self._total

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self._spans)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many rows each rank has."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self._spans)

    def positions(self, rank: int) -> NDArray[np.int64]:
        """Return the position of each of a rank's rows: for rotary embeddings, say, or labels.

        Parameters
        ----------
        rank : int

        Returns
        -------
        ndarray of int64, of shape (rows,)
        """
        spans = self._spans[self._rank(rank)]
        return np.concatenate([np.empty(0, np.int64), *(np.arange(a, b) for a, b in spans)])

    def pieces(self, rank: int) -> Iterator[Piece]:
        """Yield a rank's spans, each with its rows.

        Parameters
        ----------
        rank : int

        Yields
        ------
        (rows, start, stop)
            A slice of the rank's rows, and the positions that they have.
        """
        row = 0
        for start, stop in self._spans[self._rank(rank)]:
            yield Piece(slice(row, row + stop - start), start, stop)
            row += stop - start

    def take(self, x: ArrayLike, rank: int, axis: int = -2) -> Array:
        """Return a rank's rows of a whole array.

        Parameters
        ----------
        x : array
        rank : int
        axis : int
            The one of positions, of size total.

        Returns
        -------
        ndarray
            A copy, C-contiguous.
        """
        array = np.asarray(x)
        if array.shape[axis] != self._total:
            raise ValueError(
                f"x must have the layout's total, {self._total}, along axis {axis}, got "
                f"x.shape={array.shape}"
            )
        return array.take(self.positions(rank), axis=axis)

    def join(self, parts: Sequence[ArrayLike], axis: int = -2) -> Array:
        """Return the whole array of which each rank has its rows.

        Parameters
        ----------
        parts : sequence over ranks of arrays
        axis : int
            The one of rows.

        Returns
        -------
        ndarray
        """
        arrays = [np.asarray(part) for part in parts]
        found = tuple(array.shape[axis] for array in arrays)
        if found != self.lengths:
            raise ValueError(
                f"parts must have the layout's lengths, {_few(self.lengths)}, along axis {axis}, "
                f"got {_few(found)}"
            )
        shape = list(arrays[0].shape)
        shape[axis] = self._total
        whole = np.empty(shape, arrays[0].dtype)
        by_position = np.moveaxis(whole, axis, 0)
        for rank, array in enumerate(arrays):
            by_row = np.moveaxis(array, axis, 0)
            for rows, start, stop in self.pieces(rank):
                by_position[start:stop] = by_row[rows]
        return whole

    def _rank(self, rank: int) -> int:
        if not is_integer(rank):
            raise TypeError(f"rank must be an int, not {type(rank).__name__}")
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be within 0..{self.ranks - 1}, got {rank}")
        return int(rank)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._spans == other._spans

    def __hash__(self) -> int:
        return hash(self._spans)

    def __repr__(self) -> str:
        return f"Layout({_few(self._spans)})"


def contiguous(total: int | Sequence[int], ranks: int | None = None) -> Layout:
    """Return the layout in which each rank has one span, rank after rank.

    Parameters
    ----------
    total : int, or sequence of int
        How many positions there are, which ranks share as equally as can be; or how many each rank
        has.
    ranks : int, optional
        How many ranks there are; must be given with an int.

    Returns
    -------
    Layout

    Examples
    --------
    >>> import fastattn.distributed as fd
    >>> fd.contiguous(10, 4).lengths
    (2, 3, 2, 3)
    >>> fd.contiguous([7, 0, 3])
    Layout((((0, 7),), (), ((7, 10),)))
    """
    if is_integer(total):
        cuts = _cuts(total, ranks, 1)
    else:
        lengths = _integers("total", total)
        if ranks is not None and ranks != len(lengths):
            raise ValueError(
                f"ranks must be the number of lengths in total, {len(lengths)}, got ranks={ranks}"
            )
        cuts = [0, *itertools.accumulate(lengths)]
    return Layout([[pair] for pair in itertools.pairwise(cuts)])


def zigzag(total: int, ranks: int) -> Layout:
    """Return the layout that shares the work of causal attention equally.

    Positions are cut into 2 * ranks chunks; rank r has chunks r and 2 * ranks - 1 - r, an early one
    and a late one. This is how PyTorch's context parallelism cuts its buffers, too.

    Parameters
    ----------
    total : int
        How many positions there are; they need not divide.
    ranks : int

    Returns
    -------
    Layout

    Examples
    --------
    >>> import fastattn.distributed as fd
    >>> fd.zigzag(8, 2)
    Layout((((0, 2), (6, 8)), ((2, 6),)))
    """
    chunks = list(itertools.pairwise(_cuts(total, ranks, 2)))
    return Layout([[chunks[r], chunks[-1 - r]] for r in range(ranks)])


def _cuts(total: Any, ranks: Any, chunks: int) -> list[int]:
    """Return where the positions are cut, into so many chunks for each rank."""
    for name, x, least in (("total", total, 0), ("ranks", ranks, 1)):
        if not is_integer(x):
            raise TypeError(f"{name} must be an int, not {type(x).__name__}")
        if x < least:
            raise ValueError(f"{name} must be {least} or more, got {name}={x}")
    return [total * i // (chunks * ranks) for i in range(chunks * ranks + 1)]


def _integers(name: str, x: Any) -> list[int]:
    numbers = list(x) if hasattr(x, "__iter__") else [x]
    for number in numbers:
        if not is_integer(number):
            raise TypeError(f"{name} must be an int or a sequence of them, got {number!r}")
        if number < 0:
            raise ValueError(f"{name} must be lengths of 0 or more, got {number}")
    return [int(number) for number in numbers]


def _checked(rank: int, spans: Any) -> list[tuple[int, int]]:
    """Return the spans of a rank, if they are pairs of integers."""
    checked = []
    for span in spans:
        try:
            start, stop = span
        except (TypeError, ValueError):
            start = stop = None
        if not is_integer(start) or not is_integer(stop):
            raise TypeError(f"spans must be pairs of integers (start, stop), got {span!r}")
        if not 0 <= start <= stop:
            raise ValueError(f"spans must have 0 <= start <= stop, got {span!r} of rank {rank}")
        checked.append((int(start), int(stop)))
    return checked


def _joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return spans without empty ones, and neighbours as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return tuple(joined)


def _total(spans: Iterable[Iterable[tuple[int, int]]]) -> int:
    """Return how many positions there are, if each has one rank."""
    owned = sorted((*span, rank) for rank, of_rank in enumerate(spans) for span in of_rank)
    end, before = 0, -1
    for start, stop, rank in owned:
        if start > end:
            raise ValueError(f"spans must miss no position, got none that has {end}..{start - 1}")
        if start < end:
            raise ValueError(
                f"spans must not overlap, got position {start} of ranks {before} and {rank}"
            )
        end, before = stop, rank
    return end


def _few(of_ranks: Sequence[Any]) -> str:
    """Return what ranks have as text, of many ranks only the first."""
    if len(of_ranks) <= MOST_SHOWN:
        return str(tuple(of_ranks))
    shown = ", ".join(map(str, of_ranks[:MOST_SHOWN]))
    return f"({shown}, .. {len(of_ranks)} ranks)"
