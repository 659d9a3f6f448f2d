# SPDX-License-Identifier: Apache-2.0
"""What a cache attends to is all that was appended, whatever happened to it in between."""
# ruff: noqa: E501 - the tables of errors have a line per error

import ast
import copy
import inspect
import io
import pickle
import subprocess
import sys
import traceback

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_bits, assert_within_gate, make_problem
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import KVCache, PagedKVCache, _kv_cache

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


# Less: truncate, evict, capacity.


@pytest.mark.promise("truncate-undoes-append")
@every_dtype
def test_truncate_is_as_if_never_appended(dtype):
    query, key, value = problem(dtype, 300)
    cache = filled(key, value, dtype)
    cache.truncate([140, 128])
    assert_array_equal(cache.lengths, [140, 128])
    expected = KVCache(2, 2, 16, value_head_dim=24, dtype=dtype)
    expected.append(key, value, [140, 128])
    assert_same_bits(cache.attend(query), expected.attend(query))
    for x in (cache, expected):
        x.append(key[:, :, 7:9], value[:, :, 7:9])
    assert_same_bits(cache.attend(query), expected.attend(query))
    cache.truncate(0)
    assert_array_equal(cache.lengths, [0, 0])
    cache.append(key, value)
    check(cache, query, held(key, dtype), held(value, dtype))


@pytest.mark.promise("cache-keeps-positions")
def test_evict_keeps_positions_and_frees_pages():
    query, key, value = problem(np.float32, 1000, 4)
    cache = PagedKVCache(2, 16, value_head_dim=24)
    for _ in range(2):
        cache.add()
    cache.append(key, value)
    assert (cache.used_pages, cache.free_pages) == (16, 0)
    cache.evict([500, 2000])
    assert_array_equal(cache.lengths, [1000, 1000])
    assert_array_equal(cache.begins, [500, 0])
    assert cache.used_pages == 5 + 8
    check(cache, query, key, value, window=(600, 0), alibi_slopes=np.ones(4) / 100)
    cache.evict(1, sequences=[1])
    assert_array_equal(cache.begins, [500, 999])
    cache.evict(200)
    assert_array_equal(cache.begins, [800, 999])
    assert cache.used_pages == 2 + 1
    check(cache, query, key, value)
    cache.evict(0)
    assert cache.used_pages == 2  # what comes next goes on in their last pages
    assert (cache.attend(query) == 0).all()
    cache.truncate(1000)
    cache.append(key[:, :, :30], value[:, :, :30])
    check(cache, query, *(np.concatenate([x, x[:, :, :30]], axis=2) for x in (key, value)))
    cache.evict(0)
    cache.append(key[:, :, :122], value[:, :, :122])
    assert_array_equal(cache.lengths, [1152, 1152])  # 9 pages
    cache.evict(0)
    assert cache.used_pages == 0


@pytest.mark.promise("capacity-is-kept", "cache-keeps-positions")
def test_a_window_slides_for_ever():
    query, key, value = problem(np.float32, 700)
    cache = KVCache(2, 2, 16, value_head_dim=24, capacity=100)
    nbytes = cache.nbytes
    for start in range(0, 700, 7):
        cache.evict(93)
        cache.append(key[:, :, start : start + 7], value[:, :, start : start + 7])
        assert_array_equal(cache.begins, [max(0, start + 7 - 100)] * 2)
        if start % 49 == 0:
            check(cache, query, key, value)
    assert cache.nbytes == nbytes
    windowed = filled(key, value).attend(query, window=(99, 0))
    assert_allclose(cache.attend(query), windowed, atol=1e-6)


@pytest.mark.promise("capacity-is-kept")
@pytest.mark.parametrize("capacity", [1, 2, 127, 128, 129, 130, 300])
def test_capacity_has_room_wherever_the_tokens_lie(capacity):
    key = np.zeros((2, 1, capacity, 1), np.float32)
    for offset in (0, 1, 126, 127):
        cache = KVCache(2, 1, 1, capacity=capacity)
        for _ in range(offset):
            cache.append(key[:, :, :1], key[:, :, :1])
            cache.evict(0)
        cache.append(key, key)
        before = state(cache)
        with pytest.raises(MemoryError, match="capacity must be"):
            cache.append(key[:, :, :1], key[:, :, :1], [0, 1])
        assert_same_state(cache, before)
        cache.reorder([0, 0])
        cache.truncate(offset)
        cache.append(key, key)


@pytest.mark.promise("append-copies-no-history")
def test_growth():
    _, key, value = problem(np.float32, 1)
    cache = KVCache(2, 2, 16, value_head_dim=24)
    assert cache.nbytes == 0
    sizes = []
    for _ in range(1100):
        cache.append(key, value)
        sizes.append(cache.nbytes)
    assert sizes == sorted(sizes)
    page = 2 * 128 * (16 + 24) * 4
    assert sorted(set(sizes)) == [page * n for n in (2, 4, 8, 16, 32)]
    assert KVCache(2, 2, 16, capacity=128).nbytes == 4 * 2 * 128 * 32 * 4


def test_growth_leaves_no_page_behind():
    _, key, value = problem(np.float32, 600, batch=1)
    cache = PagedKVCache(2, 16, value_head_dim=24)
    cache.add()
    pages = []
    for count in (100, 100, 100, 300, 300):
        cache.append(key, value, count)
        pages.append((cache.used_pages, cache.free_pages))
    assert pages == [(1, 0), (2, 0), (3, 1), (5, 3), (8, 0)]


# Sharing.


@pytest.mark.promise("sharing-changes-no-bit")
@every_isa
@every_dtype
def test_shared_or_not_is_the_same(dtype):
    query, key, value = problem(dtype, 330, batch=4, q_len=2)
    key[:, :, :290], value[:, :, :290] = key[0, :, :290], value[0, :, :290]
    ids = []
    shared, apart = (PagedKVCache(2, 16, value_head_dim=24, dtype=dtype) for _ in range(2))
    prompt = shared.add()
    shared.append(key[:1, :, :290], value[:1, :, :290])
    ids = [prompt, *(shared.add(prompt) for _ in range(3))]
    for _ in ids:
        apart.add()
    apart.append(key[:, :, :290], value[:, :, :290])
    assert (shared.used_pages, apart.used_pages) == (3, 12)
    options = {"return_lse": True, "alibi_slopes": np.full(4, 0.01)}
    assert_same_bits(shared.attend(query, **options), apart.attend(query, **options))
    for start in range(290, 330, 4):
        for cache in (shared, apart):
            cache.append(key[:, :, start : start + 4], value[:, :, start : start + 4])
        assert_same_bits(shared.attend(query, **options), apart.attend(query, **options))
    assert (shared.used_pages, apart.used_pages) == (2 + 4, 12)
    check(shared, query, held(key, dtype), held(value, dtype))


