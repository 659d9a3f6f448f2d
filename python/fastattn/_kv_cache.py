# SPDX-License-Identifier: Apache-2.0
"""Where the keys and values of earlier tokens wait for the next ones.

`PagedKVCache` is the one storage: a pool of pages, and for each sequence a table of the pages that
it reads, with counts, so that sequences share what they have in common. `KVCache` is a batch of
such sequences. The kernel reads keys and values where they lie in the pool (src/bindings.cpp); the
rules about the options of a call are those of `attention` (`_arguments.py`).

A sequence has pages for the positions from its begin to its length, whole pages: those of table
columns begin // page_size up to length / page_size, rounded up. All other entries of the table, and
all other rows of a page, mean nothing. So an append writes first and becomes visible last, by the
new length: if it raises in between, no sequence has changed.

A file, a pickle and a copy are made of the same arrays (`_stored`), which hold nothing else, and a
cache is made of such arrays by the same checks (`_restored`).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from fastattn import _core
from fastattn._arguments import (
    FARTHEST,
    MOST_DIM,
    MOST_ELEMENTS,
    as_array,
    boolean,
    floats,
    integers,
    may_share_memory,
    of_dtypes,
    options,
    overlaps_itself,
    result_array,
    sizes,
    whole_number,
)
from fastattn._arrays import answer, destination, room

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import BinaryIO

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Array = NDArray[Any]
    File = str | os.PathLike[str] | BinaryIO
    Rows = slice | NDArray[np.int64]  # which rows of the table

KEY_TILE = 128  # of the kernel: it lies within one page
DTYPES = ("float16", "bfloat16", "float32", "int8")
TAKES = {  # dtypes of the keys and values that a cache is given
    name: ("float16", "bfloat16", "float32") if name == "int8" else (name,) for name in DTYPES
}
ASKS = {  # dtypes of its queries
    name: names if "float32" in names else (*names, "float32") for name, names in TAKES.items()
}
POOL = ("key", "value", "key_scale", "value_scale")  # the arrays, in this order
STORED = ("dtype", "limit", "sequences", "next", "tables", "lengths", "begins")  # beside these
NONE = -1  # no page; in a file: no limit
LARGEST = 127  # int8 that a token's largest number becomes
SMALLEST_SCALE = np.finfo(np.float32).tiny  # below it, a quotient may exceed LARGEST


class _Stored:
    """How a cache becomes a file, a pickle or a copy: by arrays that hold what it keeps."""

    _kind: ClassVar[str]

    if TYPE_CHECKING:

        def _stored(self) -> dict[str, Any]: ...

        @classmethod
        def _restored(cls, arrays: Mapping[str, Any]) -> Self: ...

    def _save(self, file: File) -> None:
        """Write the arrays to a file."""
        arrays = self._stored()
        if isinstance(file, str | os.PathLike):
            with Path(file).open("wb") as opened:
                np.savez(opened, **arrays)
        else:
            np.savez(file, **arrays)

    @classmethod
    def _load(cls, file: File) -> Self:
        """Return the cache in a file."""
        with (
            _rule(f"file must hold a {cls._kind} that save wrote"),
            np.load(file, allow_pickle=False) as arrays,
        ):
            return cls._restored(arrays)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle keeps: the arrays, and what else the cache has got as attributes."""
        return self._stored() | {"others": self._others()}

    def __setstate__(self, state: Any) -> None:
        """Become the cache that pickle kept. Its arrays may lie in memory that others have too."""
        with _rule(f"state must be what pickle made of a {self._kind}"):
            if not isinstance(state, dict):
                raise TypeError(f"it is of type {type(state).__name__}")
            own = {k: x.copy() if isinstance(x, np.ndarray) else x for k, x in state.items()}
            others = dict(own.pop("others", {}))
            restored = self._restored(own)
        vars(self).update(others | vars(restored))

    def __copy__(self) -> Self:
        """Return a cache of its own memory."""
        other = self._restored(self._stored())
        vars(other).update(self._others())
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a cache of its own memory; what else it has got is copied in depth."""
        other = memo[id(self)] = self._restored(self._stored())
        vars(other).update(copy.deepcopy(self._others(), memo))
        return other

    def _others(self) -> dict[str, Any]:
        """Return attributes that are not the cache's own: those of a subclass, or given later."""
        return {name: x for name, x in vars(self).items() if name not in OWN[self._kind]}


