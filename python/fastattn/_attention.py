# SPDX-License-Identifier: Apache-2.0
"""The attention calls: check the arguments, make room for the result, let the kernel fill it.

The rules are in `_arguments.py`, the meaning in `reference.py`, the work in `_core`
(src/bindings.cpp).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from fastattn import _core, reference
from fastattn._arguments import (
    FARTHEST,
    MASK_NAMES,
    arithmetic,
    boolean,
    check,
    check_packed,
    countable,
    dropout,
    floats,
    pair_array,
    per_batch,
    result_array,
    sizes,
    whole_number,
)
from fastattn._arrays import answer, as_numpy, destination, is_cuda_array, room
from fastattn._report import Report

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: Literal[False] = False,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: Literal[True],
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Compute exact softmax attention, ``softmax(scale * query @ key.T + ...) @ value``.

    The scores are never held as a q_len x kv_len array: tiles of keys pass by while a running
    maximum and sum are kept for each query [1]_. Every combination of arguments runs in one fused
    kernel, and pairs that is_causal, window, kv_lengths or a whole tile of the mask exclude cost
    nothing.

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
        key, kv_len - q_len the last with the last.
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
        nothing but seed and, of each pair, the key, the query's position ``i + query_offset``, the
        query head, and the index in the batch; `dropout_mask` says which.
    return_lse : bool
        Return (out, lse).
    out : ndarray of the result's shape and dtype, optional
        Where to write the result; it must not overlap an input.

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
    if type(query) is not np.ndarray and is_cuda_array(query):
        from fastattn import cuda

        return cuda.attention(  # type: ignore[no-any-return]
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            scale=scale,
            is_causal=is_causal,
            query_offset=query_offset,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            kv_lengths=kv_lengths,
            dropout_p=dropout_p,
            seed=seed,
            return_lse=return_lse,
            out=out,
        )
    given: Any = query
    given_out = out
    query, key, value, known, arguments = check(
        query,
        key,
        value,
        mask,
        bias,
        scale,
        is_causal,
        query_offset,
        window,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        dropout_p,
        seed,
    )
    if return_lse is not False:
        return_lse = boolean("return_lse", return_lse)
    dtype = query.dtype
    if out is not None:
        out = destination(given, out)
        out = result_array(out, known.out_shape, dtype, (query, key, value, *arguments[:2]))
    elif query is given:
        out = np.empty(known.out_shape, dtype)
    else:
        out = room(given, known.out_shape, dtype)
    lse = np.empty(known.lse_shape, arithmetic(dtype)) if return_lse else None
    if out.size or lse is not None:
        _core.attention(query, key, value, out, lse, known.batch_shape, *arguments)
    if query is not given:
        out, lse = answer(given, given_out, out, lse)
    return out if lse is None else (out, lse)


def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
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
    query_offset, kv_lengths : int, or array of int of shape (sequences,), optional
        One per sequence. query_offset must be given with is_causal, window or alibi_slopes if a
        sequence has not as many queries as keys.
    alibi_slopes : array of shape (q_heads,) or (sequences, q_heads), optional
    scale, is_causal, window, softcap, sinks, dropout_p, seed, return_lse
        As for `attention`.
    out : ndarray of shape (total_q, q_heads, value_head_dim) and the result's dtype, optional
        Where to write the result; it must not overlap an input.

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
    given: Any = query
    given_out = out
    query, key, value, known, arguments, starts = check_packed(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_kv,
        mask,
        bias,
        scale,
        is_causal,
        query_offset,
        window,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        dropout_p,
        seed,
    )
    return_lse = boolean("return_lse", return_lse)
    if out is None:
        out = room(given, known.out_shape, query.dtype)
    else:
        out = destination(given, out)
        out = result_array(out, known.out_shape, query.dtype, (query, key, value, *arguments[:2]))
    lse = np.empty(known.lse_shape, arithmetic(query.dtype)) if return_lse else None
    q_starts, _ = starts
    for rows in (slice(q_starts[0]), slice(q_starts[-1], None)):
        out[rows] = np.zeros((), out.dtype)  # of bits, too
        if lse is not None:
            lse[:, rows] = -np.inf
    if lse is not None or out.size:
        q, k, v, results = (x.swapaxes(0, 1) for x in (query, key, value, out))
        arguments = (*arguments, *starts)
        _core.varlen_attention(q, k, v, results, lse, known.batch_shape, *arguments)
    if query is not given:
        out, lse = answer(given, given_out, out, lse)
    return out if lse is None else (out, lse)


def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> NDArray[Any]:
    """Compute attention with the signature and meaning of PyTorch's function, on NumPy arrays.

    Parameters
    ----------
    query : array of shape (..., q_heads, q_len, head_dim)
    key : array of shape (..., heads, kv_len, head_dim)
    value : array of shape (..., heads, kv_len, value_head_dim)
        Of a dtype that `attention` takes. All axes but the last two broadcast, unless enable_gqa.
    attn_mask : array, broadcastable to (..., q_heads, q_len, kv_len), optional
        bool: True = attend. A float dtype: added to the scores. Not together with is_causal.
    dropout_p : float
        Drop each pair with this probability, and divide what is kept by 1 - dropout_p. Each call
        drops others; `attention` has a seed.
    is_causal : bool
        Query i sees key j iff j <= i, whatever the two lengths.
    scale : float, optional
        1 / sqrt(head_dim) unless given.
    enable_gqa : bool
        q_heads may be a multiple of the heads of key and value.

    Returns
    -------
    ndarray of shape (..., q_heads, q_len, value_head_dim)
        A query that sees no key gives 0.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule.

    See Also
    --------
    attention : all that the kernel can do.

    References
    ----------
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    is_causal = boolean("is_causal", is_causal)
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must not be given together with is_causal=True")
    given: Any = query
    out = None
    query, key, value = floats("query", query), floats("key", key), floats("value", value)
    if not boolean("enable_gqa", enable_gqa):
        query, key, value = _equal_heads(query, key, value)
    if attn_mask is not None:
        known = sizes(query.shape, key.shape, value.shape)
        attn_mask = pair_array("attn_mask", attn_mask, MASK_NAMES, known)
    seed = int.from_bytes(os.urandom(8), "little") if dropout_p != 0 else None
    if query is not given:
        out = room(given, sizes(query.shape, key.shape, value.shape).out_shape, query.dtype)
    out = attention(
        query,
        key,
        value,
        mask=attn_mask,
        scale=scale,
        is_causal=is_causal,
        query_offset=0 if is_causal else None,
        dropout_p=dropout_p,
        seed=seed,
        out=out,
    )
    return out if query is given else answer(given, None, out)[0]