def alone(cache, sequence, query, key, value, **options):
    """Attend in a cache that holds one of the sequences and nothing else."""
    i = cache.sequences.index(sequence)
    length, begin = int(cache.lengths[i]), int(cache.begins[i])
    only = PagedKVCache(2, 16, value_head_dim=24, dtype=cache.dtype, page_size=cache.page_size)
    only.add()
    only.append(key[:, :, :length], value[:, :, :length])
    only.evict(length - begin)
    return only.attend(query, **options)


@pytest.mark.promise("sharing-changes-no-bit")
@every_isa
@every_dtype
@pytest.mark.parametrize(
    ("q_len", "heads", "page_size", "window", "keep"),
    [
        (1, 8, 128, None, 10**6),
        (2, 2, 128, (500, 0), 10**6),
        (3, 4, 256, None, 300),
        (4, 12, 128, (None, 2), 900),  # more rows than run in the few-queries form
    ],
)
def test_a_tree_of_forks(dtype, q_len, heads, page_size, window, keep):
    """Sequences that share some of their pages are attended together, and yet as if alone."""
    rng = np.random.default_rng(q_len)
    cache = PagedKVCache(2, 16, value_head_dim=24, dtype=dtype, page_size=page_size)
    given, tokens = given_to(dtype), {}

    def grow(sequence, count):
        new = [rng.normal(1, 1, (1, 2, count, dim)).astype(given) for dim in (16, 24)]
        cache.append(*new, sequences=[sequence])
        before = tokens.get(sequence, [x[:, :, :0] for x in new])
        tokens[sequence] = [np.concatenate(x, axis=2) for x in zip(before, new, strict=True)]

    for length in (1, 950, 1500):
        root = cache.add()
        grow(root, length)
        for shared in (length, *range(100, length, 128)[:7]):
            fork = cache.add(root, shared)
            tokens[fork] = [x[:, :, :shared] for x in tokens[root]]
            grow(fork, int(rng.integers(0, 200)))
            twig = cache.add(fork)
            tokens[twig] = tokens[fork]
            grow(twig, int(rng.integers(1, 70)))
    cache.evict(keep, sequences=cache.sequences[::3])
    ids = rng.permutation(cache.sequences).tolist()
    query = rng.normal(size=(len(ids), heads, q_len, 16)).astype(given)
    options = {"return_lse": True, "window": window}
    together = cache.attend(query, sequences=ids, **options)
    for b, sequence in enumerate(ids):
        expected = alone(cache, sequence, query[b : b + 1], *tokens[sequence], **options)
        assert_same_bits(tuple(x[b : b + 1] for x in together), expected)
    longest = max(x.shape[2] for x, _ in tokens.values())
    key, value = (
        np.concatenate(
            [
                np.pad(
                    tokens[i][part],
                    [(0, 0)] * 2 + [(0, longest - tokens[i][part].shape[2])] + [(0, 0)],
                )
                for i in cache.sequences
            ]
        )
        for part in (0, 1)
    )
    check(cache, query, held(key, dtype), held(value, dtype), window=window)


