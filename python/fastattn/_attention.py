# SPDX-License-Identifier: Apache-2.0
"""The attention calls: check the arguments, make room for the result, let the kernel fill it.

The options are in `_options.py`, the rules in `_arguments.py`, the meaning in `reference.py`, the
work in `_core` (src/calls.cpp).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np

from fastattn import _core
from fastattn._arguments import (
    accumulates,
    arithmetic,
    boolean,
    check,
    check_packed,
    result_array,
)
from fastattn._arrays import NUMPY, library_of
from fastattn._options import AttentionOptions, options_of, takes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from fastattn._arrays import Library


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    accumulate: bool = False,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any]: ...
@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_lse: Literal[True],
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    accumulate: bool = False,
    **options: Unpack[AttentionOptions],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@takes(AttentionOptions)
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_lse: bool = False,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    accumulate: bool = False,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Compute exact softmax attention, ``softmax(scale * query @ key.T + ...) @ value``.

    The scores are never held as a q_len x kv_len array: tiles of keys pass by while a running
    maximum and sum are kept for each query [1]_. Every combination of arguments runs in one fused
    kernel, and pairs that is_causal, window, kv_lengths or a whole tile of the mask exclude cost
    nothing.

    ======================== ===================================================================
    batch                    any number of axes, or none
    q_heads, kv_heads        heads of queries, and of keys and values
    q_len, kv_len            queries, and keys with their values, of a head
    head_dim, value_head_dim numbers of a query or key, and of a value
    ======================== ===================================================================

    Parameters
    ----------
    query : array of shape (batch, q_heads, q_len, head_dim)
        float16, bfloat16 (of ml_dtypes), float32 or float64; key and value share the dtype, except
        that they may be of half precision beside a float32 query. Half precision is computed in
        float32. Axis -3 is heads; the axes before it are
        batch, any number of them, and broadcast without a copy. 2-D is one head, 3-D is
        (heads, length, head_dim). Any strides; a last axis that is not contiguous is copied once.
    key : array of shape (batch, kv_heads, kv_len, head_dim)
        q_heads is a multiple of kv_heads; query head h reads key head
        ``h // (q_heads // kv_heads)`` (grouped-query and multi-query attention; keys and values are
        never repeated).
    value : array of shape (batch, kv_heads, kv_len, value_head_dim)
    mask : array, broadcastable to (batch, q_heads, q_len, kv_len), optional
        bool: True = attend. A float dtype: added to the scores; -inf masks the pair. Never
        expanded.
    bias : array, broadcastable to (batch, q_heads, q_len, kv_len), optional
        A float dtype: added to the scores, beside mask.
    scale : float, optional
        1 / sqrt(head_dim) unless given.
    is_causal : bool
        Query i, at position ``i + query_offset``, sees key j iff j <= that position.
    query_offset : int, or array of int broadcastable to the batch shape, optional
        Position of the first query among the keys, negative too. Must be given with is_causal,
        window or alibi_slopes if q_len != kv_len (else 0): 0 aligns the first query with the first
        key, kv_len - q_len the last with the last. What 3 causal queries see of 5 keys::

            query_offset=0     query_offset=2
                x . . . .          x x x . .
                x x . . .          x x x x .
                x x x . .          x x x x x

    window : (left, right), optional
        Key j is seen iff ``-left <= j - position <= right``; None is unlimited.
    softcap : float > 0, optional
        Scores become ``softcap * tanh(scores / softcap)``, before mask and bias.
    alibi_slopes : array of shape (q_heads,) or (batch, q_heads), optional
        Adds ``-slope * |j - position|`` to the scores [2]_.
    sinks : array of shape (q_heads,), optional
        A logit for each head that joins the softmax's denominator alone [3]_.
    kv_lengths : int, or array of int broadcastable to the batch shape, optional
        Keys from there on are padding; within 0..kv_len.
    dropout_p : float
        Drop each pair with this probability, and divide what is kept by 1 - dropout_p [4]_: out
        is what the probabilities that are left give. lse is as without dropout.
    seed : int, optional
        Within 0..2**64 - 1; must be given with dropout_p > 0. Which pairs are dropped depends on
        nothing but seed and, of each pair, the positions ``j + key_offset`` of the key and
        ``i + query_offset`` of the query, the query head, and the index in the batch;
        `dropout_mask` says which.
    key_offset : int, or array of int broadcastable to the batch shape
        Position of the first key, where key and value are a part of more: key j stands at
        ``j + key_offset``, and is_causal, window, alibi_slopes and dropout compare positions.
        kv_lengths, mask and bias count the keys that are given.
    head_offset, batch_offset : int
        What dropout counts query heads, and elements of the batch, from, where query is a part of
        more; within 0..2**32 - 1.
    return_lse : bool
        Return (out, lse).
    out : ndarray of the result's shape and dtype, optional
        Where to write the result; it must not overlap an input. If it is float32, so is the result
        of half precision, which is then not rounded.
    lse : ndarray of the shape and dtype of lse, optional
        Where to write that; likewise.
    accumulate : bool
        out and lse, which must be given, hold attention over other keys before the call, and over
        both after it: what `merge` gives, without a second array of that size. Where lse is -inf,
        out is not read. sinks count once, in `merge`, and must not be given.

    Returns
    -------
    out : ndarray of shape (batch, q_heads, q_len, value_head_dim)
        A query that sees no key gives 0.
    lse : ndarray of shape (batch, q_heads, q_len), only if return_lse
        float64 for a float64 query, else float32.
        Natural logarithm of the sum over keys of exp(score), sinks left out; -inf if no key is
        seen.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; the message says which argument, the rule, and what was given.
    MemoryError
        There is no room for the result or the scratch memory; what `out` then holds is undefined.
    KeyboardInterrupt
        Ctrl-C; likewise.

    Notes
    -----
    Any of the arrays may also be a tensor of PyTorch on the CPU, a JAX array on one CPU device, or
    an array of another library that has ``__dlpack__`` and lies in the CPU's memory; the result is
    of the kind of query, whatever the others are. They are read where they lie. The kind of a
    library that nobody here knows is what its ``__array_namespace__().from_dlpack`` makes of the
    result, in place; where there is none, the result is a NumPy array. out may be a tensor where
    query is one, and beside a query of another library any array whose DLPack says that it may be
    written. bfloat16 needs ml_dtypes. There is no gradient here: fastattn.torch and fastattn.jax
    have it. A call with arrays on a GPU is one of `fastattn.cuda.attention`.

    What is more than its numbers is refused with a TypeError: masked arrays, matrices, tables, and
    whatever overrides NumPy's functions (``__array_ufunc__``, ``__array_function__``), which has a
    unit, labels or work still to do. ``numpy.asarray`` gives the numbers alone.

    Bitwise the same for any number of threads, any strides, and whatever else is in the batch. A
    NaN or Inf in a key or value that a query does not see leaves its result as it is, and so does
    one in a value that is dropped.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
       Partitioning", 2023, https://arxiv.org/abs/2307.08691
    .. [2] O. Press et al., "Train Short, Test Long", 2021, https://arxiv.org/abs/2108.12409
    .. [3] G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023,
       https://arxiv.org/abs/2309.17453
    .. [4] N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from
       Overfitting", 2014, https://jmlr.org/papers/v15/srivastava14a.html

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> query = key = value = np.eye(3, dtype=np.float32)
    >>> fastattn.attention(query, key, value, is_causal=True).round(2)
    array([[1.  , 0.  , 0.  ],
           [0.36, 0.64, 0.  ],
           [0.26, 0.26, 0.47]], dtype=float32)
    """
    asked = options_of(attention, options)
    library = NUMPY if type(query) is np.ndarray else library_of(query)
    if library is not NUMPY:
        if library.on_gpu:
            from fastattn import cuda

            if lse is not None or accumulate is not False:
                raise NotImplementedError("lse, accumulate have no kernel for GPUs")
            return cuda.attention(  # type: ignore[no-any-return]
                query, key, value, return_lse=return_lse, out=out, **options
            )
        query = library.array("query", query)
    q, k, v, shapes, checked = check(query, key, value, asked)
    if return_lse is not False:
        return_lse = boolean("return_lse", return_lse)
    adds = accumulate is not False and accumulates(accumulate, asked.sinks, out=out, lse=lse)
    if out is None and lse is None and library is NUMPY:
        result = np.empty(shapes.out_shape, q.dtype)
        sums = np.empty(shapes.lse_shape, arithmetic(q.dtype)) if return_lse else None
    else:
        inputs = (q, k, v, checked.mask, checked.bias)
        result = result_array("out", out, library, shapes.out_shape, q.dtype, inputs)
        sums = sums_array(lse, library, shapes.lse_shape, return_lse, (result, *inputs))
    if result.size or sums is not None:
        library.compute(_core.attention, q, k, v, result, sums, shapes.batch_shape, checked, adds)
    return returned(library, out, result, lse, sums, return_lse)  # type: ignore[no-any-return]


