# SPDX-License-Identifier: Apache-2.0
"""The gradients, on every variant of the kernel: the definition's, and what else is promised."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import attention, attention_backward, dropout_mask, varlen_attention
from tests.attention.problems import CASES, arguments_of
from tests.support.correctness import assert_same_bits, in_pairs
from tests.support.gradients import gradient_errors, grads_of
from tests.support.problems import every_dtype, make_problem

pytestmark = pytest.mark.usefixtures("isa")
INF = np.inf


def assert_gradients_within_gate(operands, options, seed=1):
    query, key, value = operands
    pairs = in_pairs(query, key) and value.shape[-1] % 2 == 0
    got = grads_of(operands, options, seed)
    rounded_to = query.dtype if pairs else None
    for error, allowed in gradient_errors(got, operands, options, seed, rounded_to):
        assert error <= allowed


@pytest.mark.promise(
    "gradients-are-the-definitions",
    "gradients-of-bias-sinks-lse",
    "gradients-sum-over-what-repeats",
)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_argument_with_every_other(number):
    case = CASES[number]
    operands, options = arguments_of(case, np.random.default_rng(number))
    assert_gradients_within_gate(operands, options)


SHAPES = [
    ((1, 1), (1, 1)),
    ((95, 64), (127, 64)),
    ((96, 64), (128, 64)),
    ((97, 33), (129, 33)),
    ((193, 128), (1025, 128)),
    ((17, 256), (700, 256)),
    ((700, 80), (17, 80)),
]


@pytest.mark.promise("gradients-are-the-definitions")
@every_dtype
@pytest.mark.parametrize(("rows", "keys"), SHAPES, ids=str)
def test_sizes(rows, keys, dtype):
    operands = make_problem(rows[0], keys[0], rows[1], heads=2, dtype=dtype)
    assert_gradients_within_gate(operands, {})
    assert_gradients_within_gate(operands, {"is_causal": True, "query_offset": keys[0] - rows[0]})


@pytest.mark.promise("gradients-are-the-definitions", "gradients-of-bias-sinks-lse")
def test_central_differences():
    operands = make_problem(5, 7, 4, heads=4, kv_heads=2, batch=(2,), dtype=np.float64)
    rng = np.random.default_rng(0)
    options = {
        "bias": rng.normal(size=(4, 1, 7)),
        "sinks": rng.normal(size=4),
        "softcap": 2.0,
        "is_causal": True,
        "query_offset": 2,
    }
    arrays = {"query": operands[0], "key": operands[1], "value": operands[2]}
    arrays |= {name: options[name] for name in ("bias", "sinks")}
    grads = grads_of(operands, options)
    weights = np.random.default_rng(1)
    grad_out = weights.standard_normal(operands[0].shape)
    grad_lse = weights.standard_normal(operands[0].shape[:-1])

    def loss():
        out, lse = attention(**(options | arrays), return_lse=True)
        return (out * grad_out).sum() + (lse * grad_lse).sum()

    step = 1e-5
    for (name, array), grad in zip(arrays.items(), grads, strict=True):
        for index in np.ndindex(array.shape):
            usual = array[index]
            array[index] = usual + step
            above = loss()
            array[index] = usual - step
            difference = (above - loss()) / (2 * step)
            array[index] = usual
            assert_allclose(grad[index], difference, rtol=1e-6, atol=1e-6, err_msg=name)


BIASES = [(), (1,), (257,), (60, 1), (4, 1, 1), (4, 60, 257), (2, 1, 1, 257), (1, 4, 60, 1)]


@pytest.mark.promise("gradients-sum-over-what-repeats", "gradients-of-bias-sinks-lse")
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_bias_is_summed_over_what_it_repeats(shape):
    operands = make_problem(60, 257, 16, heads=4, kv_heads=2, batch=(2,))
    rng = np.random.default_rng(0)
    options = {"bias": rng.normal(size=shape), "sinks": rng.normal(size=4)}
    options["kv_lengths"] = [200, 0]
    assert_gradients_within_gate(operands, options)


@pytest.mark.promise("bitwise-gradients")
@every_dtype
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)], ids=str)
def test_threads_and_runs_change_no_bit(heads, dtype, threads):
    q_heads, kv_heads = heads
    operands = make_problem(450, 900, 32, heads=q_heads, kv_heads=kv_heads, dtype=dtype)
    rng = np.random.default_rng(0)
    for options in (
        {},
        {"is_causal": True, "query_offset": 450},
        {"window": (100, 20), "query_offset": 100},
        {"bias": rng.normal(size=(900,)), "sinks": rng.normal(size=q_heads)},
    ):
        threads(1)
        alone = grads_of(operands, options)
        for count in (2, 2, 3, 7):
            threads(count)
            assert_same_bits(grads_of(operands, options), alone)


@pytest.mark.promise("bitwise-gradients")
def test_many_heads_that_leave_room_for_each_other(threads):
    lens = (130, 0, 300, 140, 0, 270)
    starts = np.cumsum([0, *lens])
    kv_starts = np.cumsum([0, 130, 5, 300, 0, 7, 270])
    rng = np.random.default_rng(0)
    query, grad_out = rng.standard_normal((2, starts[-1], 12, 8), dtype=np.float32)
    key, value = rng.standard_normal((2, kv_starts[-1], 12, 8), dtype=np.float32)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_kv": kv_starts}
    out, lse = varlen_attention(query, key, value, **packed, return_lse=True)
    threads(1)
    alone = attention_backward(grad_out, query, key, value, out, lse, **packed)
    threads(5)
    for _ in range(30):
        again = attention_backward(grad_out, query, key, value, out, lse, **packed)
        assert_same_bits(again, alone)


SEEN = {
    "all": {},
    "causal": {"is_causal": True, "query_offset": -150},
    "a window": {"window": (40, 25), "query_offset": 60},
    "later keys": {"window": (0, None), "query_offset": 300},
    "lengths": {"kv_lengths": [1700, 0]},
    "a bias of all": {"is_causal": True, "query_offset": 300, "bias": np.linspace(-1, 1, 2000)},
    "dropout": {"window": (300, 300), "query_offset": 0, "dropout_p": 0.1, "seed": 5},
}


@pytest.mark.promise("bitwise-gradients")
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("seen", SEEN)
def test_order_of_key_blocks(seen, heads, threads):
    """More threads work on fewer keys at a time, on parts of the rows, with other waits."""
    q_heads, kv_heads = heads
    operands = make_problem(1700, 2000, 8, heads=q_heads, kv_heads=kv_heads, batch=(2,))
    threads(1)
    alone = grads_of(operands, SEEN[seen])
    for count in (2, 3, 8):
        threads(count)
        assert_same_bits(grads_of(operands, SEEN[seen]), alone)


@pytest.mark.promise("bitwise-gradients")
@pytest.mark.parametrize("heads", [2, 3, 4])
@pytest.mark.parametrize("offset", [-300, -192, -100])
def test_parts_of_a_chain_whose_first_rows_see_nothing(offset, heads, threads):
    """A bias that heads share makes them a chain; its key blocks are done in parts by threads."""
    operands = make_problem(480, 640, 8, heads=heads)
    options = {"bias": np.zeros(640), "is_causal": True, "query_offset": offset}
    threads(1)
    alone = grads_of(operands, options)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(grads_of(operands, options), alone)


@pytest.mark.promise("gradients-sum-over-what-repeats", "bitwise-gradients")
def test_batches_are_computed_alone_and_summed_where_they_share():
    query, key, value = make_problem(50, 140, 16, heads=2, batch=(2, 3))
    for shared in ((query[:1, :1], key, value), (query, key[:, 1:2], value[0, 0])):
        assert_gradients_within_gate(shared, {})
    dq, dk, dv = grads_of((query, key, value), {})
    out, lse = attention(query, key, value, return_lse=True)
    rng = np.random.default_rng(1)
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    grad_lse = rng.standard_normal(lse.shape).astype(lse.dtype)
    one = [x[1, 2] for x in (grad_out, query, key, value, out, lse)]
    alone = attention_backward(*one, grad_lse=grad_lse[1, 2])
    assert_same_bits((dq[1, 2], dk[1, 2], dv[1, 2]), alone)


@pytest.mark.promise("bitwise-gradients")
@every_dtype
def test_strides_change_no_bit(dtype):
    operands = make_problem(50, 140, 16, heads=2, dtype=dtype)
    out, lse = attention(*operands, return_lse=True)
    grad_out = np.ones_like(out)
    plain = attention_backward(grad_out, *operands, out, lse)
    turned = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (*operands, out)]
    repeated = np.broadcast_to(np.ones((), out.dtype), out.shape)
    assert_same_bits(attention_backward(repeated, *turned, np.asfortranarray(lse)), plain)


@pytest.mark.promise("masked-pair-passes-no-gradient", "empty-row-has-gradient-zero")
@every_dtype
@pytest.mark.parametrize("poison", [np.nan, INF], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_poison_of_pairs_that_are_hidden(softcap, poison, dtype):
    operands = make_problem(110, 300, 16, heads=2, dtype=dtype)
    mask = np.zeros((110, 300), bool)
    mask[3:, 5:] = np.random.default_rng(0).random((107, 295)) < 0.5  # rows 0-2, keys 0-4: none
    mask[50] = False
    options = {"mask": mask, "softcap": softcap}
    expected = grads_of(operands, options)
    query, key, value = (x.copy() for x in operands)
    query[:, [0, 50]] = poison
    key[:, :5] = value[:, :5] = poison
    assert_same_bits(grads_of((query, key, value), options), expected)
    assert_array_equal(expected[0][:, [0, 1, 2, 50]].astype(np.float32), 0)
    assert_array_equal(expected[1][:, :5].astype(np.float32), 0)
    # Some rows see the key: theirs alone is not finite, and so are the keys that they see.
    key = operands[1].copy()
    key[:, 7] = np.nan
    dq, dk, dv = grads_of((operands[0], key, operands[2]), options)
    rows = mask[:, 7]
    assert_array_equal(np.isnan(dq.astype(np.float32)).all(-1), np.stack([rows, rows]))
    assert_same_bits(dq[:, ~rows], expected[0][:, ~rows])
    touched = mask[rows].any(0)
    for grad, clean in ((dk, expected[1]), (dv, expected[2])):
        assert_array_equal(np.isnan(grad.astype(np.float32)).all(-1), np.stack([touched] * 2))
        assert_same_bits(grad[:, ~touched], clean[:, ~touched])


@pytest.mark.promise("masked-pair-passes-no-gradient")
@every_dtype
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_poison_behind_the_length(softcap, dtype):
    operands = make_problem(110, 300, 16, heads=2, dtype=dtype)
    options = {"kv_lengths": 290, "softcap": softcap}
    expected = grads_of(operands, options)
    key, value = (x.copy() for x in operands[1:])
    key[:, 290:] = value[:, 290:] = np.nan
    assert_same_bits(grads_of((operands[0], key, value), options), expected)


@pytest.mark.promise("masked-pair-passes-no-gradient")
def test_a_poisoned_gradient_of_a_row_that_sees_nothing():
    operands = make_problem(60, 140, 16, heads=2)
    mask = np.ones((60, 140), bool)
    mask[3] = False
    options = {"mask": mask, "sinks": np.ones(2, np.float32)}
    out, lse = attention(*operands, return_lse=True, **options)
    grad_out = np.ones_like(out)
    expected = attention_backward(grad_out, *operands, out, lse, return_dsinks=True, **options)
    grad_out[:, 3] = np.nan
    again = attention_backward(grad_out, *operands, out, lse, return_dsinks=True, **options)
    assert_same_bits(again, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sums_that_are_not_finite_raise_no_warning(dtype):
    query, key, value = make_problem(50, 60, 16, batch=(4,), dtype=dtype)
    shared = (query, key[:1], value[:1])
    options = {"sinks": np.zeros(1), "bias": np.zeros((50, 1), np.float16)}
    out, lse = attention(*shared, return_lse=True, **options)
    grad_out = np.full_like(out, 60000)
    grad_out[0, 0, 0, 0], grad_out[1, 0, 0, 0] = INF, -INF
    grad_lse = np.full_like(lse, 1e30)
    dq, _, dv, *_ = attention_backward(
        grad_out,
        *shared,
        out,
        lse,
        grad_lse=grad_lse,
        return_dbias=True,
        return_dsinks=True,
        **options,
    )
    assert not np.isfinite(dq[0, 0, 0].astype(np.float32)).any()
    assert not np.isfinite(dv[0, 0].astype(np.float32)).all()


@pytest.mark.promise("gradients-drop-the-same-pairs")
@every_dtype
def test_dropped_pairs_pass_nothing_on(dtype):
    operands = make_problem(100, 260, 16, heads=2, dtype=dtype)
    options = {"dropout_p": 0.4, "seed": 3}
    assert_gradients_within_gate(operands, options)
    kept = dropout_mask(*operands[:2], **options)
    out, lse = attention(*operands, return_lse=True, **options)
    grad_out = np.zeros_like(out)
    grad_out[:, 7] = 1
    dv = attention_backward(grad_out, *operands, out, lse, **options)[2].astype(np.float32)
    assert_array_equal((dv != 0).all(-1), kept[:, 7])
    assert_array_equal((dv != 0).any(-1), kept[:, 7])
    everything = attention(*operands, return_lse=True, dropout_p=1.0, seed=0)
    for grad in attention_backward(grad_out, *operands, *everything, dropout_p=1.0, seed=0):
        assert_array_equal(grad.astype(np.float32), 0)


@pytest.mark.promise("empty-row-has-gradient-zero")
@every_dtype
def test_nothing_to_see(dtype):
    operands = make_problem(60, 140, 16, heads=2, batch=(2,), dtype=dtype)
    for options in (
        {"kv_lengths": 0, "sinks": np.zeros(2)},
        {"mask": np.zeros((140,), bool)},
        {"bias": np.full((60, 140), -INF)},
        {"is_causal": True, "query_offset": -60},
    ):
        for grad in grads_of(operands, options):
            assert_array_equal(grad.astype(np.float32), 0)
    for q_len, kv_len in ((0, 5), (5, 0), (0, 0)):
        operands = make_problem(q_len, kv_len, 4, heads=2, dtype=dtype)
        grads = grads_of(operands, {})
        for grad, x in zip(grads, operands, strict=True):
            assert grad.shape == x.shape
            assert_array_equal(grad.astype(np.float32), 0)


@pytest.mark.parametrize("heads", [0, 1])
def test_more_empty_heads_than_can_be_counted(heads):
    empty = np.empty((2**40, heads, 0, 8), np.float32)
    grads = attention_backward(*[empty] * 5, empty[..., 0])
    assert [grad.shape for grad in grads] == [empty.shape] * 3


@pytest.mark.promise("packed-gradients-are-alone")
@every_dtype
def test_packed_sequences(dtype):
    q_lens, kv_lens = (3, 0, 100, 17, 60), (9, 4, 300, 0, 60)
    rng = np.random.default_rng(0)
    starts = [np.cumsum([1, *lens]) for lens in (q_lens, kv_lens)]
    query, key, value = (
        rng.standard_normal((total, heads, dim)).astype(dtype)
        for total, heads, dim in ((182, 4, 16), (375, 2, 16), (375, 2, 8))
    )
    sinks, bias = rng.normal(size=4), rng.normal(size=(4, 182, 300))
    offsets = np.subtract(kv_lens, q_lens)
    options = {"is_causal": True, "sinks": sinks, "softcap": 3.0}
    out, lse = varlen_attention(
        query, key, value, *starts, bias=bias, query_offset=offsets, return_lse=True, **options
    )
    grad_out = rng.standard_normal(out.shape).astype(dtype)
    grad_lse = rng.standard_normal(lse.shape).astype(lse.dtype)
    dq, dk, dv, dbias, dsinks = attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        cu_seqlens_q=starts[0],
        cu_seqlens_kv=starts[1],
        bias=bias,
        query_offset=offsets,
        grad_lse=grad_lse,
        return_dbias=True,
        return_dsinks=True,
        **options,
    )
    assert (dq.shape, dk.shape, dv.shape) == (query.shape, key.shape, value.shape)
    total = np.zeros(4)
    for b, (rows, keys) in enumerate(
        zip(*([slice(*s[i : i + 2]) for i in range(5)] for s in starts), strict=True)
    ):
        own_bias = bias[:, rows, : kv_lens[b]]
        own = attention_backward(
            *(x[rows].swapaxes(0, 1) for x in (grad_out, query)),
            *(x[keys].swapaxes(0, 1) for x in (key, value)),
            out[rows].swapaxes(0, 1),
            lse[:, rows],
            bias=own_bias,
            query_offset=int(offsets[b]),
            grad_lse=grad_lse[:, rows],
            return_dbias=True,
            return_dsinks=True,
            **options,
        )
        mine = (dq[rows], dk[keys], dv[keys])
        assert_same_bits(tuple(x.swapaxes(0, 1) for x in mine), own[:3])
        assert_same_bits(dbias[:, rows, : kv_lens[b]], own[3])
        assert_array_equal(dbias[:, rows, kv_lens[b] :], 0)
        total += own[4]
    assert_allclose(dsinks, total, rtol=1e-5, atol=1e-5)
    assert_array_equal(dq[:1].astype(np.float32), 0)
    assert_array_equal(dk[-1:].astype(np.float32), 0)


@pytest.mark.promise("gradients-are-the-definitions")
@pytest.mark.parametrize("kv_len", [2048, 16384])
def test_accuracy_of_long_sums(kv_len):
    operands = make_problem(50, kv_len, 32, mean=1.0)
    assert_gradients_within_gate(operands, {})
    operands = make_problem(kv_len, 50, 32, mean=1.0)
    assert_gradients_within_gate(operands, {})


@pytest.mark.promise("error-says-which-rule-and-what")
def test_errors():
    operands = make_problem(3, 5, 4, heads=2)
    out, lse = attention(*operands, return_lse=True)
    grad = np.ones_like(out)
    good = (grad, *operands, out, lse)
    for change, error, text in (
        ({0: grad[:1]}, ValueError, r"grad_out must have shape \(2, 3, 4\), got grad_out.shape="),
        ({0: grad.astype(float)}, TypeError, "grad_out must have dtype float32, not float64"),
        ({4: out[..., :2]}, ValueError, r"out must have shape \(2, 3, 4\), got out.shape="),
        ({5: lse[0]}, ValueError, r"lse must have shape \(2, 3\), got lse.shape=\(3,\)"),
        ({5: lse.astype(float)}, TypeError, "lse must have dtype float32, not float64"),
        ({2: operands[1][..., :3]}, ValueError, "key has head_dim 3 but query has head_dim 4"),
    ):
        with pytest.raises(error, match=text):
            attention_backward(*(change.get(i, x) for i, x in enumerate(good)))
    for options, error, text in (
        ({"return_dbias": True}, ValueError, "return_dbias needs bias, got bias=None"),
        ({"return_dsinks": True}, ValueError, "return_dsinks needs sinks, got sinks=None"),
        ({"return_dbias": 1}, TypeError, "return_dbias must be"),
        ({"grad_lse": lse[0]}, ValueError, "grad_lse must have shape"),
        ({"cu_seqlens_q": [0, 2]}, ValueError, "cu_seqlens_kv must be given with"),
        ({"is_causal": True}, ValueError, "query_offset must be given with is_causal"),
    ):
        with pytest.raises(error, match=text):
            attention_backward(*good, **options)
