# SPDX-License-Identifier: Apache-2.0
"""The call on a GPU's arrays, whole, on a device that is none: every form against the definition.

What each kernel does in detail its own tests show; here is what lies between the call and it:
checks, views, small arguments of the host and of the device, copies, the repair of rows, results.
"""
# ruff: noqa: E501 - the tables have a line per case

import gc
import itertools
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs the extra `cuda`")

import fastattn
from fastattn import cuda, reference
from fastattn.cuda import _recipe
from tests.cuda.cases import assert_right
from tests.cuda.fake_device import fake_device
from tests.support.correctness import assert_within_gate
from tests.support.problems import make_problem

TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Form, capability, query lengths that it serves.
FORMS = {"mma": (AMPERE, 20), "wgmma": (HOPPER, 20), "decode": (AMPERE, 3), "simt": (TURING, 20)}
ON_DEVICE = ("mask", "bias")  # of the options, always


def problem(q_len=20, kv_len=40, head_dim=64, dtype=np.float16, **sizes):
    return make_problem(q_len, kv_len, head_dim, dtype=dtype, **{"heads": 2, "kv_heads": 1} | sizes)


def attend(capability, query, key, value, *, everything_on_device=False, **options):
    """Return out, lse and what was launched."""
    with fake_device(capability) as device:
        given = {
            name: device.array(x)
            if isinstance(x, np.ndarray) and (everything_on_device or name in ON_DEVICE)
            else x
            for name, x in options.items()
        }
        arrays = map(device.array, (query, key, value))
        out, lse = fastattn.attention(*arrays, return_lse=True, **given)
        return device.values(out), device.values(lse), device.launched


def pairs(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


RNG = np.random.default_rng(5)
OPTIONS = {
    "nothing": {},
    "causal": {"is_causal": True, "query_offset": 20},
    "window": {"window": (7, 2), "query_offset": 10},
    "lengths": {"kv_lengths": np.array([30, 0])},
    "offsets": {"is_causal": True, "query_offset": np.array([20, -4])},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.3},
    "bool mask": {"mask": RNG.random((2, 1, 1, 40)) > 0.4},
    "float mask": {"mask": np.where(RNG.random((20, 40)) > 0.4, 0.5, -np.inf)},
    "bias": {"bias": pairs(RNG, 2, 1, 40).astype(BFLOAT16)},
    "alibi": {"alibi_slopes": np.array([0.3, 0.1], np.float32), "query_offset": 20},
    "sinks": {"sinks": np.array([0.5, -1.0], np.float16)},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 7},
    "keys of a part": {
        **{"dropout_p": 0.3, "seed": 2**40 + 7, "is_causal": True, "query_offset": 35},
        **{"key_offset": np.array([15, 2]), "head_offset": 3, "batch_offset": 9},
    },
}
TENSOR_CORE_OPTIONS = list(OPTIONS)[:7]


@pytest.mark.promise("gpu-means-the-same")
@pytest.mark.parametrize("name", TENSOR_CORE_OPTIONS)
@pytest.mark.parametrize("form", ["mma", "wgmma", "decode"])
def test_forms_within_gate(form, name):
    capability, q_len = FORMS[form]
    arrays = problem(q_len, batch=(2,))
    out, lse, launched = attend(capability, *arrays, **OPTIONS[name])
    assert any(form in kernel for kernel in launched)
    assert_right(out, lse, *arrays, **OPTIONS[name])


PAIRS = [
    pair
    for pair in itertools.combinations(list(OPTIONS)[1:], 2)
    if len({option for name in pair for option in OPTIONS[name]})
    == sum(len(OPTIONS[name]) for name in pair)
]


