# SPDX-License-Identifier: Apache-2.0
"""Caches that forget the middle: the first tokens and the newest, with a gap or closed up."""

import copy

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import fastattn
from fastattn import KVCache, PagedKVCache
from tests.cache.beside import OPTIONS, Beside, beside, closed_up_or_not
from tests.cache.problems import (
    BFLOAT16,
    assert_same_state,
    every_dtype,
    every_isa,
    filled,
    pickled,
    problem,
    reopened,
    state,
)
from tests.support.correctness import assert_same_bits


@pytest.mark.promise("cache-forgets-the-middle", "cache-attends-to-what-it-holds")
@every_isa
@every_dtype
@closed_up_or_not
@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(dtype, q_len, renumber, name):
    query, both = beside(dtype, 400, q_len)
    both.append(300)
    both.evict(70, 9, renumber)
    both.append(100)
    both.evict(140, 9, renumber)
    assert_array_equal(both.cache.kept_first, [9, 9])
    assert_array_equal(both.cache.begins, [9 if renumber else 260] * 2)
    both.check(query, dtype, **OPTIONS[name])


@pytest.mark.promise("bitwise-threads", "cache-forgets-the-middle")
@every_isa
@every_dtype
@closed_up_or_not
def test_threads_that_share_keys_change_no_bit(dtype, renumber, threads):
    """Both parts are longer than what one thread attends to alone (4096 keys)."""
    query, both = beside(dtype, 14_000, 20, batch=2)
    both.append(14_000)
    both.evict([5000, 8100], [4200, 5000], renumber)
    threads(1)
    asked = {"return_lse": True, "return_column_sums": True}
    expected = both.cache.attend(query, **asked)
    for count in (3, 30):
        threads(count)
        assert_same_bits(both.cache.attend(query, **asked), expected)
    if dtype == np.float32:
        both.check(query, dtype)


