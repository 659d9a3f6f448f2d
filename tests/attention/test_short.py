# SPDX-License-Identifier: Apache-2.0
"""Problems of few rows and keys: bit by bit what they give where they lie among many more keys.

With many more keys, of which kv_lengths hides all but the first, they go another way.
"""

import numpy as np
import pytest

import fastattn
from tests.attention import problems
from tests.attention.problems import BATCH_VIEWS, FLOATS, arguments_of, with_lse
from tests.support.correctness import assert_same_bits, assert_within_gate
from tests.support.problems import both_dtypes, covering_cases, make_problem

pytestmark = pytest.mark.usefixtures("isa")

LONG = 200  # keys, more than are short
LEVELS = problems.LEVELS | {
    "q_len": (1, 2, 5, 12, 16, 17, 24, 49, 64, 65),
    "kv_len": (1, 3, 12, 16, 31, 32, 33, 49, 64, 65),
    "head_dim": (1, 8, 16, 24, 40, 64, 100, 128, 256),
    "value_head_dim": (1, 8, 16, 24, 40, 64, 80, 128, 256),
    "heads": ((1, 1), (3, 3), (4, 1), (4, 2)),
}
CASES = covering_cases(LEVELS)


def padded(x, axis, length, filling):
    """Return x with more elements behind those of an axis."""
    shape = list(x.shape)
    shape[axis] = length - x.shape[axis]
    return np.concatenate([x, np.full(shape, filling, x.dtype)], axis)


def both_ways(operands, options):
    """Assert that a call gives the bits of one with many more keys, and return its result."""
    query, key, value = operands
    batch, kv_len = query.shape[:-3], key.shape[-2]
    lengths = options.get("kv_lengths")
    lengths = kv_len if lengths is None else lengths
    more = np.random.default_rng(0).random(LONG) < 0.5
    longer = options | {"kv_lengths": np.broadcast_to(lengths, batch) if batch else lengths}
    if options.get("query_offset") is None:
        longer["query_offset"] = 0
    for name in ("mask", "bias"):
        array = options.get(name)
        if array is not None:
            filled = np.broadcast_to(array, (*array.shape[:-1], kv_len))
            longer[name] = padded(filled, -1, LONG, 0)
            longer[name][..., kv_len:] = more[kv_len:]
    got = with_lse(query, key, value, **options)
    for filling in (np.nan, np.inf):
        wide = [padded(x, -2, LONG, filling) for x in (key, value)]
        assert_same_bits(blurred(got), blurred(with_lse(query, *wide, **longer)))
    return got


def blurred(results):
    """Return NaN for all of out that is not finite: of a visible Inf, no more is promised."""
    out, lse = results
    return np.where(np.isfinite(out), out, np.nan), lse


@pytest.mark.parametrize("case", range(len(CASES)))
def test_bits_are_those_of_long_problems(case):
    operands, options = arguments_of(CASES[case], np.random.default_rng(case))
    both_ways(operands, options)


@pytest.mark.parametrize("q_len", [1, 7, 12, 24, 49, 64])
@both_dtypes
def test_right(dtype, q_len):
    operands = make_problem(q_len, q_len, 24, heads=2, batch=(3,), dtype=dtype)
    options = {"bias": np.random.default_rng(1).standard_normal((2, q_len, q_len)).astype(dtype)}
    assert_within_gate(with_lse(*operands, **options), *operands, **options)


@pytest.mark.parametrize("q_len", [12, 24])
def test_alone_as_in_a_batch(threads, q_len):
    operands = make_problem(q_len, 20, 40, heads=2, batch=(150,))
    bias = np.random.default_rng(1).standard_normal((2, q_len, 20)).astype(np.float32)
    mask = np.random.default_rng(2).random((150, 1, 1, 20)) < 0.7
    expected = with_lse(*operands, bias=bias, mask=mask)
    for n in (1, 3):
        threads(n)
        assert_same_bits(with_lse(*operands, bias=bias, mask=mask), expected)
    for i in (0, 77, 149):
        alone = with_lse(*(x[i] for x in operands), bias=bias, mask=mask[i])
        assert_same_bits(alone, tuple(x[i] for x in expected))


@pytest.mark.parametrize("q_len", [12, 24])
def test_strides_over_the_batch(q_len):
    query, key, value = make_problem(q_len, 20, 32, heads=3, batch=(4, 5))
    for view in BATCH_VIEWS:
        operands = [view(x) for x in (query, key, value)]
        assert_same_bits(with_lse(*operands), with_lse(*(x.copy() for x in operands)))
        mixed = (operands[0].copy(), operands[1], operands[2].copy())
        assert_same_bits(with_lse(*mixed), with_lse(*operands))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("q_len", [7, 24])
def test_numbers_that_are_not_finite(bad, q_len):
    """Some problems of a run have them; the others give what they give anyway."""
    operands = make_problem(q_len, 20, 32, heads=2, batch=(40,))
    usual = with_lse(*operands, is_causal=True, query_offset=0)
    rng = np.random.default_rng(3)
    for which, x in enumerate(operands):
        x[[3, 4, 39], 1, rng.integers(q_len), which] = bad
    for options in ({}, {"dropout_p": 0.5, "seed": 1}, {"scale": 1e3}):
        got = both_ways(operands, {"is_causal": True, "query_offset": 0} | options)
        if not options:
            others = [i for i in range(40) if i not in (3, 4, 39)]
            assert_same_bits(tuple(x[others] for x in got), tuple(x[others] for x in usual))


def test_hidden_keys_are_not_seen():
    query, key, value = make_problem(12, 20, 32, batch=(30,))
    mask = np.random.default_rng(1).random((30, 1, 1, 20)) < 0.5
    expected = with_lse(query, key, value, mask=mask)
    hidden = ~mask.reshape(30, 1, 20)
    for x in (key, value):
        x[hidden] = np.nan
    assert_same_bits(with_lse(query, key, value, mask=mask), expected)


def test_many_of_one_number():
    query = np.linspace(-1, 1, 2**20, dtype=np.float32).reshape(2**20, 1, 1, 1)
    out, lse = with_lse(query, query, query)
    assert_same_bits(out, query)
    np.testing.assert_allclose(lse.ravel(), query.ravel() ** 2, rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bias_of_many(dtype):
    """What repeats over the batch is never expanded."""
    query, key, value = make_problem(5, 5, 8, heads=2, batch=(1,), dtype=np.float32)
    many = [np.broadcast_to(x, (100_000, *x.shape[1:])) for x in (query, key, value)]
    bias = np.random.default_rng(1).standard_normal((1, 2, 5, 5)).astype(dtype)
    got = fastattn.attention(*many, bias=bias)
    expected = fastattn.attention(query, key, value, bias=bias)
    assert_same_bits(got, np.broadcast_to(expected, got.shape).copy())
    assert fastattn.explain(*many, bias=bias, threads=2)["scratch_bytes"] < 2**20


def test_distant_positions():
    operands = make_problem(5, 20, 16, heads=2)
    for offset in (2**21, -(2**22) - 3, 2**30 + 1):
        options = {"alibi_slopes": np.array([0.1, 1e-6]), "query_offset": offset}
        both_ways(operands, options)