@pytest.mark.promise("unused-rows-are-not-read", "sharing-changes-no-bit")
@every_isa
@every_dtype
def test_some_pages_are_shared_and_others_do_not_exist(dtype):
    """What a table says beyond a length is never followed, not even for its neighbours' sake."""
    lengths = np.array([130, 700, 300, 701, 260, 1000])
    query, key, value = problem(dtype, 1024, batch=6, heads=8)
    key[:, :, :256], value[:, :, :256] = key[0, :, :256], value[0, :, :256]
    arrays = pages_of(dtype, 60)
    cache = PagedKVCache.from_pages(**arrays, tables=np.zeros((6, 0), int), lengths=0)
    cache.append(key, value, lengths)
    tables = np.full((6, 8), 2**40)
    for b, length in enumerate(lengths):
        used = -(-length // 128)
        tables[b, :used] = cache._table[b, :used]
        tables[b, : min(used, 2 if length >= 256 else 1)] = cache._table[
            1, : min(used, 2 if length >= 256 else 1)
        ]
    shared = PagedKVCache.from_pages(**arrays, tables=tables, lengths=lengths)
    assert shared.used_pages < cache.used_pages
    for window in (None, (400, 0)):
        options = {"return_lse": True, "window": window}
        assert_same_bits(shared.attend(query, **options), cache.attend(query, **options))


@pytest.mark.promise("shared-pages-are-copied-on-write")
def test_copied_when_written_and_not_before():
    query, key, value = problem(np.float32, 200, batch=1)
    other, other_value = -key, value + 1
    cache = PagedKVCache(2, 16, value_head_dim=24, pages=5)
    first = cache.add()
    cache.append(key, value)
    second = cache.add(first, 150)
    third = cache.add(first, 128)
    assert cache.used_pages == 2
    before = cache.attend(query, sequences=[first])
    cache.append(other[:, :, :1], other_value[:, :, :1], sequences=[third])
    assert cache.used_pages == 3  # a page begins: nothing to copy
    cache.append(other[:, :, :10], other_value[:, :, :10], sequences=[second])
    assert cache.used_pages == 4
    assert_same_bits(cache.attend(query, sequences=[first]), before)
    cache.append(key[:, :, :10], value[:, :, :10], sequences=[first])
    assert cache.used_pages == 4  # now nobody else's
    for sequence, length, (more, more_value), count in (
        (first, 200, (key, value), 10),
        (second, 150, (other, other_value), 10),
        (third, 128, (other, other_value), 1),
    ):
        alone = filled(
            np.concatenate([key[:, :, :length], more[:, :, :count]], axis=2),
            np.concatenate([value[:, :, :length], more_value[:, :, :count]], axis=2),
        )
        assert_same_bits(cache.attend(query, sequences=[sequence]), alone.attend(query))
    cache.free(first)
    assert cache.used_pages == 3
    cache.free(second)
    cache.free(third)
    assert (cache.used_pages, cache.free_pages) == (0, 5)


@pytest.mark.promise("shared-pages-are-copied-on-write")
def test_the_last_writer_keeps_the_page():
    """Sharers that append in one call need one page less than there are of them."""
    _, key, value = problem(np.float32, 10, batch=3)
    cache = PagedKVCache(2, 16, value_head_dim=24, pages=3)
    prompt = cache.add()
    cache.append(key[:1], value[:1])
    cache.add(prompt)
    cache.add(prompt)
    cache.append(key, value)
    assert cache.free_pages == 0
    cache.free(prompt)
    cache.add(1)
    cache.add(1)
    before = state(cache)
    with pytest.raises(MemoryError, match="needs 2 more, got pages=3, 1 of them free"):
        cache.append(key, value, sequences=[1, 3, 4])
    assert_same_state(cache, before)
    cache.append(key[:2], value[:2], sequences=[4, 1], lengths=[3, 0])


@pytest.mark.promise("reorder-takes-everything-along")
@every_isa
def test_beam_search():
    rng = np.random.default_rng(0)
    beams, steps = 4, 150
    cache = KVCache(beams, 2, 8, capacity=120 + steps)
    key = rng.normal(size=(beams, 2, 120, 8)).astype(np.float32)
    cache.append(key, key)
    history = key
    for step in range(steps):
        new = rng.normal(size=(beams, 2, 1, 8)).astype(np.float32)
        indices = rng.integers(0, beams, beams)
        cache.reorder(indices)
        cache.append(new, new)
        history = np.concatenate([history[indices], new], axis=2)
        if step % 15 == 0:
            query = rng.normal(size=(beams, 4, 1, 8)).astype(np.float32)
            check(cache, query, history, history)
            assert_same_bits(cache.attend(query), filled(history, history).attend(query))
    cache.reorder(2)
    assert_same_bits(
        cache.attend(query[[0] * beams]),
        filled(history[[2] * beams], history[[2] * beams]).attend(query[[0] * beams]),
    )


@pytest.mark.promise("reorder-takes-everything-along")
def test_reorder_takes_lengths_and_begins_along():
    query, key, value = problem(np.float32, 300, batch=3)
    cache = KVCache(3, 2, 16, value_head_dim=24)
    cache.append(key, value, [300, 0, 140])
    cache.evict([10, 10, 200])
    cache.reorder([2, 0, 1])
    assert_array_equal(cache.lengths, [140, 300, 0])
    assert_array_equal(cache.begins, [0, 290, 0])
    check(cache, query, key[[2, 0, 1]], value[[2, 0, 1]])


@pytest.mark.promise("reorder-takes-everything-along")
def test_ragged_beams_leave_nothing_behind():
    rng = np.random.default_rng(0)
    cache = KVCache(3, 1, 2, capacity=200)
    pages = int(state(cache)["free"])
    history = [np.zeros((1, 0, 2), np.float32)] * 3
    for _ in range(200):
        indices = rng.integers(0, 3, 3)
        cache.reorder(indices)
        new = rng.normal(size=(3, 1, 40, 2)).astype(np.float32)
        counts = rng.integers(0, 41, 3)
        cache.evict(160)
        cache.append(new, new, counts)
        history = [
            np.concatenate([history[i], new[b, :, :count]], axis=1)
            for b, (i, count) in enumerate(zip(indices, counts, strict=True))
        ]
    assert_array_equal(cache.lengths, [x.shape[1] for x in history])
    query = rng.normal(size=(3, 1, 1, 2)).astype(np.float32)
    out = cache.attend(query)
    for b, x in enumerate(history):
        own = x[:, cache.begins[b] :]
        assert_allclose(out[b], fastattn.reference.attention(query[b], own, own), atol=1e-6)
    cache.truncate(cache.begins)
    cache.evict(0)
    assert state(cache)["free"] >= pages - 3


def test_sequences_come_and_go():
    query, key, value = problem(np.float32, 40, batch=4)
    cache = PagedKVCache(2, 16, value_head_dim=24)
    assert [cache.add() for _ in range(4)] == [0, 1, 2, 3]
    cache.append(key[[3, 1]], value[[3, 1]], sequences=[3, 1])
    cache.append(key[[0, 2]], value[[0, 2]], sequences=(np.int64(0), 2))
    check(cache, query, key, value)
    cache.free(1)
    assert cache.sequences == [0, 2, 3]
    assert cache.add() == 4
    assert_array_equal(cache.lengths, [40, 40, 40, 0])
    cache.append(key[1:2], value[1:2], sequences=[4])
    whole = cache.attend(query[[0, 2, 3, 1]])
    assert_same_bits(
        whole, filled(key[[0, 2, 3, 1]], value[[0, 2, 3, 1]]).attend(query[[0, 2, 3, 1]])
    )
    assert_same_bits(cache.attend(query[[3, 0]], sequences=iter([3, 0])), whole[[2, 0]])
    cache.truncate([3], sequences=[2])
    cache.evict(5, sequences=[4, 3])
    assert_array_equal(cache.lengths, [40, 3, 40, 40])
    assert_array_equal(cache.begins, [0, 0, 35, 35])
    late = cache.add(3, 37)
    assert_array_equal(cache.begins[-1:], [35])
    assert_array_equal(cache.lengths[-1:], [37])
    for sequence in (0, 2, 3, 4, late):
        cache.free(sequence)
    assert cache.sequences == []
    assert cache.used_pages == 0


# Pages that exist already; files.


@pytest.mark.promise(
    "append-copies-no-history", "pages-of-the-caller-are-used-in-place", "unused-rows-are-not-read"
)
@every_isa
@every_dtype
def test_from_pages(dtype):
    query, key, value = problem(dtype, 256, batch=3, q_len=2)
    key[1:, :, :128], value[1:, :, :128] = key[0, :, :128], value[0, :, :128]
    arrays = pages_of(dtype, 7)
    source = PagedKVCache.from_pages(**arrays, tables=[[5, 3], [5, 1], [5, 2]], lengths=[0, 0, 0])
    source.append(
        key, value, [256, 256, 150]
    )  # written where the pool has room, not where these say
    tables = source._table[:3].copy()
    tables[2:, 2:] = 10**6  # beyond its length: may hold anything
    for x in (tables, tables.astype(np.uint16), tables.tolist()):
        cache = PagedKVCache.from_pages(**arrays, tables=x, lengths=[256, 256, 150])
        assert_same_bits(cache.attend(query), source.attend(query))
        assert (cache.used_pages, cache.free_pages) == (6, 1)
    check(cache, query, held(key, dtype), held(value, dtype))
    cache = PagedKVCache.from_pages(**arrays, tables=tables[[0, 0]], lengths=[200, 150])
    assert cache.used_pages == 2
    kept = {name: x.copy() for name, x in arrays.items()}
    cache.append(key[:2, :, :1], value[:2, :, :1])
    assert cache.used_pages == 3
    changed = [
        name
        for name in arrays
        if not np.array_equal(kept[name], arrays[name], equal_nan=dtype != np.int8)
    ]
    assert changed == [*arrays]  # written in place


@pytest.mark.promise("pages-of-the-caller-are-used-in-place")
def test_from_pages_of_another_layout():
    query, key, value = problem(np.float32, 200)
    pages = [np.full((4, 128, 2, dim), NAN, np.float32) for dim in (16, 24)]
    for page, b, start in ((2, 0, 0), (0, 0, 128), (3, 1, 0), (1, 1, 128)):
        for x, source in zip(pages, (key, value), strict=True):
            part = source[b, :, start : start + 128].swapaxes(0, 1)
            x[page, : len(part)] = part
    cache = PagedKVCache.from_pages(*(x.swapaxes(1, 2) for x in pages), [[2, 0], [3, 1]], 200)
    assert_same_bits(cache.attend(query), filled(key, value).attend(query))
    cache.append(key[:, :, :5], value[:, :, :5])
    assert_array_equal(pages[0][0, 72:77], key[0, :, :5].swapaxes(0, 1))


@pytest.mark.promise("files-give-the-same-bits")
@every_dtype
@pytest.mark.parametrize("fixed", [False, True])
def test_files(dtype, fixed, tmp_path):
    query, key, value = problem(dtype, 300)
    cache = KVCache(2, 2, 16, value_head_dim=24, dtype=dtype, capacity=200 if fixed else None)
    cache.append(key[:, :, :200], value[:, :, :200], [200, 190])
    cache.evict([50, 190])
    cache.reorder([1, 1])
    cache.save(tmp_path / "cache")
    again = KVCache.load(tmp_path / "cache")
    assert (again.dtype, again.capacity, again.batch) == (np.dtype(dtype), cache.capacity, 2)
    if fixed:
        assert again.nbytes == cache.nbytes
    assert_array_equal(again.lengths, cache.lengths)
    assert_array_equal(again.begins, cache.begins)
    for _ in range(10):
        assert_same_bits(again.attend(query), cache.attend(query))
        for x in (again, cache):
            x.append(key[:, :, 200:201], value[:, :, 200:201])
    if fixed:
        with pytest.raises(MemoryError):
            again.append(key[:, :, :1], value[:, :, :1])


@pytest.mark.promise("files-give-the-same-bits")
@every_dtype
def test_files_of_pages(dtype, tmp_path):
    query, key, value = problem(dtype, 300, batch=3)
    arrays = pages_of(dtype, 9)
    cache = PagedKVCache.from_pages(**arrays, tables=np.zeros((3, 0), int), lengths=0)
    cache.append(key, value, [300, 140, 0])
    cache.free(1)
    cache.evict(100)
    child = cache.add(0, 250)
    with (tmp_path / "file.npz").open("wb") as file:
        cache.save(file)
    again = PagedKVCache.load(str(tmp_path / "file.npz"))
    assert_same_state(again, state(cache))
    assert again.sequences == cache.sequences == [0, 2, child]
    assert_same_bits(again.attend(query), cache.attend(query))
    assert again.add() == cache.add() == child + 1
    with np.load(tmp_path / "file.npz", allow_pickle=False) as stored:
        for name in arrays:  # nothing but the tokens that are kept
            assert len(stored[name]) == 2
            assert np.isfinite(stored[name].astype(float)).all()
            assert (
                np.count_nonzero(stored[name].any(axis=(1, 3) if stored[name].ndim == 4 else 1))
                == 100
            )
    assert reopened(PagedKVCache(1, 2, dtype=dtype)).sequences == []


def test_a_file_of_bfloat16_brings_the_dtype(tmp_path):
    KVCache(1, 1, 1, dtype=BFLOAT16).save(tmp_path / "file")
    code = f"import fastattn; print(fastattn.KVCache.load({str(tmp_path / 'file')!r}).dtype)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "bfloat16\n"


# Whatever happens, in any order.


class Machine(RuleBasedStateMachine):
    """Caches beside lists of tokens."""

    PAGES = None

    def __init__(self):
        super().__init__()
        self.cache = PagedKVCache(1, 2, pages=self.PAGES)
        self.model = {}  # id: (tokens of head_dim 4: key and value; how many are evicted)
        self.rng = np.random.default_rng(0)

    def pages_unshared(self, extra=()):
        lengths = {i: len(tokens) for i, (tokens, _) in self.model.items()}
        for i, count in extra:
            lengths[i] += count
        return sum(-(-lengths[i] // 128) - begin // 128 for i, (_, begin) in self.model.items())

    def draw_ids(self, data):
        return data.draw(st.lists(st.sampled_from([*self.model]), unique=True, min_size=1))

    @rule()
    def add(self):
        self.model[self.cache.add()] = (np.zeros((0, 4), np.float32), 0)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def share(self, data):
        prefix = data.draw(st.sampled_from([*self.model]))
        tokens, begin = self.model[prefix]
        length = data.draw(st.none() | st.integers(begin, len(tokens)))
        added = self.cache.add(prefix, length)
        self.model[added] = (tokens[:length], begin)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.sampled_from([*self.model]))
        self.cache.free(sequence)
        del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=st.sampled_from([1, 2, 5, 90, 128, 200]))
    def append(self, data, tokens):
        ids = self.draw_ids(data)
        counts = [data.draw(st.integers(0, tokens) | st.just(tokens)) for _ in ids]
        new = self.rng.normal(size=(len(ids), 1, tokens, 4)).astype(np.float32)
        for b, count in enumerate(counts):
            new[b, :, count:] = NAN
        before = state(self.cache)
        try:
            self.cache.append(new[..., :2], new[..., 2:], counts, sequences=ids)
        except MemoryError:
            assert self.PAGES is not None
            assert self.pages_unshared(zip(ids, counts, strict=True)) > self.PAGES
            assert_same_state(self.cache, before)
            return
        for b, (sequence, count) in enumerate(zip(ids, counts, strict=True)):
            old, begin = self.model[sequence]
            self.model[sequence] = (np.concatenate([old, new[b, 0, :count]]), begin)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        ids = self.draw_ids(data)
        lengths = [data.draw(st.integers(self.model[i][1], len(self.model[i][0]))) for i in ids]
        self.cache.truncate(lengths, sequences=ids)
        for sequence, length in zip(ids, lengths, strict=True):
            tokens, begin = self.model[sequence]
            self.model[sequence] = (tokens[:length], begin)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), keep=st.integers(0, 300))
    def evict(self, data, keep):
        ids = self.draw_ids(data)
        self.cache.evict(keep, sequences=ids)
        for sequence in ids:
            tokens, begin = self.model[sequence]
            self.model[sequence] = (tokens, max(begin, len(tokens) - keep))

    @rule(again=st.sampled_from([reopened, pickled, copy.copy, copy.deepcopy]))
    def reopen(self, again):
        before = state(self.cache)
        self.cache = again(self.cache)
        if self.PAGES is None:
            before["free"] *= 0
        assert_same_state(self.cache, before)

    @precondition(lambda self: self.model)
    @rule(q_len=st.sampled_from([1, 3, 20]), window=st.none() | st.integers(0, 200))
    def attend(self, q_len, window):
        query = self.rng.normal(size=(len(self.model), 1, q_len, 2)).astype(np.float32)
        options = {"window": None if window is None else (window, 0), "return_lse": True}
        result = self.cache.attend(query, **options)
        for b, (tokens, begin) in enumerate(self.model.values()):
            expected = fastattn.reference.attention(
                query[b],
                tokens[None, begin:, :2],
                tokens[None, begin:, 2:],
                is_causal=True,
                query_offset=len(tokens) - q_len - begin,
                **options,
            )
            for got, right in zip(result, expected, strict=True):
                assert_allclose(got[b], right, atol=2e-5)

    @invariant()
    def counts(self):
        assert self.cache.sequences == [*self.model]
        assert_array_equal(self.cache.lengths, [len(x) for x, _ in self.model.values()])
        assert_array_equal(self.cache.begins, [begin for _, begin in self.model.values()])
        assert self.cache.used_pages <= self.pages_unshared()
        pages = self.cache.used_pages + self.cache.free_pages
        assert self.cache.nbytes == pages * 128 * (2 + 2) * 4
        if self.PAGES is not None:
            assert self.cache.used_pages + self.cache.free_pages == self.PAGES

    def teardown(self):
        for sequence in [*self.model]:
            self.cache.free(sequence)
        assert self.cache.used_pages == 0


