# SPDX-License-Identifier: Apache-2.0
"""Arrays of any library that exports by DLPack are read in place, or refused."""
# ruff: noqa: E501 - the tables of errors have a line per error

import ctypes
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import fastattn
from fastattn import _dlpack, reference
from tests.api.arrays import (
    NAMES,
    BeforeVersions,
    Exported,
    InNamespace,
    Unit,
    X,
    converted,
    numpy_of,
    options,
    problem,
    read_only,
    tensor,
    view,
)
from tests.support.correctness import assert_same_bits


class OnDevice(InNamespace):
    device = "accelerator whose memory is the CPU's"

    def __array_namespace__(self, api_version=None):
        return SimpleNamespace(from_dlpack=lambda x: Movable(view(x)))


class Movable(InNamespace):
    def to_device(self, device):
        assert device == OnDevice.device
        return OnDevice(self.array)


class Altered(Exported):
    """What an exporter says of its tensor, with some of it replaced."""

    def __init__(self, array, **fields):
        super().__init__(array)
        self.fields = fields

    def __dlpack__(self, **wanted):
        capsule = super().__dlpack__(**wanted)
        for name, value in self.fields.items():
            if name == "major":
                _dlpack.ManagedVersioned.from_address(
                    _dlpack.pointer_in(capsule, _dlpack.DLTENSOR_VERSIONED)
                ).major = value
            else:
                setattr(_dlpack._contents(capsule)[0], name, value)
        return capsule


class Raises(Exported):
    """An exporter that says no, with what it raises."""

    def __dlpack__(self, **wanted):
        raise self.array


# As the exporter of these tests.
numpy_has_versions = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy exports no versions of DLPack"
)


@pytest.mark.promise("foreign-arrays-are-read-in-place", "answered-in-kind")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [Exported, BeforeVersions, InNamespace])
def test_exported_arrays_are_read_where_they_lie(name, kind, core_addresses):
    arrays = problem(name)
    arrays = [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in arrays]  # of other strides
    expected = fastattn.attention(*arrays, return_lse=True)
    results = fastattn.attention(*map(kind, arrays), return_lse=True)
    answers = tuple(map(numpy_of, results))
    assert {type(x) for x in results} == {InNamespace if kind is InNamespace else np.ndarray}
    assert core_addresses[-4:] == [x.ctypes.data for x in (*arrays, answers[0])]
    assert_same_bits(answers, expected)


@pytest.mark.parametrize("kind", [Exported, BeforeVersions])
def test_all_arguments_may_be_exported(kind):
    arrays, given = problem(), options()
    results = fastattn.attention(*map(kind, arrays), **converted(kind, given))
    assert_same_bits(results, fastattn.attention(*arrays, **given))


def test_bfloat16_of_another_exporter(torch, monkeypatch, core_addresses):
    """By the DLPack of PyTorch, which knows the dtype as NumPy does not."""
    arrays = problem("bfloat16")
    expected = fastattn.attention(*arrays)
    tensors = [tensor(torch, x) for x in arrays]

    class Ours(Exported):
        def __dlpack__(self, **wanted):
            return self.array.__dlpack__(**wanted)

    class OursInNamespace(Ours):
        def __array_namespace__(self):
            return torch

    assert_same_bits(fastattn.attention(*map(Ours, tensors)), expected)
    for module in ("ml_dtypes", "ml_dtypes without"):
        if module != "ml_dtypes":
            monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        result = fastattn.attention(*map(OursInNamespace, tensors))
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, tensor(torch, expected))
        assert core_addresses[-4:] == [x.data_ptr() for x in (*tensors, result)]


def test_results_are_on_the_device_of_query():
    arrays = problem()
    result = fastattn.attention(OnDevice(arrays[0]), *arrays[1:])
    assert type(result) is OnDevice
    assert_same_bits(result.array, fastattn.attention(*arrays))


