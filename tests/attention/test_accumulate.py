# SPDX-License-Identifier: Apache-2.0
"""Results that go on from what other keys gave, and float32 results of half precision.

Parts of the keys, one after the other, must give what all of them give at once: `merge` and the
definition say what that is.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastattn
from fastattn import KVCache, attention, attention_backward, merge, reference, varlen_attention
from tests.attention.problems import every_arithmetic, problem_with_everything, with_lse
from tests.support.correctness import assert_same_bits
from tests.support.problems import HALVES, both_dtypes, every_half, make_problem

pytestmark = pytest.mark.usefixtures("isa")
INF = np.inf
# Few queries, query tiles, and both in several vectors; keys in one split, and in several.
Q_LENS = (1, 3, 16, 17, 24, 49, 100)
CUTS = ((0, 40, 41, 130), (0, 0, 600, 1300), (0, 8192, 8300, 8300))


def empty_results(query, value, dtype=None):
    """Return out and lse over no keys; out holds what must never be read."""
    wide = np.promote_types(query.dtype, np.float32)
    shape = query.shape[:-1]
    out = np.full((*shape, value.shape[-1]), np.nan, wide if dtype is None else dtype)
    return out, np.full(shape, -INF, wide)


def keys_of(options, begin, end, q_len):
    """Return the options of a call with some of the keys."""
    part = dict(options)
    for name in ("mask", "bias"):
        if name in options:
            part[name] = options[name][..., begin:end]
    if "kv_lengths" in options:
        part["kv_lengths"] = np.clip(options["kv_lengths"] - begin, 0, end - begin)
    return part | {"key_offset": begin, "query_offset": options.get("query_offset", 0)}


def in_parts(operands, cuts, options, out, lse):
    """Attend to parts of the keys, one after the other."""
    query, key, value = operands
    for begin, end in itertools.pairwise(cuts):
        part = keys_of(options, begin, end, query.shape[-2])
        keys = slice(begin, end)
        got = attention(
            query, key[..., keys, :], value[..., keys, :], out=out, lse=lse, accumulate=True, **part
        )
        assert got is out
    return out, lse


def assert_near(got, expected, eps):
    """Assert that (out, lse) is as exact as numbers of that eps can be."""
    for x, y in zip(got, expected, strict=True):
        finite = np.isfinite(y)
        assert_array_equal(x[~finite], y[~finite].astype(x.dtype))
        largest = np.abs(y[finite]).max(initial=1)
        assert np.abs(x[finite] - y[finite]).max(initial=0) <= 16 * eps * largest


@pytest.mark.promise("accumulate-is-the-whole")
@every_arithmetic
@pytest.mark.parametrize("q_len", Q_LENS)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_parts_are_the_whole(q_len, cuts, dtype):
    for heads, kv_heads, head_dim, value_head_dim in ((2, 1, 16, 16), (3, 3, 9, 21)):
        operands = make_problem(
            q_len, cuts[-1], head_dim, value_head_dim, heads=heads, kv_heads=kv_heads, dtype=dtype
        )
        for options in ({}, {"is_causal": True, "query_offset": cuts[1]}, {"softcap": 3.0}):
            got = in_parts(operands, cuts, options, *empty_results(operands[0], operands[2]))
            exact = [x.astype(np.float64) for x in operands]
            expected = reference.attention(*exact, return_lse=True, **options)
            eps = ml_dtypes.finfo(dtype).eps if dtype == HALVES[1] else np.finfo(got[0].dtype).eps
            assert_near(got, expected, eps)


@pytest.mark.promise("accumulate-is-the-whole")
@both_dtypes
@pytest.mark.parametrize("threads_of_call", [1, 3])
def test_every_option(dtype, threads_of_call, threads):
    threads(threads_of_call)
    operands, options = problem_with_everything(dtype)
    del options["sinks"]
    for names in [
        *itertools.combinations(options, 1),
        *itertools.combinations(options, 2),
        options,
    ]:
        some = {name: options[name] for name in (*names, "query_offset")}
        some |= {"dropout_p": 0.3, "seed": 5} if "softcap" in some else {}
        expected = reference.attention(*operands, return_lse=True, **some)
        got = in_parts(operands, (0, 77, 78, 300), some, *empty_results(*operands[::2]))
        assert_near(got, expected, np.finfo(dtype).eps)


@pytest.mark.promise("accumulate-is-the-whole", "merge-is-the-whole")
@both_dtypes
@pytest.mark.parametrize("q_len", [2, 50])
def test_as_merge(q_len, dtype):
    query, key, value = make_problem(q_len, 300, 24, heads=4, kv_heads=2, batch=(2,), dtype=dtype)
    parts = [
        with_lse(query, key[..., keys, :], value[..., keys, :])
        for keys in (slice(0, 100), slice(100, 300))
    ]
    out, lse = (x.copy() for x in parts[0])
    got = attention(
        query,
        key[..., 100:, :],
        value[..., 100:, :],
        out=out,
        lse=lse,
        accumulate=True,
        return_lse=True,
    )
    assert got[0] is out
    assert got[1] is lse
    assert_near(got, merge(*parts), np.finfo(dtype).eps)
    # What each holds may be far larger, or smaller, than what the other does.
    for shift in (-200.0, 200.0, 1e30):
        first = parts[0][0].copy(), parts[0][1] + dtype(shift)
        expected = merge(first, parts[1])
        more = {"out": first[0], "lse": first[1], "accumulate": True}
        attention(query, key[..., 100:, :], value[..., 100:, :], **more)
        assert_near(first, expected, np.finfo(dtype).eps)


@pytest.mark.promise("accumulate-of-nothing")
@every_arithmetic
@pytest.mark.parametrize("q_len", [1, 5, 20, 60])
def test_rows_that_see_nothing(q_len, dtype):
    query, key, value = make_problem(q_len, 200, 24, 20, heads=4, kv_heads=2, dtype=dtype)
    expected = with_lse(query, key, value)
    nothing = [x[..., :0, :] for x in (key, value)]
    for keys, options in (
        ((key, value), {"mask": np.zeros(200, bool)}),
        ((key, value), {"kv_lengths": 0}),
        ((key, value), {"is_causal": True, "query_offset": 0, "key_offset": q_len}),
        (nothing, {}),
    ):
        out, lse = (x.copy() for x in expected)
        attention(query, *keys, out=out, lse=lse, accumulate=True, **options)
        assert_same_bits((out, lse), expected)
        out, lse = empty_results(query, value, dtype)
        attention(query, *keys, out=out, lse=lse, accumulate=True, **options)
        assert_same_bits((out, lse), (np.zeros_like(out), np.full_like(lse, -INF)))
    # Some rows see nothing now, others have seen nothing before.
    mask = np.arange(q_len)[:, None] % 3 != 0
    before = np.arange(q_len) % 2 == 0
    out, lse = (x.copy() for x in expected)
    out[:, ~before], lse[:, ~before] = np.nan, -INF
    attention(query, key, value, mask=mask, out=out, lse=lse, accumulate=True)
    idle = ~mask[:, 0]
    assert_same_bits(
        (out[:, idle & before], lse[:, idle & before]),
        (expected[0][:, idle & before], expected[1][:, idle & before]),
    )
    assert not out[:, idle & ~before].any()
    assert (lse[:, idle & ~before] == -INF).all()
    assert np.isfinite(out).all()
    fresh = ~idle & ~before
    tolerance = 1e-2 if dtype in HALVES else 1e-5
    assert_allclose(
        out[:, fresh].astype(float), expected[0][:, fresh].astype(float), atol=tolerance
    )
    assert_allclose(lse[:, ~idle & before], expected[1][:, ~idle & before] + np.log(2), atol=1e-5)


@pytest.mark.promise("visible-nan-reaches-its-rows", "accumulate-is-the-whole")
@both_dtypes
@pytest.mark.parametrize("q_len", [4, 40])
def test_what_is_not_finite(q_len, dtype):
    query, key, value = make_problem(q_len, 90, 8, heads=2, dtype=dtype)
    expected = with_lse(query, key, value)
    out, lse = (x.copy() for x in expected)
    out[0, 1], lse[1, 2] = np.nan, np.nan
    query = query.copy()
    query[1, 3] = np.nan
    attention(query, key, value, out=out, lse=lse, accumulate=True)
    bad = np.zeros(lse.shape, bool)
    bad[0, 1] = bad[1, 2] = bad[1, 3] = True
    assert_array_equal(np.isnan(out).all(axis=-1), bad)
    assert_array_equal(np.isfinite(out).all(axis=-1), ~bad)
    bad[0, 1] = False
    assert_array_equal(np.isnan(lse), bad)


@pytest.mark.promise("bitwise-threads", "bitwise-strides")
@every_arithmetic
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 5000), (9, 700), (70, 300), (30, 20_000)])
def test_bits_depend_on_no_threads_and_strides(q_len, kv_len, dtype, threads):
    operands = make_problem(q_len, kv_len, 16, heads=2, kv_heads=1, batch=(2,), dtype=dtype)
    before = with_lse(operands[0], *make_problem(q_len, 7, 16, heads=1, dtype=dtype, seed=3)[1:])
    results = []
    for count, steps in ((1, 1), (3, 1), (40, 2)):
        threads(count)
        out, lse = (np.repeat(x, steps, axis=-2 if x.ndim == 4 else -1) for x in before)
        out = out[..., ::steps, :]
        lse = np.ascontiguousarray(lse[..., ::steps])
        attention(*operands, out=out, lse=lse, accumulate=True)
        results.append((out, lse))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.promise("accumulate-is-the-whole", "packed-sequences-are-alone")
@every_arithmetic
def test_packed(dtype):
    starts, kv_starts = np.array([2, 3, 43, 43, 60]), np.array([0, 50, 50, 90, 400])
    query, key, value = (x[0] for x in make_problem(1, 1, 1))
    rng = np.random.default_rng(2)
    query = rng.normal(size=(62, 4, 16)).astype(dtype)
    key, value = (rng.normal(size=(400, 2, 16)).astype(dtype) for _ in range(2))
    first = varlen_attention(query, key, value, starts, kv_starts, return_lse=True)
    out, lse = first[0].astype(np.promote_types(dtype, np.float32)), first[1].copy()
    out[:2], lse[:, :2] = 7, 7  # of no sequence
    alone = {}
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        alone[b] = out[begin:end].copy().swapaxes(0, 1), lse[:, begin:end].copy()
        keys = slice(kv_starts[b], kv_starts[b + 1])
        attention(
            *(x.swapaxes(0, 1) for x in (query[begin:end], key[keys], value[keys])),
            out=alone[b][0],
            lse=alone[b][1],
            accumulate=True,
        )
    given = {"out": out, "lse": lse, "accumulate": True}
    assert varlen_attention(query, key, value, starts, kv_starts, **given) is out
    assert (out[:2] == 7).all()
    assert (lse[:, :2] == 7).all()
    assert_array_equal(out[60:], 0)
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        assert_same_bits((out[begin:end].swapaxes(0, 1), lse[:, begin:end]), alone[b])


@pytest.mark.promise("out-is-written-in-place")
@both_dtypes
def test_lse_goes_where_it_is_told(dtype):
    operands = make_problem(20, 30, batch=(2,), dtype=dtype)
    expected = with_lse(*operands)
    lse = np.empty_like(expected[1])
    got = attention(*operands, lse=lse)
    assert_same_bits((got, lse), expected)
    assert attention(*operands, lse=lse, return_lse=True)[1] is lse


# Float32 results of half precision.


@pytest.mark.promise("float32-of-half-precision")
@every_half
@pytest.mark.parametrize("q_len", [1, 5, 12, 40, 100])
@pytest.mark.parametrize("kv_len", [7, 33, 300])
def test_float32_results(q_len, kv_len, dtype):
    for heads, kv_heads, dim, value_dim in ((4, 2, 16, 16), (2, 2, 20, 7), (1, 1, 64, 130)):
        operands = make_problem(
            q_len, kv_len, dim, value_dim, heads=heads, kv_heads=kv_heads, batch=(2,), dtype=dtype
        )
        expected = with_lse(*operands)
        out = np.full(expected[0].shape, np.nan, np.float32)
        lse = attention(*operands, out=out, return_lse=True)[1]
        assert_same_bits((out.astype(dtype), lse), expected)
        truth = reference.attention(*(x.astype(np.float64) for x in operands))
        pairs = dtype == HALVES[1] and fastattn._core.isa() == "avx512_bf16"
        assert np.abs(out - truth).max() <= (2**-8 if pairs else 1e-5)


@pytest.mark.promise("float32-of-half-precision")
@every_half
def test_many_parts_stay_as_exact_as_one(dtype):
    """Rounded to half precision in between, the error grows with their number."""
    operands = make_problem(40, 2048, 32, heads=2, dtype=dtype)
    truth = reference.attention(*(x.astype(np.float64) for x in operands))
    errors = {}
    for kind in (np.float32, dtype):
        out, _ = in_parts(operands, range(0, 2049, 64), {}, *empty_results(*operands[::2], kind))
        errors[kind] = np.sqrt(((out.astype(dtype).astype(float) - truth) ** 2).mean())
    once = np.sqrt(((attention(*operands).astype(float) - truth) ** 2).mean())
    assert errors[np.float32] <= 1.25 * once
    assert errors[dtype] > 1.5 * once


@pytest.mark.promise("float32-of-half-precision")
@every_half
def test_float32_results_of_a_cache(dtype):
    query, key, value = make_problem(3, 40, 16, heads=4, kv_heads=2, batch=(2,), dtype=dtype)
    cache = KVCache(2, 2, 16, dtype=dtype)
    cache.append(key, value)
    expected = cache.attend(query)
    out = np.empty(expected.shape, np.float32)
    assert cache.attend(query, out=out) is out
    assert_same_bits(out.astype(dtype), expected)


# Gradients.


def saved(operands, options, cuts=()):
    """Return grad_out, out and lse of a call over all keys, the first two of float32 at least."""
    out, lse = empty_results(operands[0], operands[2])
    in_parts(operands, (0, *cuts, operands[1].shape[-2]), options, out, lse)
    grad_out = np.random.default_rng(1).standard_normal(out.shape)
    return grad_out.astype(operands[0].dtype).astype(out.dtype), out, lse


@pytest.mark.promise("gradients-accumulate")
@every_arithmetic
@pytest.mark.parametrize("q_len", [1, 30, 130])
@pytest.mark.parametrize("head_dim", [16, 9])
@pytest.mark.parametrize("cuts", [(60,), (128, 200, 200)], ids=str)
def test_gradients_of_parts(q_len, head_dim, cuts, dtype):
    kv_len = 300
    operands = make_problem(q_len, kv_len, head_dim, heads=4, kv_heads=2, batch=(2,), dtype=dtype)
    query, key, value = operands
    for options in ({}, {"is_causal": True, "query_offset": 170}, {"dropout_p": 0.2, "seed": 1}):
        grad_out, out, lse = saved(operands, options, cuts)
        dq, dk, dv = (np.full(x.shape, 2, out.dtype) for x in operands)
        for begin, end in itertools.pairwise((0, *cuts, kv_len)):
            keys = (..., slice(begin, end), slice(None))
            into = dq, dk[keys], dv[keys]
            got = attention_backward(
                grad_out,
                query,
                key[keys],
                value[keys],
                out,
                lse,
                grads=into,
                accumulate=True,
                **keys_of(options, begin, end, q_len),
            )
            assert all(x is y for x, y in zip(got, into, strict=True))
        exact = [x.astype(np.float64) for x in (grad_out, *operands)]
        expected = reference.attention_backward(*exact, None, None, **options)
        pairs = dtype == HALVES[1] and fastattn._core.isa() == "avx512_bf16"
        tolerance = 3e-2 if pairs else 1e-4 if out.dtype == np.float32 else 1e-10
        for got, x in zip((dq, dk, dv), expected, strict=True):
            assert_allclose(got - 2, x, atol=tolerance * np.abs(x).max(), rtol=0)


@pytest.mark.promise("float32-of-half-precision")
@every_half
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 9), (20, 64), (300, 200)])
@pytest.mark.parametrize("dim", [32, 7])
def test_float32_gradients(q_len, kv_len, dim, dtype):
    operands = make_problem(q_len, kv_len, dim, heads=2, kv_heads=1, dtype=dtype)
    out, lse = with_lse(*operands)
    grad_out = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
    expected = attention_backward(grad_out, *operands, out, lse)
    grads = tuple(np.full(x.shape, np.nan, np.float32) for x in operands)
    attention_backward(grad_out, *operands, out, lse, grads=grads)
    assert_same_bits(tuple(x.astype(dtype) for x in grads), tuple(expected))
    again = tuple(np.full(x.shape, np.nan, dtype) for x in operands)
    attention_backward(grad_out, *operands, out, lse, grads=again)
    assert_same_bits(again, tuple(expected))
    wide = (x.astype(np.float32) for x in (grad_out, out))
    same = attention_backward(next(wide), *operands, next(wide), lse)
    assert_same_bits(tuple(same), tuple(expected))


@pytest.mark.promise("gradients-accumulate", "gradients-sum-over-what-repeats")
@both_dtypes
def test_gradients_of_what_repeats(dtype):
    query, key, value = make_problem(20, 30, heads=4, kv_heads=2, batch=(3,), dtype=dtype)
    operands = query, key[:1], value[0]
    out, lse = with_lse(*operands)
    expected = attention_backward(out, *operands, out, lse)
    grads = tuple(np.ones_like(x) for x in operands)
    attention_backward(out, *operands, out, lse, grads=grads, accumulate=True)
    for got, x in zip(grads, expected, strict=True):
        assert_array_equal(got, x + 1)
    attention_backward(out, *operands, out, lse, grads=grads)
    assert_same_bits(grads, expected)


@pytest.mark.promise("gradients-accumulate", "bitwise-gradients")
@every_arithmetic
@pytest.mark.parametrize("lengths", [(9, 40), (200, 500)])
def test_bits_of_gradients(lengths, dtype, threads):
    operands = make_problem(*lengths, 16, heads=2, batch=(2,), dtype=dtype)
    grad_out, out, lse = saved(operands, {})
    results = []
    for count in (1, 3, 20):
        threads(count)
        grads = tuple(np.ones(x.shape, out.dtype) for x in operands)
        attention_backward(grad_out, *operands, out, lse, grads=grads, accumulate=True)
        results.append(grads)
    fresh = tuple(np.empty(x.shape, out.dtype) for x in operands)
    attention_backward(grad_out, *operands, out, lse, grads=fresh)
    assert_same_bits(results[0], tuple(x + 1 for x in fresh))
    for grads in results[1:]:
        assert_same_bits(grads, results[0])


@pytest.mark.promise("gradients-accumulate", "packed-sequences-are-alone")
@both_dtypes
def test_packed_gradients(dtype):
    rng = np.random.default_rng(2)
    query = rng.normal(size=(62, 4, 16)).astype(dtype)
    key, value = (rng.normal(size=(400, 2, 16)).astype(dtype) for _ in range(2))
    starts = [2, 3, 43, 43, 60], [0, 50, 50, 90, 400]
    out, lse = varlen_attention(query, key, value, *starts, return_lse=True)
    packed = dict(zip(("cu_seqlens_q", "cu_seqlens_kv"), starts, strict=True))
    expected = attention_backward(out, query, key, value, out, lse, **packed)
    grads = tuple(np.ones_like(x) for x in (query, key, value))
    more = {"grads": grads, "accumulate": True}
    attention_backward(out, query, key, value, out, lse, **more, **packed)
    assert_same_bits(grads, tuple(x + 1 for x in expected))