@pytest.mark.promise("cache-forgets-the-middle", "capacity-is-kept")
@every_dtype
@closed_up_or_not
@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
def test_streaming(dtype, renumber, kind):
    """Of 20,000 tokens, 4 at the start and the newest 1,020; without any more memory."""
    room = {"capacity": 1024} if kind is KVCache else {"pages": 11}
    total, chunks = 20_000, (1, 5, 40, 20)
    query, both = beside(dtype, total, 40, kind=kind, batch=1, **room)
    pool = getattr(both.cache, "_cache", both.cache)
    both.append(1024)
    memory = set()
    for i in range(1 + total // (sum(chunks) // len(chunks))):
        count = min(chunks[i % len(chunks)], total - both.count)
        both.evict(1020 - count, 4, renumber)
        both.append(count)
        if both.count > 1400:
            memory.add((both.cache.nbytes, pool.nbytes, pool._pool.table.shape))
            assert pool.used_pages <= 11
        if i % 200 in (100, 101, 102):
            both.check_short(query[:, :, :count], dtype)
    assert both.count == total
    assert len(memory) == 1
    assert_array_equal(both.cache.lengths, [1024 if renumber else total])
    assert_array_equal(both.cache.kept_first, [4])
    assert_array_equal(both.tokens[0], [*range(4), *range(total - 1020, total)])
    for q_len in (1, 5, 40):
        both.check(query[:, :, :q_len], dtype)
        both.check_short(query[:, :, :q_len], dtype)


@pytest.mark.promise("cache-forgets-the-middle")
@closed_up_or_not
def test_token_by_token(renumber):
    query, both = beside(np.float32, 3000, capacity=300)
    both.append(10)
    for _ in range(2990):
        both.evict(295, 4, renumber)
        both.append(1)
    both.check(query, np.float32)
    assert both.cache._cache._pool.table.shape[1] <= 8


@pytest.mark.promise("cache-forgets-the-middle", "cache-keeps-positions")
def test_what_stays():
    query, key, value = problem(np.float32, 400)
    for keep, keep_first, begins, first in (
        (10, 0, 390, 0),
        (10, 4, 390, 4),
        (0, 4, 400, 4),
        (400, 4, 0, 0),  # all
        (2**61, 400, 0, 0),
        (396, 4, 0, 0),
        (395, 4, 5, 4),
        (0, 0, 400, 0),
        (0, 400, 0, 0),
        (1, 399, 0, 0),
        (0, 399, 400, 399),
    ):
        cache = filled(key, value)
        cache.evict(keep, keep_first=keep_first)
        assert_array_equal(cache.lengths, [400, 400])
        assert_array_equal(cache.begins, [begins] * 2)
        assert_array_equal(cache.kept_first, [first] * 2)
        again = state(cache)
        cache.evict(keep, keep_first=keep_first)
        assert_same_state(cache, again)
        cache.evict(2**61)  # more than there is
        assert_same_state(cache, again)
        cache.evict(keep, keep_first=keep_first, renumber=True)
        left = min(400, first + 400 - begins)
        assert_array_equal(cache.lengths, [left] * 2)
        assert_array_equal(cache.begins, [first] * 2)
        assert_array_equal(cache.kept_first, [first] * 2)
    cache = filled(key, value)
    cache.evict(50)
    cache.evict([7, 20], keep_first=[100, 360])  # of which 350..359 are there
    assert_array_equal(cache.begins, [393, 380])
    assert_array_equal(cache.kept_first, [0, 10])
    cache.evict([7, 25])  # of 20 and 10 tokens
    assert_array_equal(cache.begins, [393, 380])
    assert_array_equal(cache.kept_first, [0, 5])
    cache.evict(3, renumber=True)
    assert_array_equal((cache.lengths, cache.begins, cache.kept_first), [[3, 3], [0, 0], [0, 0]])
    expected = fastattn.attention(query, key[:, :, -3:], value[:, :, -3:])
    np.testing.assert_allclose(cache.attend(query), expected, atol=1e-6)


@pytest.mark.promise("cache-forgets-the-middle", "cache-keeps-positions")
def test_pages_are_freed():
    _, both = beside(np.float32, 3000, kind=PagedKVCache)
    both.append(1000)
    cache = both.cache
    cache.evict(400, keep_first=4)  # 0..3 of page 0, and pages 4..7
    assert cache.used_pages == 2 * 5
    cache.evict(100, keep_first=4)
    assert cache.used_pages == 2 * 2
    cache.evict(0, keep_first=4)
    assert cache.used_pages == 2 * 2  # what comes next goes on in their last pages
    cache.evict(0)
    assert cache.used_pages == 2
    for sequence in cache.sequences:
        cache.free(sequence)
    assert cache.used_pages == 0


@pytest.mark.promise("files-give-the-same-bits", "copies-are-their-own", "cache-forgets-the-middle")
@every_dtype
@closed_up_or_not
@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
def test_files_and_copies(dtype, renumber, kind):
    room = {"capacity": 300} if kind is KVCache else {}
    query, both = beside(dtype, 800, 5, kind=kind, **room)
    both.append(300)
    assert "parts" not in state(both.cache)  # earlier versions read such files
    both.evict(150, 20, renumber)
    both.append(130)
    both.evict(90, 20, renumber)
    for again in (reopened(both.cache), pickled(both.cache), copy.deepcopy(both.cache)):
        assert_array_equal(again.kept_first, [20, 20])
        assert_same_bits(again.attend(query), both.cache.attend(query))
        assert again.nbytes == both.cache.nbytes or kind is PagedKVCache
        assert_same_state(reopened(again), state(again))
        other = Beside(again, both.key, both.value)
        other.tokens, other.positions = both.tokens.copy(), both.positions.copy()
        other.count = both.count
        other.append(150)
        other.check(query, dtype)
        other.evict(100, 20, True)
        other.check(query, dtype)
    stored = state(both.cache)
    assert_array_equal(stored["parts"][:, 2] - stored["parts"][:, 1], [20, 20])
    tokens = np.count_nonzero(stored["key"].any(axis=(1, 3)))
    assert tokens == 2 * 110  # nothing but what is kept


@pytest.mark.promise(
    "cache-forgets-the-middle", "reorder-takes-everything-along", "truncate-undoes-append"
)
@every_dtype
@closed_up_or_not
def test_sequences_share_what_is_left(dtype, renumber):
    query, both = beside(dtype, 1500, 3, batch=3)
    both.append(700)
    both.evict(200, 10, renumber)
    both.append(5)
    cache = both.cache
    cache.reorder([2, 0, 0])
    for x in (both.key, both.value):
        x[:] = x[[2, 0, 0]]
    both.check(query, dtype)
    assert cache._cache.used_pages == 8  # 4 of each, which two of the three share
    both.append(1)
    assert cache._cache.used_pages == 9  # the last page, partly full, is copied
    both.check(query, dtype)
    before = cache.attend(query)
    length = int(cache.lengths[0])
    cache.append(both.key[:, :, :30], both.value[:, :, :30])
    cache.truncate(length)
    assert_same_bits(cache.attend(query), before)
    paged = cache._cache
    child = paged.add(0)
    assert_array_equal(paged.kept_first, [10] * 4)
    alone = paged.attend(query[:1], sequences=[child])
    assert_same_bits(alone, before[:1])
    assert_same_bits(paged.attend(query[[0, 0]], sequences=[0, child]), before[[0, 0]])
    short = paged.add(1, length - 2)
    assert_array_equal(paged.lengths[-2:], [length, length - 2])
    paged.evict(7, sequences=[child])
    assert_same_bits(paged.attend(query[:1], sequences=[0]), before[:1])
    for sequence in (child, short):
        paged.free(sequence)
    assert_same_bits(cache.attend(query), before)
    with pytest.raises(ValueError, match=r"lengths must be within begins\.\.lengths"):
        cache.truncate(9)


@pytest.mark.promise("bitwise-threads", "sharing-changes-no-bit")
@every_isa
@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_threads_and_company_change_no_bit(dtype, q_len, threads):
    query, both = beside(dtype, 6000, q_len, batch=4)
    both.append(5000)
    both.cache.evict([3000, 2500, 6000, 900], keep_first=[7, 1500, 0, 4])
    both.append(1000)
    paged = both.cache._cache
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(paged.attend(query))
        assert_same_bits(results[-1], results[0])
    for b in range(4):
        assert_same_bits(paged.attend(query[[b]], sequences=[b]), results[0][[b]])


@pytest.mark.promise("capacity-is-kept")
@pytest.mark.parametrize("capacity", [1, 2, 5, 127, 128, 129, 130, 257, 300])
def test_capacity_has_room_wherever_the_gap_is(capacity):
    _, both = beside(np.float32, 9000, capacity=capacity)
    cache, sizes, rng = both.cache, set(), both.rng
    for _ in range(150):
        kept = len(both.tokens[0])
        keep = int(rng.integers(0, kept + 1))
        start = int(rng.integers(0, 1 + int(cache.lengths[0]))) if rng.random() < 0.3 else 4
        try:
            both.evict(keep, min(start, int(cache.lengths[0])), bool(rng.random() < 0.5))
        except ValueError:  # three parts
            continue
        if rng.random() < 0.2:
            cache.reorder([0, 0])
            for x in (both.key, both.value):
                x[1, :, : both.count] = x[0, :, : both.count]
        room = capacity - len(both.tokens[0])
        both.append(int(rng.integers(0, room + 1)) if rng.random() < 0.5 else room)
        sizes.add(cache.nbytes)
    assert len(sizes) <= 2
    with pytest.raises(MemoryError, match="capacity must be"):
        cache.append(*(x[:, :, : capacity + 1] for x in (both.key, both.value)))
