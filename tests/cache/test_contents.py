# SPDX-License-Identifier: Apache-2.0
"""What a cache attends to is what was appended, as it was or in int8."""
# ruff: noqa: E501 - the tables of errors have a line per error

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import KVCache, PagedKVCache
from tests.cache.problems import (
    BFLOAT16,
    INF,
    NAN,
    check,
    every_dtype,
    every_isa,
    filled,
    held,
    pages_of,
    problem,
)
from tests.support.correctness import assert_same_bits, assert_within_gate

# What is attended to is what was appended.


@pytest.mark.promise("cache-attends-to-what-it-holds")
@every_isa
@every_dtype
def test_token_by_token(dtype):
    query, key, value = problem(dtype, 300, 300)
    cache = KVCache(2, 2, 16, value_head_dim=24, dtype=dtype)
    full = held(key, dtype), held(value, dtype)
    at = 0
    for tokens in (5, 1, 1, 120, 1, 1, 1, 130, 20, 0, 17, 1, 2):
        cache.append(key[:, :, at : at + tokens], value[:, :, at : at + tokens])
        at += tokens
        assert_array_equal(cache.lengths, [at, at])
        check(cache, query[:, :, at - max(tokens, 1) : at], *full)
    assert at == 300


OPTIONS = {
    "plain": {},
    "not causal": {"is_causal": False},
    "window": {"window": (50, 0)},
    "window, not causal": {"window": (150, 3), "is_causal": False},
    "scale, softcap": {"scale": 0.5, "softcap": 2.0},
    "alibi": {"alibi_slopes": np.array([0.5, 0.1, 0.0, 0.01])},
    "alibi by batch": {"alibi_slopes": np.random.default_rng(0).random((3, 4)) / 10},
    "sinks": {"sinks": np.array([0.0, 3.0, -INF, 1.0])},
    "bool mask": {"mask": np.random.default_rng(1).random((3, 1, 1, 290)) < 0.5},
    "mask, bias": {
        "mask": np.where(np.random.default_rng(2).random((3, 4, 1, 290)) < 0.5, -INF, 1.0),
        "bias": np.random.default_rng(3).normal(size=(4, 1, 290)),
    },
}


@pytest.mark.promise("cache-attends-to-what-it-holds")
@every_isa
@every_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("evicted", [False, True])
def test_options(dtype, options, evicted):
    for q_len in (1, 3, 20):
        query, key, value = problem(dtype, 290, q_len, batch=3)
        cache = KVCache(3, 2, 16, value_head_dim=24, dtype=dtype)
        cache.append(key, value, lengths=[290, 131, 17])
        if evicted:
            cache.evict([140, 200, 5])
        check(cache, query, held(key, dtype), held(value, dtype), **options)


@pytest.mark.promise("cache-attends-to-what-it-holds")
@every_isa
@pytest.mark.parametrize(
    ("dtype", "query_dtype"),
    [(np.float16, np.float32), (BFLOAT16, np.float32), (np.int8, np.float16), (np.int8, BFLOAT16)],
)
def test_queries_of_another_dtype(dtype, query_dtype):
    query, key, value = problem(dtype)
    query = query.astype(query_dtype)
    out, lse = check(filled(key, value, dtype), query, held(key, dtype), held(value, dtype))
    assert (out.dtype, lse.dtype) == (query_dtype, np.float32)


@every_isa
@every_dtype
def test_heads(dtype):
    for heads, kv_heads in ((1, 1), (8, 1), (6, 2), (3, 3)):
        query, key, value = problem(dtype, heads=heads, kv_heads=kv_heads)
        check(filled(key, value, dtype), query, held(key, dtype), held(value, dtype))


