# SPDX-License-Identifier: Apache-2.0
"""Parts of the keys, merged, are all of them. Its errors are in test_arguments.py."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import attention, merge
from tests.support.correctness import assert_same_bits, assert_within_gate
from tests.support.problems import both_dtypes, make_problem

EDGES = (0, 1, 100, 100, 128, 300)


def problem_and_parts(dtype, edges=EDGES):
    query, key, value = make_problem(20, edges[-1], 16, 8, heads=4, kv_heads=2, dtype=dtype)
    parts = [
        attention(query, key[:, a:b], value[:, a:b], return_lse=True)
        for a, b in itertools.pairwise(edges)
    ]
    return (query, key, value), parts


@pytest.mark.promise("merge-is-the-whole")
@both_dtypes
def test_parts_are_the_whole_in_any_order(dtype):
    operands, parts = problem_and_parts(dtype)
    for order in itertools.permutations(parts):
        out, lse = merge(*order)
        assert out.dtype == lse.dtype == dtype
        assert_within_gate((out, lse), *operands)


@pytest.mark.promise("merge-of-empty-is-empty")
@both_dtypes
def test_one_part_is_itself(dtype):
    operands, _ = problem_and_parts(dtype)
    part = attention(*operands, return_lse=True)
    assert_same_bits(merge(part), part)
    nothing = (np.full_like(part[0], 3), np.full_like(part[1], -np.inf))
    assert_same_bits(merge(part, nothing), part)
    assert_same_bits(merge(nothing, part, list(nothing)), part)


@pytest.mark.promise("merge-of-empty-is-empty")
@both_dtypes
def test_nothing_and_nothing_is_nothing(dtype):
    _, parts = problem_and_parts(dtype)
    empty = parts[2]
    assert (empty[1] == -np.inf).all()
    for sinks in (None, np.zeros(4), np.full(4, -np.inf), np.full(4, 1e5)):
        assert_same_bits(merge(empty, empty, sinks=sinks), empty)
        assert_same_bits(merge(empty, sinks=sinks), empty)
    no_rows = [x[:, :0] for x in empty]
    assert merge(no_rows, no_rows)[0].shape == (4, 0, 8)


@pytest.mark.promise("merge-is-the-whole")
@both_dtypes
def test_a_prefix_that_a_batch_shares(dtype):
    """Its keys need no batch axis; what each sequence adds has one."""
    query, own_key, own_value = make_problem(
        1, 40, 32, heads=8, kv_heads=2, batch=(5,), dtype=dtype
    )
    _, key, value = make_problem(1, 1500, 32, heads=8, kv_heads=2, dtype=dtype, seed=1)
    lengths = np.array([0, 3, 17, 39, 40])
    sinks = np.linspace(-1, 1, 8)
    prefix = attention(query, key, value, return_lse=True)
    own = attention(query, own_key, own_value, kv_lengths=lengths, return_lse=True)
    out, lse = merge(prefix, own, sinks=sinks)
    whole = [
        np.concatenate([np.broadcast_to(x, (5, *x.shape)), y], axis=-2)
        for x, y in ((key, own_key), (value, own_value))
    ]
    assert_within_gate((out, lse), query, *whole, kv_lengths=1500 + lengths, sinks=sinks)


@pytest.mark.promise("merge-is-the-whole")
@both_dtypes
def test_rows_that_see_different_parts(dtype):
    query, key, value = make_problem(20, 300, heads=2, dtype=dtype)
    parts = [
        attention(
            query, key[:, a:b], value[:, a:b], is_causal=True, query_offset=90 - a, return_lse=True
        )
        for a, b in itertools.pairwise((0, 90, 100, 105, 300))
    ]
    assert (parts[2][1] == -np.inf).any()
    assert_within_gate(merge(*parts), query, key, value, is_causal=True, query_offset=90)


@pytest.mark.promise("merge-is-the-whole")
@both_dtypes
def test_sinks_count_once(dtype):
    operands, parts = problem_and_parts(dtype)
    for sinks in (np.array([0.0, 2.0, -np.inf, 30.0]), np.full(4, -1.0, np.float16)):
        out, lse = merge(*parts, sinks=sinks)
        assert_within_gate((out, lse), *operands, sinks=sinks)
        assert_same_bits(lse, merge(*parts)[1])
    flat = [(out[0], lse[0]) for out, lse in parts]
    assert_same_bits(merge(*flat, sinks=np.ones(1))[0], merge(*parts, sinks=np.ones(4))[0][0])


@pytest.mark.promise("merge-is-the-whole")
@both_dtypes
def test_associative(dtype):
    operands, (a, b, c, d, e) = problem_and_parts(dtype)
    for tree in (
        merge(merge(a, b), merge(c, merge(d, e))),
        merge(merge(merge(merge(e, d), c), b), a),
    ):
        for got, expected in zip(tree, merge(a, b, c, d, e), strict=True):
            assert_allclose(got, expected, atol=8 * np.finfo(dtype).eps)
        assert_within_gate(tree, *operands)


@pytest.mark.promise("merge-is-the-whole", "finite-stays-finite")
@both_dtypes
def test_far_apart(dtype):
    """Parts whose sums differ by more than the dtype holds, or lie at the end of its range."""
    rng = np.random.default_rng(0)
    outs = rng.normal(size=(3, 2, 5, 4)).astype(dtype)
    high = np.finfo(dtype).max
    for levels, winners in [
        ((0, 1e4, -1e4), [1]),
        ((-1e30, 0, -1e30), [1]),
        ((-high, -high, -np.inf), [0, 1]),
        ((high, high, 0), [0, 1]),
    ]:
        lses = [np.full((2, 5), level, dtype) for level in levels]
        out, lse = merge(*zip(outs, lses, strict=True))
        assert_allclose(out, outs[winners].mean(axis=0), rtol=1e-5, atol=1e-6)
        assert_allclose(lse, max(levels), rtol=1e-6)


@pytest.mark.promise("merge-of-empty-is-empty")
def test_not_finite_parts():
    """NaN reaches its row; what a part that saw nothing holds does not."""
    _, parts = problem_and_parts(np.float64)
    expected = merge(*parts)
    parts[2][0][:] = np.nan
    assert_same_bits(merge(*parts), expected)
    parts[0][0][1, 7, 3] = np.nan
    parts[1][1][2, 9] = np.nan
    out, lse = merge(*parts)
    bad = np.zeros(out.shape, bool)
    bad[1, 7, 3] = bad[2, 9] = True
    assert_array_equal(np.isnan(out), bad)
    assert_array_equal(np.isnan(lse), bad[..., 0] & (np.arange(4) == 2)[:, None])
    assert_same_bits(out[~bad], expected[0][~bad])


@pytest.mark.promise("inputs-are-not-written")
def test_arrays_of_other_kinds():
    _, parts = problem_and_parts(np.float64)
    expected = merge(*parts)
    assert_same_bits(merge(*[(out.tolist(), lse.tolist()) for out, lse in parts]), expected)
    assert_same_bits(
        merge(*[(out[..., ::-1], lse) for out, lse in parts])[0], expected[0][..., ::-1]
    )
    swapped = [tuple(x.astype(x.dtype.newbyteorder("S")) for x in part) for part in parts]
    assert_same_bits(merge(parts[0], *swapped[1:]), expected)
    assert_same_bits(merge(*swapped), expected)
    kept = [(out.copy(), lse.copy()) for out, lse in parts]
    merge(*parts, sinks=np.zeros(4))
    for part, copy in zip(parts, kept, strict=True):
        assert_same_bits(part, copy)
