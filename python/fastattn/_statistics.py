# SPDX-License-Identifier: Apache-2.0
"""What do the probabilities say? Their statistics, without the array of them.

As in `_attention.py`, the rules about the call are in `_arguments.py`, the meaning in
`reference.py`, the work in `_core` (src/statistics.cpp).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from fastattn import _core
from fastattn._arguments import (
    FLOAT_NAMES,
    MOST_ELEMENTS,
    Sizes,
    arithmetic,
    as_array,
    boolean,
    broadcast,
    check,
    of_dtypes,
    whole_number,
)
from fastattn._arrays import as_numpy, library_of, widened
from fastattn._options import WeightOptions, options_of, takes
from fastattn.reference import AttentionStatistics

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


class StatisticsArrays(NamedTuple):
    """What the kernel fills, and what it reads beside the call, in its order."""

    entropy: Array | None
    maximum: Array | None
    top_keys: Array | None
    top_weights: Array | None
    column_sums: Array | None
    row_weights: Array | None
    blocks: Array | None
    query_starts: Array | None
    key_starts: Array | None


@takes(WeightOptions)
def attention_statistics(
    query: ArrayLike,
    key: ArrayLike,
    *,
    entropy: bool = False,
    column_sums: bool = False,
    row_weights: ArrayLike | None = None,
    top: int | None = None,
    blocks: tuple[ArrayLike, ArrayLike] | None = None,
    maximum: bool = False,
    **options: Unpack[WeightOptions],
) -> AttentionStatistics:
    """Compute what the probabilities of `attention` say, without the array of them.

    The probabilities ``p`` are those that `attention_weights` returns. Here tiles of keys pass by,
    once or twice, and memory grows with q_len + kv_len alone. At least one statistic must be asked
    for.

    Parameters
    ----------
    query, key, mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, sinks, \
kv_lengths, key_offset
        As for `attention`.
    entropy : bool
        Return each row's entropy.
    column_sums : bool
        Return what each key gets from all rows.
    row_weights : array, broadcastable to (batch, q_heads, q_len), optional
        Of a float dtype, finite: what each row counts in the column sums; 1 unless given. 1 for
        one row and 0 for the others gives that row's probabilities.
    top : int >= 1, optional
        Return so many of the keys with the largest probabilities of each row. Meant to be small: a
        key that joins them costs time in proportion.
    blocks : (query_starts, key_starts), optional
        Two arrays of int, which ascend from 0: where each block of queries, and of keys, starts;
        the last one ends with the rows. Return what each block of queries gives to each of keys: a
        map of words, sentences or pixels. Blocks of one row and one key are the probabilities.
    maximum : bool
        Return each row's largest probability.

    Returns
    -------
    AttentionStatistics
        A named tuple of these, None where not asked for; numbers are float64 for a float64 query,
        else float32:

        entropy : ndarray of shape (batch, q_heads, q_len)
            ``-sum(p * ln(p))`` over keys, in nats: 0 where one key gets everything, ln(n) where n
            keys get the same. A sink takes its share of p and has no term.
        maximum : ndarray of shape (batch, q_heads, q_len)
        column_sums : ndarray of shape (batch, q_heads, kv_len)
            ``sum(row_weights * p)`` over rows.
        top_keys, top_weights : ndarray of shape (batch, q_heads, q_len, top)
            int64 indices, and their probabilities, strongest first; among equals the lower key is
            first. Beyond the keys that a row sees -1, and 0.
        blocks : ndarray of shape (batch, q_heads, len(query_starts), len(key_starts))
            The sum of p over the block.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As for `attention`.

    Notes
    -----
    A query that sees no key has entropy and maximum 0. One whose denominator is not finite, as with
    a NaN that it sees, has NaN, no strongest keys, and NaN in the sums of the keys that it sees.

    Bitwise the same for any number of threads, any strides, and whatever else is in the batch.

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> found = fastattn.attention_statistics(np.eye(2), np.eye(2), column_sums=True, top=1)
    >>> found.column_sums
    array([1., 1.])
    >>> found.top_keys, found.top_weights.round(2)
    (array([[0],
           [1]]), array([[0.67],
           [0.67]]))
    """
    asked = options_of(attention_statistics, options)
    library = library_of(query)
    q, k, _, shapes, checked = check(library.array("query", query), key, key, asked)
    *lead, q_len = shapes.lse_shape
    dtype = arithmetic(q.dtype)

    def result(wanted: bool, *rest: int, dtype: np.dtype[Any] = dtype, empty: float = 0) -> Any:
        """Return an array for a result that is wanted: what it holds where there are no pairs."""
        if not wanted:
            return None
        shape = (*lead, *rest)
        return np.full(shape, empty, dtype) if empty else np.zeros(shape, dtype)

    entropy, maximum = boolean("entropy", entropy), boolean("maximum", maximum)
    column_sums = boolean("column_sums", column_sums)
    if row_weights is not None:
        if not column_sums:
            raise ValueError("row_weights must be given with column_sums alone")
        row_weights = _row_weights(row_weights, shapes, dtype)
    count = 0 if top is None else _count(top, shapes)
    query_starts, key_starts = (None, None) if blocks is None else _blocks(blocks, shapes)
    if not (entropy or maximum or column_sums or count or blocks is not None):
        raise ValueError(
            "attention_statistics needs at least one of entropy, column_sums, top, blocks and "
            "maximum"
        )
    sizes = [0 if x is None else len(x) for x in (query_starts, key_starts)]
    arrays = StatisticsArrays(
        entropy=result(entropy, q_len),
        maximum=result(maximum, q_len),
        top_keys=result(count > 0, q_len, count, dtype=np.dtype(np.int64), empty=-1),
        top_weights=result(count > 0, q_len, count),
        column_sums=result(column_sums, shapes.kv_len),
        row_weights=row_weights,
        blocks=result(blocks is not None, *sizes),
        query_starts=query_starts,
        key_starts=key_starts,
    )
    if shapes.has_pairs:
        library.compute(_core.attention_statistics, q, k, shapes.batch_shape, checked, arrays)
    results = {name: getattr(arrays, name) for name in AttentionStatistics._fields}
    converted = library.to_caller(None, *results.values())
    return AttentionStatistics(**dict(zip(results, converted, strict=True)))


def _row_weights(x: Any, shapes: Sizes, dtype: np.dtype[Any]) -> Array:
    """Return what each row counts, broadcast to all rows, in the arithmetic's dtype."""
    array = of_dtypes("row_weights", as_numpy("row_weights", x), FLOAT_NAMES)
    if array.ndim > len(shapes.lse_shape) or broadcast(array.shape, shapes.lse_shape) != (
        shapes.lse_shape
    ):
        raise ValueError(
            f"row_weights must broadcast to (batch, q_heads, q_len) = {shapes.lse_shape}, "
            f"got row_weights.shape={array.shape}"
        )
    with np.errstate(over="ignore"):
        values = widened(array).astype(dtype)
    wrong = values[~np.isfinite(values)]
    if wrong.size:
        raise ValueError(f"row_weights must be finite, got {wrong[0]}")
    return np.broadcast_to(values, shapes.lse_shape)


