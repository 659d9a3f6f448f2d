# SPDX-License-Identifier: Apache-2.0
"""Half precision: float32 inside, rounded once; bfloat16 in pairs."""

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn import attention
from tests.attention.problems import INF, problem_with_everything, with_lse
from tests.support.correctness import assert_same_bits, attend_within_gate, in_pairs
from tests.support.problems import every_half, make_problem

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.promise("masked-pair-contributes-nothing")
@pytest.mark.parametrize("seen", [53, 60, 61, 116])
def test_poison_behind_an_odd_number_of_keys(seen):
    """A pair of keys may have one that is hidden."""
    query, key, value = make_problem(48, 117, 64, dtype=ml_dtypes.bfloat16)
    mask = np.arange(117) < seen
    expected = with_lse(query, key, value, mask=mask)
    key[:, seen:] = value[:, seen:] = np.nan
    assert_same_bits(with_lse(query, key, value, mask=mask), expected)
    assert_same_bits(
        with_lse(query, key, value, kv_lengths=seen),
        with_lse(query, key[:, :seen], value[:, :seen]),
    )


@pytest.mark.promise("bitwise-query-chunks", "bitwise-padding")
@pytest.mark.parametrize("spread", [1, 8])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (50, 0)}, {"kv_lengths": 301}])
def test_bits_of_bfloat16_where_tiles_are_cut(options, spread):
    """Whether an edge cuts a tile depends on rows nearby, and must change no bit."""
    query, key, value = make_problem(300, 302, 64, heads=2, dtype=ml_dtypes.bfloat16)
    query = (query * spread).astype(query.dtype)
    whole = with_lse(query, key, value, query_offset=2, **options)
    for first in (17, 20, 40, 150, 283):
        part = with_lse(query[:, first:], key, value, query_offset=2 + first, **options)
        assert_same_bits(part, tuple(x[:, first:] for x in whole))
    if "kv_lengths" in options:
        assert_same_bits(whole, with_lse(query, key[:, :301], value[:, :301]))


@pytest.mark.promise("bfloat16-products-within-gate", "accuracy-of-long-sums")
@pytest.mark.parametrize(("kv_len", "q_len"), [(2048, 50), (16384, 20), (16384, 3), (40000, 17)])
def test_accuracy_of_bfloat16(kv_len, q_len):
    """As test_accuracy(); where pairs are multiplied, twice the error of rounding them."""
    query, key, value = make_problem(q_len, kv_len, 32, 8, mean=1.0, dtype=ml_dtypes.bfloat16)
    attend_within_gate(query, key, value)
    attend_within_gate(query, key, value, is_causal=True, query_offset=kv_len - q_len - 101)
    attend_within_gate(query * 0, key, value)
    ramp = np.linspace(0, 30, kv_len)
    for bias in (ramp, ramp[::-1]):
        attend_within_gate(query, key, value, bias=bias, scale=-0.2)


@pytest.mark.promise("half-precision-is-float32-inside", "four-dtypes")
@every_half
def test_half_precision_is_float32_rounded_once(dtype):
    """Whichever operand is of half precision: each is widened, and the result rounded."""
    operands, options = problem_with_everything(np.float32)
    halves = [x.astype(dtype) for x in operands]
    if in_pairs(*halves[:2]):  # an odd head_dim is not
        halves[:2] = [x[..., :-1] for x in halves[:2]]
    assert not in_pairs(*halves[:2])
    for extra in (options, {}, {"mask": options["mask"]}, {"kv_lengths": 129}):
        out, lse = with_lse(*[x.astype(np.float32) for x in halves], **extra)
        assert_same_bits(with_lse(*halves, **extra), (out.astype(dtype), lse))
        wide_query = halves[0].astype(np.float32)
        assert_same_bits(with_lse(wide_query, *halves[1:], **extra), (out, lse))


def finite_numbers(dtype):
    """Return all that are positive, and 0."""
    return np.arange(np.array(INF, dtype).view(np.uint16), dtype=np.uint16).view(dtype)


@pytest.mark.promise("rounding-is-to-nearest-even")
@every_half
@pytest.mark.parametrize("head_dim", [1, 3, 16, 37])
def test_every_half_precision_number(head_dim, dtype):
    """Each comes through as itself: a query that sees one key gives its value."""
    numbers = finite_numbers(dtype)
    numbers = np.concatenate([numbers, -numbers])
    numbers = np.resize(numbers, (-(-numbers.size // head_dim), head_dim))
    key = np.zeros((len(numbers), 1), dtype)
    out = attention(key, key, numbers, window=(0, 0))
    assert_array_equal(out.astype(np.float32), numbers.astype(np.float32))
    nan = attention(key[:1], key[:1], np.full((1, head_dim), np.nan, dtype))
    assert np.isnan(nan).all()


@pytest.mark.promise("rounding-is-to-nearest-even")
@every_half
def test_rounding_to_half_precision(dtype):
    """To the nearest number, and to the even one of two, as NumPy and ml_dtypes round."""
    numbers = finite_numbers(dtype)
    numbers = numbers[numbers.astype(np.float32) < 5e37]  # the sum of four is finite
    pairs = np.stack([numbers[:-1], numbers[1:]], axis=-1)[:, :, None]
    pairs = np.concatenate([pairs, -pairs])
    key = np.zeros((len(pairs), 4, 1), dtype)
    for order in ([0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1]):  # means at 1/2, 1/4 and 3/4
        values = pairs[:, order]
        expected = values.astype(np.float32).mean(axis=1, keepdims=True).astype(dtype)
        assert_same_bits(attention(key[:, :1], key, values), expected)
