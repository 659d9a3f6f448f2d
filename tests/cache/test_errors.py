# SPDX-License-Identifier: Apache-2.0
"""Every error of a cache there is, word by word; and nothing has changed."""
# ruff: noqa: E501 - the tables of errors have a line per error

import ast
import io
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn import KVCache, PagedKVCache, kv_cache
from fastattn.kv_cache._pool import PagePool
from tests.cache.problems import (
    BFLOAT16,
    INF,
    NAN,
    assert_same_state,
    every_dtype,
    filled,
    pages_of,
    problem,
    state,
)
from tests.support.correctness import assert_same_bits

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


def forgetful():
    """Return a cache that has the tokens 0..3 and 15..19 of 20, as 0..8."""
    tokens = np.zeros((2, 2, 20, 4), np.float32)
    cache = filled(tokens, tokens)
    cache.evict(5, keep_first=4, renumber=True)
    return cache


def parts(alter):
    """Return a call that makes a forgetful cache of an altered state."""

    def function():
        state = forgetful().__getstate__()
        KVCache.__new__(KVCache).__setstate__(state | {"parts": alter(state["parts"])})

    return function


def no_bfloat16():
    file = io.BytesIO()
    KVCache(1, 1, 1, dtype=BFLOAT16).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ml_dtypes", None)  # as if it were not installed
        KVCache.load(io.BytesIO(file.getvalue()))


SHAPE = "{} must have shape (batch, kv_heads, tokens, head_dim) = (2, 2, any, {}), got {}.shape={}"
BAD_STATE = "state must be what pickle made of a {}: "
BAD_PARTS = (
    BAD_STATE.format("KVCache")
    + "parts must lie in 0..columns x page_size = 0..128, one after the other"
)
BAD_FILE = "file must hold a PagedKVCache that save wrote: "
BAD_BATCH = "file must hold a KVCache that save wrote: it must be of a batch >= 1, and no more tokens than capacity, got batch={}, {} tokens, capacity={}"
# (what is done to usual(), the error's type, its text)
CALLS = [
    (attend(query_offset=0.5), TypeError, "query_offset must be an array of integers, or an int, not float64"),
    (attend(query_offset=[1, 2, 3]), ValueError, "query_offset must broadcast to the batch shape (2,), got query_offset.shape=(3,)"),
    (attend(query_offset=-(2**62)), ValueError, f"query_offset must be within -2**61..2**61, got {-(2**62)}"),
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
    (lambda cache: cache.evict([1, 1, 1]), ValueError, "keep must broadcast to the batch shape (2,), got keep.shape=(3,)"),
    (lambda cache: cache.evict(2**62), ValueError, f"keep must be within 0..2**61 = 0..{2**61}, got {2**62}"),
    (lambda cache: cache.evict(0, keep_first=-1), ValueError, "keep_first must be within 0..lengths = 0..[3 2], got -1"),
    (lambda cache: cache.evict(0, keep_first=3), ValueError, "keep_first must be within 0..lengths = 0..[3 2], got 3"),
    (lambda cache: cache.evict(0, keep_first=1.0), TypeError, "keep_first must be an array of integers, or an int, not float64"),
    (lambda cache: cache.evict(0, keep_first=[1, 1, 1]), ValueError, "keep_first must broadcast to the batch shape (2,), got keep_first.shape=(3,)"),
    (lambda cache: cache.evict(0, renumber=1), TypeError, "renumber must be a bool, not int"),
    (lambda cache: cache.free(1), ValueError, "sequence must be one of the cache's sequences, got sequence=1"),
    (lambda cache: cache.free("a"), TypeError, "sequence must be an int, not str"),
    (lambda cache: cache.add(1), ValueError, "prefix must be one of the cache's sequences, got prefix=1"),
    (lambda cache: cache.add(0, 4), ValueError, "length must be within begins..lengths of prefix = 2..3, got length=4"),
    (lambda cache: cache.add(0, 1), ValueError, "length must be within begins..lengths of prefix = 2..3, got length=1"),
    (lambda cache: cache.add(0, 2.5), TypeError, "length must be an int, not float"),
    (lambda cache: cache.add(length=0), ValueError, "length must be given with prefix alone, got length=0"),
]  # fmt: skip
THREE_PARTS = "keep and keep_first must leave two parts of a sequence at most, got keep=2, keep_first={} where there are the tokens 0..3 and 4..8"
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
    (lambda: usual().reorder([-1, 0]), ValueError, "indices must be within 0..sequences - 1 = 0..1, got [-1, 0]"),
    (lambda: forgetful().evict(2, keep_first=5), ValueError, THREE_PARTS.format(5)),
    (lambda: forgetful().evict([9, 2], keep_first=[0, 6]), ValueError, THREE_PARTS.format(6)),
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
    (altered("format", lambda x: np.array("fastattn.KVCache 1")), ValueError, BAD_FILE + "its format is 'fastattn.KVCache 1', and this version reads 'fastattn.PagedKVCache 1' and 2"),
    (altered("format", lambda x: np.array("x" * 1000)), ValueError, BAD_FILE + f"its format is {'x' * 99!r}, and this version reads 'fastattn.PagedKVCache 1' and 2"),
    (altered("format", lambda x: None), ValueError, BAD_FILE + "its format is '', and this version reads 'fastattn.PagedKVCache 1' and 2"),
    (altered("dtype", lambda x: np.array("float16")), ValueError, BAD_FILE + "it has float32 for float16"),
    (altered("dtype", lambda x: np.array("bfloat16")), ValueError, BAD_FILE + "bfloat16 must be stored as uint16"),
    (altered("dtype", lambda x: np.array("int8")), ValueError, BAD_FILE + "it lacks key_scale"),
    (altered("tables", lambda x: x + 5), ValueError, BAD_FILE + "tables must be within 0..pages - 1 = 0..1, got 5"),
    (altered("tables", lambda x: x - 1), ValueError, BAD_FILE + "tables must be within 0..pages - 1 = 0..1, got -1"),
    (altered("tables", lambda x: x[:1]), ValueError, BAD_FILE + "lengths must broadcast to the batch shape (1,), got lengths.shape=(2,)"),
    (altered("tables", lambda x: np.array([["a"]])), ValueError, BAD_FILE + "tables must be an array of integers, not str32"),
    (altered("lengths", lambda x: -x), ValueError, BAD_FILE + "lengths must be within 0..columns x page_size = 0..128, got [-3 -2]"),
    (altered("begins", lambda x: x + 9), ValueError, BAD_FILE + "begins must be within 0..lengths = 0..[3 2], got [11 10]"),
    (altered("format", lambda x: np.array("fastattn.PagedKVCache 2")), ValueError, BAD_FILE + "it lacks parts"),
    (parts(lambda x: x.astype(np.int32)), ValueError, BAD_STATE.format("KVCache") + "parts must be an int64 array of shape (2, 4)"),
    (parts(lambda x: x[:1]), ValueError, BAD_STATE.format("KVCache") + "parts must be an int64 array of shape (2, 4)"),
    (parts(lambda x: x.tolist()), ValueError, BAD_STATE.format("KVCache") + "parts must be an int64 array of shape (2, 4)"),
    (parts(lambda x: x - [100, 0, 0, 0]), ValueError, BAD_PARTS),
    (parts(lambda x: np.add(x, [200, 0, 0, 0])), ValueError, BAD_PARTS),
    (parts(lambda x: np.add(x, [2**62, 0, 0, 0])), ValueError, BAD_PARTS),
    (parts(lambda x: x - [0, 1, 0, 0]), ValueError, BAD_PARTS),
    (parts(lambda x: np.add(x, [0, 4, 0, 0])), ValueError, BAD_PARTS),
    (parts(lambda x: np.add(x, [0, 5, 0, 0])), ValueError, BAD_PARTS),
    (parts(lambda x: np.add(x, [0, 0, 4, 0])), ValueError, BAD_PARTS),
    (parts(lambda x: np.add(x, [0, 0, 0, 2**62])), ValueError, BAD_PARTS),
    (parts(lambda x: x - [0, 0, 0, 1]), ValueError, BAD_PARTS),
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
    (becomes(lambda s: {"_pool": [], "_fixed": False}), ValueError, BAD_STATE.format("PagedKVCache") + "its format is '', and this version reads 'fastattn.PagedKVCache 1' and 2"),
    (becomes(lambda s: s | {"format": "fastattn.PagedKVCache 3"}), ValueError, BAD_STATE.format("PagedKVCache") + "its format is 'fastattn.PagedKVCache 3', and this version reads 'fastattn.PagedKVCache 1' and 2"),
    (becomes(lambda s: s, KVCache), ValueError, BAD_STATE.format("KVCache") + "its format is 'fastattn.PagedKVCache 1', and this version reads 'fastattn.KVCache 1' and 2"),
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


