# SPDX-License-Identifier: Apache-2.0
"""What attention is: the definition, in NumPy, as short as the formula.

Everything else in the package is tested against it, and it is the place to look up what an argument
means. It builds arrays of q_len x kv_len and checks little; for work, use `fastattn.attention`.
Arrays may be of any kind that this takes; the results are of NumPy, but for an out that is given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from fastattn._arrays import as_numpy, library_of
from fastattn._options import (
    NO_OPTIONS,
    AttentionOptions,
    Options,
    WeightOptions,
    options_of,
    takes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike, DTypeLike, NDArray


class AttentionStatistics(NamedTuple):
    """What `attention_statistics` returns: None where it was not asked for."""

    entropy: Any = None
    column_sums: Any = None
    top_keys: Any = None
    top_weights: Any = None
    blocks: Any = None
    maximum: Any = None


@takes(AttentionOptions)
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    lse: NDArray[Any] | None = None,
    accumulate: bool = False,
    compute_dtype: DTypeLike | None = None,
    batch_index: int = 0,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Return softmax(scale * query @ key.T + ...) @ value, by definition.

    Parameters
    ----------
    query, key, value, return_lse, out, lse, accumulate, **options
        As for `fastattn.attention`; query, key and value may also be float16 or bfloat16.
    compute_dtype : dtype, optional
        Compute everything in this dtype, as a plain program would: a yardstick for rounding errors.
        None: compute in float64. The result has the query's dtype, or that of out, either way.
    batch_index : int
        As for `fastattn.dropout_mask`.

    Returns
    -------
    out : ndarray of shape (batch, q_heads, q_len, value_head_dim)
    lse : ndarray of shape (batch, q_heads, q_len), only if return_lse
        float64 for a float64 query, else float32.
    """
    given = query
    asked = options_of(attention, options)
    query, key, value = _array("query", query), _array("key", key), _array("value", value)
    dtype = np.dtype(np.float64 if compute_dtype is None else compute_dtype)
    probs, seen, sums = _softmax(query, key, dtype, asked)
    if asked.dropout_p != 0:
        batch_shape = np.broadcast_shapes(probs.shape[:-3], value.shape[:-3])
        kept = _kept((*batch_shape, *probs.shape[-3:]), asked, batch_index)
        seen = seen & kept
        probs = probs * kept / (1 - float(asked.dropout_p) if asked.dropout_p < 1 else 1)
    result = _weighted_sum(probs, seen, _repeat_heads(value.astype(dtype), probs.shape[-3]))
    into, sums_into = (
        None if x is None else library_of(given).destination(name, x)
        for name, x in (("out", out), ("lse", lse))
    )
    with np.errstate(all="ignore"):
        sums = np.broadcast_to(sums, result.shape[:-1])
        if max(query.ndim, key.ndim, value.ndim) == 2:
            result, sums = result[0], sums[0]
        if accumulate:
            others = _array("out", into).astype(dtype), _array("lse", sums_into).astype(dtype)
            result, sums = _joined(others, (result, sums))
        result = result.astype(query.dtype if into is None else into.dtype)
        sums = sums.astype(np.float64 if query.dtype == np.float64 else np.float32)
    if into is not None:
        into[...] = result
    if sums_into is not None:
        sums_into[...] = sums
    result, sums = result if out is None else out, sums if lse is None else lse
    return (result, sums) if return_lse else result