def sums_array(
    lse: Any, library: Library, shape: tuple[int, ...], return_lse: bool, arrays: tuple[Any, ...]
) -> NDArray[Any] | None:
    """Return where the sums of rows go: lse, if it is given, or new, if it is asked for."""
    wide = arithmetic(arrays[1].dtype)
    if lse is not None:
        return result_array("lse", lse, library, shape, wide, arrays)
    return np.empty(shape, wide) if return_lse else None


def returned(
    library: Library,
    out: Any,
    result: NDArray[Any],
    lse: Any,
    sums: NDArray[Any] | None,
    return_lse: bool,
) -> Any:
    """Return out, or out and lse, as the caller has arrays."""
    if library is not NUMPY:
        (result,) = library.to_caller(out, result)
        if sums is not None:
            (sums,) = library.to_caller(lse, sums)
    return (result, sums) if return_lse else result


@overload
def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    accumulate: bool = False,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any]: ...
@overload
def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike,
    *,
    return_lse: Literal[True],
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    accumulate: bool = False,
    **options: Unpack[AttentionOptions],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike,
    *,
    return_lse: bool,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    accumulate: bool = False,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
@takes(AttentionOptions)
def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike,
    *,
    return_lse: bool = False,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    accumulate: bool = False,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Compute attention over sequences of different lengths, packed one after the other.

    Sequence b has the queries ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]`` and the keys
    ``cu_seqlens_kv[b] : cu_seqlens_kv[b + 1]``, and sees no others. No padding is computed, and the
    result of a sequence is bitwise what `attention` gives for it alone (with dropout, as element b
    of a batch).

    Parameters
    ----------
    query : array of shape (total_q, q_heads, head_dim)
        Of dtypes as for `attention`. Any strides; a last axis that is not contiguous is copied
        once.
    key : array of shape (total_kv, kv_heads, head_dim)
    value : array of shape (total_kv, kv_heads, value_head_dim)
    cu_seqlens_q, cu_seqlens_kv : array of int, shape (sequences + 1,)
        Where each sequence starts, and the last one ends: ascending, within the rows there are.
    mask, bias : array, broadcastable to (q_heads, total_q, longest kv_len), optional
        Column j is key j of the row's own sequence.
    query_offset, kv_lengths, key_offset : int, or array of int of shape (sequences,), optional
        One per sequence. query_offset must be given with is_causal, window or alibi_slopes if a
        sequence has not as many queries as keys.
    alibi_slopes : array of shape (q_heads,) or (sequences, q_heads), optional
    scale, is_causal, window, softcap, sinks, dropout_p, seed, head_offset, batch_offset, return_lse
        As for `attention`.
    out : ndarray of shape (total_q, q_heads, value_head_dim) and the result's dtype, optional
        Where to write the result; it must not overlap an input. If it is float32, so is the result
        of half precision.
    lse, accumulate
        As for `attention`; rows of no sequence then stay as they are.

    Returns
    -------
    out : ndarray of shape (total_q, q_heads, value_head_dim)
        0 in rows of no sequence and of queries that see no key.
    lse : ndarray of shape (q_heads, total_q), only if return_lse
        -inf in those rows.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As for `attention`.

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> x = np.ones((5, 1, 2), np.float32)
    >>> fastattn.varlen_attention(x, x, x, [0, 2, 5], [0, 2, 5], is_causal=True).shape
    (5, 1, 2)
    """
    asked = options_of(varlen_attention, options)
    library = library_of(query)
    q, k, v, shapes, checked, starts = check_packed(
        library.array("query", query), key, value, cu_seqlens_q, cu_seqlens_kv, asked
    )
    return_lse = boolean("return_lse", return_lse)
    adds = accumulates(accumulate, asked.sinks, out=out, lse=lse)
    inputs = (q, k, v, checked.mask, checked.bias)
    result = result_array("out", out, library, shapes.out_shape, q.dtype, inputs)
    sums = sums_array(lse, library, shapes.lse_shape, return_lse, (result, *inputs))
    q_starts, _ = starts
    for rows in (slice(q_starts[0]), slice(q_starts[-1], None)):
        if adds:  # what these rows hold stays
            break
        result[rows] = np.zeros((), result.dtype)  # of bits, too
        if sums is not None:
            sums[:, rows] = -np.inf
    if sums is not None or result.size:
        q, k, v, heads_first = (x.swapaxes(0, 1) for x in (q, k, v, result))
        where = (heads_first, sums, shapes.batch_shape)
        library.compute(_core.varlen_attention, q, k, v, *where, checked, adds, *starts)
    return returned(library, out, result, lse, sums, return_lse)  # type: ignore[no-any-return]