class FixedMachine(Machine):
    PAGES = 6


few = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestGrowing = Machine.TestCase
TestGrowing.settings = few
TestFixed = FixedMachine.TestCase
TestFixed.settings = few


# Errors: every one there is, word by word; and nothing has changed.

ZEROS = np.zeros((2, 2, 3, 4), np.float32)
VALUES = np.zeros((2, 2, 3, 5), np.float32)


def usual(dtype=np.float32, pages=4):
    """Return a cache of two sequences, 0 and 2; sequence 1 was freed."""
    cache = PagedKVCache(2, 4, value_head_dim=5, dtype=dtype, pages=pages)
    for _ in range(3):
        cache.add()
    cache.append(ZEROS[[0, 1, 1]], VALUES[[0, 1, 1]], [3, 3, 2])
    cache.free(1)
    cache.evict(1)
    return cache


def append(key=ZEROS, value=VALUES, *args, **options):
    return lambda cache: cache.append(key, value, *args, **options)


def attend(query=ZEROS, **options):
    return lambda cache: cache.attend(query, **options)


def pages(dtype=np.float32, tables=((0,), (1,)), lengths=(3, 2), **arrays):
    def function():
        usual = pages_of(dtype, 4, 2, (4, 5), fill=0)
        return PagedKVCache.from_pages(**(usual | {"tables": tables, "lengths": lengths} | arrays))

    return function


