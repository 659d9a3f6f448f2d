# SPDX-License-Identifier: Apache-2.0
"""Gradients of problems of few rows and keys: those of one among many more keys, bit by bit.

With many more keys, of which kv_lengths hides all but the first, they are added up block by block.
What is right, under every argument, `test_backward.py` asks of both ways.
"""

import numpy as np
import pytest

import fastattn
from fastattn import _core, attention_backward
from tests.attention import problems
from tests.attention.problems import BATCH_VIEWS, arguments_of, with_lse
from tests.attention.test_short import LONG, padded
from tests.support.correctness import assert_same_bits
from tests.support.gradients import gradient_errors, grads_of
from tests.support.problems import both_dtypes, covering_cases, make_problem

pytestmark = pytest.mark.usefixtures("isa")

LEVELS = problems.LEVELS | {
    "q_len": (1, 2, 5, 12, 16, 17, 24, 49, 95),
    "kv_len": (1, 3, 12, 16, 31, 49, 64, 127, 128),
    "head_dim": (1, 8, 16, 24, 40, 64, 100),
    "value_head_dim": (1, 8, 16, 24, 40, 64, 80),
    "heads": ((1, 1), (3, 3), (4, 1), (4, 2)),
}
CASES = covering_cases(LEVELS)


def both_ways(operands, options):
    """Assert that a call's gradients have the bits of one with many more keys, and return them."""
    query, key, value = operands
    batch, kv_len = query.shape[:-3], key.shape[-2]
    lengths = options.get("kv_lengths")
    lengths = kv_len if lengths is None else lengths
    longer = options | {"kv_lengths": np.broadcast_to(lengths, batch) if batch else lengths}
    if options.get("query_offset") is None:
        longer["query_offset"] = 0
    for name in ("mask", "bias"):
        array = options.get(name)
        if array is not None:
            filled = np.broadcast_to(array, (*array.shape[:-1], kv_len))
            longer[name] = padded(filled, -1, LONG, 0)
    out, lse = with_lse(query, key, value, **options)
    rng = np.random.default_rng(1)
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    saved = {"grad_lse": rng.standard_normal(lse.shape).astype(lse.dtype)}
    got = attention_backward(grad_out, query, key, value, out, lse, **saved, **options)
    wide = [padded(x, -2, LONG, np.nan) for x in (key, value)]
    dq, dk, dv = attention_backward(grad_out, query, *wide, out, lse, **saved, **longer)
    assert_same_bits(got, (dq, dk[..., :kv_len, :], dv[..., :kv_len, :]))
    assert not dk[..., kv_len:, :].any()
    assert not dv[..., kv_len:, :].any()
    return got


@pytest.mark.promise("bitwise-gradients")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_bits_are_those_of_long_problems(case):
    both_ways(*arguments_of(CASES[case], np.random.default_rng(case)))


BIASES = [(2, 13, 20), (1, 1, 2, 13, 20), (5, 1, 13, 20), (20, 5, 2, 13, 20), (13, 1), (20,)]


@pytest.mark.promise("gradients-sum-over-what-repeats", "bitwise-gradients")
@both_dtypes
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_a_bias_of_many(shape, dtype, threads):
    """Its gradient is a sum over many problems, of which each thread adds up some."""
    operands = make_problem(13, 20, 24, heads=4, kv_heads=2, batch=(20, 5), dtype=dtype)
    if shape[-3:-2] == (2,):
        shape = (*shape[:-3], 4, *shape[-2:])
    options = {"bias": np.random.default_rng(0).standard_normal(shape).astype(dtype)}
    options["kv_lengths"] = np.random.default_rng(1).integers(0, 21, (20, 5))
    threads(1)
    alone = grads_of(operands, options)
    for error, allowed in gradient_errors(alone, operands, options):
        assert error <= allowed
    for n in (2, 7):
        threads(n)
        assert_same_bits(grads_of(operands, options), alone)


@pytest.mark.promise("gradients-sum-over-what-repeats", "bitwise-gradients")
@pytest.mark.parametrize("heads", [1, 7])
def test_a_bias_of_tiny_problems(heads, threads):
    """One item has several parts of the sum."""
    operands = make_problem(2, 3, 8, heads=heads, batch=(400,))
    options = {"bias": np.random.default_rng(0).standard_normal((heads, 2, 3), np.float32)}
    threads(1)
    alone = grads_of(operands, options)
    for error, allowed in gradient_errors(alone, operands, options):
        assert error <= allowed
    threads(3)
    assert_same_bits(grads_of(operands, options), alone)