def _joined(
    *parts: tuple[NDArray[Any], NDArray[Any]],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return (out, lse) over the keys of all parts, each of which is over some of them."""
    top = np.maximum(*(lse for _, lse in parts))
    top = np.where(top == -np.inf, 0, top)
    weights = [np.exp(lse - top) for _, lse in parts]
    total = sum(weights, np.zeros(()))
    share = 1 / np.where(total == 0, 1, total)
    terms = (
        (weight * share)[..., None] * np.where((lse == -np.inf)[..., None], 0, out)
        for (out, lse), weight in zip(parts, weights, strict=True)
    )
    return sum(terms, np.zeros(())), np.log(total) + top


@takes(AttentionOptions)
def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike,
    *,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    lse: NDArray[Any] | None = None,
    accumulate: bool = False,
    compute_dtype: DTypeLike | None = None,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Return `attention` of each sequence by itself, packed as its arguments are.

    Parameters
    ----------
    query, key, value, cu_seqlens_q, cu_seqlens_kv, return_lse, out, lse, accumulate, **options
        As for `fastattn.varlen_attention`.
    compute_dtype : dtype, optional
        As for `attention`.

    Returns
    -------
    out : ndarray of shape (total_q, q_heads, value_head_dim)
    lse : ndarray of shape (q_heads, total_q), only if return_lse
    """
    query, key, value = _array("query", query), _array("key", key), _array("value", value)
    total, heads = query.shape[:2]
    wide = np.float64 if query.dtype == np.float64 else np.float32
    out = np.empty((total, heads, value.shape[2]), query.dtype) if out is None else out
    lse = np.empty((heads, total), wide) if lse is None else lse
    if not accumulate:
        out[...], lse[...] = out.dtype.type(0), -np.inf
    asked = options_of(varlen_attention, options)
    for b, rows, keys, own in _sequences(cu_seqlens_q, cu_seqlens_kv, total, heads, asked):
        q, k, v = (x.swapaxes(0, 1) for x in (query[rows], key[keys], value[keys]))
        how: dict[str, Any] = {"compute_dtype": compute_dtype, "batch_index": b, **own._asdict()}
        how |= {"out": out[rows].swapaxes(0, 1), "lse": lse[:, rows], "accumulate": accumulate}
        attention(q, k, v, **how)
    return (out, lse) if return_lse else out


@takes(AttentionOptions)
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike | None,
    lse: ArrayLike | None,
    *,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_kv: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
    grads: tuple[NDArray[Any], ...] | None = None,
    accumulate: bool = False,
    compute_dtype: DTypeLike | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[NDArray[Any], ...]:
    """Return the gradients of a loss that grad_out, and grad_lse, are the gradients of, by `out`.

    Parameters
    ----------
    grad_out : array of the shape of out
    query, key, value, **options
        As for `attention`; packed, as for `varlen_attention`, if cu_seqlens_q and cu_seqlens_kv are
        given.
    out, lse
        What the call returned. A kernel needs them; here both are computed anew.
    cu_seqlens_q, cu_seqlens_kv : array of int, shape (sequences + 1,), optional
        As for `varlen_attention`.
    grad_lse : array of the shape of lse, optional
        The gradient by lse, where the loss depends on it.
    return_dbias, return_dsinks : bool
        Return the gradients of bias, or of sinks, too.
    grads, accumulate
        As for `fastattn.attention_backward`.
    compute_dtype : dtype, optional
        As for `attention`.

    Returns
    -------
    dq, dk, dv : ndarray of the shapes and dtypes of query, key and value
        Summed over the axes that were broadcast, and over the query heads that share a key head.
    dbias, dsinks : ndarray of the shape and dtype of bias, or of sinks, if asked for
        dbias is summed over the axes that were broadcast.

    Notes
    -----
    With P the probabilities, dO grad_out and D = sum(P * dP) over a row's keys, which is
    sum(dO * O) [1]_::

        dV = P.T @ dO        dP = dO @ V.T        dS = P * (dP - D) + grad_lse * softmax
        dbias = dS           dsinks = -sum(p_sink * D)
        dQ = scale * dS @ K  dK = scale * dS.T @ Q      (dS times 1 - tanh**2, with softcap)

    where softmax is P without the sinks, which lse does not have. A pair that is masked contributes
    nothing, and a row that sees nothing has gradients of 0, whatever lies there.

    References
    ----------
    .. [1] T. Dao et al., "FlashAttention", 2022, appendix B.2, https://arxiv.org/abs/2205.14135
    """
    grad_out = _array("grad_out", grad_out)
    query, key, value = _array("query", query), _array("key", key), _array("value", value)
    dtype = np.dtype(np.float64 if compute_dtype is None else compute_dtype)
    asked = options_of(attention_backward, options)
    if cu_seqlens_q is None or cu_seqlens_kv is None:
        *found, pairs, dsinks = _gradients(grad_out, query, key, value, grad_lse, dtype, asked)
    else:
        found = [np.zeros(x.shape, dtype) for x in (query, key, value)]
        total, heads = query.shape[:2]
        longest = int(np.diff(_array("cu_seqlens_kv", cu_seqlens_kv)).max(initial=0))
        pairs, dsinks = np.zeros((heads, total, longest), dtype), np.zeros(heads, dtype)
        for b, rows, keys, own in _sequences(cu_seqlens_q, cu_seqlens_kv, total, heads, asked):
            do, q, k, v = (
                x.swapaxes(0, 1) for x in (grad_out[rows], query[rows], key[keys], value[keys])
            )
            dlse = None if grad_lse is None else _array("grad_lse", grad_lse)[:, rows]
            dq, dk, dv, pairs_here, dsinks_here = _gradients(do, q, k, v, dlse, dtype, own, b)
            for grad, where, part in zip(found, (rows, keys, keys), (dq, dk, dv), strict=True):
                grad[where] += part.swapaxes(0, 1)
            pairs[:, rows, : keys.stop - keys.start] += pairs_here
            dsinks = dsinks + dsinks_here
    with np.errstate(all="ignore"):
        into = (query, key, value) if grads is None else grads
        if accumulate:
            found = [g + x.astype(dtype) for g, x in zip(found, into, strict=True)]
        results = [g.astype(x.dtype) for g, x in zip(found, into, strict=True)]
        for given, result in zip(grads or (), results, strict=False):
            given[...] = result
        if return_dbias:
            bias = _array("bias", asked.bias)
            results.append(_summed_to(pairs, bias.shape).astype(bias.dtype))
        if return_dsinks:
            results.append(dsinks.astype(_array("sinks", asked.sinks).dtype))
    return tuple(results)


@takes(WeightOptions)
def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    *,
    compute_dtype: DTypeLike | None = None,
    **options: Unpack[WeightOptions],
) -> NDArray[Any]:
    """Return the probabilities with which `attention` weighs the values.

    Parameters
    ----------
    query, key, compute_dtype, **options
        As for `attention`.

    Returns
    -------
    ndarray of shape (batch, q_heads, q_len, kv_len) and the query's dtype
        A row sums to 1; to less with sinks; to 0 if it sees no key.
    """
    query, key = _array("query", query), _array("key", key)
    dtype = np.dtype(np.float64 if compute_dtype is None else compute_dtype)
    probs = _softmax(query, key, dtype, options_of(attention_weights, options))[0]
    return (probs[0] if max(query.ndim, key.ndim) == 2 else probs).astype(query.dtype)


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
    """Return what is asked of the probabilities with which `attention` weighs the values.

    Parameters
    ----------
    query, key, entropy, column_sums, row_weights, top, blocks, maximum, **options
        As for `fastattn.attention_statistics`.

    Returns
    -------
    AttentionStatistics
        As `fastattn.attention_statistics` says; computed in float64.
    """
    query, key = _array("query", query), _array("key", key)
    asked = options_of(attention_statistics, options)
    wide = np.dtype(np.float64)
    scores, seen = _scores(query, key, wide, asked)
    probs, _, lse = _softmax(query, key, wide, asked)
    seen = seen & (scores != -np.inf)  # nothing of such a key is in the row
    is_bad = np.isnan(lse) | (lse == np.inf)
    probs = np.where(seen, np.where(is_bad[..., None], np.nan, probs), 0)
    found: dict[str, Any] = {}
    with np.errstate(all="ignore"):
        if entropy:
            found["entropy"] = 0 - np.where(probs == 0, 0, probs * np.log(probs)).sum(axis=-1)
        if column_sums:
            weights = _array("row_weights", 1.0 if row_weights is None else row_weights)
            weighted = probs * weights.astype(wide)[..., None]
            found["column_sums"] = np.where(seen, weighted, 0).sum(axis=-2)
        if top is not None:
            count = min(top, scores.shape[-1])
            order = np.argsort(np.where(seen, -scores, np.inf), axis=-1, kind="stable")[..., :count]
            is_there = np.take_along_axis(seen, order, axis=-1) & ~is_bad[..., None]
            ranked = np.where(is_there, np.take_along_axis(probs, order, axis=-1), 0)
            beyond = ((0, 0),) * (probs.ndim - 1) + ((0, top - count),)
            found["top_keys"] = np.pad(np.where(is_there, order, -1), beyond, constant_values=-1)
            found["top_weights"] = np.where(is_bad[..., None], np.nan, np.pad(ranked, beyond))
        if blocks is not None:
            sums = probs
            for axis, starts in zip((-2, -1), blocks, strict=True):
                parts = np.split(sums, _array("blocks", starts)[1:], axis=axis)
                sums = np.stack([part.sum(axis=axis) for part in parts], axis=axis)
            found["blocks"] = sums
        if maximum:
            found["maximum"] = probs.max(axis=-1, initial=0)
        dtype = np.float64 if query.dtype.itemsize == 8 else np.float32
        for name, x in found.items():
            x = x[0] if max(query.ndim, key.ndim) == 2 else x
            found[name] = x.astype(np.int64 if name == "top_keys" else dtype)
    return AttentionStatistics(**found)