class PagedKVCache(_Stored):
    """Keys and values of sequences that come and go, share beginnings, and grow token by token.

    They lie in a pool of pages of page_size tokens [1]_. Sequences share pages by reference; a
    shared page is copied when one of them appends to it.

    Parameters
    ----------
    kv_heads, head_dim : int
    pages : int, optional
        The pool has this many pages, allocated now. None: it doubles when it is full.
    page_size : int
        Tokens in a page, a multiple of 128.
    dtype : dtype
        What the cache holds: float32, float16, bfloat16 (of ml_dtypes) or int8. int8 keeps, for
        each token and head, ``round(x / scale)`` and ``scale = max|x| / 127``: a quarter of the
        memory of float32, for an error of at most half a scale. A channel far larger than the
        others makes the scale coarse for these.
    value_head_dim : int, optional
        head_dim unless given.

    Attributes
    ----------
    kv_heads, head_dim, value_head_dim, page_size : int
    dtype : dtype

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; the message says which argument, the rule, and what was given.
        So do all methods, which then have changed nothing.
    MemoryError
        There is no room for the pool.

    Notes
    -----
    Positions count from a sequence's first token, also after `evict`. Whether sequences share
    pages changes no bit of a result. A cache must not be changed by two threads at once.

    A copy (of `copy`, `pickle`, `torch.save`, or sent to another process) is a cache of its own: it
    shares no memory, not even that of `from_pages`, and gives the same bits. Its sequences share
    pages as before. A pickle holds the pages that are used, and is checked as a file is.

    References
    ----------
    .. [1] W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with
       PagedAttention", 2023, https://arxiv.org/abs/2309.06180

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> cache = fastattn.PagedKVCache(kv_heads=2, head_dim=4)
    >>> prompt = cache.add()
    >>> tokens = np.ones((1, 2, 200, 4), np.float32)
    >>> cache.append(tokens, tokens)
    >>> answers = [cache.add(prompt) for _ in range(3)]
    >>> cache.used_pages
    2
    >>> new = np.ones((3, 2, 1, 4), np.float32)
    >>> cache.append(new, new, sequences=answers)
    >>> cache.attend(np.ones((3, 6, 1, 4), np.float32), sequences=answers).shape
    (3, 6, 1, 4)
    """

    _kind = "PagedKVCache"

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        *,
        pages: int | None = None,
        page_size: int = KEY_TILE,
        dtype: DTypeLike = np.float32,
        value_head_dim: int | None = None,
    ) -> None:
        kv_heads = _at_least("kv_heads", kv_heads, 1)
        dims = [_at_least("head_dim", head_dim, 1)]
        slots = 0 if pages is None else _at_least("pages", pages, 1)
        page_size = _page_size(_at_least("page_size", page_size, 1))
        held = _dtype(dtype)
        dims.append(
            dims[0] if value_head_dim is None else _at_least("value_head_dim", value_head_dim, 1)
        )
        for name, dim in zip(("head_dim", "value_head_dim"), dims, strict=True):
            if dim >= MOST_DIM:
                raise ValueError(f"{name} must be below 2**31, got {name}={dim}")
        rows = max(slots, 1) * kv_heads * page_size
        if rows * max(dims) >= MOST_ELEMENTS:
            raise ValueError(
                "pages x kv_heads x page_size x head_dim must be below 2**60, got "
                f"{slots} x {kv_heads} x {page_size} x {max(dims)}"
            )
        shape = (slots, kv_heads, page_size)
        pool = [np.empty((*shape, dim), held) for dim in dims]
        if held == np.int8:
            pool += [np.empty(shape, np.float32) for _ in dims]
        self._start(pool, pages is not None)

    @classmethod
    def from_pages(
        cls,
        key: NDArray[Any],
        value: NDArray[Any],
        tables: ArrayLike,
        lengths: ArrayLike,
        *,
        key_scale: NDArray[Any] | None = None,
        value_scale: NDArray[Any] | None = None,
    ) -> Self:
        """Return a cache over pages that exist already, without a copy.

        Parameters
        ----------
        key : ndarray of shape (pages, kv_heads, page_size, head_dim)
        value : ndarray of shape (pages, kv_heads, page_size, value_head_dim)
            Writeable, of one of the dtypes of a cache, contiguous along the last axis. For pages of
            shape (pages, page_size, kv_heads, head_dim), pass ``key.swapaxes(1, 2)``.
        tables : array of int of shape (batch, columns)
            Position p of sequence b lies in page ``tables[b, p // page_size]``. Entries beyond its
            length may hold anything. Sequences may share pages.
        lengths : array of int of shape (batch,)
            Tokens of each sequence.
        key_scale, value_scale : ndarray of shape (pages, kv_heads, page_size), float32
            With int8, and only then: what the integers are multiplied by.

        Returns
        -------
        PagedKVCache
            Its sequences are 0..batch - 1. The pages that no table names are free: an append writes
            there. There will be no others.
        """
        pool = _pool_arrays(key, value, key_scale, value_scale)
        cache = cls.__new__(cls)
        cache._start(pool, fixed=True)
        cache._take_tables(tables, lengths, None)
        return cache

    def _start(self, pool: list[Array], fixed: bool) -> None:
        """Begin with no sequences."""
        key, value = pool[:2]
        slots, self.kv_heads, self.page_size, self.head_dim = key.shape
        self.value_head_dim: int = value.shape[3]
        self.dtype: np.dtype[Any] = key.dtype
        self._pool = pool  # key, value; for int8 also their scales
        self._fixed = fixed
        self._counts = np.zeros(slots, np.int64)  # sequences that read a page
        self._free = list(range(slots - 1, -1, -1))  # the next one last
        self._ids: list[int] = []  # of the table's rows
        self._row: dict[int, int] = {}
        self._next = 0
        self._table = np.full((1, 1), NONE, np.int64)
        self._lengths = np.zeros(1, np.int64)
        self._begins = np.zeros(1, np.int64)

    def _take_tables(self, tables: Any, lengths: Any, begins: Any) -> None:
        """Take over tables of sequences 0, 1, ...; begins None: 0."""
        slots, page_size = len(self._counts), self.page_size
        table = as_array("tables", tables, "integers")
        if table.dtype.kind not in "iu":
            raise TypeError(f"tables must be an array of integers, not {table.dtype.name}")
        if table.ndim != 2:
            raise ValueError(
                f"tables must have shape (batch, columns), got tables.shape={table.shape}"
            )
        n, columns = table.shape
        ends = _per_sequence(
            "lengths", lengths, n, 0, columns * page_size, "0..columns x page_size"
        )
        firsts = _per_sequence("begins", 0 if begins is None else begins, n, 0, ends, "0..lengths")
        used = self._used(firsts, ends, columns)
        wrong = table[used & ((table < 0) | (table >= slots))]
        if wrong.size:
            raise ValueError(f"tables must be within 0..pages - 1 = 0..{slots - 1}, got {wrong[0]}")
        self._counts = np.bincount(table[used].astype(np.int64), minlength=slots)
        self._free = np.flatnonzero(self._counts == 0)[::-1].tolist()
        self._table = np.full((max(n, 1), max(columns, 1)), NONE, np.int64)
        self._table[:n, :columns][used] = table[used]
        self._lengths, self._begins = (np.resize(x, max(n, 1)) for x in (ends, firsts))
        self._name(list(range(n)))
        self._next = n

    @property
    def sequences(self) -> list[int]:
        """The ids of the sequences, in the order they were added."""
        return self._ids.copy()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each of `sequences`, since its first, those that were evicted included."""
        return self._lengths[: len(self._ids)].copy()

    @property
    def begins(self) -> NDArray[np.int64]:
        """Position of the first token that each of `sequences` still has."""
        return self._begins[: len(self._ids)].copy()

    @property
    def used_pages(self) -> int:
        """Pages that a sequence reads."""
        return len(self._counts) - len(self._free)

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no sequence reads."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return sum(x.nbytes for x in self._pool)

    def add(self, prefix: int | None = None, length: int | None = None) -> int:
        """Add a sequence: an empty one, or one that begins as another does.

        Parameters
        ----------
        prefix : int, optional
            Sequence whose tokens it shares.
        length : int, optional
            How many of them; all unless given.

        Returns
        -------
        int
            Its id, which no other sequence of the cache has or had.
        """
        begin = end = 0
        pages: Array | None = None
        if prefix is not None:
            row = self._row_of("prefix", prefix)
            begin, end = int(self._begins[row]), int(self._lengths[row])
            if length is not None:
                most, end = end, whole_number("length", length)
                if not begin <= end <= most:
                    raise ValueError(
                        f"length must be within begins..lengths of prefix = {begin}..{most}, "
                        f"got length={length}"
                    )
            pages = self._table[row, begin // self.page_size : self._pages(end)]
        elif length is not None:
            raise ValueError(f"length must be given with prefix alone, got length={length}")
        n = len(self._ids)
        if n == len(self._table):
            self._resize_table(2 * n, self._table.shape[1])
        self._table[n] = NONE
        if pages is not None:
            self._table[n, begin // self.page_size : self._pages(end)] = pages
            np.add.at(self._counts, pages, 1)
        self._lengths[n], self._begins[n] = end, begin
        added = self._next
        self._next += 1
        self._row[added] = n
        self._ids.append(added)
        return added

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other reads are free.

        Parameters
        ----------
        sequence : int
            Its id.
        """
        row, n = self._row_of("sequence", sequence), len(self._ids)
        here = slice(row, row + 1)
        self._drop(here, self._begins[here] // self.page_size, self._pages(self._lengths[here]))
        for x in (self._table, self._lengths, self._begins):
            x[row : n - 1] = x[row + 1 : n]
        self._name(self._ids[:row] + self._ids[row + 1 :])

    def append(
        self,
        key: ArrayLike,
        value: ArrayLike,
        lengths: ArrayLike | None = None,
        *,
        sequences: Iterable[int] | None = None,
    ) -> None:
        """Append tokens to sequences. What they have already is neither read nor moved.

        Parameters
        ----------
        key : array of shape (batch, kv_heads, tokens, head_dim)
        value : array of shape (batch, kv_heads, tokens, value_head_dim)
            Of the cache's dtype; for int8, float32, float16 or bfloat16, and finite.
        lengths : int, or array of int broadcastable to (batch,), optional
            How many of the tokens are meant, from the first; all unless given. The others are not
            looked at.
        sequences : ids, optional
            One for each of the batch, distinct. None: all, in the order they were added.

        Raises
        ------
        TypeError, ValueError
            An argument breaks a rule.
        MemoryError
            The pool has no room, or there is none for it to grow.
        """
        self._append(key, value, lengths, sequences, None)

    def _append(
        self, key: Any, value: Any, lengths: Any, sequences: Any, capacity: int | None
    ) -> None:
        """Append; a sequence may then have at most `capacity` tokens that are not evicted."""
        rows, n = self._rows(sequences)
        key = self._tokens("key", key, n, self.head_dim)
        value = self._tokens("value", value, n, self.value_head_dim)
        tokens = key.shape[2]
        if value.shape[2] != tokens:
            raise ValueError(
                f"value has {value.shape[2]} tokens but key has {tokens} "
                f"(value.shape={value.shape}, key.shape={key.shape})"
            )
        if lengths is None:
            counts = np.full(n, tokens)
        else:
            counts = _per_sequence("lengths", lengths, n, 0, tokens, "0..tokens")
        sources = [key, value]
        if self.dtype == np.int8:
            scales = [_scales("key", key, counts), _scales("value", value, counts)]
            sources = [*map(_Quantised, sources, scales), *scales]
        if not counts.any():
            return
        starts = self._lengths[rows]
        ends = starts + counts
        if capacity is not None and (ends - self._begins[rows]).max() > capacity:
            raise MemoryError(
                "capacity must be >= the tokens kept and the new ones, "
                f"got capacity={capacity}, {starts - self._begins[rows]} + {counts} tokens"
            )

        held, wanted = self._pages(starts), self._pages(ends)
        new = int((wanted - held).sum())
        column, offset = np.divmod(starts, self.page_size)
        self._resize_table(len(self._table), int(wanted.max()))
        number = np.arange(n) if isinstance(rows, slice) else rows
        inside = np.flatnonzero((offset > 0) & (counts > 0))
        shared = inside[self._counts[self._table[number[inside], column[inside]]] > 1]
        self._reserve(new + self._copies(self._table[number[shared], column[shared]]))
        for i in shared:
            self._own(number[i], column[i], offset[i])
        taken = self._free[len(self._free) - new :][::-1]
        used = 0
        for i in np.flatnonzero(wanted > held) if new else ():
            self._table[number[i], held[i] : wanted[i]] = taken[used : used + wanted[i] - held[i]]
            used += wanted[i] - held[i]
        self._write(self._table[rows], starts, counts, sources)
        if new:
            self._counts[taken] = 1
            del self._free[-new:]
        self._lengths[rows] = ends

    def attend(
        self,
        query: ArrayLike,
        *,
        sequences: Iterable[int] | None = None,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        scale: float | None = None,
        is_causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        return_lse: bool = False,
        out: NDArray[Any] | None = None,
    ) -> Any:
        """Compute the attention of the last queries of sequences over all that these have.

        Parameters
        ----------
        query : array of shape (batch, q_heads, q_len, head_dim)
            Of the cache's dtype or float32; for int8 float32, float16 or bfloat16. q_heads is a
            multiple of kv_heads. Query i stands at position ``length - q_len + i`` of its sequence:
            append first, then attend.
        sequences : ids, optional
            One for each of the batch, distinct. None: all, in the order they were added.
        mask, bias : array, broadcastable to (batch, q_heads, q_len, kv_len), optional
            As for `attention`. kv_len is the largest of the lengths, and column j is position j,
            which may have been evicted.
        scale, is_causal, window, softcap, alibi_slopes, sinks, return_lse, out
            As for `attention`, but is_causal unless said otherwise.

        Returns
        -------
        out : ndarray of shape (batch, q_heads, q_len, value_head_dim)
            Of the query's dtype. A query that sees no key gives 0.
        lse : ndarray of shape (batch, q_heads, q_len), float32, only if return_lse

        Raises
        ------
        TypeError, ValueError
            An argument breaks a rule.
        MemoryError, KeyboardInterrupt
            As for `attention`.
        """
        rows, n = self._rows(sequences)
        given, given_out = query, out
        query = floats("query", of_dtypes("query", query, ASKS[self.dtype.name]))
        if query.ndim != 4 or query.shape[0] != n:
            raise ValueError(
                f"query must have shape (batch, q_heads, q_len, head_dim) with batch={n}, "
                f"got query.shape={query.shape}"
            )
        lengths, begins = self._lengths[rows], self._begins[rows]
        kv_len = int(lengths.max(initial=0))
        kept = (n, self.kv_heads, kv_len)
        known = sizes(query.shape, (*kept, self.head_dim), (*kept, self.value_head_dim))
        checked = [
            *options(
                known,
                query.dtype,
                mask,
                bias,
                scale,
                is_causal,
                lengths - known.q_len,
                window,
                softcap,
                alibi_slopes,
                sinks,
                None,
                0.0,
                None,
            )
        ]
        checked[5] = lengths  # each of them, where options says None for kv_len
        if return_lse is not False:
            return_lse = boolean("return_lse", return_lse)
        if out is None:
            out = room(given, known.out_shape, query.dtype)
        else:
            out = destination(given, out)
            inputs = (query, *self._pool, *checked[:2])
            out = result_array(out, known.out_shape, query.dtype, inputs)
        lse = np.empty(known.lse_shape, np.float32) if return_lse else None
        if kv_len == 0:  # then there may be no pool yet
            out[...] = 0
            if lse is not None:
                lse[...] = -np.inf
        elif out.size:
            key, value, *scales = self._pool
            checked += [kv_len, begins if begins.any() else None, self._table[rows]]
            checked += scales or (None, None)
            _core.cache_attention(query, key, value, out, lse, known.batch_shape, *checked)
        if query is not given:
            out, lse = answer(given, given_out, out, lse)
        return out if lse is None else (out, lse)

    def truncate(self, lengths: ArrayLike, *, sequences: Iterable[int] | None = None) -> None:
        """Forget the last tokens of sequences, as if they had never been appended.

        Parameters
        ----------
        lengths : int, or array of int broadcastable to (batch,)
            How long each is then; not shorter than what was evicted.
        sequences : ids, optional
            None: all, in the order they were added.
        """
        rows, n = self._rows(sequences)
        before = self._lengths[rows]
        ends = _per_sequence(
            "lengths", lengths, n, self._begins[rows], before, "begins..lengths of the sequences"
        )
        self._drop(rows, self._pages(ends), self._pages(before))
        self._lengths[rows] = ends

    def evict(self, keep: ArrayLike, *, sequences: Iterable[int] | None = None) -> None:
        """Forget all but the last tokens of sequences. Positions and lengths stay as they are.

        Parameters
        ----------
        keep : int, or array of int broadcastable to (batch,)
            How many tokens each keeps, if it has so many.
        sequences : ids, optional
            None: all, in the order they were added.
        """
        rows, n = self._rows(sequences)
        kept = _per_sequence("keep", keep, n, 0, FARTHEST, "0..2**61")
        before = self._begins[rows]
        begins = np.maximum(before, self._lengths[rows] - kept)
        self._drop(rows, before // self.page_size, begins // self.page_size)
        self._begins[rows] = begins

    def save(self, file: File) -> None:
        """Write the cache to a file, the pages that are used and what they say.

        Parameters
        ----------
        file : path, or file open for writing in binary
            Becomes an .npz file, without pickled objects.
        """
        self._save(file)

    @classmethod
    def load(cls, file: File) -> Self:
        """Return the cache that a file holds, as it was saved.

        Parameters
        ----------
        file : path, or file open for reading in binary

        Raises
        ------
        ValueError
            The file is damaged, or is none that `save` wrote.
        ImportError
            The cache holds bfloat16, and ml_dtypes is not installed.
        """
        return cls._load(file)

    # Rows of the table, and what is asked of them.

    def _name(self, ids: list[int]) -> None:
        """Let the rows of the table be those sequences."""
        self._ids = ids
        self._row = {sequence: row for row, sequence in enumerate(ids)}

    def _row_of(self, name: str, sequence: Any) -> int:
        """Return the row of a sequence."""
        row = self._row.get(whole_number(name, sequence))
        if row is None:
            raise ValueError(f"{name} must be one of the cache's sequences, got {name}={sequence}")
        return row

    def _rows(self, sequences: Any) -> tuple[Rows, int]:
        """Return the rows of sequences, and how many they are."""
        if sequences is None:
            return slice(len(self._ids)), len(self._ids)
        try:
            ids = list(sequences)
        except TypeError:
            raise TypeError(f"sequences must be ids, not {type(sequences).__name__}") from None
        rows = [self._row.get(sequence) if type(sequence) is int else None for sequence in ids]
        if None in rows:
            rows = [self._row_of(f"sequences[{i}]", sequence) for i, sequence in enumerate(ids)]
        if len(set(rows)) != len(rows):
            raise ValueError(f"sequences must be distinct, got sequences={ids}")
        return np.array(rows, np.int64), len(rows)

    def _tokens(self, name: str, x: Any, n: int, dim: int) -> Array:
        """Return keys or values to append."""
        array = of_dtypes(name, x, TAKES[self.dtype.name])
        shape = array.shape
        if array.ndim != 4 or shape[:2] != (n, self.kv_heads) or shape[3] != dim:
            raise ValueError(
                f"{name} must have shape (batch, kv_heads, tokens, head_dim) = "
                f"({n}, {self.kv_heads}, any, {dim}), got {name}.shape={shape}"
            )
        return array

    # Pages.

    def _pages(self, lengths: Any) -> Any:
        """Return how many pages so many tokens fill, the last one perhaps in part."""
        return -(-lengths // self.page_size)

    def _used(self, begins: Array, lengths: Array, columns: int) -> NDArray[np.bool_]:
        """Return which entries of the table name a page."""
        column = np.arange(columns)
        first, last = begins // self.page_size, self._pages(lengths)
        used: NDArray[np.bool_] = (column >= first[:, None]) & (column < last[:, None])
        return used

    def _resize_table(self, rows: int, columns: int) -> None:
        """Let the table have so many rows and columns, or more of these."""
        before = self._table.shape
        if columns > before[1]:
            columns = max(columns, 2 * before[1])
        elif rows == before[0]:
            return
        table = np.full((rows, max(columns, before[1])), NONE, np.int64)
        table[: before[0], : before[1]] = self._table
        lengths, begins = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        lengths[: before[0]], begins[: before[0]] = self._lengths, self._begins
        self._table, self._lengths, self._begins = table, lengths, begins

    def _reserve(self, pages: int) -> None:
        """Let there be so many free pages."""
        missing = pages - len(self._free)
        if missing <= 0:
            return
        slots = len(self._counts)
        if self._fixed:
            raise MemoryError(
                f"pages must be enough for what is appended, which needs {pages} more, "
                f"got pages={slots}, {len(self._free)} of them free"
            )
        self._grow(max(2 * slots, slots + missing))

    def _grow(self, wanted: int) -> None:
        """Let the pool have so many pages."""
        slots = len(self._counts)
        if wanted * max(math.prod(x.shape[1:]) for x in self._pool) >= MOST_ELEMENTS:
            raise MemoryError(f"no room for a pool of {wanted} pages")
        pool = [np.empty((wanted, *x.shape[1:]), x.dtype) for x in self._pool]
        counts = np.zeros(wanted, np.int64)
        free = [*range(wanted - 1, slots - 1, -1), *self._free]
        for new, old in zip([*pool, counts], [*self._pool, self._counts], strict=True):
            new[:slots] = old
        self._pool, self._counts, self._free = pool, counts, free

    def _copies(self, slots: Array) -> int:
        """Return how many copies writing to shared pages, once for each of slots, takes."""
        if not slots.size:
            return 0
        pages, writers = np.unique(slots, return_counts=True)
        return int(np.minimum(writers, self._counts[pages] - 1).sum())

    def _own(self, row: int, column: int, offset: int) -> None:
        """Copy a page that others read too; of its rows, those before offset."""
        slot = self._table[row, column]
        if self._counts[slot] == 1:  # the others, of the same append, have their copies
            return
        new = self._free[-1]
        for x in self._pool:
            x[new, :, :offset] = x[slot, :, :offset]
        self._free.pop()
        self._counts[slot] -= 1
        self._counts[new] = 1
        self._table[row, column] = new

    def _write(
        self, pages: Array, starts: Array, counts: Array, sources: list[Array | _Quantised]
    ) -> None:
        """Write the first counts[b] tokens of b, in the fewest steps: by tokens or by pages."""
        most = int(counts.max())
        if most < len(counts):
            for token in range(most):
                batch = np.flatnonzero(counts > token)
                column, offset = np.divmod(starts[batch] + token, self.page_size)
                slots = pages[batch, column]
                for x, source in zip(self._pool, sources, strict=True):
                    x[slots, :, offset] = source[batch, :, token]
            return
        for b, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            token = 0
            while token < count:
                column, offset = divmod(start + token, self.page_size)
                stop = min(token + self.page_size - offset, count)
                slot, rows = pages[b, column], slice(offset, offset + stop - token)
                for x, source in zip(self._pool, sources, strict=True):
                    x[slot, :, rows] = source[b, :, token:stop]
                token = stop

    def _drop(self, rows: Rows, first: Array, last: Array) -> None:
        """Let rows no longer read their pages of columns first..last - 1."""
        number = np.arange(len(self._table))[rows]
        for i in np.flatnonzero(first < last):
            entries = self._table[number[i], first[i] : last[i]]
            self._release(entries)
            entries[:] = NONE

    def _release(self, slots: Array) -> None:
        """Let pages be read once less, each as often as it is named."""
        np.subtract.at(self._counts, slots, 1)
        pages = np.unique(slots)
        self._free.extend(pages[self._counts[pages] == 0][::-1].tolist())

    def _reorder(self, indices: Array) -> None:
        """Let each row become a copy of row indices[row]."""
        n, columns = len(self._ids), self._table.shape[1]
        used = self._used(self._begins[:n], self._lengths[:n], columns)
        before = self._table[:n][used]
        table = self._table[indices]
        np.add.at(self._counts, table[used[indices]], 1)
        self._table[:n] = table
        self._lengths[:n], self._begins[:n] = self._lengths[indices], self._begins[indices]
        self._release(before)

    # Files, pickles and copies.

    def _stored(self) -> dict[str, Any]:
        """Return what the cache is, in new arrays."""
        return self._arrays(self._kind, len(self._counts) if self._fixed else NONE)

    @classmethod
    def _restored(cls, arrays: Mapping[str, Any]) -> Self:
        """Return the cache that such arrays are, which it takes over."""
        cache, limit = cls._of_arrays(arrays, cls._kind)
        if limit != NONE:
            cache._fix(limit)
        return cache

    def _arrays(self, kind: str, limit: int) -> dict[str, Any]:
        """Return what a kind of cache is; its limit is of pages, or what the kind limits."""
        n, page_size = len(self._ids), self.page_size
        begins, lengths = self._begins[:n].copy(), self._lengths[:n].copy()
        columns = int(self._pages(lengths).max(initial=0))
        used = self._used(begins, lengths, columns)
        slots, at, table = np.unique(
            self._table[:n, :columns][used], return_index=True, return_inverse=True
        )
        # In the order in which sequences read them: equal caches are equal files and pickles.
        order = np.argsort(at)
        slots, table = slots[order], np.argsort(order)[table]
        tables = np.full((n, columns), NONE, np.int64)
        tables[used] = table
        # What lies in the other rows of a page is nobody's business: zeros.
        start = np.arange(columns) * page_size
        first, last = np.full(len(slots), page_size), np.zeros(len(slots), np.int64)
        np.minimum.at(first, table, np.maximum(begins[:, None] - start, 0)[used])
        np.maximum.at(last, table, np.minimum(lengths[:, None] - start, page_size)[used])
        row = np.arange(page_size)
        empty = (row < first[:, None]) | (row >= last[:, None])
        arrays: dict[str, Any] = {
            "format": np.array(_format(kind)),
            "dtype": np.array(self.dtype.name),
            "limit": np.array(limit),
            "sequences": np.array(self._ids, np.int64),
            "next": np.array(self._next),
            "tables": tables,
            "lengths": lengths,
            "begins": begins,
        }
        for name, x in zip(POOL, self._pool, strict=False):
            pages = np.ascontiguousarray(x[slots])
            pages.swapaxes(1, 2)[empty] = 0
            arrays[name] = pages.view(np.uint16) if x.dtype.name == "bfloat16" else pages
        return arrays

    @classmethod
    def _of_arrays(cls, arrays: Mapping[str, Any], kind: str) -> tuple[Self, int]:
        """Return the cache that such arrays are, of no more pages than it uses, and the limit."""
        form = str(arrays["format"])[:99] if "format" in arrays else ""
        if form != _format(kind):
            raise ValueError(f"its format is {form!r}, and this version reads {_format(kind)!r}")
        name = str(arrays["dtype"])[:99] if "dtype" in arrays else ""
        names = POOL if name == "int8" else POOL[:2]
        for missing in (x for x in (*STORED, *names) if x not in arrays):
            raise ValueError(f"it lacks {missing}")
        pool = [arrays[x] for x in names]
        if name == "bfloat16":
            if any(x.dtype != np.uint16 for x in pool):
                raise ValueError("bfloat16 must be stored as uint16")
            pool = [x.view(_bfloat16()) for x in pool]
        if pool[0].dtype.name != name:
            raise ValueError(f"it has {pool[0].dtype.name} for {name}")
        for x in pool[2:]:
            if not (np.isfinite(x) & (x >= 0)).all():
                raise ValueError("scales must be finite and >= 0")
        cache = cls.__new__(cls)
        cache._start(_pool_arrays(*pool), fixed=False)
        cache._take_tables(arrays["tables"], arrays["lengths"], arrays["begins"])
        ids, n = arrays["sequences"].tolist(), len(cache._ids)
        cache._next, limit = (whole_number(x, arrays[x].item()) for x in ("next", "limit"))
        for i, sequence in enumerate(ids):
            if not 0 <= whole_number(f"sequences[{i}]", sequence) < cache._next:
                raise ValueError(f"sequences must be within 0..next - 1, got {sequence}")
        if len(ids) != n or len(set(ids)) != n:
            raise ValueError(f"sequences must be {n} distinct integers")
        cache._name(ids)
        return cache, limit

    def _fix(self, pages: int) -> None:
        """Let the pool have so many pages and never others."""
        if pages < len(self._counts):
            raise ValueError(
                f"it must have no more pages than its limit allows, got {len(self._counts)} "
                f"where it allows {pages}"
            )
        self._grow(pages)
        self._fixed = True


class KVCache(_Stored):
    """Keys and values of a batch of sequences that grow together, token by token.

    For a model that writes: each layer appends the keys and values of the new tokens, then attends
    to all there are. A batch of `PagedKVCache` sequences; see there for sequences that come and go.

    Parameters
    ----------
    batch, kv_heads, head_dim : int
    capacity : int, optional
        How many tokens of each batch element are kept at most; the memory is allocated now.
        Evicted ones do not count. None: the cache doubles when it is full.
    dtype : dtype
        What the cache holds: float32, float16, bfloat16 (of ml_dtypes) or int8, as in
        `PagedKVCache`.
    value_head_dim : int, optional
        head_dim unless given.

    Attributes
    ----------
    batch, kv_heads, head_dim, value_head_dim : int
    capacity : int or None
    dtype : dtype

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; the message says which argument, the rule, and what was given.
        So do all methods, which then have changed nothing.
    MemoryError
        There is no room for the cache.

    Notes
    -----
    A copy, a pickle, and what is sent to another process are caches of their own, as those of
    `PagedKVCache`.

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> cache = fastattn.KVCache(batch=1, kv_heads=2, head_dim=4)
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.normal(size=(3, 1, 2, 5, 4)).astype(np.float32)
    >>> cache.append(key[:, :, :4], value[:, :, :4])  # the prompt
    >>> prompt = cache.attend(query[:, :, :4])
    >>> cache.append(key[:, :, 4:], value[:, :, 4:])  # the next token
    >>> token = cache.attend(query[:, :, 4:])
    >>> whole = fastattn.attention(query, key, value, is_causal=True)
    >>> np.allclose(np.concatenate([prompt, token], axis=2), whole, atol=1e-6)
    True
    """

    _kind = "KVCache"

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        capacity: int | None = None,
        dtype: DTypeLike = np.float32,
        value_head_dim: int | None = None,
    ) -> None:
        batch = _at_least("batch", batch, 1)
        if capacity is not None:
            capacity = _at_least("capacity", capacity, 1)
        cache = PagedKVCache(
            kv_heads,
            head_dim,
            pages=None if capacity is None else _pages_for(batch, capacity, KEY_TILE),
            dtype=dtype,
            value_head_dim=value_head_dim,
        )
        for _ in range(batch):
            cache.add()
        self._start(cache, capacity)

    def _start(self, cache: PagedKVCache, capacity: int | None) -> None:
        """Begin with a cache whose sequences are the batch."""
        self._cache = cache
        self.batch = len(cache.sequences)
        self.capacity = capacity
        self.kv_heads, self.head_dim = cache.kv_heads, cache.head_dim
        self.value_head_dim, self.dtype = cache.value_head_dim, cache.dtype

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each batch element since its first, those that were evicted included."""
        return self._cache.lengths

    @property
    def begins(self) -> NDArray[np.int64]:
        """Position of the first token that each batch element still has."""
        return self._cache.begins

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, free room included."""
        return self._cache.nbytes

    def append(self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """Append tokens. What there is already is neither read nor moved.

        Parameters
        ----------
        key : array of shape (batch, kv_heads, tokens, head_dim)
        value : array of shape (batch, kv_heads, tokens, value_head_dim)
            Of the cache's dtype; for int8, float32, float16 or bfloat16, and finite.
        lengths : int, or array of int broadcastable to (batch,), optional
            How many of the tokens are meant, from the first; all unless given. The others are not
            looked at.

        Raises
        ------
        TypeError, ValueError
            An argument breaks a rule.
        MemoryError
            A batch element would keep more than `capacity` tokens, or there is no room to grow.
        """
        self._cache._append(key, value, lengths, None, self.capacity)

    def attend(
        self,
        query: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        scale: float | None = None,
        is_causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        return_lse: bool = False,
        out: NDArray[Any] | None = None,
    ) -> Any:
        """Compute the attention of the last queries over all that the cache has.

        Parameters
        ----------
        query : array of shape (batch, q_heads, q_len, head_dim)
            Query i stands at position ``length - q_len + i``: append first, then attend.
        mask, ..., out
            As for `PagedKVCache.attend`.

        Returns
        -------
        out : ndarray of shape (batch, q_heads, q_len, value_head_dim)
        lse : ndarray of shape (batch, q_heads, q_len), float32, only if return_lse
        """
        return self._cache.attend(
            query,
            mask=mask,
            bias=bias,
            scale=scale,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
            out=out,
        )

    def truncate(self, lengths: ArrayLike) -> None:
        """Forget the last tokens, as if they had never been appended.

        Parameters
        ----------
        lengths : int, or array of int broadcastable to (batch,)
            How long each batch element is then; not shorter than what was evicted.
        """
        self._cache.truncate(lengths)

    def evict(self, keep: ArrayLike) -> None:
        """Forget all but the last tokens. Positions and lengths stay as they are.

        Parameters
        ----------
        keep : int, or array of int broadcastable to (batch,)
            How many tokens each batch element keeps, if it has so many.
        """
        self._cache.evict(keep)

    def reorder(self, indices: ArrayLike) -> None:
        """Let each batch element b go on from what indices[b] has: a step of beam search.

        Nothing is copied now: elements share what they have in common until one appends to it.

        Parameters
        ----------
        indices : array of int broadcastable to (batch,)
            Within 0..batch - 1.
        """
        self._cache._reorder(
            _per_sequence("indices", indices, self.batch, 0, self.batch - 1, "0..batch - 1")
        )

    def save(self, file: File) -> None:
        """Write the cache to a file, the tokens that it keeps.

        Parameters
        ----------
        file : path, or file open for writing in binary
            Becomes an .npz file, without pickled objects.
        """
        self._save(file)

    @classmethod
    def load(cls, file: File) -> Self:
        """Return the cache that a file holds, as it was saved.

        Parameters
        ----------
        file : path, or file open for reading in binary

        Raises
        ------
        ValueError
            The file is damaged, or is none that `save` wrote.
        ImportError
            The cache holds bfloat16, and ml_dtypes is not installed.
        """
        return cls._load(file)

    def _stored(self) -> dict[str, Any]:
        """Return what the cache is, in new arrays."""
        return self._cache._arrays(self._kind, NONE if self.capacity is None else self.capacity)

    @classmethod
    def _restored(cls, arrays: Mapping[str, Any]) -> Self:
        """Return the cache that such arrays are, which it takes over."""
        pool, limit = PagedKVCache._of_arrays(arrays, cls._kind)
        batch, kept = len(pool.sequences), (pool.lengths - pool.begins).max(initial=0)
        if batch < 1 or (limit != NONE and limit < max(kept, 1)):
            raise ValueError(
                "it must be of a batch >= 1, and no more tokens than capacity, "
                f"got batch={batch}, {kept} tokens, capacity={limit}"
            )
        if limit != NONE:
            pool._fix(_pages_for(batch, limit, pool.page_size))
        cache = cls.__new__(cls)
        cache._start(pool, None if limit == NONE else limit)
        return cache


def _pages_for(batch: int, capacity: int, page_size: int) -> int:
    """Return how many pages hold so many tokens of each, wherever the first lies in its page."""
    return int(batch * (1 + -(-(capacity - 1) // page_size)))


def _at_least(name: str, x: Any, least: int) -> int:
    """Return x as an int."""
    number = whole_number(name, x)
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {name}={x}")
    return number


def _page_size(page_size: int) -> int:
    """Return the page size, if key tiles do not cross pages."""
    if page_size % KEY_TILE:
        raise ValueError(f"page_size must be a multiple of {KEY_TILE}, got page_size={page_size}")
    return page_size


def _dtype(dtype: Any) -> np.dtype[Any]:
    """Return what a cache can hold."""
    held: np.dtype[Any] = np.dtype(dtype)
    if held.name not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or int8, not {held.name}")
    return held.newbyteorder("=")


def _per_sequence(name: str, x: Any, n: int, low: Any, high: Any, rule: str) -> NDArray[np.int64]:
    """Return n integers within low..high, numbers or n of them."""
    array, least, most = integers(name, x, (n,), 0)
    if least >= 0 and most <= FARTHEST:
        values = np.array(np.broadcast_to(array, (n,)), dtype=np.int64)
        if ((values >= low) & (values <= high)).all():
            return values
    raise ValueError(f"{name} must be within {rule} = {low}..{high}, got {x}")


def _pool_arrays(
    key: Any, value: Any, key_scale: Any = None, value_scale: Any = None
) -> list[Array]:
    """Return the arrays of a pool of pages, if they can be one as they are."""
    key, value = _page_array("key", key, DTYPES, 4), _page_array("value", value, DTYPES, 4)
    if value.dtype != key.dtype:
        raise TypeError(f"value must have the dtype of key, {key.dtype}, not {value.dtype}")
    shape = key.shape[:3]
    scales = []
    for name, x in (("key_scale", key_scale), ("value_scale", value_scale)):
        if (x is None) == (key.dtype == np.int8):
            raise TypeError(f"{name} must be given with int8 and only then, got {key.dtype} pages")
        if x is not None:
            scales.append(_page_array(name, x, ("float32",), 3))
    for name, x in zip(POOL[1:], (value, *scales), strict=False):
        if x.shape[:3] != shape:
            raise ValueError(
                f"{name} must have the pages, kv_heads and page_size of key, {shape}, "
                f"got {name}.shape={x.shape}"
            )
    for name, x in (("key", key), ("value", value)):
        if 0 in x.shape[1:] or x.shape[3] >= MOST_DIM:
            raise ValueError(
                f"{name} must have kv_heads, a page_size and a head_dim from 1 to below 2**31, "
                f"got {name}.shape={x.shape}"
            )
    _page_size(shape[2])
    arrays = dict(zip(POOL, (key, value, *scales), strict=False))
    for (name, x), (other, y) in itertools.combinations(arrays.items(), 2):
        if may_share_memory(x, y):
            raise ValueError(f"{other} must not overlap {name}, got arrays that share memory")
    return [key, value, *scales]


def _page_array(name: str, x: Any, dtypes: tuple[str, ...], ndim: int) -> Array:
    """Return an array that can be read and written in place."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, not {type(x).__name__}")
    array = of_dtypes(name, x, dtypes)
    if array.ndim != ndim:
        axes = (
            "(pages, kv_heads, page_size, head_dim)"
            if ndim == 4
            else "that of key without head_dim"
        )
        raise ValueError(f"{name} must have shape {axes}, got {name}.shape={array.shape}")
    if not array.flags.writeable or not array.flags.aligned or not array.dtype.isnative:
        raise ValueError(
            f"{name} must be writeable, aligned and in native byte order, got an array that is not"
        )
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise ValueError(
            f"{name} must be contiguous along its last axis, got {name}.strides={array.strides}"
        )
    if array.size and overlaps_itself(array):
        raise ValueError(f"{name} must not overlap itself, got {name}.strides={array.strides}")
    return array


class _Quantised:
    """Keys or values as int8 would hold them, computed piece by piece."""

    def __init__(self, x: Array, scales: Array) -> None:
        self.x, self.scales = x, scales

    def __getitem__(self, piece: Any) -> Array:
        """Return a piece, still as float32."""
        divisor = np.maximum(self.scales[piece], SMALLEST_SCALE)  # all zeros: 0 / it
        quotients: Array = self.x[piece].astype(np.float32) / divisor[..., None]
        return np.rint(quotients)


def _scales(name: str, x: Array, counts: Array) -> Array:
    """Return what int8 of each token and head is multiplied by; 0 where all is 0."""
    with np.errstate(all="ignore"):
        largest = np.maximum(x.max(axis=-1), -x.min(axis=-1)).astype(np.float32)
    meant = np.arange(x.shape[2]) < counts[:, None]
    if not (np.isfinite(largest) | ~meant[:, None]).all():
        raise ValueError(f"{name} must be finite in an int8 cache, got NaN or Inf")
    with np.errstate(all="ignore"):
        return np.where(largest > 0, np.maximum(largest / LARGEST, SMALLEST_SCALE), 0)


def _format(kind: str) -> str:
    """Return what a file says that it is."""
    return f"fastattn.{kind} 1"


@contextlib.contextmanager
def _rule(rule: str) -> Iterator[None]:
    """Say of what goes wrong which rule it breaks."""
    try:
        yield
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{rule}: {error}") from error


def _bfloat16() -> np.dtype[Any]:
    """Return the dtype, which NumPy has not got itself."""
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("the cache holds bfloat16, which needs ml_dtypes") from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


# Which attributes a cache has by itself.
OWN = {x._kind: frozenset(vars(x)) for x in (PagedKVCache(1, 1), KVCache(1, 1, 1))}
