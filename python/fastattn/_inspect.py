# SPDX-License-Identifier: Apache-2.0
"""What to look at: the probabilities, the pairs that dropout keeps, how a call is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from fastattn import _core, reference
from fastattn._arguments import (
    FARTHEST,
    check,
    countable,
    counter,
    dropout,
    floats,
    number_of_threads,
    per_batch,
    sizes,
)
from fastattn._arrays import as_numpy, library_of
from fastattn._options import ARRAYS, AttentionOptions, WeightOptions, options_of, takes
from fastattn._report import Report

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@takes(WeightOptions)
def attention_weights(
    query: ArrayLike, key: ArrayLike, **options: Unpack[WeightOptions]
) -> NDArray[Any]:
    """Compute the probabilities with which `attention` weighs the values, for looking at.

    This is the one call whose memory grows with q_len x kv_len: that is what it returns. It is
    computed by the definition, in float64.

    Parameters
    ----------
    query, key, mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, sinks, \
kv_lengths, key_offset
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
    library = library_of(query)
    q, k = floats("query", library.array("query", query)), floats("key", key)
    asked = options_of(attention_weights, options)
    named = {name: getattr(asked, name) for name in asked._fields if name in options}
    named |= {name: as_numpy(name, x) for name, x in named.items() if name in ARRAYS}
    check(q, k, k, asked._replace(**named) if named else asked)  # any value of the right shape
    weights: NDArray[Any] = reference.attention_weights(q, k, **named)
    (weights,) = library.to_caller(None, weights)
    return weights


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
    """Return which pairs `attention` keeps, for looking at or for another implementation.

    Like `attention_weights`, it needs memory for every pair.

    Parameters
    ----------
    query : array of shape (batch, q_heads, q_len, head_dim)
        Only the shapes matter; axes of the batch that only value has are not there.
    key : array of shape (batch, kv_heads, kv_len, head_dim)
    dropout_p, seed, query_offset, key_offset, head_offset, batch_offset
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
    A pair is kept iff its number is at least ``round(dropout_p * 2**32)``. The numbers of the keys
    at positions 4 n to 4 n + 3, where key j stands at ``j + key_offset``, are the four words that
    Philox4x32 with 7 rounds [1]_ gives for the key seed and the counter ``(n, i + query_offset,
    query head + head_offset, batch index + batch_offset)``, each modulo 2**32.

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
    library = library_of(query)
    q, k = floats("query", library.array("query", query)), floats("key", key)
    shapes = sizes(q.shape, k.shape, k.shape)
    dropout_p, seed = dropout(dropout_p, seed)
    if query_offset is not None:
        query_offset = per_batch("query_offset", query_offset, shapes, -FARTHEST, FARTHEST, 0)
    first_key = per_batch("key_offset", key_offset, shapes, -FARTHEST, FARTHEST, 0)
    head_offset = counter("head_offset", head_offset)
    batch_offset = counter("batch_offset", batch_offset)
    batch_index = counter("batch_index", batch_index)
    kept: NDArray[np.bool_] = reference.dropout_mask(
        q,
        k,
        dropout_p=dropout_p,
        seed=seed,
        query_offset=query_offset,
        key_offset=0 if first_key is None else first_key,
        head_offset=head_offset,
        batch_offset=batch_offset,
        batch_index=batch_index,
    )
    (kept,) = library.to_caller(None, kept)
    return kept


@takes(AttentionOptions)
def explain(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    threads: int | None = None,
    **options: Unpack[AttentionOptions],
) -> Report:
    """Say how `attention` would compute a call, without computing it.

    Parameters
    ----------
    query, key, value, mask, bias, scale, is_causal, query_offset, window, softcap, alibi_slopes, \
sinks, kv_lengths, dropout_p, seed, key_offset, head_offset, batch_offset
        As for `attention`.
    threads : int, optional
        How the call would run with so many threads, which this machine need not have; with those
        at hand unless given. Not for arrays on a GPU.

    Returns
    -------
    dict
        Its str() is the report. `kernel` is "tiled", or "decode" where the tiles are counted as
        if it were tiled. `tiles` are counted over all heads and batch elements, of
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
    asked = options_of(explain, options)
    library = library_of(query)
    if library.on_gpu:
        from fastattn import cuda

        given: Any = options if threads is None else {**options, "threads": threads}
        return cuda.explain(query, key, value, **given)
    q, k, v, shapes, checked = check(library.array("query", query), key, value, asked)
    countable(shapes)
    asked_of = 0 if threads is None else number_of_threads("threads", threads)
    plan = _core.explain(q, k, v, shapes.batch_shape, checked, asked_of)
    skipped = plan["tiles_skipped"] / plan["tiles"] if plan["tiles"] else 0.0
    return Report(
        "attention",
        {
            "kernel": plan["kernel"],
            "isa": plan["isa"],
            "dtype": str(q.dtype),
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