@pytest.mark.promise("answered-in-kind")
def test_arrays_of_the_array_api():
    strict = pytest.importorskip("array_api_strict", exc_type=ImportError)
    arrays = problem()
    given = [strict.asarray(x, copy=False) for x in arrays]
    results = fastattn.attention(*given, return_lse=True, kv_lengths=strict.asarray([30, 20]))
    assert all(type(x) is type(given[0]) for x in results)
    expected = fastattn.attention(*arrays, return_lse=True, kv_lengths=[30, 20])
    assert_same_bits(tuple(map(np.asarray, results)), expected)
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":  # array-api-strict needs it to move an array
        other = strict.Device("device1")
        result = fastattn.attention(strict.asarray(arrays[0], device=other), *arrays[1:])
        assert result.device == other


def test_memory_that_is_exported_lives_as_long_as_the_view():
    class Held(np.ndarray):
        """An array that can be watched."""

    for kind in (Exported, BeforeVersions):
        memory = np.arange(6.0).view(Held)
        watched = weakref.ref(memory)
        x = _dlpack.array_of(kind(memory))
        assert x.ctypes.data == memory.ctypes.data
        del memory
        assert watched() is not None
        assert x.sum() == 15
        del x
        assert watched() is None


def test_exported_without_strides_and_with_an_offset():
    x = problem()[0]
    expected = fastattn.attention(x, x[:, :2], x[:, :2])
    plain = Altered(x, strides=None)
    assert_same_bits(fastattn.attention(plain, x[:, :2], x[:, :2]), expected)
    moved = Altered(np.concatenate([x[:1] * 7, x]), shape=(ctypes.c_int64 * 4)(*x.shape))
    moved.fields["byte_offset"] = x[:1].nbytes
    assert_same_bits(fastattn.attention(moved, x[:, :2], x[:, :2]), expected)
    strided = Exported(x[::-1, ::-1, ::-2])
    assert_same_bits(
        fastattn.attention(strided, x[:, :2], x[:, :2]),
        fastattn.attention(strided.array, x[:, :2], x[:, :2]),
    )


@numpy_has_versions
def test_exported_memory_that_must_not_be_written_is_read():
    arrays = problem()
    result = fastattn.attention(*(Exported(read_only(x)) for x in arrays))
    assert_same_bits(result, fastattn.attention(*arrays))


def test_an_exporter_that_says_no_may_have_another_way():
    class HasArray(Raises):
        def __array__(self, dtype=None, copy=None):
            return X

    result = fastattn.attention(HasArray(BufferError("bit-packed")), X, X)
    assert_same_bits(result, fastattn.attention(X, X, X))


READ = "key must be an array that NumPy can read, got "


class Elsewhere(Exported):
    def __dlpack_device__(self):
        return 8, 0


class OnGPU(Exported):
    def __dlpack_device__(self):
        return _dlpack.CUDA, 0


class NoCapsule(Exported):
    def __dlpack__(self, **wanted):
        return self.array


class Used(Exported):
    def __dlpack__(self, **wanted):
        capsule = self.array.__dlpack__(**wanted)
        np.from_dlpack(NoCapsule(capsule))
        return capsule


