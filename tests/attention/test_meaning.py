# SPDX-License-Identifier: Apache-2.0
"""What each argument means, at the edges of what numbers can say."""

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fastattn import attention, reference
from tests.attention.problems import FLOATS, INF, misaligned, with_lse
from tests.support.correctness import assert_same_bits, attend_within_gate
from tests.support.problems import both_dtypes, make_problem

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.promise("lse-is-over-keys")
@both_dtypes
def test_lse(dtype):
    query, key, value = make_problem(20, 150, heads=2, dtype=dtype)
    scores = query.astype(float) @ key.astype(float).swapaxes(-1, -2) / 4
    _, lse = with_lse(query, key, value)
    assert_allclose(lse, np.log(np.exp(scores).sum(-1)), rtol=8 * np.finfo(dtype).eps)
    assert_same_bits(with_lse(query, key, value, sinks=np.full(2, 3.0))[1], lse)


@pytest.mark.promise("added-arrays-have-any-float-dtype", "float-mask-is-added")
@pytest.mark.parametrize("mask_dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
@both_dtypes
def test_dtypes_of_what_is_added(mask_dtype, dtype):
    rng = np.random.default_rng(0)
    operands = make_problem(20, 150, heads=2, batch=(2,), dtype=dtype)
    array = rng.normal(size=(2, 20, 150)).astype(mask_dtype)
    array[:, 3:5, 10:140] = -INF
    array[1, :, 17] = ml_dtypes.finfo(mask_dtype).smallest_subnormal
    array[1, :, 18] = ml_dtypes.finfo(mask_dtype).min
    exact = array.astype(np.float64)
    per_head = array[:, 0, 0]
    both = with_lse(*operands, mask=array, bias=array[:1, ::-1], sinks=per_head)
    assert_same_bits(both, with_lse(*operands, mask=exact, bias=exact[:1, ::-1], sinks=per_head))
    options = {"mask": array, "bias": array[:1, ::-1], "alibi_slopes": per_head, "sinks": per_head}
    attend_within_gate(*operands, query_offset=130, **options)
    # -inf in a float array is False in a bool array, and 0 is True.
    hiding = np.where(array < 0, -INF, 0).astype(mask_dtype)
    assert_same_bits(with_lse(*operands, mask=hiding), with_lse(*operands, mask=hiding == 0))
    assert_same_bits(with_lse(*operands, bias=hiding), with_lse(*operands, mask=hiding == 0))


@pytest.mark.promise("bitwise-strides", "added-arrays-have-any-float-dtype")
@pytest.mark.parametrize("mask_dtype", [bool, *FLOATS], ids=lambda dtype: np.dtype(dtype).name)
def test_strides_of_a_mask(mask_dtype):
    """A mask is never expanded, whatever its strides; neither do they change a bit."""
    operands = make_problem(50, 150, heads=2, batch=(3,))
    rng = np.random.default_rng(1)
    for shape in [(3, 2, 50, 150), (2, 1, 150), (3, 1, 1, 150), (50, 1), (1,), (), (3, 1, 50, 1)]:
        seen = rng.random(shape) < 0.6
        array = seen if mask_dtype is bool else np.where(seen, rng.normal(size=shape), -INF)
        array = np.asarray(array).astype(mask_dtype)
        whole = np.broadcast_to(array, (3, 2, 50, 150))
        expected = with_lse(*operands, mask=np.array(whole))
        spread = np.zeros([2 * n for n in shape], mask_dtype)
        spread[tuple(slice(1, None, 2) for _ in shape)] = array
        for same in [
            array,
            whole,
            np.asfortranarray(array),
            spread[tuple(slice(1, None, 2) for _ in shape)],
            np.flip(np.flip(array).copy()),
            misaligned(array),
        ]:
            assert_same_bits(with_lse(*operands, mask=same), expected)
            if mask_dtype is not bool:
                assert_same_bits(with_lse(*operands, bias=same), expected)


@pytest.mark.promise(
    "position-is-index-plus-offset",
    "causal-sees-up-to-its-position",
    "window-counts-from-the-position",
)
@both_dtypes
def test_positions(dtype):
    operands = make_problem(50, 150, heads=2, batch=(2,), dtype=dtype)
    plain = with_lse(*operands)
    for offset in (150, 10**9, 2**40, 2**61):
        assert_same_bits(with_lse(*operands, is_causal=True, query_offset=offset), plain)
        assert_same_bits(with_lse(*operands, window=(None, 0), query_offset=offset), plain)
        assert_same_bits(with_lse(*operands, window=(0, None), query_offset=-offset), plain)
        assert_same_bits(with_lse(*operands, window=(2**80, 2**80), query_offset=offset), plain)
    each = np.array([-7, 90])
    for options in ({"is_causal": True}, {"window": (9, 30)}, {"alibi_slopes": [0.1, 0.7]}):
        out, lse = attend_within_gate(*operands, query_offset=each, **options)
        for b in range(2):
            alone = [x[b] for x in operands]
            assert_same_bits(
                (out[b], lse[b]), with_lse(*alone, query_offset=int(each[b]), **options)
            )
    square = [x[..., :50, :] for x in operands]
    assert_same_bits(
        with_lse(*square, is_causal=True), with_lse(*square, is_causal=True, query_offset=0)
    )
    assert_same_bits(with_lse(*square, is_causal=True), with_lse(*square, window=(None, 0)))


@pytest.mark.promise("alibi-grows-with-distance", "finite-stays-finite")
@both_dtypes
@pytest.mark.parametrize("offset", [-(2**61), -(2**40), 2**24, 2**40, 2**61])
def test_alibi_far_away(offset, dtype):
    """Where a distance is too far for the dtype to count, the result is still finite and right."""
    operands = make_problem(3, 150, heads=2, dtype=dtype)
    slopes = np.array([0.5, -0.25]) / abs(offset)
    out, lse = with_lse(*operands, alibi_slopes=slopes, query_offset=offset)
    assert_allclose(out, attention(*operands), atol=1e-4)
    assert np.isfinite(lse).all()


@pytest.mark.promise(
    "bitwise-ways-to-mask",
    "causal-sees-up-to-its-position",
    "window-counts-from-the-position",
    "lengths-hide-padding",
)
def test_the_features_are_those_of_masks():
    """What causality, window and length hide is what an equal mask hides, bit for bit."""
    operands = make_problem(60, 300, heads=4, kv_heads=2, batch=(2,))
    distance = np.arange(300) - (np.arange(60)[:, None] + 77)
    lengths = np.array([299, 131])
    for options, mask in [
        ({"is_causal": True}, distance <= 0),
        ({"window": (20, 5)}, (distance >= -20) & (distance <= 5)),
        ({"window": (20, 5), "is_causal": True}, (distance >= -20) & (distance <= 0)),
        ({"window": (None, 129)}, distance <= 129),
        ({"kv_lengths": lengths}, np.arange(300) < lengths[:, None, None, None]),
    ]:
        assert_same_bits(
            with_lse(*operands, query_offset=77, **options), with_lse(*operands, mask=mask)
        )


@pytest.mark.promise("sinks-join-the-denominator", "lse-is-over-keys")
def test_sinks():
    query, key, value = make_problem(30, 140, heads=4, kv_heads=2)
    plain = with_lse(query, key, value)
    assert_same_bits(with_lse(query, key, value, sinks=np.full(4, -INF)), plain)
    sinks = np.array([0.0, 3.0, -2.0, 1e4])
    out, lse = with_lse(query, key, value, sinks=sinks)
    assert_same_bits(lse, plain[1])
    share = np.exp(plain[1] - np.logaddexp(plain[1], sinks[:, None]))
    assert_allclose(out, plain[0] * share[..., None], rtol=1e-5, atol=1e-6)
    # A sink is a key whose value is zero.
    longer_key = np.concatenate([np.zeros_like(key[:, :1]), key], axis=1)
    longer_value = np.concatenate([np.zeros_like(value[:, :1]), value], axis=1)
    bias = np.zeros((4, 1, 141))
    bias[..., 0] = sinks[:, None]
    expected = reference.attention(query, longer_key, longer_value, bias=bias)
    assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.promise("default-scale")
@both_dtypes
def test_scale(dtype):
    query, key, value = make_problem(30, 140, dtype=dtype)
    mean = np.broadcast_to(value.astype(float).mean(-2, keepdims=True), value[:, :30].shape)
    assert_allclose(attention(query, key, value, scale=0), mean, atol=8 * np.finfo(dtype).eps)
    assert_same_bits(
        attention(query, key, value, scale=-0.7), attention(-query, key, value, scale=0.7)
    )
    assert_same_bits(
        attention(query, key, value), attention(query, key, value, scale=np.float32(0.25))
    )
    attend_within_gate(query, key, value, scale=np.finfo(np.float32).tiny)


@pytest.mark.promise("finite-stays-finite")
@both_dtypes
@pytest.mark.parametrize("size", [1e4, 1e10, 1e20, 1e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits(size, sign, dtype):
    query, key, value = make_problem(20, 150, 1, 4, dtype=dtype)
    query = np.abs(query) * dtype(np.sqrt(size))
    key = np.abs(key) / np.abs(key).max() * dtype(sign * np.sqrt(size) / np.abs(query).max())
    key *= dtype(np.sqrt(size))
    out, lse = attend_within_gate(query, key, value)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    attend_within_gate(query, key, value, mask=np.arange(150) % 3 > 0)
    attend_within_gate(query, key, value, is_causal=True, query_offset=60)
    # Each score is now 5 or -5, beyond rounding: here the plain formula is exact by luck.
    capped = attention(query, key, value, softcap=5.0)
    expected = reference.attention(*(x.astype(float) for x in (query, key, value)), softcap=5.0)
    assert_allclose(capped, expected, atol=4 * 5 * np.finfo(dtype).eps)


@pytest.mark.promise("float-mask-is-added")
@both_dtypes
@pytest.mark.parametrize("mask_dtype", FLOATS[1:], ids=lambda dtype: np.dtype(dtype).name)
def test_lowest_number_is_not_a_mask(mask_dtype, dtype):
    """A row whose every key has it gives their mean; one key without it takes all."""
    query, key, value = make_problem(20, 150, heads=2, dtype=dtype)
    lowest = np.full((20, 150), ml_dtypes.finfo(mask_dtype).min, mask_dtype)
    mean = np.broadcast_to(value.astype(float).mean(-2, keepdims=True), value[:, :20].shape)
    eps = 8 * np.finfo(dtype).eps
    for options in ({"mask": lowest}, {"bias": lowest}, {"mask": lowest, "bias": lowest}):
        out = attention(query, key, value, **options)
        assert_allclose(out, mean, atol=eps)
    lowest[:, 77] = 0
    out = attention(query, key, value, mask=lowest)
    assert_same_bits(out, np.broadcast_to(value[:, 77:78], out.shape).copy())
    causal = attention(query, key, value, mask=lowest, is_causal=True, query_offset=0)
    upto = value.astype(float).cumsum(-2)[:, :20] / np.arange(1, 21)[:, None]
    assert_allclose(causal, upto, atol=eps)


@pytest.mark.promise("finite-stays-finite")
@pytest.mark.parametrize("q_len", [3, 20])
def test_huge_numbers_that_are_added(q_len):
    """One that is finite leaves a row finite, whatever the change of base makes of it."""
    query, key, value = make_problem(q_len, 150, heads=2)
    highest = np.finfo(np.float32).max
    for huge in (2.4e38, highest, 1e300):
        bias = np.zeros(150)
        bias[77] = huge
        out = attention(query, key, value, bias=bias)
        assert_same_bits(out, np.broadcast_to(value[:, 77:78], out.shape).copy())
    for options in (
        {"alibi_slopes": [1e38, -8e37], "query_offset": 20},
        {"alibi_slopes": [1e38, -8e37], "query_offset": 20, "mask": np.tri(q_len, 150, dtype=bool)},
        {"scale": 3e38},
        {"scale": 1e39},
        {"softcap": 1e-40},
    ):
        assert np.isfinite(attention(query * 0, key, value, **options)).all()


@pytest.mark.promise("true-attends")
@pytest.mark.parametrize("q_len", [3, 20])
@pytest.mark.parametrize("byte", [1, 2, 128, 255])
def test_bytes_of_a_bool_mask(q_len, byte):
    """Whatever is not 0 is True, as NumPy reads it."""
    operands = make_problem(q_len, 150, heads=2)
    seen = np.random.default_rng(0).random((q_len, 150)) < 0.6
    odd = (seen * np.uint8(byte)).view(bool)
    assert_same_bits(with_lse(*operands, mask=odd), with_lse(*operands, mask=seen))
    every = np.full((q_len, 150), byte, np.uint8).view(bool)
    assert_same_bits(with_lse(*operands, mask=every), with_lse(*operands))


@pytest.mark.promise("subnormals-count")
@both_dtypes
def test_small_numbers(dtype):
    """Subnormal numbers count in each operand, in the probabilities and in the result."""
    info = np.finfo(dtype)
    query, key, value = make_problem(20, 150, dtype=dtype)
    tiny = info.smallest_subnormal * np.arange(1, 151, dtype=dtype)[:, None]
    assert_same_bits(
        attention(query[:, :, :1], key[:, :1, :1], np.full((1, 1, 2), tiny[2], dtype)),
        np.full((1, 20, 2), tiny[2], dtype),
    )
    out, _ = attend_within_gate(query, key, np.broadcast_to(tiny, (1, 150, 4)))
    assert (out > 0).all()
    large, small = dtype(0.1) / info.tiny, info.tiny / 16  # their product is no small number
    for q, k in [(large * query, small * key), (small * query, large * key)]:
        attend_within_gate(q, k, value, scale=1.0)
    # A probability that is subnormal still brings a huge value.
    score = np.log(info.tiny) - 3
    values = np.array([[0.0], [info.max / 4]], dtype)
    out = attention(np.ones((1, 1), dtype), np.array([[0.0], [score]], dtype), values, scale=1)
    assert_allclose(out[0], np.exp(score) * values[1], rtol=0.05)


@pytest.mark.promise("scale-belongs-to-the-product")
@both_dtypes
def test_scores_in_range_from_a_query_near_its_end(dtype):
    """The scale belongs to the product: times the query alone, it would leave the range."""
    query, key, value = make_problem(20, 150, dtype=dtype)
    huge = np.finfo(dtype).max / 16
    attend_within_gate(query * huge, key / huge / 64, value, scale=64)


@pytest.mark.promise("bitwise-ways-to-mask")
@both_dtypes
def test_signed_zeros(dtype):
    query, key, value = make_problem(20, 150, dtype=dtype)
    query[:, ::3], key[:, ::5], value[:, ::7] = 0, 0, 0
    negative = [np.where(x == 0, dtype(-0.0), x) for x in (query, key, value)]
    assert_same_bits(with_lse(*negative), with_lse(query, key, value))
    # A sum underflows to -0: a later tile, computed because one row sees it, changes no other row.
    value[:] = -0.0
    value[:, 0] = -np.finfo(dtype).smallest_subnormal
    mask = np.zeros((20, 150), bool)
    mask[:, :2] = True
    expected = attention(query * 0, key, value, mask=mask, bias=np.arange(150.0))
    mask[19, 140] = True
    out = attention(query * 0, key, value, mask=mask, bias=np.arange(150.0))
    assert_same_bits(out[:, :19], expected[:, :19])


@pytest.mark.promise("bitwise-ways-to-mask")
@both_dtypes
def test_one_key(dtype):
    query, key, value = make_problem(50, 1, 64, 33, heads=2, dtype=dtype)
    expected = np.broadcast_to(value, (2, 50, 33)).copy()
    assert_same_bits(attention(query, key, value), expected)
    key, value = (np.concatenate([x] * 300, axis=1) for x in (key, value))
    for options in (
        {"mask": np.arange(300) == 200},
        {"window": (0, 0), "query_offset": 7},
        {"kv_lengths": 1},
        {"bias": np.where(np.arange(300) == 200, 5, -INF)},
    ):
        assert_same_bits(attention(query, key, value, **options), expected)


@pytest.mark.promise("keys-have-an-offset")
@both_dtypes
@pytest.mark.parametrize("q_len", [3, 30])
def test_positions_of_keys(q_len, dtype):
    """Only the distance from key to query counts, for all but dropout."""
    operands = make_problem(q_len, 50, heads=2, batch=(3,), dtype=dtype)
    slopes, lengths = np.array([0.1, 1]), np.array([50, 20, 0])
    for options in (
        {"is_causal": True},
        {"window": (7, 3)},
        {"alibi_slopes": slopes},
        {"is_causal": True, "window": (20, 0), "alibi_slopes": slopes, "kv_lengths": lengths},
    ):
        expected = with_lse(*operands, query_offset=11, **options)
        for first in (1, -9, 2**61 - 20, -(2**61)):
            moved = {"query_offset": 11 + first, "key_offset": first}
            assert_same_bits(with_lse(*operands, **moved, **options), expected)
        each = np.array([5, 0, 2**40])
        moved = {"query_offset": 11 + each, "key_offset": each}
        assert_same_bits(with_lse(*operands, **moved, **options), expected)
        each = np.array([[9], [0], [-3]])[:, 0]
        attend_within_gate(*operands, key_offset=each, query_offset=0, **options)