def _equal_heads(*arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Return query, key and value with their heads broadcast; as they are where that is nothing."""
    shapes = [x.shape for x in arrays]
    heads = {shape[-3] if shape[2:] else 1 for shape in shapes}
    if len(heads) == 1:
        return arrays
    if len(heads - {1}) > 1:
        raise ValueError(
            "query, key and value must have equally many heads unless enable_gqa=True, got "
            f"query.shape={shapes[0]}, key.shape={shapes[1]}, value.shape={shapes[2]}"
        )
    wanted = max(heads - {1})
    return tuple(
        np.broadcast_to(x, (*shape[:-3], wanted, *shape[-2:])) if len(shape) >= 2 else x
        for x, shape in zip(arrays, shapes, strict=True)
    )


def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
) -> NDArray[Any]:
    """Compute the probabilities with which `attention` weighs the values, for looking at.

    This is the one call whose memory grows with q_len x kv_len: that is what it returns. It is
    computed by the definition, in float64.

    Parameters
    ----------
    query, key, mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, sinks, \
kv_lengths
        As for `attention`.

    Returns
    -------
    ndarray of shape (batch, q_heads, q_len, kv_len)
        A row sums to 1; to less with sinks; to 0 if the query sees no key.

    Raises
    ------
    TypeError, ValueError
        As for `attention`.

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> fastattn.attention_weights(np.eye(2), np.eye(2)).round(2)
    array([[0.67, 0.33],
           [0.33, 0.67]])
    """
    given: Any = query
    query, key = floats("query", query), floats("key", key)
    mask, bias = as_numpy("mask", mask), as_numpy("bias", bias)
    query_offset = as_numpy("query_offset", query_offset)
    alibi_slopes, sinks = as_numpy("alibi_slopes", alibi_slopes), as_numpy("sinks", sinks)
    kv_lengths = as_numpy("kv_lengths", kv_lengths)
    check(
        query,
        key,
        key,  # any value of the right shape
        mask,
        bias,
        scale,
        is_causal,
        query_offset,
        window,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        0.0,
        None,
    )
    weights = reference.attention_weights(
        query,
        key,
        mask=mask,
        bias=bias,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_lengths=kv_lengths,
    )
    return answer(given, None, weights)[0]  # type: ignore[no-any-return]


def dropout_mask(
    query: ArrayLike,
    key: ArrayLike,
    *,
    dropout_p: float,
    seed: int | None,
    query_offset: ArrayLike | None = None,
    batch_index: int = 0,
) -> NDArray[np.bool_]:
    """Return which pairs `attention` keeps, for looking at or for another implementation.

    Like `attention_weights`, it needs memory for every pair.

    Parameters
    ----------
    query : array of shape (batch, q_heads, q_len, head_dim)
        Only the shapes matter; axes of the batch that only value has are not there.
    key : array of shape (batch, kv_heads, kv_len, head_dim)
    dropout_p, seed, query_offset
        As for `attention`.
    batch_index : int
        The index of the first element of the batch: for sequence b of `varlen_attention`, whose
        queries and keys are given as (heads, length, head_dim), it is b.

    Returns
    -------
    ndarray of bool, shape (batch, q_heads, q_len, kv_len)
        True: kept. Some of them may not be seen for other reasons.

    Raises
    ------
    TypeError, ValueError
        As for `attention`.

    Notes
    -----
    A pair is kept iff its number is at least ``round(dropout_p * 2**32)``. The numbers of keys 4 n
    to 4 n + 3 are the four words that Philox4x32 with 7 rounds [1]_ gives for the key seed and the
    counter ``(n, i + query_offset, query head, batch index)``, each modulo 2**32.

    References
    ----------
    .. [1] J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011,
       https://doi.org/10.1145/2063384.2063405

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> fastattn.dropout_mask(np.eye(2), np.eye(2), dropout_p=0.5, seed=1)
    array([[ True, False],
           [False,  True]])
    """
    given: Any = query
    query, key = floats("query", query), floats("key", key)
    known = sizes(query.shape, key.shape, key.shape)
    dropout_p, seed = dropout(dropout_p, seed)
    if query_offset is not None:
        query_offset = per_batch("query_offset", query_offset, known, -FARTHEST, FARTHEST, usual=0)
    batch_index = whole_number("batch_index", batch_index)
    if not 0 <= batch_index < 2**32:
        raise ValueError(f"batch_index must be within 0..2**32 - 1, got batch_index={batch_index}")
    kept = reference.dropout_mask(
        query,
        key,
        dropout_p=dropout_p,
        seed=seed,
        query_offset=query_offset,
        batch_index=batch_index,
    )
    return answer(given, None, kept)[0]  # type: ignore[no-any-return]


def explain(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Report:
    """Say how `attention` would compute a call, without computing it.

    Parameters
    ----------
    query, key, value, mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, \
sinks, kv_lengths, dropout_p, seed
        As for `attention`.

    Returns
    -------
    dict
        Its str() is the report. `kernel` is "tiled", or "few queries" where the tiles are counted
        as if it were. `tiles` are counted over all heads and batch elements, of
        `query_tile` queries (of all heads that share a key head) by `key_tile` keys; `skipped` is
        the share of them that nothing is done for. `flops` are those of the two matrix products in
        the tiles that are computed; `bytes` are those of query, key, value and result, once each;
        `scratch_bytes` is all other memory.

    Raises
    ------
    TypeError, ValueError
        As for `attention`; also if there are so many tiles, made unlike by a mask, bias or
        positions, that looking at them would take long.
    """
    if type(query) is not np.ndarray and is_cuda_array(query):
        from fastattn import cuda

        return cuda.explain(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            scale=scale,
            is_causal=is_causal,
            query_offset=query_offset,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            kv_lengths=kv_lengths,
            dropout_p=dropout_p,
            seed=seed,
        )
    query, key, value, known, arguments = check(
        query,
        key,
        value,
        mask,
        bias,
        scale,
        is_causal,
        query_offset,
        window,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        dropout_p,
        seed,
    )
    countable(known)
    plan = _core.explain(query, key, value, None, None, known.batch_shape, *arguments)
    skipped = plan["tiles_skipped"] / plan["tiles"] if plan["tiles"] else 0.0
    return Report(
        "attention",
        {
            "kernel": plan["kernel"],
            "isa": plan["isa"],
            "dtype": str(query.dtype),
            "threads": plan["threads"],
            "query_tile": plan["query_tile"],
            "key_tile": plan["key_tile"],
            "tiles": plan["tiles"],
            "tiles_skipped": plan["tiles_skipped"],
            "tiles_edge": plan["tiles_edge"],
            "skipped": skipped,
            "flops": plan["flops"],
            "bytes": plan["bytes"],
            "scratch_bytes": plan["scratch_bytes"],
        },
    )