def _array(name: str, x: Any) -> NDArray[Any]:
    """Return the array that an argument is, or stands for."""
    return np.asarray(as_numpy(name, x))


def _gradients(
    grad_out: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    grad_lse: ArrayLike | None,
    dtype: np.dtype[Any],
    options: Options,
    batch_index: int = 0,
) -> tuple[NDArray[Any], ...]:
    """Return the gradients by query, key, value, what is added to the scores, and sinks."""
    sinks, softcap, dropout_p = options.sinks, options.softcap, options.dropout_p
    softmax, seen, lse = _softmax(query, key, dtype, options._replace(sinks=None))
    kept = _kept((*grad_out.shape[:-3], *softmax.shape[-3:]), options, batch_index)
    factor = kept.astype(dtype) / (1 - dtype.type(dropout_p) if dropout_p < 1 else 1)
    heads = softmax.shape[-3]
    queries, keys, values = (_repeat_heads(x.astype(dtype), heads) for x in (query, key, value))
    grads = _with_heads(grad_out.astype(dtype))
    with np.errstate(all="ignore"):
        p_sink = np.zeros((), dtype)
        if sinks is not None:
            sink = _array("sinks", sinks).astype(dtype)[:, None]
            p_sink = 1 / (1 + np.exp(lse - sink))[..., None]
        probs = np.where(seen, softmax * (1 - p_sink), 0)
        dprobs = np.where(seen & kept, factor * (grads @ values.swapaxes(-1, -2)), 0)
        row_dots = (probs * dprobs).sum(axis=-1, keepdims=True)
        dscores = probs * (dprobs - row_dots)
        if grad_lse is not None:
            dscores = dscores + _array("grad_lse", grad_lse).astype(dtype)[..., None] * softmax
        dpairs = dscores = np.where(seen, dscores, 0)
        if softcap is not None:
            scores = _products(query, key, dtype, options.scale)
            dscores = np.where(seen, dscores * (1 - np.tanh(scores / float(softcap)) ** 2), 0)
        dscores = dscores * dtype.type(_scale(query, options.scale))
        seen = np.broadcast_to(seen, dscores.shape)
        transposed = seen.swapaxes(-1, -2)
        dq = _weighted_sum(dscores, seen, keys)
        dk = _weighted_sum(dscores.swapaxes(-1, -2), transposed, queries)
        dv = _weighted_sum(
            (probs * factor).swapaxes(-1, -2), transposed & kept.swapaxes(-1, -2), grads
        )
        sees = seen.any(axis=-1, keepdims=True)
        dsinks = _summed_to(np.where(sees, -p_sink * row_dots, 0), (heads, 1, 1)).ravel()
    return (
        _summed_over_group(dq, query.shape),
        _summed_over_group(dk, key.shape),
        _summed_over_group(dv, value.shape),
        dpairs,
        dsinks,
    )


