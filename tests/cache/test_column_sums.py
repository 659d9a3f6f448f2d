# SPDX-License-Identifier: Apache-2.0
"""What each key gets from the queries of a call of a cache, for heavy-hitter eviction."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import KVCache, PagedKVCache, attention_statistics
from tests.cache.beside import OPTIONS, beside, closed_up_or_not
from tests.cache.problems import BFLOAT16, NAN, every_dtype, every_isa, filled, problem
from tests.support.correctness import assert_same_bits


@pytest.mark.promise("column-sums-of-a-cache")
@every_isa
@every_dtype
@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(dtype, q_len, name):
    query, both = beside(dtype, 1400, q_len)
    both.append(1300)
    both.evict(1100, 9)
    both.append(100)
    sums = both.check_sums(query, dtype, **OPTIONS[name])
    if "sinks" not in OPTIONS[name] and "mask" not in OPTIONS[name]:
        assert_allclose(sums.sum(axis=2), q_len, rtol=1e-5)


@pytest.mark.promise("column-sums-of-a-cache")
@every_dtype
@closed_up_or_not
@pytest.mark.parametrize("heads", [2, 34])
@pytest.mark.parametrize("q_len", [1, 3, 17])
def test_heads_and_gaps(dtype, renumber, heads, q_len):
    _, both = beside(dtype, 1500)
    query = problem(dtype, 1, q_len, heads=heads)[0]
    both.append(1400)
    both.evict([900, 1400], [400, 0], renumber)
    both.check_sums(query, dtype)
    both.append(60)
    both.evict([600, 700], [10, 4], renumber)
    both.check_sums(query, dtype)
    both.evict(0, 1, renumber)
    both.check_sums(query, dtype)
    both.evict(0)
    assert not both.check_sums(query, dtype).any()


@pytest.mark.promise("column-sums-of-a-cache")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("q_len", [1, 2, 16, 100])
def test_they_are_those_of_attention_statistics(dtype, q_len):
    query, key, value = problem(dtype, 700, q_len)
    cache = filled(key, value)
    _, sums = cache.attend(query, return_column_sums=True)
    expected = attention_statistics(
        query, key, column_sums=True, is_causal=True, query_offset=700 - q_len
    )
    assert sums.dtype == np.float32
    assert_allclose(sums, expected.column_sums, rtol=1e-5, atol=1e-7)


@pytest.mark.promise("column-sums-of-a-cache")
@every_isa
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("q_len", [1, 2, 8, 16, 33])
def test_rows_sum_to_one_however_large_scores_are(q_len, gap):
    query, key, value = problem(np.float32, 1300, q_len)
    cache = filled(key, value)
    if gap:
        cache.evict(700, keep_first=90)
    for scale in (1.0, 100.0):
        _, sums = cache.attend(query, scale=scale, return_column_sums=True)
        assert_allclose(sums.sum(axis=2), q_len, rtol=1e-5)
    sinks = np.array([-3, 0.5, 900, 2], np.float32)
    _, lse, sums = cache.attend(
        query, scale=100.0, sinks=sinks, return_lse=True, return_column_sums=True
    )
    without = lse.astype(np.float64)
    seen = 1 / (1 + np.exp(np.minimum(sinks[:, None] - without, 700)))
    assert_allclose(sums.sum(axis=2), seen.sum(axis=2), rtol=1e-3, atol=1e-6)


@pytest.mark.promise("column-sums-of-a-cache")
def test_what_is_returned():
    query, key, value = problem(np.float32, 200, 3)
    cache = filled(key, value)
    out, lse, sums = cache.attend(query, return_lse=True, return_column_sums=True)
    assert (out.shape, lse.shape, sums.shape) == ((2, 4, 3, 24), (2, 4, 3), (2, 4, 200))
    for results in (cache.attend(query, return_column_sums=True), (out, sums)):
        assert_same_bits(results[0], out)
        assert_same_bits(results[1], sums)
    into = np.empty_like(out)
    got = cache.attend(query, return_column_sums=True, out=into)
    assert got[0] is into
    with pytest.raises(TypeError, match="return_column_sums must be a bool, not int"):
        cache.attend(query, return_column_sums=1)
    empty = KVCache(2, 2, 16, value_head_dim=24)
    assert empty.attend(query, return_column_sums=True)[1].shape == (2, 4, 0)
    nobody = PagedKVCache(2, 16, value_head_dim=24)
    assert nobody.attend(query[:0], return_column_sums=True)[1].shape == (0, 4, 0)
    assert not cache.attend(query[:, :, :0], return_column_sums=True)[1].any()


@pytest.mark.promise("column-sums-of-a-cache", "bitwise-threads", "sharing-changes-no-bit")
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.int8])
@pytest.mark.parametrize("q_len", [1, 30])
def test_threads_and_company_change_no_bit(dtype, q_len, threads):
    query, both = beside(dtype, 6000, q_len, batch=3, kind=PagedKVCache)
    both.append(5000)
    cache = both.cache
    cache.evict([3000, 2500, 6000], keep_first=[7, 1500, 0])
    both.append(1000)
    expected = cache.attend(query, return_column_sums=True)
    for count in (1, 2, 5):
        threads(count)
        for mine, other in zip(cache.attend(query, return_column_sums=True), expected, strict=True):
            assert_same_bits(mine, other)
    for b in range(3):
        own = cache.attend(query[[b]], return_column_sums=True, sequences=[b])
        assert_same_bits(own[0], expected[0][[b]])
        assert_same_bits(own[1], expected[1][[b]])


@pytest.mark.promise("column-sums-of-a-cache")
@every_isa
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.int8])
@pytest.mark.parametrize("q_len", [1, 3, 30])
def test_a_long_neighbour_changes_no_bit(dtype, q_len):
    """Beyond 65,536 keys the longest sequence says how many a thread sums at a time."""
    query, key, value = problem(dtype, 70_000, q_len, dims=(4, 4))
    cache = PagedKVCache(2, 4, dtype=dtype)
    for keep in (3000, 70_000):
        cache.append(key[:1, :, :keep], value[:1, :, :keep], sequences=[cache.add()])
    for keep_first in (7, 0):  # with a gap, then without
        cache.evict(2000, keep_first=keep_first, sequences=[0])
        both = cache.attend(query, return_column_sums=True)[1]
        alone = cache.attend(query[:1], return_column_sums=True, sequences=[0])[1]
        assert_same_bits(both[:1, :, : alone.shape[2]], alone)


@pytest.mark.promise("column-sums-of-a-cache")
@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_nan_reaches_the_rows_that_see_it(q_len):
    query, key, value = problem(np.float32, 300, q_len)
    key[0, 0, 7] = NAN
    cache = filled(key, value)
    sums = cache.attend(query, return_column_sums=True)[1]
    assert np.isnan(sums[0, :2]).all()
    assert not np.isnan(sums[0, 2:]).any()
    assert not np.isnan(sums[1]).any()
    cache.evict(200, keep_first=7)
    assert_allclose(cache.attend(query, return_column_sums=True)[1].sum(axis=2), q_len, rtol=1e-5)


@pytest.mark.promise("column-sums-of-a-cache")
def test_heavy_hitters_are_found():
    query, key, value = problem(np.float32, 2000)
    key[:, :, 123] = 9 * query[:, ::2, 0] / np.linalg.norm(query[:, ::2, 0], axis=-1)[..., None]
    cache = filled(key, value)
    sums = cache.attend(query, return_column_sums=True)[1]
    assert_array_equal(sums[:, ::2].argmax(axis=2), 123)