@pytest.mark.promise("bitwise-gradients")
@pytest.mark.parametrize("q_len", [1, 12, 24, 90])
def test_alone_as_in_a_batch(threads, q_len):
    operands = make_problem(q_len, 20, 40, heads=2, batch=(150,))
    bias = np.random.default_rng(1).standard_normal((2, q_len, 20)).astype(np.float32)
    mask = np.random.default_rng(2).random((150, 1, 1, 20)) < 0.7
    out, lse = with_lse(*operands, bias=bias, mask=mask)
    grad_out = np.random.default_rng(3).standard_normal(out.shape, np.float32)
    saved = (grad_out, *operands, out, lse)
    expected = attention_backward(*saved, bias=bias, mask=mask)
    for n in (1, 3):
        threads(n)
        assert_same_bits(attention_backward(*saved, bias=bias, mask=mask), expected)
    for i in (0, 77, 149):
        alone = attention_backward(*(x[i] for x in saved), bias=bias, mask=mask[i])
        assert_same_bits(alone, tuple(x[i] for x in expected))


@pytest.mark.promise("bitwise-gradients")
@pytest.mark.parametrize("q_len", [12, 24])
def test_strides_over_the_batch(q_len):
    query, key, value = make_problem(q_len, 20, 32, heads=3, batch=(4, 5))
    for view in BATCH_VIEWS:
        operands = [view(x) for x in (query, key, value)]
        assert_same_bits(grads_of(operands, {}), grads_of([x.copy() for x in operands], {}))


@pytest.mark.promise("masked-pair-passes-no-gradient", "bitwise-gradients")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(bad):
    """Some problems of an item have them; the others give what they give anyway."""
    operands = make_problem(24, 20, 32, heads=2, batch=(40,))
    options = {"is_causal": True, "query_offset": 0}
    usual = grads_of(operands, options)
    for which, x in enumerate(operands):
        x[[3, 4, 39], 1, 11 + which, which] = bad
    both_ways(operands, options)
    got = grads_of(operands, options)
    others = [i for i in range(40) if i not in (3, 4, 39)]
    assert_same_bits(tuple(x[others] for x in got), tuple(x[others] for x in usual))
    for i in (3, 4, 39):  # where query 11 is bad, key 12 and value 13
        assert np.isfinite(got[0][i, 1, :11]).all()
        if np.isnan(bad):  # an Inf may also hide a key
            assert np.isnan(got[0][i, 1, 11:]).any(-1).all()


@pytest.mark.promise("packed-gradients-are-alone")
@both_dtypes
def test_packed(dtype):
    q_lens, kv_lens = [3, 0, 24, 7, 1], [5, 4, 0, 31, 128]
    starts = {
        "cu_seqlens_q": np.cumsum([0, *q_lens]),
        "cu_seqlens_kv": np.cumsum([0, *kv_lens]),
    }
    rng = np.random.default_rng(0)
    query, grad_out = rng.standard_normal((2, sum(q_lens), 4, 24)).astype(dtype)
    key, value = rng.standard_normal((2, sum(kv_lens), 2, 24)).astype(dtype)
    out, lse = fastattn.varlen_attention(query, key, value, **starts, return_lse=True)
    got = attention_backward(grad_out, query, key, value, out, lse, **starts)
    for i in range(len(q_lens)):
        rows, keys = (slice(*x[i : i + 2]) for x in starts.values())
        operands = [x.swapaxes(0, 1) for x in (query[rows], key[keys], value[keys])]
        alone = attention_backward(
            grad_out[rows].swapaxes(0, 1), *operands, out[rows].swapaxes(0, 1), lse[:, rows]
        )
        here = (got[0][rows], got[1][keys], got[2][keys])
        assert_same_bits(tuple(x.swapaxes(0, 1) for x in here), alone)


def test_many_of_one_number():
    """The only key has all of the probability: dq and dk are 0, dv is grad_out."""
    query = np.linspace(-1, 1, 2**20, dtype=np.float32).reshape(2**20, 1, 1, 1)
    out, lse = with_lse(query, query, query)
    saved = (query[::-1], query, query, query, out, lse)
    dq, dk, dv = attention_backward(*saved)
    np.testing.assert_allclose(dq, 0, atol=1e-7)
    np.testing.assert_allclose(dk, 0, atol=1e-7)
    np.testing.assert_allclose(dv, query[::-1], rtol=1e-6)
    few = tuple(x[:1000] for x in saved)
    ((many_bytes, _),) = _core.schedule(lambda: attention_backward(*saved), 2)
    ((few_bytes, _),) = _core.schedule(lambda: attention_backward(*few), 2)
    assert many_bytes == few_bytes