EXPORTERS = [
    (Raises(BufferError("no")), READ + "Raises: no"),
    (Raises(TypeError("never")), READ + "Raises: never"),
    (Raises(KeyError("lost")), READ + "Raises: 'lost'"),
    (BeforeVersions(read_only(X)), None),
    (Elsewhere(X), "key must be on the CPU, got Elsewhere on device 8 of DLPack"),
    (OnGPU(X), "key must be on the CPU, got OnGPU on a GPU"),
    (Altered(X, device_type=2), READ + "Altered: its memory is on DLPack's device 2"),
    (NoCapsule(7), READ + "NoCapsule: __dlpack__ must return a capsule named dltensor"),
    (Used(X), READ + "Used: __dlpack__ must return a capsule named dltensor"),
    (Altered(X, major=2), READ + "Altered: version 2 of DLPack is not understood, only 1"),
    (Altered(X, lanes=2), READ + "Altered: NumPy has no dtype for float32 in 2 lanes"),
    (Altered(X, code=10, bits=8), READ + "Altered: NumPy has no dtype for DLPack code 10, 8"),
    (Altered(X, bits=4), READ + "Altered: NumPy has no dtype for float4"),
    (Altered(X, shape=None), READ + "Altered: it has no shape of 4 axes"),
    (Altered(X, ndim=-1), READ + "Altered: it has no shape of -1 axes"),
    (Exported(X.astype(np.int32)), None),
    (Exported(X[..., :3]), "key has head_dim 3 but query has head_dim 4 (key.shape=(1, 2, 3, 3), "
                           "query.shape=(1, 2, 3, 4))"),
]  # fmt: skip


@pytest.mark.promise("error-says-which-rule-and-what")
@numpy_has_versions
@pytest.mark.parametrize("number", range(len(EXPORTERS)))
def test_exporters_that_cannot_be_read(number):
    x, message = EXPORTERS[number]
    if isinstance(x, BeforeVersions):
        with pytest.raises(BufferError) as reason:
            x.array.__dlpack__()
        message = READ + f"BeforeVersions: {reason.value}"
    elif message is None:
        message = "key must be an array of float16, bfloat16, float32 or float64, not int32"
    with pytest.raises((TypeError, ValueError)) as error:
        fastattn.attention(X, x, X)
    assert str(error.value) == message


class NoDevice(Altered):
    def __dlpack_device__(self):
        raise RuntimeError("which?")


def test_an_exporter_that_does_not_say_where_it_is():
    assert_same_bits(fastattn.attention(NoDevice(X), X, X), fastattn.attention(X, X, X))
    with pytest.raises(TypeError, match="DLPack's device 2"):
        fastattn.attention(NoDevice(X, device_type=2), X, X)


@numpy_has_versions
def test_out_may_be_exported():
    arrays = [Exported(x) for x in problem()]
    expected = fastattn.attention(*problem(), return_lse=True)
    out = Exported(np.full((2, 21, 4, 16), 7, np.float32).swapaxes(1, 2))
    result, lse = fastattn.attention(*arrays, out=out, return_lse=True)
    assert result is out
    assert_same_bits((out.array, lse), expected)
    space = np.empty_like(expected[0])
    assert fastattn.attention(*arrays, out=space) is space
    assert_same_bits(space, expected[0])
    definition = reference.attention(*arrays, out=out)
    assert definition is out
    assert_same_bits(out.array, reference.attention(*problem()))
    cache = fastattn.KVCache(2, 2, 16)
    cache.append(*arrays[1:])
    expected = cache.attend(problem()[0])
    assert cache.attend(arrays[0], out=out) is out
    assert_same_bits(out.array, expected)


class Copies(Exported):
    def __dlpack__(self, *, copy=None, **wanted):
        if copy is False:
            raise BufferError("only copies")
        return self.array.copy().__dlpack__(**wanted)


class FlagOnly(Exported):
    """An exporter of before versions that takes all arguments."""

    def __dlpack__(self, **wanted):
        return self.array.__dlpack__()