def _count(top: Any, shapes: Sizes) -> int:
    """Return how many keys are asked for."""
    count = whole_number("top", top)
    rows = max(int(np.prod(shapes.lse_shape, dtype=object)), 1)
    if not 1 <= count <= MOST_ELEMENTS // rows:
        raise ValueError(f"top must be at least 1, and top x rows below 2**60, got top={count}")
    return count


def _blocks(blocks: Any, shapes: Sizes) -> tuple[Array, Array]:
    """Return where the blocks of queries and of keys start."""
    if not isinstance(blocks, tuple | list) or len(blocks) != 2:
        raise TypeError(
            f"blocks must be a pair (query_starts, key_starts), not {type(blocks).__name__}"
            + (f" of {len(blocks)}" if isinstance(blocks, tuple | list) else "")
        )
    names = "query_starts", "key_starts"
    lengths = shapes.q_len, shapes.kv_len
    query_starts, key_starts = map(_starts, names, blocks, lengths)
    return query_starts, key_starts


def _starts(name: str, x: Any, length: int) -> Array:
    """Return where blocks of rows start."""
    array = as_array(f"blocks' {name}", x, "integers")
    if array.dtype.kind not in "iu":
        raise TypeError(f"blocks' {name} must be an array of integers, not {array.dtype.name}")
    if array.ndim != 1 or not array.size or array[0] != 0:
        found = f"shape {array.shape}" if array.ndim != 1 or not array.size else array[0]
        raise ValueError(f"blocks' {name} must be one axis that begins with 0, got {found}")
    for i in np.flatnonzero(array[1:] <= array[:-1])[:1]:
        raise ValueError(f"blocks' {name} must ascend, got {array[i]} before {array[i + 1]} at {i}")
    if array[-1] >= max(length, 1):
        raise ValueError(f"blocks' {name} must be below {length}, the rows, got {array[-1]}")
    return array.astype(np.int64, order="C")
