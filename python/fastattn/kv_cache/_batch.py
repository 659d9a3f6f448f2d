# SPDX-License-Identifier: Apache-2.0
"""`KVCache`: a batch of the sequences of a `PagedKVCache`, for a model that writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self, Unpack, overload

import numpy as np

from fastattn._options import ScoreOptions, options_of, takes
from fastattn.kv_cache._arguments import PAGE_TOKENS, at_least_one
from fastattn.kv_cache._files import Contents, StoredCache
from fastattn.kv_cache._paged import PagedKVCache
from fastattn.kv_cache._pool import NONE

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from fastattn.kv_cache._pool import Array


class KVCache(StoredCache):
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

    __module__ = "fastattn"  # a pickle names the class as users do
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
        batch = at_least_one("batch", batch)
        if capacity is not None:
            capacity = at_least_one("capacity", capacity)
        cache = PagedKVCache(
            kv_heads,
            head_dim,
            pages=None if capacity is None else _pages_for(batch, capacity, PAGE_TOKENS),
            dtype=dtype,
            value_head_dim=value_head_dim,
        )
        for _ in range(batch):
            cache.add()
        self._start(cache, capacity)

    def _start(self, cache: PagedKVCache, capacity: int | None) -> None:
        """Become the cache of the batch that another cache has as its sequences."""
        self._cache = cache
        self.batch = len(cache.sequences)
        self.capacity = capacity
        self.kv_heads, self.head_dim = cache.kv_heads, cache.head_dim
        self.value_head_dim, self.dtype = cache.value_head_dim, cache.dtype

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Position of the next token of each batch element; see `PagedKVCache.lengths`."""
        return self._cache.lengths

    @property
    def begins(self) -> NDArray[np.int64]:
        """Position of the first token that each batch element still has, but for `kept_first`."""
        return self._cache.begins

    @property
    def kept_first(self) -> NDArray[np.int64]:
        """Tokens at the start that each batch element kept apart; see `PagedKVCache.kept_first`."""
        return self._cache.kept_first

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

    @overload
    def attend(
        self,
        query: ArrayLike,
        *,
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
        query_offset: ArrayLike | None = None,
        return_lse: bool = False,
        return_column_sums: bool = False,
        out: ArrayLike | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Array | tuple[Array, ...]:
        """Compute the attention of the last queries over all that the cache has.

        Parameters
        ----------
        query : array of shape (batch, q_heads, q_len, head_dim)
            Query i stands at position ``length - q_len + i`` unless query_offset is given: append
            first, then attend.
        query_offset, mask, bias, scale, is_causal, window, softcap, alibi_slopes, sinks, \
return_lse, return_column_sums, out
            As for `PagedKVCache.attend`.

        Returns
        -------
        out : ndarray of shape (batch, q_heads, q_len, value_head_dim)
        lse : ndarray of shape (batch, q_heads, q_len), float32, only if return_lse
        column_sums : ndarray of shape (batch, q_heads, kv_len), float32, only if asked for
        """
        asked = options_of(KVCache.attend, options)
        return self._cache._attend(
            query, None, query_offset, asked, return_lse, return_column_sums, out
        )

    def truncate(self, lengths: ArrayLike) -> None:
        """Forget the last tokens, as if they had never been appended.

        Parameters
        ----------
        lengths : int, or array of int broadcastable to (batch,)
            How long each batch element is then; not shorter than what was evicted.
        """
        self._cache.truncate(lengths)

    def evict(self, keep: ArrayLike, *, keep_first: ArrayLike = 0, renumber: bool = False) -> None:
        """Forget all but the last tokens and, if asked, the first ones.

        Parameters
        ----------
        keep : int, or array of int broadcastable to (batch,)
            How many of the last tokens each batch element keeps, if it has so many.
        keep_first, renumber
            As for `PagedKVCache.evict`.

        Raises
        ------
        MemoryError
            From the first gap on, a batch element may need two pages of 128 tokens more than its
            capacity: there is no room for them.
        """
        capacity = self.capacity
        pages = None if capacity is None else _pages_for(self.batch, capacity, PAGE_TOKENS, True)
        self._cache._evict(keep, keep_first, renumber, None, pages)

    def reorder(self, indices: ArrayLike) -> None:
        """Let each batch element b go on from what indices[b] has: a step of beam search.

        Nothing is copied now: elements share what they have in common until one appends to it.

        Parameters
        ----------
        indices : array of int broadcastable to (batch,)
            Within 0..batch - 1.
        """
        self._cache._reorder(indices, "0..batch - 1")

    def _contents(self) -> Contents:
        """Return what the cache is."""
        limit = NONE if self.capacity is None else self.capacity
        return self._cache._contents()._replace(limit=limit)

    @classmethod
    def _of_contents(cls, contents: Contents) -> Self:
        """Return the cache with these contents, in their memory."""
        pool, limit = contents.pool, contents.limit
        batch, kept = pool.rows, pool.kept(slice(pool.rows)).max(initial=0)
        if batch < 1 or (limit != NONE and limit < max(kept, 1)):
            raise ValueError(
                "it must be of a batch >= 1, and no more tokens than capacity, "
                f"got batch={batch}, {kept} tokens, capacity={limit}"
            )
        gaps = bool(pool.parts[:, 2].any())
        pages = NONE if limit == NONE else _pages_for(batch, limit, pool.page_size, gaps)
        cache = cls.__new__(cls)
        paged = PagedKVCache._of_contents(contents._replace(limit=pages))
        cache._start(paged, None if limit == NONE else limit)
        return cache


def _pages_for(batch: int, capacity: int, page_size: int, gaps: bool = False) -> int:
    """Return how many pages hold `capacity` tokens of each, wherever the first lies in its page.

    Of two parts, each may begin and end anywhere in a page: it takes two pages more.
    """
    return int(batch * (1 + -(-(capacity - 1) // page_size) + 2 * gaps))


KVCache._own = frozenset(vars(KVCache(1, 1, 1)))