def dropout_mask(
    query: ArrayLike,
    key: ArrayLike,
    *,
    dropout_p: float,
    seed: int | None,
    query_offset: ArrayLike | None = None,
    key_offset: ArrayLike = 0,
    head_offset: int = 0,
    batch_offset: int = 0,
    batch_index: int = 0,
) -> NDArray[np.bool_]:
    """Return which pairs `attention` keeps.

    Parameters
    ----------
    query, key, dropout_p, seed, query_offset, key_offset, head_offset, batch_offset, batch_index
        As for `fastattn.dropout_mask`.

    Returns
    -------
    ndarray of bool, shape (batch, q_heads, q_len, kv_len)
    """
    query, key = _array("query", query), _array("key", key)
    queries, keys = _with_heads(query), _with_heads(key)
    batch_shape = np.broadcast_shapes(queries.shape[:-3], keys.shape[:-3])
    shape = (*batch_shape, *queries.shape[-3:-1], keys.shape[-2])
    options = NO_OPTIONS._replace(
        dropout_p=dropout_p,
        seed=seed,
        query_offset=query_offset,
        key_offset=key_offset,
        head_offset=head_offset,
        batch_offset=batch_offset,
    )
    kept = _kept(shape, options, batch_index)
    return kept[0] if max(query.ndim, key.ndim) == 2 else kept