@pytest.mark.promise("cache-errors-change-nothing")
def test_an_eviction_into_three_parts_changes_nothing():
    cache = forgetful()
    before = state(cache)
    for keep, keep_first in ((2, 5), ([9, 2], [0, 6]), (0, [9, 8])):
        with pytest.raises(ValueError, match="two parts"):
            cache.evict(keep, keep_first=keep_first, renumber=True)
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
    raises = {
        (str(file), range(node.lineno, node.end_lineno + 1))
        for file in Path(kv_cache.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Raise) and node.exc is not None
    }
    seen = set()
    for function, kind, text in CALLS + OTHERS:
        error = raised(
            kind, text, function, *([usual()] if (function, kind, text) in CALLS else [])
        )
        while error is not None:
            frames = traceback.walk_tb(error.__traceback__)
            seen |= {(frame.f_code.co_filename, line) for frame, line in frames}
            error = error.__cause__
    assert not [
        (file, lines) for file, lines in raises if not any((file, x) in seen for x in lines)
    ]


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

    for step in ("_copy_shared_page", "_write"):
        with monkeypatch.context() as patched:
            patched.setattr(PagePool, step, failing)
            with pytest.raises(MemoryError):
                cache.append(key, value)
        assert_array_equal(cache.lengths, [140, 140])
        assert_same_bits(cache.attend(query), result)
    cache.append(key, value)
    assert cache.used_pages == 1 + 3 + 3
