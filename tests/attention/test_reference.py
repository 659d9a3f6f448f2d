# SPDX-License-Identifier: Apache-2.0
"""Is the definition what it says? By hand, by other words for the same thing, and against torch."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn.reference import (
    attention,
    attention_backward,
    attention_weights,
    dropout_mask,
    philox4x32,
    varlen_attention,
)
from tests.support.correctness import assert_same_bits
from tests.support.problems import make_problem

INF = np.inf
LOG2 = np.log(2.0)
# Two queries, two keys; with scale=1 query 0 scores (log 2, 0), query 1 scores (0, log 3).
QUERY = np.array([[LOG2, 0.0], [0.0, np.log(3.0)]])
KEY = np.eye(2)
VALUE = np.array([[1.0, 10.0], [2.0, 20.0]])

# (arguments, probabilities): what the two queries make of the two keys.
BY_HAND = [
    ({}, [[2 / 3, 1 / 3], [1 / 4, 3 / 4]]),
    ({"scale": 2.0}, [[4 / 5, 1 / 5], [1 / 10, 9 / 10]]),
    ({"scale": -1.0}, [[1 / 3, 2 / 3], [3 / 4, 1 / 4]]),
    ({"scale": 0.0}, [[1 / 2, 1 / 2], [1 / 2, 1 / 2]]),
    ({"mask": [[True, False], [False, False]]}, [[1, 0], [0, 0]]),
    ({"mask": [[True], [False]]}, [[2 / 3, 1 / 3], [0, 0]]),
    ({"mask": [[LOG2, 0.0], [-INF, 0.0]]}, [[4 / 5, 1 / 5], [0, 1]]),
    ({"bias": [[0.0, LOG2]]}, [[1 / 2, 1 / 2], [1 / 7, 6 / 7]]),
    ({"bias": [[0.0, -INF]]}, [[1, 0], [1, 0]]),
    ({"bias": [[LOG2, 0.0]], "mask": [[LOG2, 0.0]]}, [[8 / 9, 1 / 9], [4 / 7, 3 / 7]]),
    ({"bias": [[-INF, 0.0]], "mask": [[True, False]]}, [[0, 0], [0, 0]]),
    ({"mask": [[np.finfo(float).min] * 2]}, [[1 / 2, 1 / 2], [1 / 2, 1 / 2]]),
    ({"is_causal": True}, [[1, 0], [1 / 4, 3 / 4]]),
    ({"is_causal": True, "query_offset": 1}, [[2 / 3, 1 / 3], [1 / 4, 3 / 4]]),
    ({"is_causal": True, "query_offset": -1}, [[0, 0], [1, 0]]),
    ({"window": (0, 0)}, [[1, 0], [0, 1]]),
    ({"window": (0, None)}, [[2 / 3, 1 / 3], [0, 1]]),
    ({"window": (None, 0)}, [[1, 0], [1 / 4, 3 / 4]]),
    ({"window": (None, None)}, [[2 / 3, 1 / 3], [1 / 4, 3 / 4]]),
    ({"window": (1, 0), "query_offset": 1}, [[2 / 3, 1 / 3], [0, 1]]),
    ({"window": (5, 5), "is_causal": True}, [[1, 0], [1 / 4, 3 / 4]]),
    ({"window": (0, 0), "query_offset": 9}, [[0, 0], [0, 0]]),
    ({"kv_lengths": 1}, [[1, 0], [1, 0]]),
    ({"kv_lengths": 0}, [[0, 0], [0, 0]]),
    ({"alibi_slopes": [LOG2]}, [[4 / 5, 1 / 5], [1 / 7, 6 / 7]]),
    ({"alibi_slopes": [LOG2], "query_offset": -1}, [[4 / 5, 1 / 5], [2 / 5, 3 / 5]]),
    ({"sinks": [0.0]}, [[2 / 4, 1 / 4], [1 / 5, 3 / 5]]),
    ({"sinks": [-INF]}, [[2 / 3, 1 / 3], [1 / 4, 3 / 4]]),
    ({"sinks": [5.0], "kv_lengths": 0}, [[0, 0], [0, 0]]),
    ({"sinks": [1000.0]}, [[0, 0], [0, 0]]),
]


@pytest.mark.promise(
    "result-is-the-definition",
    "true-attends",
    "float-mask-is-added",
    "causal-sees-up-to-its-position",
    "window-counts-from-the-position",
    "position-is-index-plus-offset",
    "lengths-hide-padding",
    "alibi-grows-with-distance",
    "sinks-join-the-denominator",
    "empty-row-is-zero",
)
@pytest.mark.parametrize(("arguments", "probs"), BY_HAND, ids=[str(case[0]) for case in BY_HAND])
def test_by_hand(arguments, probs):
    options = {"scale": 1.0} | arguments
    out, lse = attention(QUERY, KEY, VALUE, return_lse=True, **options)
    assert out.shape == (2, 2)
    assert lse.shape == (2,)
    assert_allclose(out, np.asarray(probs) @ VALUE, rtol=1e-14, atol=1e-300)
    assert_allclose(attention_weights(QUERY, KEY, **options), probs, rtol=1e-14, atol=1e-300)


@pytest.mark.promise("lse-is-over-keys")
def test_lse_by_hand():
    def lse(**options):
        return attention(QUERY, KEY, VALUE, scale=1.0, return_lse=True, **options)[1]

    assert_allclose(lse(), np.log([3.0, 4.0]), rtol=1e-15)
    assert_allclose(lse(sinks=[7.0]), np.log([3.0, 4.0]), rtol=1e-15)
    assert_allclose(lse(mask=np.full((2, 2), LOG2)), np.log([6.0, 8.0]), rtol=1e-15)
    assert_array_equal(lse(kv_lengths=0), [-INF, -INF])
    assert_allclose(lse(is_causal=True), np.log([2.0, 4.0]), rtol=1e-15)


@pytest.mark.promise("order-of-the-score")
def test_softcap_comes_after_the_scale_and_before_the_rest():
    score = 3 * np.tanh(2 * LOG2 / 3) + 1.0 - 0.5
    options = {"scale": 2.0, "softcap": 3.0, "bias": [[1.0, 0.0]], "alibi_slopes": [0.5]}
    probs = attention_weights(QUERY[:1], KEY, query_offset=1, **options)
    assert_allclose(probs[0, 0], 1 / (1 + np.exp(-score)), rtol=1e-14)


@pytest.mark.promise("default-scale")
def test_default_scale():
    query, key, value = make_problem(3, 4, 25)
    assert_same_bits(attention(query, key, value), attention(query, key, value, scale=0.2))


@pytest.mark.promise("heads-share-keys-in-groups", "two-axes-or-more")
@pytest.mark.parametrize("query_shape", [(2, 3), (4, 2, 3), (5, 4, 2, 3), (6, 5, 4, 2, 3)])
@pytest.mark.parametrize("key_batch", [None, (), (1,), (6, 1)])
def test_shapes_and_heads(query_shape, key_batch):
    rng = np.random.default_rng(0)
    heads = query_shape[-3] if len(query_shape) > 2 else 1
    key_shape = (7, 3) if key_batch is None else (*key_batch, heads // 2 or 1, 7, 3)
    query, key = rng.normal(size=query_shape), rng.normal(size=key_shape)
    value = rng.normal(size=(*key_shape[:-1], 9))
    out, lse = attention(query, key, value, return_lse=True)
    batch = np.broadcast_shapes(query_shape[:-3], key_shape[:-3])
    flat = max(len(query_shape), len(key_shape)) == 2
    assert lse.shape == (batch if flat else (*batch, heads)) + (2,)
    assert out.shape == (*lse.shape, 9)
    queries = np.broadcast_to(query, (*batch, heads, 2, 3))
    keys = np.broadcast_to(key, (*batch, *((1, 7, 3) if len(key_shape) == 2 else key_shape[-3:])))
    values = np.broadcast_to(value, (*keys.shape[:-1], 9))
    for index in np.ndindex(*batch, heads):
        shared = (*index[:-1], index[-1] // (heads // keys.shape[-3]))
        alone = attention(queries[index], keys[shared], values[shared])
        assert_allclose(out if flat else out[index], alone, rtol=1e-13, atol=1e-14)


@pytest.mark.promise(
    "position-is-index-plus-offset", "lengths-hide-padding", "alibi-grows-with-distance"
)
def test_per_batch_and_per_head_arguments():
    query, key, value = make_problem(2, 5, 3, heads=2, batch=(3, 2), dtype=np.float64)
    whole = {
        "query_offset": np.arange(6).reshape(3, 2),
        "kv_lengths": np.arange(6).reshape(3, 2) % 6,
        "alibi_slopes": np.arange(12.0).reshape(3, 2, 2),
    }
    sinks = np.array([0.5, 2.0])
    out = attention(query, key, value, sinks=sinks, **whole)
    for index in np.ndindex(3, 2):
        for head in range(2):
            here = (*index, head)
            alone = {name: array[index] for name, array in whole.items()}
            alone["alibi_slopes"] = alone["alibi_slopes"][head : head + 1]
            expected = attention(
                query[here], key[here], value[here], sinks=sinks[head : head + 1], **alone
            )
            assert_allclose(out[here], expected, rtol=1e-13, atol=1e-14)


@pytest.mark.promise("four-dtypes", "lse-is-over-keys")
def test_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        query, key, value = make_problem(3, 5, dtype=dtype)
        out, lse = attention(query, key, value, return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
        rough = attention(query, key, value, compute_dtype=dtype)
        assert rough.dtype == dtype
        eps = float(ml_dtypes.finfo(dtype).eps)
        assert_allclose(rough.astype(float), out.astype(float), atol=20 * eps, rtol=20 * eps)
        if dtype != np.float64:
            assert not np.array_equal(rough, out)
    out = np.empty((1, 3, 16), np.float64)
    assert attention(query, key, value, out=out) is out
    assert_array_equal(out, attention(query, key, value))


@pytest.mark.promise("no-keys-no-queries")
def test_empty():
    query, key, value = make_problem(3, 0, 4, 2, heads=2)
    out, lse = attention(query, key, value, return_lse=True)
    assert_array_equal(out, np.zeros((2, 3, 2)))
    assert_array_equal(lse, np.full((2, 3), -INF))
    assert attention(query[:, :0], key, value).shape == (2, 0, 2)


@pytest.mark.promise("visible-nan-reaches-its-rows")
def test_not_finite_values_reach_the_rows_that_see_them():
    value = VALUE.copy()
    value[1, 0] = np.nan
    out = attention(QUERY, KEY, value, is_causal=True)
    assert_array_equal(np.isnan(out), [[False, False], [True, False]])
    assert_array_equal(out[0], VALUE[0])
    value[1, 0] = INF
    assert_array_equal(attention(QUERY, KEY, value, is_causal=True)[:, 0], [1, INF])


@pytest.mark.promise("position-must-be-given")
def test_position_must_be_given():
    with pytest.raises(ValueError, match="query_offset must be given"):
        attention(QUERY[:1], KEY, VALUE, is_causal=True)
    with pytest.raises(ValueError, match="seed must be given"):
        attention(QUERY, KEY, VALUE, dropout_p=0.5)


# Counter, key and words of philox4x32 with 7 rounds, of tests/kat_vectors in Random123, the library
# of the generator's authors (https://github.com/DEShawResearch/random123).
KNOWN_ANSWERS = [
    """00000000 00000000 00000000 00000000  00000000 00000000
       5f6fb709 0d893f64 4f121f81 4f730a48""",
    """ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff
       5207ddc2 45165e59 4d8ee751 8c52f662""",
    """243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0
       4dfccaba 190a87f0 c47362ba b6b5242a""",
]


@pytest.mark.promise("dropout-follows-its-counter")
@pytest.mark.parametrize("numbers", KNOWN_ANSWERS)
def test_known_answers_of_the_generator(numbers):
    numbers = [int(x, 16) for x in numbers.split()]
    assert [int(x) for x in philox4x32(numbers[:4], numbers[4:6])] == numbers[6:]


@pytest.mark.promise("dropout-scales-what-stays", "dropped-value-contributes-nothing")
def test_dropout_by_hand():
    """Of the first words for seed 0, 5f6fb709 is the largest and 0d893f64 the smallest."""
    options = {"dropout_p": 0.25, "seed": 0}
    query, key = np.zeros((1, 1)), np.zeros((4, 1))
    assert_array_equal(dropout_mask(query, key, **options), [[True, False, True, True]])
    value = np.eye(4)
    out, lse = attention(query, key, value, return_lse=True, **options)
    assert_allclose(out, [[1 / 3, 0, 1 / 3, 1 / 3]], rtol=1e-15)
    assert_allclose(lse, np.log(4), rtol=1e-15)
    value[1] = np.nan
    assert_allclose(attention(query, key, value, **options), [[1 / 3, 0, 1 / 3, 1 / 3]])
    value[0, 0] = np.nan
    assert_array_equal(np.isnan(attention(query, key, value, **options)), [[True] + 3 * [False]])


@pytest.mark.parametrize("is_causal", [False, True])
def test_torch_agrees(is_causal):
    torch = pytest.importorskip("torch")
    query, key, value = make_problem(7, 7, heads=3, batch=(2,), dtype=np.float64)
    tensors = [torch.from_numpy(x) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=is_causal)
    assert_allclose(
        attention(query, key, value, is_causal=is_causal), expected, rtol=1e-13, atol=1e-14
    )


# Gradients.

GRADIENT_CASES = [
    {},
    {"scale": -0.7},
    {"is_causal": True, "query_offset": 1},
    {"window": (1, 2), "query_offset": [[0], [2]]},
    {"softcap": 0.8},
    {"bias": "pairs", "softcap": 1.5},
    {"bias": "row", "mask": "some"},
    {"bias": "column", "mask": "float"},
    {"mask": "some"},
    {"alibi_slopes": [0.3, 0.1, 0.7, 0.2], "query_offset": -1},
    {"sinks": [0.5, -1.0, 2.0, -INF]},
    {"sinks": [0.5, -1.0, 2.0, 0.0], "kv_lengths": [[5], [0]], "bias": "pairs"},
    {"kv_lengths": [[3], [6]]},
    {"dropout_p": 0.3, "seed": 5, "query_offset": [[0], [2]], "sinks": [0.5, -1.0, 2.0, 0.0]},
]
PAIRS = {"pairs": (2, 1, 4, 5, 6), "row": (4, 1, 6), "column": (5, 1)}


def gradient_problem(options, seed=0):
    """Return query, key, value, the options with arrays, and gradients of out and lse."""
    rng = np.random.default_rng(seed)
    shapes = ((2, 3, 4, 5, 3), (2, 1, 2, 6, 3), (3, 2, 6, 2))
    query, key, value = (rng.normal(size=shape) for shape in shapes)
    options = dict(options)
    if "bias" in options:
        options["bias"] = rng.normal(size=PAIRS[options["bias"]])
    kind = options.get("mask")
    if kind == "some":
        options["mask"] = rng.random((2, 3, 1, 5, 6)) < 0.6
        options["mask"][0, 0, 0, 3] = False  # a row that sees nothing
    elif kind == "float":
        options["mask"] = np.where(rng.random((5, 6)) < 0.3, -INF, rng.normal(size=(5, 6)))
    if "sinks" in options:
        options["sinks"] = np.asarray(options["sinks"])
    grad_out = rng.normal(size=(2, 3, 4, 5, 2))
    return query, key, value, options, grad_out, rng.normal(size=(2, 3, 4, 5))


def gradients(query, key, value, options, grad_out, grad_lse):
    """Return a gradient for each of query, key, value, and bias and sinks if they are there."""
    out, lse = attention(query, key, value, return_lse=True, **options)
    wanted = {"return_dbias": "bias" in options, "return_dsinks": "sinks" in options}
    return attention_backward(
        grad_out, query, key, value, out, lse, grad_lse=grad_lse, **options, **wanted
    )


@pytest.mark.promise("gradients-are-the-definitions", "gradients-of-bias-sinks-lse")
@pytest.mark.parametrize("options", GRADIENT_CASES, ids=str)
def test_gradients_are_central_differences(options):
    query, key, value, options, grad_out, grad_lse = gradient_problem(options)
    arrays = {"query": query, "key": key, "value": value}
    arrays |= {name: options[name] for name in ("bias", "sinks") if name in options}

    def loss():
        out, lse = attention(**(options | arrays), return_lse=True)
        return (out * grad_out).sum() + (lse * grad_lse)[lse != -INF].sum()

    grads = gradients(query, key, value, options, grad_out, grad_lse)
    step = 1e-5
    for (name, array), grad in zip(arrays.items(), grads, strict=True):
        assert grad.shape == array.shape
        differences = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            usual = array[index]
            array[index] = usual + step
            above = loss()
            array[index] = usual - step
            differences[index] = (above - loss()) / (2 * step)
            array[index] = usual
        assert_allclose(grad, differences, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.promise("gradients-are-the-definitions", "gradients-of-bias-sinks-lse")
@pytest.mark.parametrize("is_causal", [False, True])
def test_torch_autograd_agrees(is_causal):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    rng = np.random.default_rng(0)
    arrays = make_problem(7, 7, heads=4, batch=(2,), dtype=np.float64)
    bias, sinks = rng.normal(size=(4, 7, 7)), rng.normal(size=4)
    grad_out, grad_lse = rng.normal(size=arrays[0].shape), rng.normal(size=(2, 4, 7))
    leaves = [torch.from_numpy(x.copy()).requires_grad_() for x in (*arrays, bias, sinks)]
    q, k, v, b, s = leaves
    scores = q @ k.transpose(-1, -2) / 4 + b
    if is_causal:
        scores = scores.masked_fill(torch.ones(7, 7).triu(1) > 0, -INF)
    lse = scores.logsumexp(-1)
    out = torch.cat([scores, s[:, None, None].expand(2, 4, 7, 1)], -1).softmax(-1)[..., :-1] @ v
    ((out * torch.from_numpy(grad_out)).sum() + (lse * torch.from_numpy(grad_lse)).sum()).backward()
    options = {"bias": bias, "sinks": sinks, "is_causal": is_causal}
    for grad, leaf in zip(gradients(*arrays, options, grad_out, grad_lse), leaves, strict=True):
        assert_allclose(grad, leaf.grad, rtol=1e-11, atol=1e-13)


def test_gradients_without_heads_and_in_other_dtypes():
    query, key, value = make_problem(3, 5, dtype=np.float64)
    grad_out = np.random.default_rng(1).normal(size=query.shape)
    expected = gradients(query, key, value, {}, grad_out, None)
    flat = gradients(query[0], key[0], value[0], {}, grad_out[0], None)
    for grad, whole in zip(flat, expected, strict=True):
        assert_same_bits(grad, whole[0])
    narrow = [x.astype(np.float32) for x in (query, key, value)]
    bias = np.zeros((3, 5), np.float16)
    grads = gradients(*narrow, {"bias": bias}, grad_out.astype(np.float32), None)
    assert [grad.dtype for grad in grads] == [np.float32] * 3 + [np.float16]
    for grad, exact in zip(grads, expected, strict=False):
        assert_allclose(grad, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.promise("packed-gradients-are-alone")
def test_gradients_of_packed_sequences():
    rng = np.random.default_rng(0)
    q_starts, kv_starts = np.array([1, 4, 4, 9]), np.array([0, 5, 7, 8])
    query, grad_out = rng.normal(size=(2, 10, 4, 3))
    key, value = rng.normal(size=(2, 9, 2, 3))
    grad_lse = rng.normal(size=(4, 10))
    bias, sinks = rng.normal(size=(4, 10, 5)), rng.normal(size=4)
    options = {"kv_lengths": [3, 1, 1], "is_causal": True, "query_offset": [1, 0, -2]}
    dq, dk, dv, dbias, dsinks = attention_backward(
        grad_out,
        query,
        key,
        value,
        None,
        None,
        bias=bias,
        sinks=sinks,
        **options,
        cu_seqlens_q=q_starts,
        cu_seqlens_kv=kv_starts,
        grad_lse=grad_lse,
        return_dbias=True,
        return_dsinks=True,
    )
    assert_array_equal(dq[[0, 9]], 0)
    assert_array_equal(dk[8], 0)
    sum_of_dsinks = 0
    for b in range(3):
        rows, keys = slice(*q_starts[b : b + 2]), slice(*kv_starts[b : b + 2])
        own = {name: x if x is True else x[b] for name, x in options.items()}
        own |= {"bias": bias[:, rows, : keys.stop - keys.start], "sinks": sinks}
        q, do = (x[rows].swapaxes(0, 1) for x in (query, grad_out))
        k, v = (x[keys].swapaxes(0, 1) for x in (key, value))
        grads = gradients(q, k, v, own, do, grad_lse[:, rows])
        for packed, alone in zip((dq[rows], dk[keys], dv[keys]), grads, strict=False):
            assert_same_bits(packed.swapaxes(0, 1), alone)
        assert_same_bits(dbias[:, rows, : keys.stop - keys.start], grads[3])
        sum_of_dsinks = sum_of_dsinks + grads[4]
    assert_allclose(dsinks, sum_of_dsinks, rtol=1e-14)


@pytest.mark.promise("masked-pair-passes-no-gradient", "empty-row-has-gradient-zero")
def test_gradients_of_masked_pairs_are_zero():
    query, key, value, options, grad_out, grad_lse = gradient_problem({"mask": "some"})
    mask = np.zeros((2, 3, 1, 5, 6), bool)
    mask[..., 1:, 2:] = True  # row 0 sees nothing; nobody sees keys 0 and 1
    options = {"mask": mask, "sinks": np.ones(4), "softcap": 2.0}
    expected = gradients(query, key, value, options, grad_out, grad_lse)
    query[..., 0, :] = grad_out[..., 0, :] = grad_lse[..., 0] = np.nan
    key[..., :2, :] = value[..., :2, :] = INF
    poisoned = gradients(query, key, value, options, grad_out, grad_lse)
    for grad, clean in zip(poisoned, expected, strict=True):
        assert_same_bits(grad, clean)
    for grad, rows in zip(expected, (slice(1), slice(2), slice(2)), strict=False):
        assert_array_equal(grad[..., rows, :], 0)


@pytest.mark.promise("masked-pair-passes-no-gradient")
def test_a_visible_nan_reaches_the_gradients_that_depend_on_it():
    query, key, value = make_problem(2, 2, dtype=np.float64)
    key[:, 1, 0] = np.nan  # seen by query 1 alone
    dq, dk, dv = gradients(query, key, value, {"is_causal": True}, np.ones_like(query), None)
    assert_array_equal(np.isnan(dq).any(-1), [[False, True]])
    assert np.isnan(dk).any(-1).all()  # query 1 sees both keys
    assert np.isnan(dv).any(-1).all()


@pytest.mark.promise("accumulate-is-the-whole", "accumulate-of-nothing", "keys-have-an-offset")
def test_parts_are_the_whole():
    query, key, value = make_problem(6, 9, 4, heads=2, batch=(2,), dtype=np.float64)
    options = {"is_causal": True, "query_offset": 1, "dropout_p": 0.5, "seed": 3}
    expected = attention(query, key, value, return_lse=True, **options)
    out, lse = np.full(query.shape, np.nan), np.full(query.shape[:-1], -np.inf)
    grads = [np.ones_like(x) for x in (query, key, value)]
    for keys in (slice(3, 9), slice(0, 3), slice(0, 0)):
        part = key[..., keys, :], value[..., keys, :]
        more = {"out": out, "lse": lse, "accumulate": True, "key_offset": keys.start}
        got = attention(query, *part, return_lse=True, **more, **options)
        assert got[0] is out
        assert got[1] is lse
    assert_allclose(out, expected[0], rtol=1e-12)
    assert_allclose(lse, expected[1], rtol=1e-12)
    got = attention_backward(
        out, query, key, value, None, None, grads=grads, accumulate=True, **options
    )
    wanted = attention_backward(out, query, key, value, None, None, **options)
    for x, y, into in zip(got, wanted, grads, strict=True):
        assert_allclose(x, y + 1, rtol=1e-12)
        assert_array_equal(into, x)


@pytest.mark.promise("float32-of-half-precision")
def test_float32_results():
    query, key, value = make_problem(6, 9, 4, heads=2, dtype=np.float16)
    exact = attention(*(x.astype(np.float64) for x in (query, key, value)))
    out = np.empty(query.shape, np.float32)
    assert attention(query, key, value, out=out) is out
    assert_array_equal(out, exact.astype(np.float32))
    starts = [0, 4, 6], [0, 5, 9]
    packed = [x.swapaxes(0, 1) for x in (query, key, value)]
    whole = np.empty(packed[0].shape, np.float32)
    lse = np.empty((2, 6), np.float32)
    varlen_attention(*packed, *starts, out=whole, lse=lse)
    assert_array_equal(
        whole.astype(np.float16), varlen_attention(*packed, *starts, return_lse=True)[0]
    )
    before = whole.copy(), lse.copy()
    varlen_attention(*packed, *starts, out=whole, lse=lse, accumulate=True)
    assert_allclose(whole, before[0], rtol=1e-6)
    assert_allclose(lse, before[1] + np.log(2), rtol=1e-6)