def philox4x32(counter: Sequence[ArrayLike], key: Sequence[int]) -> tuple[NDArray[np.uint64], ...]:
    """Return what Philox4x32 with 7 rounds makes of counters: four random words of each [1]_.

    Parameters
    ----------
    counter : 4 arrays of int, which broadcast
        Modulo 2**32.
    key : 2 ints
        Likewise.

    Returns
    -------
    4 ndarrays of uint64
        Below 2**32.

    References
    ----------
    .. [1] J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011,
       https://doi.org/10.1145/2063384.2063405
    """
    low = np.uint64(2**32 - 1)
    high = np.uint64(32)
    x = [np.asarray(word).astype(np.uint64) & low for word in counter]
    for n in range(7):
        keys = [
            np.uint64((k + n * step) % 2**32)
            for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        ]
        first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [
            second >> high ^ x[1] ^ keys[0],
            second & low,
            first >> high ^ x[3] ^ keys[1],
            first & low,
        ]
    return tuple(np.broadcast_arrays(*x))


def _kept(shape: tuple[int, ...], options: Options, batch_index: int) -> NDArray[np.bool_]:
    """Return which pairs of the shape (*batch, q_heads, q_len, kv_len) dropout keeps."""
    dropout_p, seed = options.dropout_p, options.seed
    if seed is None:
        if dropout_p != 0:
            raise ValueError(f"seed must be given with dropout_p > 0, got dropout_p={dropout_p}")
        return np.ones(shape, bool)
    *batch_shape, q_heads, q_len, kv_len = shape
    queries, keys = (x.astype(np.int64)[..., None, None, None] for x in _offsets(options))
    batch = batch_index + options.batch_offset + np.arange(math.prod(batch_shape))
    fours = (kv_len + 6) // 4  # that hold the keys, wherever the first one stands
    counter = (
        np.arange(fours) + keys // 4,
        np.arange(q_len)[:, None] + queries,
        options.head_offset + np.arange(q_heads)[:, None, None],
        batch.reshape(batch_shape)[..., None, None, None],
    )
    words = np.stack(philox4x32(counter, divmod(int(seed), 2**32)[::-1]), axis=-1)
    kept: NDArray[np.bool_] = words >= round(float(dropout_p) * 2**32)
    places = np.broadcast_to(np.arange(kv_len) + keys % 4, shape)
    return np.take_along_axis(kept.reshape(*shape[:-1], 4 * fours), places, axis=-1)