@pytest.mark.promise("cache-attends-to-what-it-holds")
@every_isa
@every_dtype
def test_ragged_appends(dtype):
    query, key, value = problem(dtype, 400, batch=3)
    cache = KVCache(3, 2, 16, value_head_dim=24, dtype=dtype)
    rng = np.random.default_rng(0)
    lengths = np.zeros(3, int)
    for tokens in (2, 200, 1, 1, 2, 130, 3):
        counts = rng.integers(0, tokens + 1, 3)
        new = [np.full((3, 2, tokens, x.shape[-1]), NAN, x.dtype) for x in (key, value)]
        for b in range(3):
            for to, x in zip(new, (key, value), strict=True):
                to[b, :, : counts[b]] = x[b, :, lengths[b] : lengths[b] + counts[b]]
        cache.append(*new, counts)
        lengths += counts
        assert_array_equal(cache.lengths, lengths)
    check(cache, query, held(key, dtype), held(value, dtype))


@pytest.mark.promise("empty-row-is-zero")
@every_isa
@every_dtype
def test_nothing_yet(dtype):
    query, key, value = problem(dtype, q_len=3)
    cache = KVCache(2, 2, 16, value_head_dim=24, dtype=dtype)
    for _ in range(2):
        out, lse = cache.attend(query, return_lse=True, sinks=np.zeros(4))
        assert (out == 0).all()
        assert (lse == -INF).all()
        cache.append(key[:, :, :0], value[:, :, :0])
    cache.append(key, value, [1, 0])
    out, lse = cache.attend(query, return_lse=True)
    assert (out[1] == 0).all()
    assert (lse[1] == -INF).all()
    assert (out[0, :, :2] == 0).all()  # these stand before the first token
    shared = cache.attend(query, sinks=np.full(4, 9.0))  # not as while there was no key
    assert (abs(shared[0, :, 2]) < abs(out[0, :, 2])).all()
    assert_array_equal(
        out[0, :, 2], held(value, dtype)[0, :, 0].repeat(2, axis=0).astype(out.dtype)
    )
    assert cache.attend(query[:, :, :0]).shape == (2, 4, 0, 24)
    assert PagedKVCache(2, 16).attend(np.zeros((0, 4, 1, 16), np.float32)).shape == (0, 4, 1, 16)


@pytest.mark.promise("short-chunks-within-gate")
@every_isa
@every_dtype
def test_a_step_is_the_last_row_of_the_whole(dtype):
    query, key, value = problem(dtype, 270, 270, dims=(64, 64))
    cache = filled(key[:, :, :-1], value[:, :, :-1], dtype)
    cache.append(key[:, :, -1:], value[:, :, -1:])
    step = check(cache, query[:, :, -1:], held(key, dtype), held(value, dtype))
    whole = check(cache, query, held(key, dtype), held(value, dtype))
    tolerance = 32 * float(ml_dtypes.finfo(step[0].dtype).eps)
    for one, all_rows in zip(step, whole, strict=True):
        last = all_rows[:, :, -1:].astype(float)
        assert_allclose(one.astype(float), last, atol=tolerance, rtol=tolerance)


@pytest.mark.promise("unused-rows-are-not-read")
@every_isa
@every_dtype
def test_unused_rows_change_no_bit(dtype):
    query, key, value = problem(dtype, 300)
    results = []
    for fill in (0, NAN, INF):
        arrays = pages_of(dtype, 8, fill=fill)
        if fill == 0 and dtype == np.int8:
            arrays = {name: np.zeros_like(x) for name, x in arrays.items()}
        cache = PagedKVCache.from_pages(**arrays, tables=np.zeros((2, 0), int), lengths=0)
        cache.append(key, value, [300, 140])
        cache.evict([290, 3])
        results.append(cache.attend(query, return_lse=True))
        assert np.isfinite(results[-1][0].astype(float)).all()
        assert_same_bits(results[-1], results[0])


@pytest.mark.promise("bitwise-strides", "out-is-written-in-place")
def test_strides_and_array_likes():
    query, key, value = problem(np.float32)
    expected = filled(key, value).attend(query)
    flipped = [np.ascontiguousarray(x[..., ::-1])[..., ::-1] for x in (query, key, value)]
    swapped = [x.astype(x.dtype.newbyteorder("S")) for x in (query, key, value)]
    heads = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (query, key, value)]
    for q, k, v in (flipped, swapped, heads):
        cache = KVCache(2, 2, 16, value_head_dim=24, dtype="float32")
        cache.append(k, v)
        assert_same_bits(cache.attend(q), expected)
    out = np.empty((2, 4, 24, 2), np.float32).swapaxes(2, 3)[:, :, :1]
    with pytest.raises(ValueError, match="contiguous"):
        filled(key, value).attend(query, out=out)
    out = np.empty_like(expected)
    assert filled(key, value).attend(query, out=out) is out
    assert_same_bits(out, expected)