@pytest.mark.promise("errors-come-before-writing", "error-says-which-rule-and-what")
@numpy_has_versions
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (lambda x: Exported(read_only(x)), ValueError, "out must be writeable, got a read-only array"),
        (FlagOnly, ValueError, "out must be writeable, got a read-only array"),
        (BeforeVersions, TypeError, "out must be an array that NumPy can write, got BeforeVersions: BeforeVersions.__dlpack__() got an unexpected keyword argument 'max_version'"),
        (Copies, TypeError, "out must be an array that NumPy can write, got Copies: only copies"),
        (list, TypeError, "out must be a NumPy array, not list"),
        (lambda x: Exported(x[:, :1]), ValueError, "out must have the shape of the result, (1, 2, 3, 4), got out.shape=(1, 1, 3, 4)"),
        (lambda x: np.ma.array(x), TypeError, "out must be a NumPy array, not MaskedArray"),
        (lambda x: x.view(Unit), TypeError, "out must be a NumPy array, not Unit"),
    ],
)  # fmt: skip
def test_out_that_cannot_be_written(kind, error, message):
    query, out = Exported(X), np.full_like(X, 7)
    with pytest.raises(error) as raised:
        fastattn.attention(query, X, X, out=kind(out))
    assert str(raised.value) == message
    assert (out == 7).all()


@pytest.mark.promise("out-overlaps-no-input")
@numpy_has_versions
def test_out_must_not_overlap_an_exported_input():
    query = X.copy()
    with pytest.raises(ValueError, match="out must not overlap an input"):
        fastattn.attention(Exported(query), X, X, out=Exported(query))
    with pytest.raises(TypeError, match=r"^out must be a NumPy array, not Exported$"):
        fastattn.attention(query, X, X, out=Exported(X.copy()))


@pytest.mark.promise("answered-in-kind")
@pytest.mark.parametrize("kind", [Exported, BeforeVersions, InNamespace])
def test_every_call_takes_exported_arrays(kind):
    """What each call gives is that for NumPy arrays; exporters have no library to be given to."""
    query, key, value = arrays = problem()
    given = options()
    out, lse = fastattn.attention(*arrays, **given, return_lse=True)
    backward = {"grad_out": out, "query": query, "key": key, "value": value, "out": out, "lse": lse}
    backward |= given | {"grad_lse": lse, "return_dbias": True, "return_dsinks": True}
    plain = {"query": query, "key": key, "value": value}
    pairs = {"query": query, "key": key} | given
    statistics = pairs | {"entropy": True, "column_sums": True, "row_weights": np.ones(1), "top": 3}
    statistics |= {"blocks": (np.array([0, 2]), np.array([0, 9])), "maximum": True}
    packed = {name: x[0].swapaxes(0, 1) for name, x in plain.items()}
    starts = {"cu_seqlens_q": np.array([0, 9, 21]), "cu_seqlens_kv": np.array([0, 15, 37])}
    lengths = {"kv_lengths": np.array([15, 22]), "query_offset": np.array([6, 1])}
    packed |= starts | lengths | {"is_causal": True, "return_lse": True}
    torch_options = {"attn_mask": given["mask"], "enable_gqa": True}
    drop = {"query": query, "key": key, "query_offset": np.array([1, 2]), "seed": 3}
    calls = [
        (fastattn.attention_backward, backward),
        (fastattn.attention_weights, pairs),
        (fastattn.attention_statistics, statistics),
        (fastattn.varlen_attention, packed),
        (fastattn.dropout_mask, drop | {"dropout_p": 0.5}),
        (fastattn.explain, plain | given),
        (fastattn.scaled_dot_product_attention, plain | torch_options),
        (reference.attention, plain | given | {"return_lse": True}),
        (reference.varlen_attention, packed),
        (reference.attention_backward, backward),
        (reference.attention_weights, pairs),
        (reference.attention_statistics, statistics),
        (reference.dropout_mask, drop | {"dropout_p": 0.5}),
    ]  # fmt: skip
    for call, arguments in calls:
        expected = call(**arguments)
        results = call(**converted(kind, arguments))
        if isinstance(expected, dict):
            assert results == expected
            continue
        answered = kind is InNamespace and call.__module__ != reference.__name__
        several = results if isinstance(results, tuple) else (results,)
        assert {type(x) for x in several} == {InNamespace if answered else np.ndarray}
        expected = expected if isinstance(expected, tuple) else (expected,)
        for x, y in zip(map(numpy_of, several), expected, strict=True):
            assert_same_bits(x, y)
