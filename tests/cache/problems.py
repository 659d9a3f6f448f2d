# SPDX-License-Identifier: Apache-2.0
"""What tests of caches share: problems, caches that hold them, and whether two are the same."""

import io
import pickle

import ml_dtypes
import numpy as np
import pytest

from fastattn import KVCache
from tests.support.correctness import assert_within_gate
from tests.support.problems import make_problem

BFLOAT16 = ml_dtypes.bfloat16
CACHES = (np.float32, np.float16, BFLOAT16, np.int8)
NAN, INF = np.nan, np.inf
every_isa = pytest.mark.usefixtures("isa")
every_dtype = pytest.mark.parametrize("dtype", CACHES, ids=lambda dtype: np.dtype(dtype).name)


def given_to(dtype):
    """Return the dtype of the keys and values of a cache's problems."""
    return np.float32 if dtype == np.int8 else dtype


def held(x, dtype):
    """Return what a cache of that dtype makes of x."""
    if dtype != np.int8:
        return x
    x = x.astype(np.float32)
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    whole = np.rint(x / np.where(scale == 0, 1, scale))
    return whole.astype(np.int8) * scale.astype(float)


def check(cache, query, key, value, *, batch=None, **options):
    """Attend, and assert for each sequence that it is attention over its own keys and values.

    key and value are those of positions from 0, evicted ones included and of any value.
    """
    result = cache.attend(query, return_lse=True, **options)
    lengths, begins = cache.lengths, cache.begins
    options = {"is_causal": True} | options
    for name in {"out", "sequences"} & {*options}:
        del options[name]
    for b, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
        own = dict(options)
        for name in {"mask", "bias"} & {*own}:
            whole = np.broadcast_to(own[name], (*query.shape[:3], lengths.max()))
            own[name] = whole[b, ..., begin:length]
        if np.ndim(own.get("alibi_slopes")) == 2:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        own["query_offset"] = int(length - query.shape[2] - begin)
        parts = (x[b, :, begin:length] for x in (key, value))
        assert_within_gate(tuple(x[b] for x in result), query[b], *parts, **own)
    return result


def problem(dtype, tokens=300, q_len=1, *, batch=2, heads=4, kv_heads=2, dims=(16, 24), seed=0):
    return make_problem(
        q_len,
        tokens,
        *dims,
        heads=heads,
        kv_heads=kv_heads,
        batch=(batch,),
        dtype=given_to(dtype),
        mean=1.0,
        seed=seed,
    )


def filled(key, value, dtype=None, **options):
    """Return a cache that holds them."""
    batch, kv_heads, _, head_dim = key.shape
    cache = KVCache(
        batch,
        kv_heads,
        head_dim,
        value_head_dim=value.shape[-1],
        dtype=key.dtype if dtype is None else dtype,
        **options,
    )
    cache.append(key, value)
    return cache


def pages_of(dtype, pages, kv_heads=2, dims=(16, 24), fill=NAN, page_size=128):
    """Return the arrays of a pool, as from_pages takes them."""
    shape = (pages, kv_heads, page_size)
    fill = 99 if dtype == np.int8 else fill
    arrays = {
        name: np.full((*shape, dim), fill, dtype)
        for name, dim in zip(("key", "value"), dims, strict=True)
    }
    if dtype == np.int8:
        arrays |= {name: np.full(shape, NAN, np.float32) for name in ("key_scale", "value_scale")}
    return arrays


def state(cache):
    """Return all that a cache is."""
    file = io.BytesIO()
    cache.save(file)
    pool = getattr(cache, "_cache", cache)
    file.seek(0)
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays} | {"free": np.array(pool.free_pages)}


def assert_same_state(cache, expected):
    actual = state(cache)
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def reopened(cache):
    file = io.BytesIO()
    cache.save(file)
    file.seek(0)
    return type(cache).load(file)
