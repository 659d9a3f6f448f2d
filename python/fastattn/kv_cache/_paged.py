# SPDX-License-Identifier: Apache-2.0
"""Which sequences are meant, and what do they attend to? `PagedKVCache` knows them by ids.

Each has a row in the table of `_pool.py`, in the order in which they were added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import numpy as np

from fastattn import _core
from fastattn._arguments import (
    FARTHEST,
    boolean,
    check_options,
    floats,
    of_dtypes,
    result_array,
    sizes,
    whole_number,
)
from fastattn._arrays import library_of
from fastattn._options import ScoreOptions, options_of, takes
from fastattn.kv_cache._arguments import (
    PAGE_TOKENS,
    QUERY_DTYPES,
    TOKEN_DTYPES,
    given_arrays,
    new_arrays,
    per_sequence,
    positions_of,
    rows_of_tables,
)
from fastattn.kv_cache._evict import Left, evicted
from fastattn.kv_cache._files import Contents, StoredCache
from fastattn.kv_cache._int8 import Quantised, scales_of
from fastattn.kv_cache._pool import NONE, PagePool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from fastattn._options import Options
    from fastattn.kv_cache._pool import Array, Rows


class PagedKVCache(StoredCache):
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
    Positions count from a sequence's first token, also after `evict` unless it renumbers. Whether
    sequences share pages changes no bit of a result. A cache must not be changed by two threads at
    once.

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

    __module__ = "fastattn"  # a pickle names the class as users do
    _kind = "PagedKVCache"

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        *,
        pages: int | None = None,
        page_size: int = PAGE_TOKENS,
        dtype: DTypeLike = np.float32,
        value_head_dim: int | None = None,
    ) -> None:
        arrays = new_arrays(kv_heads, head_dim, pages, page_size, dtype, value_head_dim)
        self._start(PagePool(arrays, fixed=pages is not None), [], 0)

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
        pool = PagePool(given_arrays(key, value, key_scale, value_scale), fixed=True)
        pool.take_rows(*rows_of_tables(pool, tables, lengths))
        cache = cls.__new__(cls)
        cache._start(pool, list(range(pool.rows)), pool.rows)
        return cache

    def _start(self, pool: PagePool, ids: list[int], next_id: int) -> None:
        """Become the cache whose sequences are the pool's rows."""
        key, value = pool.arrays[:2]
        _, self.kv_heads, self.page_size, self.head_dim = key.shape
        self.value_head_dim: int = value.shape[3]
        self.dtype: np.dtype[Any] = key.dtype
        self._pool = pool
        self._next = next_id
        # Of the last call, whose next one differs in kv_len alone: only mask and bias ask for that.
        self._query_shape: tuple[int, ...] = ()
        self._shapes: Any = None
        self._name_rows(ids)

    @property
    def sequences(self) -> list[int]:
        """The ids of the sequences, in the order they were added."""
        return self._ids.copy()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Position of the next token of each of `sequences`.

        How many tokens it got, unless `evict` closed positions up or `truncate` took some back.
        """
        return self._pool.lengths[: self._pool.rows].copy()

    @property
    def begins(self) -> NDArray[np.int64]:
        """Position of the first token that each of `sequences` still has, but for `kept_first`."""
        return self._pool.begins[: self._pool.rows].copy()

    @property
    def kept_first(self) -> NDArray[np.int64]:
        """Tokens at the start that each of `sequences` kept when `evict` took those behind.

        0 where all that is left lies in one piece.
        """
        parts = self._pool.parts[: self._pool.rows]
        kept: NDArray[np.int64] = parts[:, 2] - parts[:, 1]
        return kept

    @property
    def used_pages(self) -> int:
        """Pages that a sequence reads."""
        return len(self._pool.counts) - len(self._pool.free)

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no sequence reads."""
        return len(self._pool.free)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return sum(x.nbytes for x in self._pool.arrays)

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
        if prefix is not None:
            row = self._row_of("prefix", prefix)
            begin, end = int(self._pool.begins[row]), int(self._pool.lengths[row])
            if length is not None:
                most, end = end, whole_number("length", length)
                if not begin <= end <= most:
                    raise ValueError(
                        f"length must be within begins..lengths of prefix = {begin}..{most}, "
                        f"got length={length}"
                    )
            self._pool.add_row(row, end)
        elif length is not None:
            raise ValueError(f"length must be given with prefix alone, got length={length}")
        else:
            self._pool.add_row()
        added = self._next
        self._next += 1
        self._row[added] = len(self._ids)
        self._ids.append(added)
        return added

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other reads are free.

        Parameters
        ----------
        sequence : int
            Its id.
        """
        row = self._row_of("sequence", sequence)
        self._pool.remove_row(row)
        self._name_rows(self._ids[:row] + self._ids[row + 1 :])

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
        pool = self._pool
        if lengths is None:
            every = sequences is None and tokens > 0 and self.dtype != np.int8
            if every and pool.append_ahead(tokens, (key, value), capacity):
                return
            counts = np.full(n, tokens)
        else:
            counts = per_sequence("lengths", lengths, n, 0, tokens, "0..tokens")
        sources = [key, value]
        if self.dtype == np.int8:
            scales = [scales_of("key", key, counts), scales_of("value", value, counts)]
            sources = [*map(Quantised, sources, scales), *scales]
        if not counts.any():
            return
        if capacity is not None:
            kept = pool.kept(rows)
            if (kept + counts).max() > capacity:
                raise MemoryError(
                    "capacity must be >= the tokens kept and the new ones, "
                    f"got capacity={capacity}, {kept} + {counts} tokens"
                )
        pool.append(rows, counts, sources)

    @overload
    def attend(
        self,
        query: ArrayLike,
        *,
        sequences: Iterable[int] | None = None,
        query_offset: ArrayLike | None = None,
        return_lse: Literal[False] = False,
        return_column_sums: Literal[False] = False,
        out: ArrayLike | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Array: ...
    @overload
    def attend(
        self,
        query: ArrayLike,
        *,
        sequences: Iterable[int] | None = None,
        query_offset: ArrayLike | None = None,
        return_lse: Literal[True],
        return_column_sums: Literal[False] = False,
        out: ArrayLike | None = None,
        **options: Unpack[ScoreOptions],
    ) -> tuple[Array, Array]: ...
    @overload
    def attend(
        self,
        query: ArrayLike,
        *,
        sequences: Iterable[int] | None = None,
        query_offset: ArrayLike | None = None,
        return_lse: Literal[False] = False,
        return_column_sums: Literal[True],
        out: ArrayLike | None = None,
        **options: Unpack[ScoreOptions],
    ) -> tuple[Array, Array]: ...
    @overload
    def attend(
        self,
        query: ArrayLike,
        *,
        sequences: Iterable[int] | None = None,
        query_offset: ArrayLike | None = None,
        return_lse: Literal[True],
        return_column_sums: Literal[True],
        out: ArrayLike | None = None,
        **options: Unpack[ScoreOptions],
    ) -> tuple[Array, Array, Array]: ...
    @overload
    def attend(
        self,
        query: ArrayLike,
        *,
        sequences: Iterable[int] | None = None,
        query_offset: ArrayLike | None = None,
        return_lse: bool = False,
        return_column_sums: bool = False,
        out: ArrayLike | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Array | tuple[Array, ...]: ...
    @takes(ScoreOptions, is_causal=True)
    def attend(
        self,
        query: ArrayLike,
        *,
        sequences: Iterable[int] | None = None,
        query_offset: ArrayLike | None = None,
        return_lse: bool = False,
        return_column_sums: bool = False,
        out: ArrayLike | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Array | tuple[Array, ...]:
        """Compute the attention of the last queries of sequences over all that these have.

        Parameters
        ----------
        query : array of shape (batch, q_heads, q_len, head_dim)
            Of the cache's dtype or float32; for int8 float32, float16 or bfloat16. q_heads is a
            multiple of kv_heads. Query i stands at position ``length - q_len + i`` of its sequence
            unless query_offset is given: append first, then attend.
        sequences : ids, optional
            One for each of the batch, distinct. None: all, in the order they were added.
        query_offset : int, or array of int broadcastable to (batch,), optional
            Position of the first query in its sequence, ``length - q_len`` unless given; negative,
            or beyond the length, where other caches have what the query also sees.
        mask, bias : array, broadcastable to (batch, q_heads, q_len, kv_len), optional
            As for `attention`. kv_len is the largest of the lengths, and column j is position j,
            which may have been evicted.
        scale, is_causal, window, softcap, alibi_slopes, sinks, return_lse, out
            As for `attention`, but is_causal unless said otherwise.
        return_column_sums : bool
            Also return what each position gets from these queries, of which the heavy hitters [2]_
            get the most. Of one query, if at most 16 heads share a key head, keys and values are
            read once, and the memory of the sums is all that it takes; otherwise the keys are read
            once more, or twice by 2 to 16 queries.

        Returns
        -------
        out : ndarray of shape (batch, q_heads, q_len, value_head_dim)
            Of the query's dtype, or float32 if out is. A query that sees no key gives 0.
        lse : ndarray of shape (batch, q_heads, q_len), float32, only if return_lse
        column_sums : ndarray of shape (batch, q_heads, kv_len), float32, only if asked for
            The probabilities with which the values are weighed, summed over the queries: 0 where
            there is no token, or none of the queries sees it.

        Raises
        ------
        TypeError, ValueError
            An argument breaks a rule.
        MemoryError, KeyboardInterrupt
            As for `attention`.

        References
        ----------
        .. [2] Z. Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of
           Large Language Models", 2023, https://arxiv.org/abs/2306.14048
        """
        asked = options_of(PagedKVCache.attend, options)
        return self._attend(
            query, sequences, query_offset, asked, return_lse, return_column_sums, out
        )

    def _attend(
        self,
        query: Any,
        sequences: Any,
        query_offset: Any,
        options: Options,
        return_lse: Any,
        return_column_sums: Any,
        out: Any,
    ) -> Array | tuple[Array, ...]:
        """Do what `attend` does, with options that were given to either cache."""
        rows, n = self._rows(sequences)
        library = library_of(query)
        q = library.array("query", query)
        if type(q) is not np.ndarray or q.dtype != self.dtype or q.dtype == np.int8:
            q = of_dtypes("query", q, QUERY_DTYPES[self.dtype.name])
        q = floats("query", q)
        if q.ndim != 4 or q.shape[0] != n:
            raise ValueError(
                f"query must have shape (batch, q_heads, q_len, head_dim) with batch={n}, "
                f"got query.shape={q.shape}"
            )
        pool = self._pool
        lengths, begins = pool.lengths[rows], pool.begins[rows]
        kv_len = lengths.item() if n == 1 else int(lengths.max(initial=0))
        shapes = self._shapes
        if q.shape != self._query_shape or options.mask is not None or options.bias is not None:
            kept = (n, self.kv_heads, kv_len)
            shapes = sizes(q.shape, (*kept, self.head_dim), (*kept, self.value_head_dim))
            if kv_len > 0:
                self._shapes, self._query_shape = shapes, q.shape
        checked = check_options(shapes, q.dtype, options, is_placed=True)
        positions = lengths - shapes.q_len
        if query_offset is not None:
            positions = positions_of(query_offset, n)
        if return_lse is not False:
            return_lse = boolean("return_lse", return_lse)
        inputs = (q, *pool.arrays, checked.mask, checked.bias)
        result: Array = result_array("out", out, library, shapes.out_shape, q.dtype, inputs)
        lse = np.empty(shapes.lse_shape, np.float32) if return_lse else None
        sums = None
        if return_column_sums is not False and boolean("return_column_sums", return_column_sums):
            sums = np.zeros((*shapes.lse_shape[:2], kv_len), np.float32)
        if kv_len == 0:  # then the pool may have no page yet
            result[...] = 0
            if lse is not None:
                lse[...] = -np.inf
        elif result.size:
            key, value, *scales = pool.arrays
            parts = pool.parts[rows] if pool.has_parts else None
            where = (positions, lengths, begins, parts, pool.table[rows])
            how = (shapes.batch_shape, checked, kv_len, *where, *(scales or (None, None)), sums)
            library.compute(_core.cache_attention, q, key, value, result, lse, *how)
        result, lse, sums = library.to_caller(out, result, lse, sums)
        if lse is None and sums is None:
            return result
        return tuple(x for x in (result, lse, sums) if x is not None)

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
        begins, before = self._pool.begins[rows], self._pool.lengths[rows]
        ends = per_sequence(
            "lengths", lengths, n, begins, before, "begins..lengths of the sequences"
        )
        self._pool.truncate(rows, ends)

    def evict(
        self,
        keep: ArrayLike,
        *,
        keep_first: ArrayLike = 0,
        renumber: bool = False,
        sequences: Iterable[int] | None = None,
    ) -> None:
        """Forget all but the last tokens of sequences and, if asked, the first ones [1]_.

        Parameters
        ----------
        keep : int, or array of int broadcastable to (batch,)
            How many of the last tokens each keeps, if it has so many.
        keep_first : int, or array of int broadcastable to (batch,)
            What it still has at positions below keep_first stays too. Not more than its length.
        renumber : bool
            False: positions and lengths stay as they are. True: the tokens that are left get the
            positions from 0 on, and lengths is how many they are. Masks, windows and slopes count
            these; a rotation that the keys had at other positions stays in them.
        sequences : ids, optional
            None: all, in the order they were added.

        Raises
        ------
        TypeError, ValueError
            An argument breaks a rule. A sequence has two parts at most: keep_first must not grow
            into tokens that come behind a gap, or that a renumbering moved there.
        MemoryError
            Of a `KVCache` with a capacity: there is no room for the two pages more that a batch
            element may need, from its first gap on.

        References
        ----------
        .. [1] G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023,
           https://arxiv.org/abs/2309.17453
        """
        self._evict(keep, keep_first, renumber, sequences, None)

    def _evict(
        self, keep: Any, keep_first: Any, renumber: Any, sequences: Any, pages: int | None
    ) -> None:
        """Evict; a fixed pool has at least so many pages from the first gap on."""
        rows, n = self._rows(sequences)
        pool = self._pool
        before = Left(pool.begins[rows], pool.lengths[rows], pool.parts[rows])
        kept = per_sequence("keep", keep, n, 0, FARTHEST, "0..2**61")
        first = per_sequence("keep_first", keep_first, n, 0, before.lengths, "0..lengths")
        left = evicted(before, kept, first, boolean("renumber", renumber))
        if pages is not None and len(pool.counts) < pages and left.parts[:, 2].any():
            pool.fix(pages)
        pool.evict(rows, *left)

    def reorder(self, indices: ArrayLike) -> None:
        """Let each of `sequences` go on from what another one has: a step of beam search.

        Nothing is copied now: sequences share what they have in common until one appends to it.

        Parameters
        ----------
        indices : array of int broadcastable to (sequences,)
            Sequence ``sequences[b]`` becomes a copy of ``sequences[indices[b]]``.
        """
        self._reorder(indices, "0..sequences - 1")

    def _reorder(self, indices: Any, rule: str) -> None:
        """Do what `reorder` does, whose indices must be by that rule."""
        n = len(self._ids)
        self._pool.reorder(per_sequence("indices", indices, n, 0, n - 1, rule))

    def _name_rows(self, ids: list[int]) -> None:
        """Let the rows of the table be the sequences of these ids."""
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
        array: Array = x
        if type(x) is not np.ndarray or x.dtype != self.dtype or x.dtype == np.int8:
            array = of_dtypes(name, x, TOKEN_DTYPES[self.dtype.name])
        shape = array.shape
        if len(shape) != 4 or shape[:2] != (n, self.kv_heads) or shape[3] != dim:
            raise ValueError(
                f"{name} must have shape (batch, kv_heads, tokens, head_dim) = "
                f"({n}, {self.kv_heads}, any, {dim}), got {name}.shape={shape}"
            )
        return array

    def _contents(self) -> Contents:
        """Return what the cache is."""
        limit = len(self._pool.counts) if self._pool.fixed else NONE
        return Contents(self._pool, self._ids, self._next, limit)

    @classmethod
    def _of_contents(cls, contents: Contents) -> Self:
        """Return the cache with these contents, in their memory."""
        pool, ids, next_id, limit = contents
        if limit != NONE:
            pool.fix(limit)
        cache = cls.__new__(cls)
        cache._start(pool, ids, next_id)
        return cache


PagedKVCache._own = frozenset(vars(PagedKVCache(1, 1)))