def put(x, where, what):
    x = x.copy()
    x[where] = what
    return x


def altered(name, alter, kind=PagedKVCache, dtype=np.float32):
    """Return a call that loads a file in which one array is another, or none."""

    def function():
        cache = (
            usual(dtype) if kind is PagedKVCache else KVCache(2, 2, 4, value_head_dim=5, capacity=9)
        )
        if kind is KVCache:
            cache.append(ZEROS, VALUES)
        arrays = {name: x for name, x in state(cache).items() if name != "free"}
        arrays[name] = alter(arrays[name])
        if arrays[name] is None:
            del arrays[name]
        file = io.BytesIO()
        np.savez(file, **arrays)
        file.seek(0)
        kind.load(file)

    return function


def loads(content):
    return lambda: KVCache.load(io.BytesIO(content))


def content(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def becomes(alter, kind=PagedKVCache, dtype=np.float32):
    """Return a call that makes a cache of an altered state, as unpickling it would."""

    def function():
        cache = kind.__new__(kind)
        try:
            cache.__setstate__(alter(usual(dtype).__getstate__()))
        finally:
            assert not vars(cache)

    return function


def no_bfloat16():
    file = io.BytesIO()
    KVCache(1, 1, 1, dtype=BFLOAT16).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ml_dtypes", None)  # as if it were not installed
        KVCache.load(io.BytesIO(file.getvalue()))


SHAPE = "{} must have shape (batch, kv_heads, tokens, head_dim) = (2, 2, any, {}), got {}.shape={}"
BAD_STATE = "state must be what pickle made of a {}: "
BAD_FILE = "file must hold a PagedKVCache that save wrote: "
BAD_BATCH = "file must hold a KVCache that save wrote: it must be of a batch >= 1, and no more tokens than capacity, got batch={}, {} tokens, capacity={}"

# (what is done to usual(), the error's type, its text)
CALLS = [
    (append(np.ma.array(ZEROS)), TypeError, "key must be an array of numbers and nothing beside, not MaskedArray, whose mask, unit, labels or rules would be lost: numpy.asarray(key) is the numbers alone"),
    (append(ZEROS.astype(float)), TypeError, "key must be an array of float32, not float64"),
    (append(ZEROS, VALUES.astype(np.float16)), TypeError, "value must be an array of float32, not float16"),
    (append(ZEROS[:1]), ValueError, SHAPE.format("key", 4, "key", (1, 2, 3, 4))),
    (append(ZEROS[0]), ValueError, SHAPE.format("key", 4, "key", (2, 3, 4))),
    (append(ZEROS[:, :1]), ValueError, SHAPE.format("key", 4, "key", (2, 1, 3, 4))),
    (append(ZEROS, ZEROS), ValueError, SHAPE.format("value", 5, "value", (2, 2, 3, 4))),
    (append(ZEROS, VALUES[:, :, :2]), ValueError, "value has 2 tokens but key has 3 (value.shape=(2, 2, 2, 5), key.shape=(2, 2, 3, 4))"),
    (append(ZEROS, VALUES, [1.0, 2.0]), TypeError, "lengths must be an array of integers, or an int, not float64"),
    (append(ZEROS, VALUES, True), TypeError, "lengths must be an array of integers, or an int, not bool"),
    (append(ZEROS, VALUES, [1, 2, 3]), ValueError, "lengths must broadcast to the batch shape (2,), got lengths.shape=(3,)"),
    (append(ZEROS, VALUES, 4), ValueError, "lengths must be within 0..tokens = 0..3, got 4"),
    (append(ZEROS, VALUES, [0, -1]), ValueError, "lengths must be within 0..tokens = 0..3, got [0, -1]"),
    (append(ZEROS, VALUES, 2**70), ValueError, f"lengths must be within 0..tokens = 0..3, got {2**70}"),
    (append(sequences=[0, 1]), ValueError, "sequences[1] must be one of the cache's sequences, got sequences[1]=1"),
    (append(sequences=[2, 2]), ValueError, "sequences must be distinct, got sequences=[2, 2]"),
    (append(sequences=[0, 2.0]), TypeError, "sequences[1] must be an int, not float"),
    (append(sequences=[0, True]), TypeError, "sequences[1] must be an int, not bool"),
    (append(sequences=2), TypeError, "sequences must be ids, not int"),
    (append(np.zeros((2, 2, 400, 4), np.float32), np.zeros((2, 2, 400, 5), np.float32)), MemoryError, "pages must be enough for what is appended, which needs 6 more, got pages=4, 2 of them free"),
    (attend(ZEROS.astype(float)), TypeError, "query must be an array of float32, not float64"),
    (attend(ZEROS[:1]), ValueError, "query must have shape (batch, q_heads, q_len, head_dim) with batch=2, got query.shape=(1, 2, 3, 4)"),
    (attend(ZEROS[0]), ValueError, "query must have shape (batch, q_heads, q_len, head_dim) with batch=2, got query.shape=(2, 3, 4)"),
    (attend(VALUES), ValueError, "key has head_dim 4 but query has head_dim 5 (key.shape=(2, 2, 3, 4), query.shape=(2, 2, 3, 5))"),
    (attend(ZEROS[:, :1]), ValueError, "q_heads must be a multiple of kv_heads, got q_heads=1, kv_heads=2 (key.shape=(2, 2, 3, 4), query.shape=(2, 1, 3, 4))"),
    (attend(mask=np.zeros((3, 4), bool)), ValueError, "mask must broadcast to (batch, q_heads, q_len, kv_len) = (2, 2, 3, 3), got mask.shape=(3, 4)"),
    (attend(scale="1"), TypeError, "scale must be a number, not str"),
    (attend(is_causal=1), TypeError, "is_causal must be a bool, not int"),
    (attend(return_lse=1), TypeError, "return_lse must be a bool, not int"),
    (attend(out=ZEROS), ValueError, "out must have the shape of the result, (2, 2, 3, 5), got out.shape=(2, 2, 3, 4)"),
    (attend(sequences=[7, 0]), ValueError, "sequences[0] must be one of the cache's sequences, got sequences[0]=7"),
    (lambda cache: cache.truncate([3, 0]), ValueError, "lengths must be within begins..lengths of the sequences = [2 1]..[3 2], got [3, 0]"),
    (lambda cache: cache.truncate(3), ValueError, "lengths must be within begins..lengths of the sequences = [2 1]..[3 2], got 3"),
    (lambda cache: cache.truncate(1.0), TypeError, "lengths must be an array of integers, or an int, not float64"),
    (lambda cache: cache.evict(-1), ValueError, f"keep must be within 0..2**61 = 0..{2**61}, got -1"),
    (lambda cache: cache.evict(None), TypeError, "keep must be an array of integers, or an int, not NoneType"),
    (lambda cache: cache.free(1), ValueError, "sequence must be one of the cache's sequences, got sequence=1"),
    (lambda cache: cache.free("a"), TypeError, "sequence must be an int, not str"),
    (lambda cache: cache.add(1), ValueError, "prefix must be one of the cache's sequences, got prefix=1"),
    (lambda cache: cache.add(0, 4), ValueError, "length must be within begins..lengths of prefix = 2..3, got length=4"),
    (lambda cache: cache.add(0, 1), ValueError, "length must be within begins..lengths of prefix = 2..3, got length=1"),
    (lambda cache: cache.add(0, 2.5), TypeError, "length must be an int, not float"),
    (lambda cache: cache.add(length=0), ValueError, "length must be given with prefix alone, got length=0"),
]  # fmt: skip

HUGE = np.broadcast_to(np.float32(0), (1, 2**22, 129, 2**30))

# (a call, the error's type, its text)
OTHERS = [
    (lambda: append(put(ZEROS, (1, 1, 2, 3), INF))(usual(np.int8)), ValueError, "key must be finite in an int8 cache, got NaN or Inf"),
    (lambda: append(ZEROS, put(VALUES, (0, 0, 0, 0), NAN))(usual(np.int8)), ValueError, "value must be finite in an int8 cache, got NaN or Inf"),
    (lambda: append(ZEROS.astype(np.int8))(usual(np.int8)), TypeError, "key must be an array of float16, bfloat16 or float32, not int8"),
    (lambda: attend(ZEROS.astype(float))(usual(np.int8)), TypeError, "query must be an array of float16, bfloat16 or float32, not float64"),
    (lambda: attend(ZEROS.astype(BFLOAT16))(usual(pages=None)), TypeError, "query must be an array of float32, not bfloat16"),
    (lambda: filled(ZEROS, VALUES, capacity=2), MemoryError, "capacity must be >= the tokens kept and the new ones, got capacity=2, [0 0] + [3 3] tokens"),
    (lambda: filled(ZEROS, VALUES).reorder([0, 2]), ValueError, "indices must be within 0..batch - 1 = 0..1, got [0, 2]"),
    (lambda: filled(ZEROS, VALUES).reorder([0, 1, 0]), ValueError, "indices must broadcast to the batch shape (2,), got indices.shape=(3,)"),
    (lambda: filled(HUGE, HUGE), MemoryError, "no room for a pool of 2 pages"),
    # a new cache
    (lambda: KVCache(0, 2, 4), ValueError, "batch must be >= 1, got batch=0"),
    (lambda: KVCache(1.0, 2, 4), TypeError, "batch must be an int, not float"),
    (lambda: KVCache(1, 2, 4, capacity=0), ValueError, "capacity must be >= 1, got capacity=0"),
    (lambda: PagedKVCache(0, 4), ValueError, "kv_heads must be >= 1, got kv_heads=0"),
    (lambda: PagedKVCache(2, 0), ValueError, "head_dim must be >= 1, got head_dim=0"),
    (lambda: PagedKVCache(2, 2**31), ValueError, f"head_dim must be below 2**31, got head_dim={2**31}"),
    (lambda: PagedKVCache(2, 4, value_head_dim=-1), ValueError, "value_head_dim must be >= 1, got value_head_dim=-1"),
    (lambda: PagedKVCache(2, 4, pages=0), ValueError, "pages must be >= 1, got pages=0"),
    (lambda: PagedKVCache(2, 4, page_size=64), ValueError, "page_size must be a multiple of 128, got page_size=64"),
    (lambda: PagedKVCache(2, 4, page_size=0), ValueError, "page_size must be >= 1, got page_size=0"),
    (lambda: PagedKVCache(2, 4, dtype=float), TypeError, "dtype must be float16, bfloat16, float32 or int8, not float64"),
    (lambda: PagedKVCache(2, 4, dtype=None), TypeError, "dtype must be float16, bfloat16, float32 or int8, not float64"),
    (lambda: PagedKVCache(2, 4, pages=2**53), ValueError, f"pages x kv_heads x page_size x head_dim must be below 2**60, got {2**53} x 2 x 128 x 4"),
    # from_pages
    (pages(key=ZEROS.tolist()), TypeError, "key must be a NumPy array, not list"),
    (pages(key=np.zeros((4, 2, 128, 4))), TypeError, "key must be an array of float16, bfloat16, float32 or int8, not float64"),
    (pages(value=np.zeros((4, 2, 128, 5), np.float16)), TypeError, "value must have the dtype of key, float32, not float16"),
    (pages(key=ZEROS[0]), ValueError, "key must have shape (pages, kv_heads, page_size, head_dim), got key.shape=(2, 3, 4)"),
    (pages(np.int8, key_scale=ZEROS), ValueError, "key_scale must have shape that of key without head_dim, got key_scale.shape=(2, 2, 3, 4)"),
    (pages(np.int8, value_scale=ZEROS[0]), ValueError, "value_scale must have the pages, kv_heads and page_size of key, (4, 2, 128), got value_scale.shape=(2, 3, 4)"),
    (pages(value=VALUES), ValueError, "value must have the pages, kv_heads and page_size of key, (4, 2, 128), got value.shape=(2, 2, 3, 5)"),
    (pages(key=ZEROS, value=VALUES), ValueError, "page_size must be a multiple of 128, got page_size=3"),
    (pages(value=np.zeros((4, 2, 128, 0), np.float32)), ValueError, "value must have kv_heads, a page_size and a head_dim from 1 to below 2**31, got value.shape=(4, 2, 128, 0)"),
    (pages(key=np.broadcast_to(ZEROS[:1, :, :1], (4, 2, 128, 4))), ValueError, "key must be writeable, aligned and in native byte order, got an array that is not"),
    (pages(key=np.zeros((4, 2, 128, 4), ">f4")), ValueError, "key must be writeable, aligned and in native byte order, got an array that is not"),
    (pages(key=np.zeros((4, 2, 128, 8), np.float32)[..., ::2]), ValueError, "key must be contiguous along its last axis, got key.strides=(8192, 4096, 32, 8)"),
    (pages(key=np.lib.stride_tricks.as_strided(np.zeros(9999, np.float32), (4, 2, 128, 4), (2048, 2048, 16, 4))), ValueError, "key must not overlap itself, got key.strides=(2048, 2048, 16, 4)"),
    (pages(**dict.fromkeys(("key", "value"), np.zeros((4, 2, 128, 4), np.float32))), ValueError, "value must not overlap key, got arrays that share memory"),
    (pages(np.int8, key_scale=None), TypeError, "key_scale must be given with int8 and only then, got int8 pages"),
    (pages(value_scale=np.zeros((4, 2, 128), np.float32)), TypeError, "value_scale must be given with int8 and only then, got float32 pages"),
    (pages(np.int8, key_scale=np.zeros((4, 2, 128))), TypeError, "key_scale must be an array of float32, not float64"),
    (pages(tables=[[0.0], [1.0]]), TypeError, "tables must be an array of integers, not float64"),
    (pages(tables=[0, 1]), ValueError, "tables must have shape (batch, columns), got tables.shape=(2,)"),
    (pages(tables=[[4], [1]]), ValueError, "tables must be within 0..pages - 1 = 0..3, got 4"),
    (pages(tables=[[0], [-1]]), ValueError, "tables must be within 0..pages - 1 = 0..3, got -1"),
    (pages(tables=np.array([[0], [2**64 - 1]], np.uint64)), ValueError, f"tables must be within 0..pages - 1 = 0..3, got {2**64 - 1}"),
    (pages(lengths=[3, 129]), ValueError, "lengths must be within 0..columns x page_size = 0..128, got [3, 129]"),
    (pages(lengths=[3, -1]), ValueError, "lengths must be within 0..columns x page_size = 0..128, got [3, -1]"),
    (pages(lengths=[3, 3, 3]), ValueError, "lengths must broadcast to the batch shape (2,), got lengths.shape=(3,)"),
    # files
    (altered("format", lambda x: np.array("fastattn.KVCache 1")), ValueError, BAD_FILE + "its format is 'fastattn.KVCache 1', and this version reads 'fastattn.PagedKVCache 1'"),
    (altered("format", lambda x: np.array("x" * 1000)), ValueError, BAD_FILE + f"its format is {'x' * 99!r}, and this version reads 'fastattn.PagedKVCache 1'"),
    (altered("format", lambda x: None), ValueError, BAD_FILE + "its format is '', and this version reads 'fastattn.PagedKVCache 1'"),
    (altered("dtype", lambda x: np.array("float16")), ValueError, BAD_FILE + "it has float32 for float16"),
    (altered("dtype", lambda x: np.array("bfloat16")), ValueError, BAD_FILE + "bfloat16 must be stored as uint16"),
    (altered("dtype", lambda x: np.array("int8")), ValueError, BAD_FILE + "it lacks key_scale"),
    (altered("tables", lambda x: x + 5), ValueError, BAD_FILE + "tables must be within 0..pages - 1 = 0..1, got 5"),
    (altered("tables", lambda x: x - 1), ValueError, BAD_FILE + "tables must be within 0..pages - 1 = 0..1, got -1"),
    (altered("tables", lambda x: x[:1]), ValueError, BAD_FILE + "lengths must broadcast to the batch shape (1,), got lengths.shape=(2,)"),
    (altered("tables", lambda x: np.array([["a"]])), ValueError, BAD_FILE + "tables must be an array of integers, not str32"),
    (altered("lengths", lambda x: -x), ValueError, BAD_FILE + "lengths must be within 0..columns x page_size = 0..128, got [-3 -2]"),
    (altered("begins", lambda x: x + 9), ValueError, BAD_FILE + "begins must be within 0..lengths = 0..[3 2], got [11 10]"),
    (altered("key", lambda x: x[:, :, :100]), ValueError, BAD_FILE + "value must have the pages, kv_heads and page_size of key, (2, 2, 100), got value.shape=(2, 2, 128, 5)"),
    (altered("value", lambda x: None), ValueError, BAD_FILE + "it lacks value"),
    (altered("next", lambda x: None), ValueError, BAD_FILE + "it lacks next"),
    (altered("key_scale", lambda x: x - 1, dtype=np.int8), ValueError, BAD_FILE + "scales must be finite and >= 0"),
    (altered("value_scale", lambda x: x * NAN, dtype=np.int8), ValueError, BAD_FILE + "scales must be finite and >= 0"),
    (altered("sequences", lambda x: x + 1), ValueError, BAD_FILE + "sequences must be within 0..next - 1, got 3"),
    (altered("sequences", lambda x: x - 1), ValueError, BAD_FILE + "sequences must be within 0..next - 1, got -1"),
    (altered("sequences", lambda x: x * 0), ValueError, BAD_FILE + "sequences must be 2 distinct integers"),
    (altered("sequences", lambda x: x / 2), ValueError, BAD_FILE + "sequences[0] must be an int, not float"),
    (altered("next", lambda x: x + 0.5), ValueError, BAD_FILE + "next must be an int, not float"),
    (altered("limit", lambda x: x * 0 + 1), ValueError, BAD_FILE + "it must have no more pages than its limit allows, got 2 where it allows 1"),
    (altered("limit", lambda x: x - 11, KVCache), ValueError, BAD_BATCH.format(2, 3, -2)),
    (altered("limit", lambda x: x * 0 + 2, KVCache), ValueError, BAD_BATCH.format(2, 3, 2)),
    (loads(b""), ValueError, None),
    (loads(b"nonsense" * 99), ValueError, None),
    (loads(b"PK\x03\x04" + bytes(99)), ValueError, None),
    (loads(content(ZEROS)), ValueError, None),
    (lambda: KVCache.load("/no/such/file"), FileNotFoundError, None),
    # pickles
    (becomes(lambda s: None), ValueError, BAD_STATE.format("PagedKVCache") + "it is of type NoneType"),
    (becomes(lambda s: ({}, s)), ValueError, BAD_STATE.format("PagedKVCache") + "it is of type tuple"),
    (becomes(lambda s: {"_pool": [], "_fixed": False}), ValueError, BAD_STATE.format("PagedKVCache") + "its format is '', and this version reads 'fastattn.PagedKVCache 1'"),
    (becomes(lambda s: s | {"format": "fastattn.PagedKVCache 2"}), ValueError, BAD_STATE.format("PagedKVCache") + "its format is 'fastattn.PagedKVCache 2', and this version reads 'fastattn.PagedKVCache 1'"),
    (becomes(lambda s: s, KVCache), ValueError, BAD_STATE.format("KVCache") + "its format is 'fastattn.PagedKVCache 1', and this version reads 'fastattn.KVCache 1'"),
    (becomes(lambda s: s | {"tables": s["tables"] + 5}), ValueError, BAD_STATE.format("PagedKVCache") + "tables must be within 0..pages - 1 = 0..1, got 5"),
    (becomes(lambda s: s | {"lengths": [2**40, 1]}), ValueError, BAD_STATE.format("PagedKVCache") + f"lengths must be within 0..columns x page_size = 0..128, got [{2**40}, 1]"),
    (becomes(lambda s: s | {"key": "torn", "dtype": "float32"}), ValueError, BAD_STATE.format("PagedKVCache") + "'str' object has no attribute 'dtype'"),
    (becomes(lambda s: s | {"value": s["key"].tolist()}), ValueError, BAD_STATE.format("PagedKVCache") + "value must be a NumPy array, not list"),
    (becomes(lambda s: s | {"key_scale": s["key_scale"] * NAN}, dtype=np.int8), ValueError, BAD_STATE.format("PagedKVCache") + "scales must be finite and >= 0"),
    (becomes(lambda s: s | {"others": 3}), ValueError, BAD_STATE.format("PagedKVCache") + "'int' object is not iterable"),
    (no_bfloat16, ImportError, "the cache holds bfloat16, which needs ml_dtypes"),
]  # fmt: skip


def raised(kind, text, function, *args):
    with pytest.raises(kind) as error:
        function(*args)
    assert type(error.value) is kind
    if text is not None:
        assert str(error.value) == text
    return error.value


@pytest.mark.promise("cache-errors-change-nothing", "error-says-which-rule-and-what")
@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda i: f"{i}: {CALLS[i][2][:60]}")
def test_errors_change_nothing(number):
    function, kind, text = CALLS[number]
    cache = usual()
    before = state(cache)
    raised(kind, text, function, cache)
    assert_same_state(cache, before)


