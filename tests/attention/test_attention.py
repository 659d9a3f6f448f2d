# SPDX-License-Identifier: Apache-2.0
"""Every argument with every other, sizes, shapes, accuracy: on every variant of the kernel.

Sizes lie around the edges of the tiles: 12, 24 or 48 rows (queries x heads per key head), 128 keys,
and 8192 keys, after which a new group of sums begins.
"""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import attention, attention_weights, reference
from tests.attention.problems import (
    CASES,
    INF,
    LEVELS,
    arguments_of,
    problem_with_everything,
    with_lse,
)
from tests.support.correctness import assert_same_bits, assert_within_gate, attend_within_gate
from tests.support.problems import both_dtypes, make_problem

pytestmark = pytest.mark.usefixtures("isa")


# Every size and argument with every other.


@pytest.mark.promise(
    "result-is-the-definition",
    "order-of-the-score",
    "out-is-written-in-place",
    "four-dtypes",
    "accuracy-gate",
)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_argument_with_every_other(number):
    operands, options = arguments_of(CASES[number], np.random.default_rng(number))
    out, lse = attend_within_gate(*operands, **options)
    filled = np.full((*out.shape[:-1], out.shape[-1] + 3), 7, out.dtype)
    into = filled[..., 1:-2]
    assert attention(*operands, out=into, **options) is into
    assert_same_bits(into, out)
    assert (filled[..., [0, -2, -1]] == 7).all()
    hidden = lse == -INF
    assert (out[hidden] == 0).all()


def test_the_cases_cover():
    names = list(LEVELS)
    for a, first in enumerate(names):
        for second in names[a + 1 :]:
            met = {(str(case[first]), str(case[second])) for case in CASES}
            assert len(met) == len(LEVELS[first]) * len(LEVELS[second])


# Sizes and shapes.