def _softmax(
    query: NDArray[Any], key: NDArray[Any], dtype: np.dtype[Any], options: Options
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the probabilities, which pairs are seen, and the log-sum-exp; never without heads."""
    scores, seen = _scores(query, key, dtype, options)
    with np.errstate(all="ignore"):
        row_max = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
        row_max = np.where(row_max == -np.inf, dtype.type(0), row_max)
        exps = np.where(seen, np.exp(scores - row_max), 0).astype(dtype)
        row_sum = exps.sum(axis=-1, keepdims=True)
        lse = np.log(row_sum) + row_max
        denominator = row_sum
        if options.sinks is not None:
            sink = _array("sinks", options.sinks).astype(dtype)[:, None, None]
            denominator = row_sum + np.exp(sink - row_max)
        probs = exps / np.where(row_sum == 0, denominator.dtype.type(1), denominator)
    return probs, seen, lse[..., 0]


def _scores(
    query: NDArray[Any], key: NDArray[Any], dtype: np.dtype[Any], options: Options
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the scores, -inf for a pair that is not seen, and which pairs are seen."""
    q_len, kv_len = query.shape[-2], key.shape[-2]
    is_causal, window, softcap = options.is_causal, options.window, options.softcap
    positional = is_causal or window is not None or options.alibi_slopes is not None
    if options.query_offset is None and positional and q_len != kv_len:
        raise ValueError(
            "query_offset must be given with is_causal, window or alibi_slopes if q_len differs "
            f"from kv_len, got q_len={q_len}, kv_len={kv_len}"
        )
    queries, keys = (x[..., None, None, None] for x in _offsets(options))
    positions = np.arange(kv_len)
    # > 0: the key is in the future.
    distance = positions - np.arange(q_len)[:, None] + (keys - queries)

    with np.errstate(all="ignore"):
        scores = _products(query, key, dtype, options.scale)
        if softcap is not None:
            scores = float(softcap) * np.tanh(scores / float(softcap))
        seen = np.ones_like(scores, dtype=bool)
        for name, array in (("bias", options.bias), ("mask", options.mask)):
            if array is None:
                continue
            array = _array(name, array)
            if array.dtype == bool:
                seen = seen & array
            else:
                seen = seen & (array.astype(np.float64) != -np.inf)
                scores = scores + array.astype(dtype)
        if options.alibi_slopes is not None:
            slopes = _array("alibi_slopes", options.alibi_slopes).astype(dtype)[..., None, None]
            scores = scores - slopes * np.abs(distance).astype(dtype)
        left, right = (side if side is None else int(side) for side in window or (None, None))
        if is_causal:
            seen = seen & (distance <= 0)
        if left is not None:
            seen = seen & (distance >= -left)
        if right is not None:
            seen = seen & (distance <= right)
        if options.kv_lengths is not None:
            lengths = _array("kv_lengths", options.kv_lengths)
            seen = seen & (positions < lengths[..., None, None, None])

        scores = np.where(seen, scores, -np.inf)
    return scores, np.broadcast_to(seen, scores.shape)


def _offsets(options: Options) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the positions of the first query and key, or one for each element of the batch."""
    query_offset = 0 if options.query_offset is None else options.query_offset
    return _array("query_offset", query_offset), _array("key_offset", options.key_offset)


def _scale(query: NDArray[Any], scale: float | None) -> float:
    """Return what the products of query and key are multiplied by."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _products(
    query: NDArray[Any], key: NDArray[Any], dtype: np.dtype[Any], scale: float | None
) -> NDArray[Any]:
    """Return scale * query @ key.T, with an axis for heads."""
    queries = _with_heads(query.astype(dtype))
    keys = _repeat_heads(key.astype(dtype), queries.shape[-3])
    product: NDArray[Any] = _scale(query, scale) * (queries @ keys.swapaxes(-1, -2))
    return product