@pytest.mark.promise("files-give-the-same-bits", "error-says-which-rule-and-what")
@pytest.mark.parametrize(
    "number", range(len(OTHERS)), ids=lambda i: f"{i}: {(OTHERS[i][2] or '')[:60]}"
)
def test_errors(number):
    function, kind, text = OTHERS[number]
    raised(kind, text, function)


@pytest.mark.promise("error-says-which-rule-and-what")
def test_every_error_is_tested():
    source = inspect.getsource(_kv_cache)
    raises = {
        range(node.lineno, node.end_lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and node.exc is not None
    }
    seen = set()
    for function, kind, text in CALLS + OTHERS:
        error = raised(
            kind, text, function, *([usual()] if (function, kind, text) in CALLS else [])
        )
        while error is not None:
            frames = traceback.walk_tb(error.__traceback__)
            seen |= {
                line for frame, line in frames if frame.f_code.co_filename == _kv_cache.__file__
            }
            error = error.__cause__
    lines = source.splitlines()
    assert not [lines[span[0] - 1] for span in raises if not seen & set(span)]


@pytest.mark.promise("cache-errors-change-nothing")
@every_dtype
def test_no_memory_changes_nothing(dtype, monkeypatch):
    """Wherever in an append the memory ends."""
    key, value = problem(dtype, 300)[1:]
    cache = PagedKVCache(2, 16, value_head_dim=24, dtype=dtype)
    prompt = cache.add()
    cache.append(key[:1, :, :140], value[:1, :, :140])
    cache.add(prompt)
    before = state(cache)
    real, allowed = np.empty, 0

    def empty(*args, **options):
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise MemoryError
        return real(*args, **options)

    for count in range(4 if dtype == np.int8 else 2):
        allowed = count
        with monkeypatch.context() as patched:
            patched.setattr(np, "empty", empty)
            with pytest.raises(MemoryError):
                cache.append(key, value)
        assert_same_state(cache, before)
    query = problem(dtype)[0]
    result = cache.attend(query)

    def failing(*_):
        raise MemoryError

    for step in ("_own", "_write"):
        with monkeypatch.context() as patched:
            patched.setattr(PagedKVCache, step, failing)
            with pytest.raises(MemoryError):
                cache.append(key, value)
        assert_array_equal(cache.lengths, [140, 140])
        assert_same_bits(cache.attend(query), result)
    cache.append(key, value)
    assert cache.used_pages == 1 + 3 + 3
