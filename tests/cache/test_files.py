# SPDX-License-Identifier: Apache-2.0
"""A cache over pages that exist already, and a cache in a file, is the cache that it was."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn import KVCache, PagedKVCache
from tests.cache.problems import (
    BFLOAT16,
    NAN,
    assert_same_state,
    check,
    every_dtype,
    every_isa,
    filled,
    held,
    pages_of,
    problem,
    reopened,
    state,
)
from tests.support.correctness import assert_same_bits


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
    tables = source._pool.table[:3].copy()
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
