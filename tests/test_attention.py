# SPDX-License-Identifier: Apache-2.0
"""The contract of fastattn.attention, line by line, on every variant of the kernel.

Sizes lie around the edges of the tiles: 12, 24 or 48 rows (queries x heads per key head), 128 keys,
and 8192 keys, after which a new group of sums begins.
"""

import functools

import ml_dtypes
import numpy as np
import pytest
from conftest import (
    DTYPES,
    HALVES,
    assert_same_bits,
    assert_within_gate,
    attend_within_gate,
    in_pairs,
    make_problem,
)
from numpy.lib.stride_tricks import as_strided
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import attention, attention_weights, explain, reference

pytestmark = pytest.mark.usefixtures("isa")
INF = np.inf
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
# bfloat16 may be multiplied in pairs, which no other dtype is.
every_arithmetic = pytest.mark.parametrize(
    "dtype", [*DTYPES, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__
)


def with_lse(*operands, **options):
    return attention(*operands, return_lse=True, **options)


# Every size and argument with every other.

LEVELS = {
    "dtype": (*DTYPES, *HALVES, "float32 beside float16", "float32 beside bfloat16"),
    "q_len": (1, 2, 11, 12, 13, 23, 24, 25, 47, 48, 49, 97),
    "kv_len": (1, 2, 63, 127, 128, 129, 255, 257),
    "head_dim": (1, 7, 8, 17, 64, 80, 128, 256, 259),
    "value_head_dim": (1, 5, 8, 16, 31, 64, 130),
    "heads": ((1, 1), (2, 2), (3, 1), (4, 2), (8, 1)),
    "batch": (None, (), (2,), (2, 3), (2, 1, 2)),
    "layout": ("plain", "interleaved", "reversed", "fortran", "repeated"),
    "mask": (None, "padding", "pairs", "causal rows", "float", "float16", "bfloat16", "column"),
    "bias": (None, "heads", "float64", "row", "hiding"),
    "scale": (None, 0.3, -0.5, 0),
    "is_causal": (False, True),
    "query_offset": (None, "end", "negative", "beyond", "each"),
    "window": (None, (3, 2), (None, 0), (0, None), (50, 9)),
    "softcap": (None, 1.5, 30.0),
    "alibi_slopes": (None, "heads", "each"),
    "sinks": (None, "heads", "some"),
    "kv_lengths": (None, "one", "each"),
    "dropout_p": (0.0, 0.1, 0.6),
}


@functools.cache
def covering_cases():
    """Return cases in which each level of a factor meets each level of every other factor."""
    names = list(LEVELS)
    open_pairs = {
        (a, i, b, j)
        for a, first in enumerate(names)
        for b in range(a + 1, len(names))
        for i in range(len(LEVELS[first]))
        for j in range(len(LEVELS[names[b]]))
    }
    rng = np.random.default_rng(0)
    cases = []
    while open_pairs:
        a, i, b, j = min(open_pairs)
        case = {a: i, b: j}
        for factor in rng.permutation(len(names)):
            if factor in case:
                continue
            gains = [
                sum(
                    ((c, k, factor, level) if c < factor else (factor, level, c, k)) in open_pairs
                    for c, k in case.items()
                )
                for level in range(len(LEVELS[names[factor]]))
            ]
            best = np.flatnonzero(np.array(gains) == max(gains))
            case[int(factor)] = int(rng.choice(best))
        open_pairs -= {(c, k, d, m) for c, k in case.items() for d, m in case.items() if c < d}
        cases.append({name: LEVELS[name][case[c]] for c, name in enumerate(names)})
    return cases


def laid_out(x, layout):
    """Return an equal array with other strides; "repeated" repeats the first along axis -2."""
    if layout == "interleaved" and x.ndim > 2:
        return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
    if layout == "fortran":
        return np.asfortranarray(x)
    return x


def arguments_of(case, rng):
    """Return the operands and options that a case stands for."""
    batch = case["batch"] or ()
    heads, kv_heads = case["heads"]
    dtype, *kv_dtype = (
        str(case["dtype"]).split(" beside ") if isinstance(case["dtype"], str) else [case["dtype"]]
    )
    q_len, kv_len = case["q_len"], case["kv_len"]
    operands = make_problem(
        q_len,
        kv_len,
        case["head_dim"],
        case["value_head_dim"],
        heads=heads,
        kv_heads=kv_heads,
        batch=batch,
        dtype=kv_dtype[0] if kv_dtype else dtype,
    )
    if kv_dtype:
        operands = (operands[0].astype(dtype), *operands[1:])
    if case["batch"] is None and heads == 1:
        operands = [x[0] for x in operands]
    elif case["layout"] == "repeated":
        operands = [operands[0], operands[1][..., :1, :], operands[2]]
        operands[1] = np.broadcast_to(operands[1], (*operands[2].shape[:-1], case["head_dim"]))
    operands = [laid_out(x, case["layout"]) for x in operands]

    pairs = (*batch, heads, q_len, kv_len)
    seen = rng.random(pairs) < 0.7
    added = np.where(seen, rng.normal(size=pairs), -INF)
    masks = {
        "padding": lambda: np.arange(kv_len) < rng.integers(0, kv_len + 1, (*batch, 1, 1, 1)),
        "pairs": lambda: seen[..., :1, :, :],
        "causal rows": lambda: np.tri(q_len, kv_len, kv_len // 2, dtype=bool),
        "float": lambda: added.astype(np.float32),
        "float16": lambda: laid_out(added.astype(np.float16), "fortran"),
        "bfloat16": lambda: np.broadcast_to(added[..., :1].astype(ml_dtypes.bfloat16), pairs),
        "column": lambda: seen[..., :1],
    }
    biases = {
        "heads": lambda: rng.normal(size=(heads, q_len, kv_len)).astype(dtype),
        "float64": lambda: rng.normal(size=pairs)[..., ::-1, ::-1],
        "row": lambda: rng.normal(size=kv_len).astype(np.float16),
        "hiding": lambda: added[..., :1, :, :].astype(np.float32),
    }
    positional = case["is_causal"] or case["window"] or case["alibi_slopes"]
    offsets = {
        None: kv_len - q_len if positional and q_len != kv_len else None,
        "end": kv_len - q_len,
        "negative": -(q_len // 2),
        "beyond": kv_len + 3,
        "each": rng.integers(-q_len, kv_len + 2, batch),
    }
    sinks = rng.normal(size=heads)
    per_argument = {
        "alibi_slopes": {"heads": rng.random(heads), "each": rng.random((*batch, heads))},
        "sinks": {"heads": sinks.astype(np.float32), "some": np.where(sinks > 0, -INF, sinks)},
        "kv_lengths": {
            "one": int(rng.integers(0, kv_len + 1)),
            "each": rng.integers(0, kv_len + 1, batch),
        },
    }
    options = {
        name: case[name] for name in ("scale", "is_causal", "window", "softcap", "dropout_p")
    }
    options["seed"] = int(rng.integers(0, 2**64, dtype=np.uint64))
    options["query_offset"] = offsets[case["query_offset"]]
    options["mask"] = masks[case["mask"]]() if case["mask"] else None
    options["bias"] = biases[case["bias"]]() if case["bias"] else None
    for name, levels in per_argument.items():
        options[name] = levels[case[name]] if case[name] else None
    return operands, options


@pytest.mark.promise(
    "result-is-the-definition",
    "order-of-the-score",
    "out-is-written-in-place",
    "four-dtypes",
    "accuracy-gate",
)
@pytest.mark.parametrize("number", range(len(covering_cases())))
def test_every_argument_with_every_other(number):
    operands, options = arguments_of(covering_cases()[number], np.random.default_rng(number))
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
            met = {(str(case[first]), str(case[second])) for case in covering_cases()}
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


# Meaning.


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


def misaligned(x):
    """Return an equal array that begins one byte after where its dtype is aligned."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    copy = np.ndarray(x.shape, x.dtype, raw, offset=1)
    copy[...] = x
    return copy


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


# What is not seen changes no bit; what is seen propagates.

POISON = (np.nan, INF, -INF)


@pytest.mark.promise("masked-pair-contributes-nothing")
@every_arithmetic
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("q_len", [1, 50])
def test_poison_of_keys_that_no_row_sees(q_len, poison, dtype):
    rng = np.random.default_rng(2)
    operands = make_problem(q_len, 300, heads=4, kv_heads=2, batch=(2,), dtype=dtype)
    mask = rng.random(300) < 0.5
    mask[128:256] = False
    for options, hidden in [
        ({"mask": mask}, ~mask),
        ({"mask": np.where(mask, 0, -INF)}, ~mask),
        ({"bias": np.where(mask, 0.5, -INF).astype(np.float16)}, ~mask),
        ({"kv_lengths": 131}, np.arange(300) >= 131),
        ({"is_causal": True, "query_offset": 17}, np.arange(300) > q_len + 16),
        ({"window": (9, 4), "query_offset": 100}, np.abs(np.arange(300) - 100 - q_len / 2) > 100),
        ({"mask": mask, "softcap": 3.0, "alibi_slopes": np.ones(4), "query_offset": 0}, ~mask),
    ]:
        expected = with_lse(*operands, **options)
        for which in ((1,), (2,), (1, 2)):
            poisoned = [x.copy() for x in operands]
            for i in which:
                poisoned[i][..., hidden, :] = poison
            assert_same_bits(with_lse(*poisoned, **options), expected)


@pytest.mark.promise(
    "masked-pair-contributes-nothing", "visible-nan-reaches-its-rows", "visible-inf-is-not-hidden"
)
@every_arithmetic
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("kv_len", [30, 300, 8400])
def test_poison_that_some_rows_see(kv_len, poison, dtype):
    """A key or value that is not finite reaches the rows that see it and no others."""
    query, key, value = make_problem(60, kv_len, 8, 20, heads=4, kv_heads=2, dtype=dtype)
    rng = np.random.default_rng(3)
    mask = rng.random((4, 60, kv_len)) < 0.5
    distance = np.arange(kv_len) - np.arange(60)[:, None]
    for bad in (5, kv_len - 2):
        for options, seen in [
            ({"mask": mask}, mask[..., bad]),
            ({"bias": np.where(mask, rng.normal(size=mask.shape), -INF)}, mask[..., bad]),
            ({"is_causal": True, "query_offset": bad - 30}, np.arange(60) >= 30),
            ({"window": (7, 2), "query_offset": bad - 30}, np.abs(np.arange(60) - 32.5) < 5),
            ({"window": (7, 2), "mask": mask, "query_offset": bad - 30, "softcap": 2.0}, None),
        ]:
            if seen is None:
                seen = mask[..., bad] & (np.abs(distance[:, 0] + 32.5) < 5)
            seen = np.broadcast_to(seen, (4, 60))
            expected = with_lse(query, key, value, **options)
            poisoned = value.copy()
            poisoned[:, bad, 13] = poison
            out, lse = with_lse(query, key, poisoned, **options)
            assert_same_bits(lse, expected[1])
            assert_same_bits(out[~seen], expected[0][~seen])
            others = np.arange(20) != 13
            assert_same_bits(out[..., others], expected[0][..., others])
            assert not np.isfinite(out[seen][:, 13]).any()
            if np.isnan(poison):
                assert np.isnan(out[seen][:, 13]).all()
            poisoned = key.copy()
            poisoned[:, bad, 3] = poison
            out, lse = with_lse(query, poisoned, value, **options)
            assert_same_bits((out[~seen], lse[~seen]), (expected[0][~seen], expected[1][~seen]))
            if np.isnan(poison):
                assert np.isnan(out[seen]).all()
                assert np.isnan(lse[seen]).all()


@pytest.mark.promise("minus-inf-score-is-unseen", "visible-inf-is-not-hidden")
@both_dtypes
def test_infinite_key(dtype):
    """A score of +inf makes the row NaN; one of -inf is a probability of 0, as by definition."""
    query, key, value = make_problem(30, 300, dtype=dtype)
    key[:, 7, 2] = INF
    up = query[0, :, 2] > 0
    for mask in (np.ones((30, 300), bool), np.tri(30, 300, 100, dtype=bool)):
        out, lse = with_lse(query, key, value, mask=mask)
        assert np.isnan(out[0, up]).all()
        assert not np.isfinite(lse[0, up]).any()
        finite = out[:, ~up], lse[:, ~up]
        assert_within_gate(finite, query[:, ~up], key, value, mask=mask[~up])


@pytest.mark.promise("minus-inf-score-is-unseen")
@every_arithmetic
@pytest.mark.parametrize("q_len", [1, 20])
def test_keys_whose_score_is_minus_infinity(q_len, dtype):
    """If they are all that a row sees, it sees none; beside others they change no bit."""
    query = np.ones((1, q_len, 2), dtype)
    key = np.full((1, 150, 2), -INF).astype(dtype)
    value = make_problem(1, 150, 2, 4, dtype=dtype)[2]
    for options in ({}, {"mask": np.arange(150) > 7}, {"sinks": np.zeros(1)}):
        out, lse = with_lse(query, key, value, **options)
        assert_same_bits(out, np.zeros_like(out))
        assert_same_bits(lse, np.full_like(lse, -INF))
    seen = np.arange(150) % 3 > 0
    key[:, seen] = 0.5
    assert_same_bits(with_lse(query, key, value), with_lse(query, key, value, mask=seen))


@pytest.mark.promise("visible-nan-reaches-its-rows", "empty-row-is-zero")
@every_arithmetic
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1)])
def test_poisoned_query(heads, poison, dtype):
    """It reaches its row alone."""
    query, key, value = make_problem(60, 140, heads=heads[0], kv_heads=heads[1], dtype=dtype)
    mask = np.ones((60, 140), bool)
    mask[11] = False
    for options in ({}, {"mask": mask}, {"is_causal": True, "query_offset": 80}):
        expected = with_lse(query, key, value, **options)
        bad = query.copy()
        bad[0, 7, 3] = poison
        out, lse = with_lse(bad, key, value, **options)
        assert np.isnan(out[0, 7]).all()
        assert not np.isfinite(lse[0, 7])
        clean = np.ones(lse.shape, bool)
        clean[0, 7] = False
        assert_same_bits((out[clean], lse[clean]), (expected[0][clean], expected[1][clean]))
        blind = query.copy()
        blind[0, 11] = poison
        if "mask" in options:  # a row that sees nothing is 0 whatever its query
            assert_same_bits(with_lse(blind, key, value, **options), expected)


@pytest.mark.promise("visible-nan-reaches-its-rows")
@every_arithmetic
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_poisoned_mask(name, dtype):
    """NaN or +inf in what is added reaches its row alone."""
    operands = make_problem(60, 140, heads=2, dtype=dtype)
    array = np.zeros((60, 140), dtype)
    expected = with_lse(*operands, **{name: array})
    array[7, 130] = np.nan
    array[50, 3] = INF
    out, lse = with_lse(*operands, **{name: array})
    bad = np.isin(np.arange(60), [7, 50])
    assert np.isnan(out[:, bad]).all()
    assert not np.isfinite(lse[:, bad]).any()
    assert_same_bits((out[:, ~bad], lse[:, ~bad]), (expected[0][:, ~bad], expected[1][:, ~bad]))


# Bits.


def problem_with_everything(dtype):
    operands = make_problem(70, 300, 40, 24, heads=4, kv_heads=2, batch=(3,), dtype=dtype)
    rng = np.random.default_rng(4)
    options = {
        "mask": rng.random((3, 1, 70, 300)) < 0.8,
        "bias": rng.normal(size=(4, 70, 300)).astype(np.float32),
        "query_offset": np.array([230, 0, 90]),
        "window": (200, 20),
        "alibi_slopes": rng.random((3, 4)),
        "sinks": rng.normal(size=4),
        "kv_lengths": np.array([300, 129, 0]),
        "softcap": 20.0,
    }
    return operands, options


@pytest.mark.promise("bitwise-strides", "inputs-are-not-written")
@both_dtypes
def test_strides_change_no_bit(dtype, tmp_path):
    (query, key, value), options = problem_with_everything(dtype)
    expected = with_lse(query, key, value, **options)

    def mapped(x):
        path = tmp_path / f"{id(x)}.npy"
        np.save(path, x)
        return np.load(path, mmap_mode="r")

    def in_the_middle(x):
        wide = np.full([n + 3 for n in x.shape], np.nan, x.dtype)
        part = wide[tuple(slice(1, -2) for _ in x.shape)]
        part[...] = x
        return part

    def frozen(x):
        x = x.copy()
        x.flags.writeable = False
        return x

    for other in (
        lambda x: laid_out(x, "interleaved"),
        lambda x: laid_out(x, "reversed"),
        np.asfortranarray,
        lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
        lambda x: np.flip(np.flip(x).copy()),
        lambda x: x.repeat(3, axis=-1)[..., ::3],
        in_the_middle,
        misaligned,
        lambda x: x.astype(x.dtype.newbyteorder(">")),
        frozen,
        mapped,
        lambda x: x.tolist() if dtype == np.float64 else memoryview(x),
        lambda x: x[None],
    ):
        same = [other(x) for x in (query, key, value)]
        got = with_lse(*same, **options) if np.ndim(same[0]) == 4 else None
        if got is None:
            wide = {
                n: x[None] for n, x in options.items() if n not in ("sinks", "window", "softcap")
            }
            got = [x[0] for x in with_lse(*same, **(options | wide))]
        assert_same_bits(tuple(got), expected)
    big_endian = {
        name: x.astype(x.dtype.newbyteorder(">")) if isinstance(x, np.ndarray) else x
        for name, x in options.items()
    }
    assert_same_bits(with_lse(query, key, value, **big_endian), expected)


@pytest.mark.promise("bitwise-strides")
@every_arithmetic
def test_stride_zero_operands(dtype):
    query, key, value = make_problem(20, 150, heads=2, batch=(2,), dtype=dtype)
    for axis in range(-4, 0):
        first = [x.take([0], axis) for x in (query, key, value)]
        repeated = [
            np.broadcast_to(a, x.shape) for a, x in zip(first, (query, key, value), strict=True)
        ]
        assert_same_bits(with_lse(*repeated), with_lse(*[x.copy() for x in repeated]))
    overlapping = as_strided(key, (2, 2, 100, 16), (*key.strides[:2], key.itemsize, key.itemsize))
    assert_same_bits(
        with_lse(query, overlapping, overlapping),
        with_lse(query, overlapping.copy(), overlapping.copy()),
    )
    same = query[..., :20, :]
    assert_same_bits(with_lse(same, same, same), with_lse(same, same.copy(), same.copy()))


@pytest.mark.promise("bitwise-threads", "bitwise-runs")
@every_arithmetic
def test_threads_and_runs_change_no_bit(dtype, threads):
    operands, options = problem_with_everything(dtype)
    for extra in (options, {}):
        threads(1)
        expected = with_lse(*operands, **extra)
        for count in (2, 3, 7):
            threads(count)
            for _ in range(3):
                assert_same_bits(with_lse(*operands, **extra), expected)


@pytest.mark.promise("bitwise-batch-neighbours")
@every_arithmetic
def test_batch_neighbours_change_no_bit(dtype):
    operands, options = problem_with_everything(dtype)
    out, lse = with_lse(*operands, **options)
    for b in range(3):
        alone = {
            name: x[b] if name in ("mask", "query_offset", "alibi_slopes", "kv_lengths") else x
            for name, x in options.items()
        }
        assert_same_bits((out[b], lse[b]), with_lse(*[x[b] for x in operands], **alone))
    poisoned = [x.copy() for x in operands]
    for x in poisoned:
        x[1] = np.nan
    again = with_lse(*poisoned, **options)
    assert_same_bits((again[0][::2], again[1][::2]), (out[::2], lse[::2]))
    # A key head and its group alone: the same rows in the same blocks.
    group = {
        name: x[..., 2:, :, :] if name == "bias" else x[..., 2:] if name in ("sinks",) else x
        for name, x in options.items()
    } | {"alibi_slopes": options["alibi_slopes"][:, 2:]}
    parts = [operands[0][:, 2:], operands[1][:, 1:], operands[2][:, 1:]]
    assert_same_bits(with_lse(*parts, **group), (out[:, 2:], lse[:, 2:]))


@pytest.mark.promise("bitwise-padding")
@every_arithmetic
def test_padding_changes_no_bit(dtype):
    operands = make_problem(60, 131, heads=4, kv_heads=2, dtype=dtype)
    expected = with_lse(*operands)
    rng = np.random.default_rng(5)
    for padding in (1, 125, 126, 1000, 9000):
        longer = [operands[0]]
        for x in operands[1:]:
            fill = rng.normal(size=(2, padding, 16)).astype(dtype) * 100
            longer.append(np.concatenate([x, fill], axis=1))
        assert_same_bits(with_lse(*longer, kv_lengths=131), expected)
        mask = np.arange(131 + padding) < 131
        assert_same_bits(with_lse(*longer, mask=mask), expected)
        more_queries = np.concatenate([operands[0], np.full((4, padding, 16), np.nan, dtype)], 1)
        out, lse = with_lse(more_queries, *operands[1:])
        assert_same_bits((out[:, :60], lse[:, :60]), expected)


@pytest.mark.promise("bitwise-query-chunks")
@every_arithmetic
@pytest.mark.parametrize("chunk", [17, 24, 25, 48, 63])
def test_query_chunks_change_no_bit(chunk, dtype):
    operands, options = problem_with_everything(dtype)
    options["mask"] = np.broadcast_to(options["mask"], (3, 4, 70, 300))
    expected = with_lse(*operands, **options)
    for begin in range(0, 70 - 16, chunk):
        end = 70 if 70 - begin - chunk < 17 else begin + chunk
        rows = slice(begin, end)
        part = options | {
            "mask": options["mask"][..., rows, :],
            "bias": options["bias"][..., rows, :],
            "query_offset": options["query_offset"] + begin,
        }
        got = with_lse(operands[0][..., rows, :], *operands[1:], **part)
        assert_same_bits(got, (expected[0][..., rows, :], expected[1][..., rows]))
        if end == 70:
            break


@pytest.mark.promise("bitwise-ways-to-mask")
def test_tiles_that_are_skipped_change_no_bit():
    """A mask that hides whole tiles gives what the keys that it leaves give alone."""
    query, key, value = make_problem(50, 700, heads=2)
    mask = np.zeros(700, bool)
    mask[128:256] = mask[512:640] = True
    expected = with_lse(query, key, value, mask=np.where(mask, 0, -INF))
    assert_same_bits(with_lse(query, key, value, mask=mask), expected)
    zeroed = np.where(mask[:, None], value, 0)
    assert_same_bits(with_lse(query, key, zeroed, mask=mask), expected)
    order = np.r_[128:256, 512:640]
    assert_same_bits(with_lse(query, key[:, order], value[:, order]), expected)


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


# Few queries against long keys: a form of its own, in stretches of 512 keys.


def few_queries(dtype, q_len=2, kv_len=2700):
    operands = make_problem(
        q_len, kv_len, 40, 24, heads=6, kv_heads=2, batch=(3,), dtype=dtype, mean=1
    )
    rng = np.random.default_rng(6)
    options = {
        "mask": rng.random((3, 1, q_len, kv_len)) < 0.8,
        "bias": rng.normal(size=(6, q_len, kv_len)).astype(np.float32),
        "query_offset": np.array([kv_len - q_len, 700, 1030]),
        "window": (2000, 20),
        "alibi_slopes": rng.random((3, 6)) / 100,
        "sinks": rng.normal(size=6),
        "kv_lengths": np.array([kv_len, 1024, 0]),
        "softcap": 20.0,
    }
    return operands, options


@pytest.mark.promise("result-is-the-definition", "accuracy-gate")
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("q_len", [1, 2])
def test_few_queries(q_len, dtype):
    operands, options = few_queries(dtype, q_len)
    assert explain(*operands)["kernel"] == "few queries"
    attend_within_gate(*operands)
    attend_within_gate(*operands, **options)
    for name, value in options.items():
        positions = {"query_offset": options["query_offset"]}
        attend_within_gate(*operands, **(positions | {name: value}))


@pytest.mark.promise(
    "bitwise-threads",
    "bitwise-batch-neighbours",
    "bitwise-padding",
    "bitwise-strides",
    "masked-pair-contributes-nothing",
)
@every_arithmetic
def test_bits_of_few_queries(dtype, threads):
    """Threads, batch neighbours, padding, strides and other keys' poison change none."""
    operands, options = few_queries(dtype)
    for extra in (options, {}):
        threads(1)
        expected = with_lse(*operands, **extra)
        for count in (2, 3, 7):
            threads(count)
            assert_same_bits(with_lse(*operands, **extra), expected)
        for b in range(3):
            each = ("mask", "query_offset", "alibi_slopes", "kv_lengths")
            alone = {name: x[b] if name in each else x for name, x in extra.items()}
            got = with_lse(*[x[b] for x in operands], **alone)
            assert_same_bits(got, (expected[0][b], expected[1][b]))
        assert_same_bits(with_lse(*[laid_out(x, "reversed") for x in operands], **extra), expected)
    query, key, value = operands
    expected = with_lse(query, key, value)
    for padding in (1, 300, 5000):
        longer = [
            np.concatenate([x, np.full((3, 2, padding, x.shape[-1]), np.nan, dtype)], axis=2)
            for x in (key, value)
        ]
        assert_same_bits(with_lse(query, *longer, kv_lengths=2700), expected)
        assert_same_bits(with_lse(query, *longer, mask=np.arange(2700 + padding) < 2700), expected)


@pytest.mark.promise("bitwise-batch-neighbours")
@both_dtypes
def test_few_queries_whose_parts_wait(dtype):
    """More parts than may wait at once are merged wave by wave."""
    query, key, _ = make_problem(1, 30000, 2, heads=16, kv_heads=2, dtype=dtype)
    buffer = np.random.default_rng(7).normal(size=(2, 35000)).astype(dtype)
    value = as_strided(buffer, (2, 30000, 4096), (buffer.strides[0], *[buffer.itemsize] * 2))
    parts = [slice(8 * i, 8 * i + 8) for i in (0, 1)]
    expected = [attention(query[part], key[i], value[i]) for i, part in enumerate(parts)]
    assert_same_bits(attention(query, key, value), np.concatenate(expected))
    attend_within_gate(query, key, value[..., :3])


@pytest.mark.promise("sharing-changes-no-bit", "bitwise-batch-neighbours")
@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize(("q_len", "heads"), [(1, 8), (2, 6), (16, 12)])
def test_keys_that_a_batch_shares(q_len, heads, dtype):
    """A prefix that the batch repeats is read once for all; each still gets what it gets alone."""
    batch, kv_len = 21, 1100  # more rows than share a stretch
    query = make_problem(q_len, 1, 64, heads=heads, batch=(batch,), dtype=dtype)[0]
    _, key, value = make_problem(1, kv_len, 64, heads=2, dtype=dtype, mean=1)
    options = {"kv_lengths": np.arange(batch) * 53, "window": (900, None), "query_offset": 0}
    together = with_lse(query, key, value, **options)
    for b in range(batch):
        own = {**options, "kv_lengths": int(options["kv_lengths"][b])}
        alone = with_lse(query[b : b + 1], key, value, **own)
        assert_same_bits(tuple(x[b : b + 1] for x in together), alone)
    assert_within_gate(
        together, query, *(np.repeat(x[None], batch, 0) for x in (key, value)), **options
    )


# Half precision.


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
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.__name__)
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
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.__name__)
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
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.__name__)
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