@pytest.mark.promise("gpu-means-the-same")
@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_pairs_of_options(names):
    options = {option: x for name in names for option, x in OPTIONS[name].items()}
    if "window" in options or "is_causal" in options or "alibi_slopes" in options:
        options.setdefault("query_offset", 20)
    dtype = [np.float16, BFLOAT16, np.float32][PAIRS.index(names) % 3]
    arrays = problem(head_dim=24, value_head_dim=20, dtype=dtype, batch=(2,))
    out, lse, launched = attend(TURING, *arrays, **options)
    assert any("simt" in kernel for kernel in launched)
    assert_within_gate((out, lse), *arrays, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wide_dtypes(dtype):
    arrays = problem(dtype=dtype, head_dim=16)
    assert_within_gate(attend(HOPPER, *arrays)[:2], *arrays)


def test_a_float32_query_over_half_precision():
    query, key, value = problem(dtype=np.float32, head_dim=16)
    key, value = key.astype(BFLOAT16), value.astype(BFLOAT16)
    out, lse, _ = attend(HOPPER, query, key, value)
    assert out.dtype == np.float32
    assert_within_gate((out, lse), query, *(x.astype(np.float32) for x in (key, value)))


EXTREMES = [{"scale": 1e-300}, {"scale": 1e300, "softcap": 5.0}]
EXTREMES += [{"softcap": x} for x in (1e-300, 1e-3, 1e4, 1e300)]


@pytest.mark.parametrize("options", EXTREMES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_float32_has_not(form, options):
    arrays = problem(3 if form == "decode" else 17, 9, heads=1)
    out, lse, _ = attend(FORMS[form][0], *arrays, **options)
    assert_right(out, lse, *arrays, **options)


@pytest.mark.parametrize("form", ["mma", "wgmma", "simt"])
def test_numbers_of_the_device_mean_what_those_of_the_host_do(form):
    capability, q_len = FORMS[form]
    arrays = problem(q_len, batch=(2,))
    options = {
        "is_causal": True,
        "query_offset": np.array([20, 5], np.int32),
        "kv_lengths": np.array([33, 12]),
    }
    if form == "simt":
        options["sinks"] = np.array([0.5, 1.0])
    of_host = attend(capability, *arrays, **options)
    of_device = attend(capability, *arrays, everything_on_device=True, **options)
    for a, b in zip(of_host[:2], of_device[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.promise("gpu-numbers-are-clamped")
@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_the_device_are_clamped(form):
    capability, q_len = FORMS[form]
    arrays = problem(q_len, batch=(2,), head_dim=64 if form != "simt" else 16)
    options = {"kv_lengths": np.array([10**12, -7]), "is_causal": True}
    options["query_offset"] = np.array([2**40, 0])
    out, lse, _ = attend(capability, *arrays, everything_on_device=True, **options)
    expected = {"kv_lengths": np.array([40, 0]), "query_offset": 40, "is_causal": True}
    assert_right(out, lse, *arrays, **expected)


def test_more_numbers_than_one_launch_takes():
    arrays = problem(17, 6, batch=(40,), heads=1)
    lengths = np.arange(40) % 7
    out, lse, launched = attend(AMPERE, *arrays, kv_lengths=lengths)
    assert launched[:2] == ["fastattn_write", "fastattn_write"]
    assert_right(out, lse, *arrays, kv_lengths=lengths)


SHAPES = [  # of query, key and value, whose batch axes broadcast
    ((2, 1, 2, 20, 64), (3, 1, 40, 64)),
    ((2, 20, 64), (4, 1, 40, 64)),
    ((1, 2, 2, 20, 64), (3, 1, 1, 40, 64)),
    ((20, 64), (40, 64)),
    ((2, 20, 64), (2, 40, 64)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_batch_axes_broadcast(shapes, capability):
    query, key = (RNG.standard_normal(shape).astype(np.float16) for shape in shapes)
    value = (key + 1).astype(np.float16)
    out, lse, _ = attend(capability, query, key, value, is_causal=True, query_offset=3)
    assert_right(out, lse, query, key, value, is_causal=True, query_offset=3)


def test_dropout_draws_by_the_number_in_the_whole_batch():
    query, key = (RNG.standard_normal(s) for s in ((2, 1, 1, 3, 8), (3, 1, 40, 8)))
    options = {"dropout_p": 0.4, "seed": 2**64 - 1}
    out, lse, launched = attend(TURING, query, key, key, **options)
    assert len(launched) == 2  # the batch axes do not join
    assert_within_gate((out, lse), query, key, key, **options)


def test_small_arrays_are_read_at_every_call():
    class Lengths:  # can be hashed, as tensors can
        def __array__(self, dtype=None, copy=None):
            return np.array(self.values)

    arrays, lengths = problem(3, batch=(2,)), Lengths()
    for lengths.values in ([40, 7], [2, 0]):
        out, lse, _ = attend(TURING, *arrays, kv_lengths=lengths)
        assert_within_gate((out, lse), *arrays, kv_lengths=lengths.values)


@pytest.mark.promise("gpu-bitwise")
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_any_strides_give_the_same_bits(capability):
    query, key, value = problem(batch=(2,))
    expected = attend(capability, query, key, value)
    rows_first = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (query, key, value)]
    views = [x.transpose(0, 2, 1, 3) for x in rows_first]
    odd = np.zeros((*key.shape[:-1], 67), key.dtype)  # rows at addresses that are not aligned
    odd[..., 1:65] = key
    columns_first = np.ascontiguousarray(value.swapaxes(-1, -2)).swapaxes(-1, -2)
    for arrays in (views, (query, odd[..., 1:65], value), (query, key, columns_first)):
        out, lse, _ = attend(capability, *arrays)
        np.testing.assert_array_equal(out, expected[0])
        np.testing.assert_array_equal(lse, expected[1])


def test_strides_of_an_axis_of_one_do_not_count():
    query, _, _ = problem()
    odd = RNG.standard_normal((1, 1, 67)).astype(np.float16)
    key = np.ascontiguousarray(odd[..., :64])
    arrays = query, odd[..., :64], key
    out, lse, launched = attend(HOPPER, *arrays)
    assert len(launched) == 1
    assert "wgmma" in launched[0]
    assert_right(out, lse, query, key, key)


@pytest.mark.promise("gpu-masked-pair-contributes-nothing")
@pytest.mark.parametrize("form", ["mma", "wgmma", "decode"])
def test_a_hidden_nan_leaves_rows_as_they_are(form):
    capability, q_len = FORMS[form]
    query, key, value = problem(q_len, batch=(1,))
    options = {"is_causal": True, "query_offset": 10}
    expected, _, _ = attend(capability, query, key, value, **options)
    key[..., 12, :] = np.nan
    value[..., 25:, :] = np.inf
    out, lse, launched = attend(capability, query, key, value, **options)
    assert "simt" in launched[-1]
    sees = np.arange(q_len) + 10 >= 12
    np.testing.assert_allclose(
        out[..., ~sees, :].astype(float), expected[..., ~sees, :].astype(float), atol=2e-3
    )
    assert np.isnan(out[..., sees, :].astype(float)).all()
    assert np.isfinite(lse[..., ~sees]).all()


def test_without_hidden_keys_there_is_no_repair():
    query, key, value = problem()
    value[..., 3, 5] = np.nan
    out, _, launched = attend(AMPERE, query, key, value)
    assert len(launched) == 1
    assert np.isnan(out[..., 5].astype(float)).all()
    assert np.isfinite(np.delete(out.astype(float), 5, axis=-1)).all()


@pytest.mark.parametrize("shape", [(2, 0, 64), (0, 20, 64)])
def test_empty_results(shape):
    query = np.zeros(shape, np.float16)
    key = np.zeros((shape[0], 40, 64), np.float16)
    out, lse, launched = attend(AMPERE, query, key, key)
    assert out.shape == shape
    assert lse.shape == shape[:-1]
    assert launched == []


@pytest.mark.promise("gpu-empty-row-is-zero")
@pytest.mark.parametrize("form", FORMS)
def test_no_keys(form):
    capability, q_len = FORMS[form]
    query, key, value = problem(q_len, 0, head_dim=64)
    out, lse, _ = attend(capability, query, key, value)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("columns", [64, 65])
def test_out_is_written_and_returned(columns):
    query, key, value = problem(batch=(1,))
    room = np.full((1, 2, 20, columns), np.nan, np.float16)  # with 65, its rows are not aligned
    with fake_device(AMPERE) as device:
        given = device.array(room[..., :64])
        arrays = [device.array(x) for x in (query, key, value)]
        out, lse = cuda.attention(*arrays, out=given, return_lse=True)
        assert out is given
        assert_right(room[..., :64], device.values(lse), query, key, value)
    assert np.isnan(room[..., 64:].astype(float)).all()


AGAIN = [
    ({}, {}),
    ({"is_causal": True, "query_offset": 5}, {}),
    ({"window": (9, None), "query_offset": 20}, {}),
    ({"kv_lengths": 30}, {}),
    ({"softcap": 3.0, "scale": 0.2}, {}),
    ({}, {"batch": (2, 1)}),
]


@pytest.mark.parametrize(("options", "sizes"), AGAIN, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_call_again_with_other_arrays(form, options, sizes):
    capability, q_len = FORMS[form]
    first = problem(q_len, **({"batch": (2,)} | sizes), seed=1)
    query, key, value = problem(q_len, **({"batch": (2,)} | sizes), seed=2)
    if sizes:  # batch axes that do not join: two launches
        key, value = (np.concatenate([x[:1]] * 3, axis=1) for x in (key, value))
        first = [first[0], key + 1, value + 1]
    alone = attend(capability, query, key, value, **options)
    with fake_device(capability) as device:
        cuda.attention(*map(device.array, first), **options, return_lse=True)
        once = list(device.launched)
        arrays = [device.array(x) for x in (query, key, value)]
        out, lse = cuda.attention(*arrays, **options, return_lse=True)
        assert device.launched == once * 2
        assert len(_recipe.tapes) == 1
        np.testing.assert_array_equal(device.values(out), alone[0])
        np.testing.assert_array_equal(device.values(lse), alone[1])
        assert not isinstance(cuda.attention(*arrays, **options), tuple)


def test_a_call_with_another_layout_is_no_repetition():
    arrays = problem(3, batch=(2,))
    rows_first = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in arrays]
    views = [x.transpose(0, 2, 1, 3) for x in rows_first]
    with fake_device(AMPERE) as device:
        for given in (arrays, views):
            cuda.attention(*map(device.array, given))
            cuda.attention(*map(device.array, given), is_causal=True, query_offset=1)
        assert len(_recipe.tapes) == 4
        with pytest.raises(TypeError, match="query_offset must be an array of integers"):
            cuda.attention(*map(device.array, arrays), is_causal=True, query_offset=True)
        cuda.attention(*map(device.array, arrays), window=(1, 1), query_offset=0, sinks=[0.0, 0.0])
        cuda.attention(*map(device.array, arrays), window=(1, 1), query_offset=0)
        for more in ({}, {"sinks": [0.0, 0.0]}, {"seed": 1}):
            with pytest.raises(TypeError, match="window must be a pair"):
                cuda.attention(*map(device.array, arrays), window=(1, True), query_offset=0, **more)
        with pytest.raises(TypeError, match="is_causal must be a bool, not int"):
            cuda.attention(*map(device.array, arrays), is_causal=1, query_offset=1)


def test_what_is_remembered_keeps_no_array():
    with fake_device(AMPERE) as device:
        arrays = [device.array(x) for x in problem(3)]
        kept = [weakref.ref(x) for x in arrays]
        out = weakref.ref(cuda.attention(*arrays))
        del arrays
        gc.collect()
        assert [x() for x in (*kept, out)] == [None] * 4


def test_few_layouts_are_remembered(monkeypatch):
    monkeypatch.setattr(_recipe, "MOST", 3)
    with fake_device(TURING) as device:
        for kv_len in range(1, 9):
            cuda.attention(*map(device.array, problem(1, kv_len, 8, heads=1)))
            assert 0 < len(_recipe.tapes) <= 3


def test_explain():
    query, key, value = problem(batch=(1,))
    with fake_device(HOPPER) as device:
        arrays = [device.array(x) for x in (query, key, value)]
        report = fastattn.explain(*arrays)
        with_sinks = cuda.explain(*arrays, sinks=[0.0, 1.0])
        with pytest.raises(TypeError, match="unexpected keyword argument 'threads'"):
            fastattn.explain(*arrays, threads=2)
        assert device.launched == []
    assert report["kernel"] == "wgmma"
    assert report["reason"] == "Hopper's tensor cores take this call"
    assert "an emulator" in str(report)
    assert with_sinks["kernel"] == "simt"
    assert with_sinks["reason"] == "sinks given: only simt knows such arguments"


ERRORS = {
    "heads": ({"key": np.zeros((3, 40, 64), np.float16)}, {}, ValueError, "q_heads must be a multiple of kv_heads, got q_heads=2, kv_heads=3"),
    "dtypes": ({"key": np.zeros((1, 40, 64), np.float32)}, {}, TypeError, "key must have the dtype of query, float16, not float32"),
    "integers": ({"query": np.zeros((2, 20, 64), np.int32)}, {}, TypeError, "query must be an array of float16, bfloat16, float32 or float64, not int32"),
    "scale": ({}, {"scale": np.inf}, ValueError, "scale must be finite, got scale=inf"),
    "softcap": ({}, {"softcap": -1.0}, ValueError, "softcap must be > 0"),
    "query_offset": ({}, {"is_causal": True}, ValueError, "query_offset must be given with is_causal if q_len differs from kv_len"),
    "lengths of the host": ({}, {"kv_lengths": 41}, ValueError, "kv_lengths must be within 0..kv_len = 0..40, got 41"),
    "sinks of the host": ({}, {"sinks": [np.nan, 0.0]}, ValueError, "sinks must be finite or -inf, got nan"),
    "head_dim": (
        {"value": np.broadcast_to(np.float16(0), (1, 40, 2**16 + 1))},
        {},
        ValueError,
        "value must have a head_dim of at most 2**16 on a GPU, got value.shape=(1, 40, 65537)",
    ),
    "seed": ({}, {"dropout_p": 0.1}, ValueError, "seed must be given with dropout_p > 0"),
    "is_causal": ({}, {"is_causal": 1}, TypeError, "is_causal must be a bool, not int"),
    "stream": ({}, {"stream": 1.5}, TypeError, "stream must be an int, not float"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    arrays, options, kind, text = ERRORS[name]
    given = dict(zip(("query", "key", "value"), problem(), strict=True)) | arrays
    with fake_device(AMPERE) as device:
        placed = {name: device.array(x) for name, x in given.items()}
        for _ in range(2):  # a refusal is not remembered as anything else
            with pytest.raises(kind) as caught:
                cuda.attention(**placed, **options)
            assert str(caught.value).startswith(text)
        assert device.launched == []


def test_without_numba(monkeypatch):
    with fake_device(AMPERE) as device:
        arrays = [device.array(x) for x in problem()]
        monkeypatch.setitem(sys.modules, "numba.cuda", None)
        with pytest.raises(ImportError, match=r"needs numba-cuda .*pip install \"fastattn\[cuda\]"):
            cuda.attention(*arrays)
        assert cuda.explain(*arrays)["kernel"] == "mma"


@pytest.mark.parametrize("call", [fastattn.attention, fastattn.scaled_dot_product_attention])
def test_arrays_of_both_sides_are_refused(call):
    query, key, value = problem(20, 20, heads=1)
    with fake_device(AMPERE) as device:
        key = device.array(key)
        with pytest.raises(TypeError, match="key must be on the CPU, got FakeArray on a GPU"):
            call(query, key, value)


def test_a_mask_of_the_host_is_refused():
    with fake_device(AMPERE) as device:
        arrays = [device.array(x) for x in problem()]
        with pytest.raises(
            TypeError, match="mask must be on the GPU, got ndarray on another device"
        ):
            cuda.attention(*arrays, mask=np.ones((20, 40), bool))


GRADIENTS = {
    "simt": (TURING, 16, {"bias": pairs(RNG, 2, 1, 40), "sinks": np.array([0.5, -0.5])}),
    "mma": (AMPERE, 64, {}),
    "wgmma": (HOPPER, 64, {}),
}


@pytest.mark.promise("gpu-means-the-same")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", GRADIENTS)
def test_gradients(form, shared, deterministic):
    capability, head_dim, more = GRADIENTS[form]
    query, key, value = problem(20, 40, head_dim, np.float16, batch=(2,))
    if shared:
        key, value = key[:1], value[:1]
    options = {"is_causal": True, "query_offset": 18, "softcap": 8.0, **more}
    want = {"return_dbias": "bias" in more, "return_dsinks": "sinks" in more}
    with fake_device(capability) as device:
        given = {n: device.array(x) if n in more else x for n, x in options.items()}
        arrays = [device.array(x) for x in (query, key, value)]
        out, lse = cuda.attention(*arrays, return_lse=True, **given)
        grad_out = RNG.standard_normal(out.shape).astype(np.float16)
        grad_lse = RNG.standard_normal(lse.shape).astype(np.float32)
        grads = (
            fastattn.attention_backward(
                device.array(grad_out),
                *arrays,
                out,
                lse,
                grad_lse=device.array(grad_lse),
                **want,
                **given,
            )
            if not deterministic
            else cuda.attention_backward(
                device.array(grad_out),
                *arrays,
                out,
                lse,
                grad_lse=device.array(grad_lse),
                deterministic=True,
                **want,
                **given,
            )
        )
        grads = [device.values(grad) for grad in grads]
        assert any(f"{form}" in kernel for kernel in device.launched)
    wide = [x.astype(np.float64) for x in (query, key, value)]
    expected = reference.attention_backward(
        grad_out.astype(np.float64),
        *wide,
        *reference.attention(*wide, return_lse=True, **options),
        grad_lse=grad_lse.astype(np.float64),
        **want,
        **options,
    )
    for got, right, like in zip(grads, expected, (query, key, value, *more.values()), strict=True):
        assert got.shape == like.shape
        assert got.dtype == like.dtype
        assert np.abs(got.astype(float) - right).max() <= 4e-3 * np.abs(right).max()


@pytest.mark.parametrize("shapes", [((3, 64), (2, 1, 5, 64)), ((2, 3, 1, 3, 64), (5, 64))])
def test_gradients_of_an_array_without_an_axis_for_heads(shapes):
    query, key = (RNG.standard_normal(shape).astype(np.float32) for shape in shapes)
    with fake_device(AMPERE) as device:
        arrays = [device.array(x) for x in (query, key, key)]
        out, lse = cuda.attention(*arrays, return_lse=True)
        grads = [device.values(x) for x in cuda.attention_backward(out, *arrays, out, lse)]
    wide = [x.astype(np.float64) for x in (query, key, key)]
    results = reference.attention(*wide, return_lse=True)
    expected = reference.attention_backward(results[0], *wide, *results)
    for got, right in zip(grads, expected, strict=True):
        assert got.shape == right.shape
        assert np.abs(got - right).max() <= 1e-5 * np.abs(right).max()


@pytest.mark.parametrize("kv_len", [0, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_dsinks_have_the_dtype_of_sinks(kv_len, dtype):
    sinks = np.array([0.5, -0.5], dtype)
    query, key, value = problem(3, kv_len)
    with fake_device(AMPERE) as device:
        arrays = [device.array(x) for x in (query, key, value)]
        found = []
        for given in (sinks, device.array(sinks)):
            out, lse = cuda.attention(*arrays, return_lse=True, sinks=given)
            grads = cuda.attention_backward(out, *arrays, out, lse, sinks=given, return_dsinks=True)
            found.append(device.values(grads[3]))
    assert found[0].dtype == dtype
    assert found[0].any() == (kv_len > 0)
    np.testing.assert_array_equal(*found)


def test_gradients_without_pairs_are_zero():
    query, key, value = problem(20, 0)
    with fake_device(AMPERE) as device:
        arrays = [device.array(x) for x in (query, key, value)]
        out, lse = cuda.attention(*arrays, return_lse=True)
        dq, dk, dv = cuda.attention_backward(out, *arrays, out, lse)
        assert (device.values(dq) == 0).all()
        assert dk.shape == key.shape
        assert dv.shape == value.shape


def test_gradients_of_what_was_not_given_are_refused():
    query, key, value = problem()
    with fake_device(AMPERE) as device:
        arrays = [device.array(x) for x in (query, key, value)]
        out, lse = cuda.attention(*arrays, return_lse=True)
        with pytest.raises(ValueError, match="return_dbias needs bias, got bias=None"):
            cuda.attention_backward(out, *arrays, out, lse, return_dbias=True)
        with pytest.raises(TypeError, match="lse must have dtype float32, not float16"):
            cuda.attention_backward(out, *arrays, out, lse=arrays[0])
        with pytest.raises(ValueError, match=r"grad_out must have shape \(2, 20, 64\), got"):
            cuda.attention_backward(arrays[1], *arrays, out, lse)


def test_packed_sequences_have_no_kernel():
    with fake_device(AMPERE) as device:
        arrays = [device.array(x) for x in problem()]
        with pytest.raises(NotImplementedError, match="cu_seqlens_q, cu_seqlens_kv have no kernel"):
            fastattn.attention_backward(*arrays, *arrays, cu_seqlens_q=[0], cu_seqlens_kv=[0])