@pytest.mark.promise("accuracy-gate")
@both_dtypes
@pytest.mark.parametrize("q_len", [1, 16, 17, 24, 48, 49])
@pytest.mark.parametrize("kv_len", [8191, 8192, 8193, 16385])
def test_group_edges(q_len, kv_len, dtype):
    operands = make_problem(q_len, kv_len, 2, 3, dtype=dtype, mean=1)
    attend_within_gate(*operands)
    attend_within_gate(*operands, is_causal=True, query_offset=8192 - q_len // 2)
    attend_within_gate(*operands, window=(8200, 0), query_offset=kv_len - q_len)
    attend_within_gate(*operands, mask=np.arange(kv_len) // 300 % 2 == 0, sinks=np.zeros(1))


@pytest.mark.promise("any-head-dim")
@pytest.mark.parametrize("head_dim", [1, 2, 3, 15, 16, 17, 33, 63, 65, 127, 255, 300, 1024, 4096])
def test_head_dims(head_dim):
    attend_within_gate(*make_problem(50, 131, head_dim, 3))
    attend_within_gate(*make_problem(50, 131, 3, head_dim))


@pytest.mark.promise("two-axes-or-more", "no-keys-no-queries", "any-head-dim")
@both_dtypes
@pytest.mark.parametrize(
    ("query", "key", "value", "out"),
    [
        ((5, 4), (7, 4), (7, 3), (5, 3)),
        ((2, 5, 4), (7, 4), (7, 3), (2, 5, 3)),
        ((5, 4), (1, 7, 4), (7, 3), (1, 5, 3)),
        ((6, 5, 4), (2, 7, 4), (2, 7, 3), (6, 5, 3)),
        ((2, 6, 5, 4), (3, 7, 4), (3, 7, 3), (2, 6, 5, 3)),
        ((6, 5, 4), (2, 3, 7, 4), (1, 3, 7, 3), (2, 6, 5, 3)),
        ((1, 6, 5, 4), (2, 3, 7, 4), (3, 7, 3), (2, 6, 5, 3)),
        ((2, 1, 6, 5, 4), (3, 3, 7, 4), (1, 1, 3, 7, 3), (2, 3, 6, 5, 3)),
        ((4, 1, 1, 1, 5, 4), (1, 3, 1, 1, 7, 4), (2, 1, 7, 3), (4, 3, 2, 1, 5, 3)),
        ((0, 2, 5, 4), (0, 2, 7, 4), (0, 2, 7, 3), (0, 2, 5, 3)),
        ((0, 2, 5, 4), (1, 2, 7, 4), (2, 7, 3), (0, 2, 5, 3)),
        ((3, 0, 5, 4), (3, 0, 7, 4), (3, 0, 7, 3), (3, 0, 5, 3)),
        ((0, 5, 4), (2, 7, 4), (2, 7, 3), (0, 5, 3)),
        ((2, 0, 4), (2, 7, 4), (2, 7, 3), (2, 0, 3)),
        ((2, 5, 4), (2, 0, 4), (2, 0, 3), (2, 5, 3)),
        ((2, 0, 4), (2, 0, 4), (2, 0, 3), (2, 0, 3)),
        ((2, 5, 4), (2, 7, 4), (2, 7, 0), (2, 5, 0)),
        ((0, 4), (7, 4), (7, 3), (0, 3)),
        ((5, 4), (0, 4), (0, 3), (5, 3)),
    ],
    ids=str,
)
def test_shapes(query, key, value, out, dtype):
    rng = np.random.default_rng(0)
    operands = [rng.normal(size=shape).astype(dtype) for shape in (query, key, value)]
    for options in ({}, {"sinks": np.ones(query[-3] if query[2:] else 1), "is_causal": True}):
        options["query_offset"] = 1
        got, lse = with_lse(*operands, **options)
        assert got.shape == out
        assert lse.shape == out[:-1]
        assert lse.dtype == got.dtype == dtype
        if 0 not in out:
            assert_within_gate((got, lse), *operands, **options)
        given = np.empty_like(got)  # of an empty array, NumPy's strides are 0
        assert attention(*operands, **options, out=given) is given
        assert_array_equal(given, got)


@pytest.mark.promise("empty-row-is-zero", "no-keys-no-queries")
@both_dtypes
def test_nothing_to_see(dtype):
    operands = make_problem(50, 130, heads=4, kv_heads=2, batch=(2,), dtype=dtype)
    empty = [operands[0], operands[1][..., :0, :], operands[2][..., :0, :]]
    hidden = np.zeros((130,), bool)
    for arguments, options in [
        (empty, {}),
        (empty, {"mask": np.ones((50, 1), bool), "kv_lengths": 0}),
        (operands, {"mask": hidden}),
        (operands, {"mask": np.where(hidden, 0, -INF).astype(np.float16)}),
        (operands, {"bias": np.full((4, 1, 1), -INF)}),
        (operands, {"kv_lengths": 0}),
        (operands, {"is_causal": True, "query_offset": -50}),
        (operands, {"window": (3, 0), "query_offset": 1000}),
        (operands, {"window": (3, 0), "query_offset": 2**61}),
        (operands, {"window": (None, 3), "query_offset": -(2**61)}),
    ]:
        for sinks in (None, np.zeros(4), np.full(4, -INF), np.full(4, 1e4)):
            out, lse = with_lse(*arguments, sinks=sinks, **options)
            assert_same_bits(out, np.zeros((2, 4, 50, 16), dtype))
            assert_same_bits(lse, np.full((2, 4, 50), -INF, dtype))
    mask = np.ones((50, 130), bool)
    mask[[0, 3, 16, 49]] = False
    out, lse = attend_within_gate(*operands, mask=mask, sinks=np.zeros(4))
    assert (out[..., [0, 3, 16, 49], :] == 0).all()
    assert_array_equal(lse == -INF, np.broadcast_to(~mask[:, 0], lse.shape))


# Accuracy.


@pytest.mark.promise("accuracy-gate", "accuracy-of-long-sums", "float64-is-float64")
@both_dtypes
@pytest.mark.parametrize(
    ("kv_len", "q_len", "spread"),
    [(2048, 50, 1), (2048, 50, 4), (16384, 20, 1), (16384, 3, 4), (131072, 2, 1), (131072, 17, 2)],
)
def test_accuracy(kv_len, q_len, spread, dtype):
    if dtype == np.float64:
        q_len = min(q_len, 3)  # the extended precision that it is compared with is slow
    query, key, value = make_problem(q_len, kv_len, 32, 8, mean=1.0, dtype=dtype)
    query *= dtype(spread)
    attend_within_gate(query, key, value)
    attend_within_gate(query, key, value, is_causal=True, query_offset=kv_len - q_len - 100)
    # Equal weights, increasing and decreasing maxima: the hardest for running sums.
    attend_within_gate(query * 0, key, value)
    ramp = np.linspace(0, 30, kv_len)
    for bias in (ramp, ramp[::-1]):
        attend_within_gate(query, key, value, bias=bias)


# The other calls with the same arguments.


@pytest.mark.promise("weights-are-the-definition")
@both_dtypes
def test_weights(dtype):
    (query, key, _), options = problem_with_everything(dtype)
    probs = attention_weights(query, key, **options)
    assert probs.shape == (3, 4, 70, 300)
    assert probs.dtype == dtype
    values = np.broadcast_to(np.eye(300, dtype=dtype), (3, 2, 300, 300))
    assert_allclose(attention(query, key, values, **options), probs, atol=8 * np.finfo(dtype).eps)
    assert_same_bits(probs, reference.attention_weights(query, key, **options))
    assert attention_weights(query[0, 0], key[0, 0]).shape == (70, 300)
