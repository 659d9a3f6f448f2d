# SPDX-License-Identifier: Apache-2.0
"""What is left of a cache: truncated, evicted, within a capacity; the pages that become free."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import KVCache, PagedKVCache
from tests.cache.problems import assert_same_state, check, every_dtype, filled, held, problem, state
from tests.support.correctness import assert_same_bits


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