# int8.


@pytest.mark.promise("int8-within-half-a-scale")
def test_int8_holds_what_it_says():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, 6, 8)).astype(np.float32)
    x[0, 0, 1] = 0
    x[0, 0, 2] = np.finfo(np.float32).max
    x[0, 0, 3] = np.finfo(np.float32).smallest_subnormal * np.arange(180, 188)
    x[0, 0, 4] *= np.float32(1e-37)
    arrays = pages_of(np.int8, 1, 1, (8, 8))
    cache = PagedKVCache.from_pages(**arrays, tables=np.zeros((1, 0), int), lengths=0)
    cache.append(x, x)
    for name in ("key", "value"):
        whole, scale = arrays[name][0, 0, :6], arrays[f"{name}_scale"][0, 0, :6]
        assert (np.abs(whole.astype(int)) <= 127).all()
        wide = x[0, 0].astype(float)
        largest = np.abs(wide).max(axis=-1)
        usual = [0, 1, 2, 5]
        assert_allclose(scale[usual], largest[usual] / 127, rtol=1e-6)
        assert scale[1] == 0
        error = np.abs(whole * scale[:, None].astype(float) - wide)
        assert (error <= 0.5001 * scale[:, None]).all()
        assert (np.abs(whole[[0, 2, 5]]).max(axis=-1) == 127).all()


@pytest.mark.promise("int8-within-half-a-scale")
@every_isa
@pytest.mark.parametrize(
    ("outlier", "most", "mean"),
    [(1, 0.0035, 0.0006), (20, 0.17, 0.015)],
    ids=["Gaussian", "outlier channel"],
)
def test_int8_error(outlier, most, mean):
    """Against the numbers before they were rounded; the bounds are about 1.5 times what was seen."""
    query, key, value = problem(np.int8, 1000, dims=(64, 64), heads=8)
    value -= 1
    key[..., 5] *= outlier
    out = filled(key, value, np.int8).attend(query)
    exact = fastattn.reference.attention(query.astype(float), key, value)
    error = np.abs(out - exact)
    assert error.max() < most
    assert error.mean() < mean


@pytest.mark.promise("cache-queries-stand-where-told")
@every_isa
@every_dtype
@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_queries_that_stand_elsewhere(dtype, q_len):
    query, key, value = problem(dtype, 290, q_len, batch=3)
    cache = KVCache(3, 2, 16, value_head_dim=24, dtype=dtype)
    cache.append(key, value)
    usual = cache.attend(query, return_lse=True)
    assert_same_bits(cache.attend(query, return_lse=True, query_offset=290 - q_len), usual)
    slopes = np.array([0.5, 0.1, 0.0, 0.01])
    offsets = np.array([-5, 100, 400])
    for options in ({}, {"window": (30, 0)}, {"alibi_slopes": slopes, "is_causal": False}):
        together = cache.attend(query, query_offset=offsets, return_lse=True, **options)
        for b, offset in enumerate(offsets):
            own = {"is_causal": True, "query_offset": int(offset)} | options
            parts = (held(x, dtype)[b] for x in (key, value))
            assert_within_gate(tuple(x[b] for x in together), query[b], *parts, **own)
    # A cache of some of the keys, and one of the others: each counts from its own first key.
    first, second = (KVCache(3, 2, 16, value_head_dim=24, dtype=dtype) for _ in range(2))
    first.append(key[:, :, :200], value[:, :, :200])
    second.append(key[:, :, 200:], value[:, :, 200:])
    offset = 290 - q_len
    parts = (
        first.attend(query, query_offset=offset, return_lse=True),
        second.attend(query, query_offset=offset - 200, return_lse=True),
    )
    got = fastattn.merge(*parts)
    assert_allclose(*(x[0].astype(float) for x in (got, usual)), atol=2e-2)
    assert_allclose(got[1], usual[1], atol=1e-2)