def _weighted_sum(weights: NDArray[Any], seen: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Return weights @ values, each row of only those values that it sees.

    0 * NaN is NaN: what is not finite reaches the rows that see it, and no others.
    """
    finite = np.isfinite(values)
    zero = values.dtype.type(0)  # NumPy 1 does not take a plain 0 for bfloat16
    with np.errstate(all="ignore"):
        result: NDArray[Any] = weights @ np.where(finite, values, zero)
        for j in np.flatnonzero(~finite.all(axis=(*range(values.ndim - 2), -1))):
            special = np.where(finite[..., j, :], zero, values[..., j, :])
            result = result + np.where(seen[..., j, None], special[..., None, :], zero)
    return result


def _sequences(
    cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike,
    total: int,
    heads: int,
    options: Options,
) -> Iterator[tuple[int, slice, slice, Options]]:
    """Yield each sequence's number, its rows of queries and of keys, and its own options."""
    q_starts = _array("cu_seqlens_q", cu_seqlens_q)
    kv_starts = _array("cu_seqlens_kv", cu_seqlens_kv)
    longest = int(np.diff(kv_starts).max(initial=0))
    for b in range(len(q_starts) - 1):
        rows = slice(q_starts[b], q_starts[b + 1])
        keys = slice(kv_starts[b], kv_starts[b + 1])
        own: dict[str, Any] = {}
        for name in ("mask", "bias"):
            if getattr(options, name) is not None:
                pairs = _array(name, getattr(options, name))
                whole = np.broadcast_to(pairs, (heads, total, longest))
                own[name] = whole[:, rows, : keys.stop - keys.start]
        for name in ("query_offset", "key_offset", "kv_lengths"):
            if getattr(options, name) is not None:
                numbers = _array(name, getattr(options, name))
                own[name] = np.broadcast_to(numbers, len(q_starts) - 1)[b]
        if options.alibi_slopes is not None:
            slopes = _array("alibi_slopes", options.alibi_slopes)
            own["alibi_slopes"] = slopes[b] if slopes.ndim == 2 else slopes
        yield b, rows, keys, options._replace(**own)


def _summed_over_group(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the sums over what was broadcast from `shape`, and over the heads that share one."""
    heads = shape[-3] if shape[2:] else 1
    array = _with_heads(array)
    if heads and array.shape[-3] != heads:
        grouped = (*array.shape[:-3], heads, array.shape[-3] // heads, *array.shape[-2:])
        array = array.reshape(grouped).sum(axis=-3)
    return _summed_to(array, (*shape[:-3], heads, *shape[-2:])).reshape(shape)


def _summed_to(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the sums of the array over the axes that were broadcast from `shape`."""
    extra = array.ndim - len(shape)
    axes = tuple(
        axis
        for axis, size in enumerate(array.shape)
        if axis < extra or (shape[axis - extra] == 1 and size != 1)
    )
    summed: NDArray[Any] = array.sum(axis=axes, keepdims=True)
    return summed.reshape(shape)


def _with_heads(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array with an axis for heads."""
    return array.reshape((1,) * (3 - array.ndim) + array.shape)


def _repeat_heads(array: NDArray[Any], q_heads: int) -> NDArray[Any]:
    """Return the array with each head repeated for the query heads that share it."""
    array = _with_heads(array)
    return array.repeat(q_heads // max(array.shape[-3], 1), axis=-3)
