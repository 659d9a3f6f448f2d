# SPDX-License-Identifier: Apache-2.0
"""Which pages does a sequence read? `PagePool` reserves, shares, copies, writes and frees them.

The kernel reads keys and values where they lie in the pool (src/calls.cpp).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._arguments import MOST_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fastattn.kv_cache._int8 import Quantised

    Array = NDArray[Any]
    Rows = slice | NDArray[np.int64]  # which rows of the table

NONE = -1  # no page; in a file: no limit


def slots_of(begins: Array, lengths: Array, parts: Array) -> list[tuple[Array, Array]]:
    """Return where the slots of the newest part of rows begin and end, and of the first part."""
    shift, first_begins, first_ends, first_shift = parts.T
    return [
        (begins + shift, lengths + shift),
        (first_begins + first_shift, first_ends + first_shift),
    ]


class PagePool:
    """Pages of keys and values, and a table with one row of pages for each sequence.

    The table's first `rows` rows are those of sequences. The sequence of row r has the tokens at
    positions begins[r]..lengths[r] - 1. Position p lies in slot ``s = p + shift``, which is in page
    ``table[r, s // page_size]``. A sequence whose middle was evicted also has its first tokens, in
    earlier slots: parts[r] is its shift, and where its first part begins, ends and is shifted to;
    all zeros for any other. Between any two calls:

    - A row names pages in the columns that hold the slots of its parts: of the newest part
      (begins[r] + shift) // page_size up to (lengths[r] + shift) / page_size, rounded up. All other
      entries of the table, and all other tokens of a page, mean nothing.
    - counts[page] says how many entries name a page; those that none names are in `free`.
    - A page that several rows name is never written: the row that appends copies it first.

    An append writes first and becomes visible last, by the new length: if it raises in between, no
    sequence has changed.

    `ahead` says how many tokens every row can take by writing alone, with neither a new page nor a
    copy, so that a token of a loop costs little; None: whoever asks must look. What changes the
    rows in another way makes it None.
    """

    def __init__(self, arrays: list[Array], fixed: bool) -> None:
        pages, _, self.page_size, _ = arrays[0].shape
        self.arrays = arrays  # key, value; for int8 also their scales
        self.fixed = fixed  # there will be no other pages than these
        self.counts = np.zeros(pages, np.int64)
        self.free = list(range(pages - 1, -1, -1))  # the last one is taken next
        self.rows = 0
        self.table = np.full((1, 1), NONE, np.int64)
        self.lengths = np.zeros(1, np.int64)
        self.begins = np.zeros(1, np.int64)
        self.parts = np.zeros((1, 4), np.int64)  # Parts of cpp/attention.h
        self.has_parts = False  # False: all are zeros
        self.ahead: int | None = None
        self._ends: tuple[Any, Any] = (0, 0)  # where each row's next token goes: page and place
        self._most_kept = 0  # tokens of a row that are not evicted

    def pages_of(self, lengths: Any) -> Any:
        """Return how many pages the tokens fill, the last one perhaps in part."""
        return -(-lengths // self.page_size)

    def columns_of(self, begins: Any, ends: Any) -> tuple[Any, Any]:
        """Return the first column that holds the slots begins..ends - 1, and the one behind."""
        return begins // self.page_size, self.pages_of(ends)

    def named(self, begins: Array, lengths: Array, parts: Array, columns: int) -> NDArray[np.bool_]:
        """Tell of each entry of a table with these columns whether it names a page."""
        column = np.arange(columns)
        named = np.zeros((len(begins), columns), bool)
        for begin, end in slots_of(begins, lengths, parts):
            first, last = self.columns_of(begin[:, None], end[:, None])
            named |= (column >= first) & (column < last)
        return named

    def kept(self, rows: Rows) -> Array:
        """Return how many tokens rows have that are not evicted."""
        parts = self.parts[rows]
        kept: Array = self.lengths[rows] - self.begins[rows] + parts[:, 2] - parts[:, 1]
        return kept

    # Rows.

    def take_rows(
        self, table: Array, named: Array, begins: Array, lengths: Array, parts: Array
    ) -> None:
        """Take the rows of a table, where none are yet; `named` tells which entries are pages."""
        self.ahead = None
        self.has_parts = bool(parts.any())
        n, columns = table.shape
        self.counts = np.bincount(table[named].astype(np.int64), minlength=len(self.counts))
        self.free = np.flatnonzero(self.counts == 0)[::-1].tolist()
        self.rows = n
        self.table = np.full((max(n, 1), max(columns, 1)), NONE, np.int64)
        self.table[:n, :columns][named] = table[named]
        self.lengths, self.begins = (np.resize(x, max(n, 1)) for x in (lengths, begins))
        self.parts = np.resize(parts, (max(n, 1), 4))

    def add_row(self, prefix: int | None = None, end: int = 0) -> None:
        """Add a row that shares the tokens before `end` of the row `prefix`."""
        self.ahead = None
        n = self.rows
        if n == len(self.table):
            self._resize_table(2 * n, self.table.shape[1])
        self.table[n] = NONE
        self.lengths[n], self.begins[n], self.parts[n] = end, 0, 0
        if prefix is not None:
            self.begins[n], self.parts[n] = self.begins[prefix], self.parts[prefix]
            named = self._named_of(n)
            pages = self.table[n, named] = self.table[prefix, named]
            np.add.at(self.counts, pages, 1)
        self.rows += 1

    def remove_row(self, row: int) -> None:
        """Remove a row; those behind it move up."""
        self.ahead = None
        n = self.rows
        self._release(self.table[row, self._named_of(row)])
        for x in (self.table, self.lengths, self.begins, self.parts):
            x[row : n - 1] = x[row + 1 : n]
        self.rows -= 1

    def truncate(self, rows: Rows, lengths: Array) -> None:
        """Give up the tokens behind these lengths."""
        self.ahead = None
        shift = self.parts[rows, 0]
        self._drop(rows, self.pages_of(lengths + shift), self.pages_of(self.lengths[rows] + shift))
        self.lengths[rows] = lengths

    def evict(self, rows: Rows, begins: Array, lengths: Array, parts: Array) -> None:
        """Give up the tokens that rows have not got with these begins, lengths and parts."""
        self.ahead = None
        number = np.arange(len(self.table))[rows]
        apart = (parts | self.parts[rows]).any(axis=1)
        first, last = self.begins[rows] // self.page_size, begins // self.page_size
        self._drop(rows, first, np.where(apart, first, last))
        before = [(row, self._named_of(row)) for row in number[apart]]
        self.begins[rows], self.lengths[rows], self.parts[rows] = begins, lengths, parts
        for row, named in before:
            self._close_gaps(row, named)
        self.has_parts = bool(self.parts[: self.rows].any())

    def reorder(self, indices: Array) -> None:
        """Let each row become a copy of row indices[row]; pages are shared, not copied."""
        self.ahead = None
        n, columns = self.rows, self.table.shape[1]
        named = self.named(self.begins[:n], self.lengths[:n], self.parts[:n], columns)
        before = self.table[:n][named]
        table = self.table[indices]
        np.add.at(self.counts, table[named[indices]], 1)
        self.table[:n] = table
        for x in (self.lengths, self.begins, self.parts):
            x[:n] = x[indices]
        self._release(before)

    # Appending.

    def append(self, rows: Rows, counts: Array, sources: Sequence[Array | Quantised]) -> None:
        """Append the first counts[i] tokens of each source's element i to row i of rows."""
        self.ahead = None
        starts = self.lengths[rows] + self.parts[rows, 0]
        ends = starts + counts
        held, wanted = self.pages_of(starts), self.pages_of(ends)
        new = int((wanted - held).sum())
        column, offset = np.divmod(starts, self.page_size)
        self._resize_table(len(self.table), int(wanted.max()))
        number = np.arange(len(counts)) if isinstance(rows, slice) else rows
        inside = np.flatnonzero((offset > 0) & (counts > 0))  # these write to a page that they have
        shared = inside[self.counts[self.table[number[inside], column[inside]]] > 1]
        self._reserve(new + self._copies_needed(self.table[number[shared], column[shared]]))
        for i in shared:
            self._copy_shared_page(number[i], column[i], offset[i])
        taken = self.free[len(self.free) - new :][::-1]
        used = 0
        for i in np.flatnonzero(wanted > held) if new else ():
            self.table[number[i], held[i] : wanted[i]] = taken[used : used + wanted[i] - held[i]]
            used += wanted[i] - held[i]
        self._write(self.table[rows], starts, counts, sources)
        if new:
            self.counts[taken] = 1
            del self.free[-new:]
        self.lengths[rows] += counts

    def append_ahead(
        self, tokens: int, sources: Sequence[Array | Quantised], capacity: int | None
    ) -> bool:
        """Append so many tokens to every row, if nothing but writing is needed; tell if it was."""
        if self.ahead is None:
            self._look_ahead()
        ahead, n = self.ahead, self.rows
        if not ahead or tokens > ahead or (tokens > 1 and n > 1):
            return False
        if capacity is not None and self._most_kept + tokens > capacity:
            return False
        self.ahead = None  # until all is done
        page, place = self._ends
        for x, source in zip(self.arrays, sources, strict=True):
            if n == 1:
                x[page, :, place : place + tokens] = source[0]
            else:
                x[page, :, place] = source[:, :, 0]
        self._ends = page, place + tokens
        self._most_kept += tokens
        for row in range(n) if n < 4 else (slice(n),):  # one by one is quicker for few
            self.lengths[row] += tokens
        self.ahead = ahead - tokens
        return True

    def _look_ahead(self) -> None:
        """Find how many tokens every row can take by writing alone."""
        n = self.rows
        column, place = np.divmod(self.lengths[:n] + self.parts[:n, 0], self.page_size)
        self.ahead = 0
        if not n or not place.all():  # of a row whose pages are full, or that has none
            return
        page = self.table[np.arange(n), column]
        if (self.counts[page] > 1).any():
            return
        self._ends = (int(page[0]), int(place[0])) if n == 1 else (page, place)
        self._most_kept = int(self.kept(slice(n)).max())
        self.ahead = self.page_size - int(place.max())

    def _resize_table(self, rows: int, columns: int) -> None:
        """Let the table have this many rows, and at least this many columns."""
        before = self.table.shape
        if columns > before[1]:
            columns = max(columns, 2 * before[1])
        elif rows == before[0]:
            return
        table = np.full((rows, max(columns, before[1])), NONE, np.int64)
        table[: before[0], : before[1]] = self.table
        more = rows - before[0]
        self.lengths, self.begins = (np.pad(x, (0, more)) for x in (self.lengths, self.begins))
        self.table, self.parts = table, np.pad(self.parts, ((0, more), (0, 0)))

    def _copies_needed(self, shared: Array) -> int:
        """Return how many copies it takes to write once to each of these pages."""
        if not shared.size:
            return 0
        pages, writers = np.unique(shared, return_counts=True)
        return int(np.minimum(writers, self.counts[pages] - 1).sum())

    def _copy_shared_page(self, row: int, column: int, offset: int) -> None:
        """Let a row have a page for itself, with the first `offset` tokens of the shared one."""
        page = self.table[row, column]
        if self.counts[page] == 1:  # the other rows of this append have their copies already
            return
        new = self.free[-1]
        for x in self.arrays:
            x[new, :, :offset] = x[page, :, :offset]
        self.free.pop()
        self.counts[page] -= 1
        self.counts[new] = 1
        self.table[row, column] = new

    def _write(
        self, pages: Array, starts: Array, counts: Array, sources: Sequence[Array | Quantised]
    ) -> None:
        """Write the first counts[b] tokens of element b, in the fewest steps: by tokens or pages.

        They go to the slots from starts[b] in the row of pages ``pages[b]``.
        """
        most = int(counts.max())
        if most < len(counts):
            for token in range(most):
                batch = np.flatnonzero(counts > token)
                column, offset = np.divmod(starts[batch] + token, self.page_size)
                page = pages[batch, column]
                for x, source in zip(self.arrays, sources, strict=True):
                    x[page, :, offset] = source[batch, :, token]
            return
        for b, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            token = 0
            while token < count:
                column, offset = divmod(start + token, self.page_size)
                stop = min(token + self.page_size - offset, count)
                page, place = pages[b, column], slice(offset, offset + stop - token)
                for x, source in zip(self.arrays, sources, strict=True):
                    x[page, :, place] = source[b, :, token:stop]
                token = stop

    # Pages, used and free.

    def fix(self, pages: int) -> None:
        """Let the pool grow to this many pages, and never further."""
        if pages < len(self.counts):
            raise ValueError(
                f"it must have no more pages than its limit allows, got {len(self.counts)} "
                f"where it allows {pages}"
            )
        self._grow(pages)
        self.fixed = True

    def _reserve(self, pages: int) -> None:
        """Let at least this many pages be free."""
        missing = pages - len(self.free)
        if missing <= 0:
            return
        before = len(self.counts)
        if self.fixed:
            raise MemoryError(
                f"pages must be enough for what is appended, which needs {pages} more, "
                f"got pages={before}, {len(self.free)} of them free"
            )
        self._grow(max(2 * before, before + missing))

    def _grow(self, pages: int) -> None:
        """Let the pool have this many pages; those that it has stay as they are."""
        before = len(self.counts)
        if pages * max(math.prod(x.shape[1:]) for x in self.arrays) >= MOST_ELEMENTS:
            raise MemoryError(f"no room for a pool of {pages} pages")
        arrays = [np.empty((pages, *x.shape[1:]), x.dtype) for x in self.arrays]
        counts = np.zeros(pages, np.int64)
        free = [*range(pages - 1, before - 1, -1), *self.free]
        for new, old in zip([*arrays, counts], [*self.arrays, self.counts], strict=True):
            new[:before] = old
        self.arrays, self.counts, self.free = arrays, counts, free

    def _named_of(self, row: int) -> NDArray[np.bool_]:
        """Tell of each entry of a row whether it names a page."""
        here = slice(row, row + 1)
        columns = self.table.shape[1]
        named = self.named(self.begins[here], self.lengths[here], self.parts[here], columns)
        of_row: NDArray[np.bool_] = named[0]
        return of_row

    def _close_gaps(self, row: int, before: NDArray[np.bool_]) -> None:
        """Drop the pages of a row that its parts do not name; those that stay move together.

        So a row needs no more columns than it has pages, however long it streams.
        """
        stays = self._named_of(row)
        self._release(self.table[row, before & ~stays])
        pages = self.table[row, stays]
        self.table[row] = NONE
        self.table[row, : len(pages)] = pages
        gone = self.page_size * np.concatenate([[0], (~stays).cumsum()])
        shift, first_begin, first_end, first_shift = self.parts[row]
        self.parts[row, 0] -= gone[(self.begins[row] + shift) // self.page_size]
        if first_begin < first_end:
            self.parts[row, 3] -= gone[(first_begin + first_shift) // self.page_size]

    def _drop(self, rows: Rows, first: Array, last: Array) -> None:
        """Let rows no longer name their pages in the columns first..last - 1."""
        number = np.arange(len(self.table))[rows]
        for i in np.flatnonzero(first < last):
            entries = self.table[number[i], first[i] : last[i]]
            self._release(entries)
            entries[:] = NONE

    def _release(self, pages: Array) -> None:
        """Count one entry less for each time that a page is listed; free those with none left."""
        np.subtract.at(self.counts, pages, 1)
        distinct = np.unique(pages)
        self.free.extend(distinct[self.counts[distinct] == 0][::-1].tolist())
