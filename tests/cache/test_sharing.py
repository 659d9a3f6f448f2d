# SPDX-License-Identifier: Apache-2.0
"""Sequences share pages until one writes: forks, beams, sequences that come and go."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import KVCache, PagedKVCache
from tests.cache.problems import (
    assert_same_state,
    check,
    every_dtype,
    every_isa,
    filled,
    given_to,
    held,
    pages_of,
    problem,
    state,
)
from tests.support.correctness import assert_same_bits


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
        (4, 12, 128, (None, 2), 900),  # more rows than kernel/decode.h takes: in query tiles
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
        tables[b, :used] = cache._pool.table[b, :used]
        tables[b, : min(used, 2 if length >= 256 else 1)] = cache._pool.table[
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
def test_sequences_go_on_from_others_in_the_order_they_were_added():
    query, key, value = problem(np.float32, 300, batch=3)
    cache = PagedKVCache(2, 16, value_head_dim=24)
    first, *others = (cache.add() for _ in range(4))
    cache.append(key, value, [300, 0, 140], sequences=others)
    cache.free(first)
    pages = cache.used_pages
    cache.reorder([2, 0, 2])
    assert cache.sequences == others
    assert_array_equal(cache.lengths, [140, 300, 140])
    assert cache.used_pages == pages  # shared, not copied
    cache.append(key[:, :, :1], value[:, :, :1])
    alone = KVCache(3, 2, 16, value_head_dim=24)
    alone.append(key[[2, 0, 2]], value[[2, 0, 2]], [140, 300, 140])
    alone.append(key[:, :, :1], value[:, :, :1])
    assert_same_bits(cache.attend(query[:, :, :1]), alone.attend(query[:, :, :1]))


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
