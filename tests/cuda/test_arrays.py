# SPDX-License-Identifier: Apache-2.0
"""Which arrays are on a GPU, and what their interface or DLPack says of them."""
# ruff: noqa: E501 - the tables have a line per case

import ctypes
import weakref

import ml_dtypes
import numpy as np
import pytest

from fastattn import _dlpack
from fastattn.cuda import _arrays
from fastattn.cuda._arrays import DeviceArray
from tests.cuda.arrays import (
    FLOATS,
    STREAM,
    Capsules,
    attribute,
    interface,
    needs_versions,
    pointer_of,
    query_on,
    tensor,
)

# Is it on a GPU?


def test_what_is_on_a_gpu(gpu, torch):
    with torch.device("meta"):
        meta = torch.empty(2)
    for x in (3, [1.0], "text", None, np.zeros(3), np.float32(1), torch.zeros(3), meta):
        assert _arrays.library_of(x).on_gpu is False, x
    assert _arrays.library_of(tensor(torch, (2,))).on_gpu
    assert _arrays.library_of(interface(gpu)).on_gpu
    for device, expected in (((2, 1), True), ((13, 0), True), ((1, 0), False), ((3, 0), False)):
        assert _arrays.library_of(Capsules(np.zeros(2), device)).on_gpu is expected


def test_what_raises_when_asked_is_not_asked_more_than_once(gpu):
    class Odd:
        @property
        def __cuda_array_interface__(self):
            raise AttributeError("only sometimes")

    assert _arrays.library_of(Odd()).on_gpu is False
    with pytest.raises(TypeError, match=r"^key must be an array on the GPU, not Odd$"):
        _arrays.device_array("key", Odd(), STREAM)


# __cuda_array_interface__.


@pytest.mark.parametrize(
    ("typestr", "dtype"),
    [("<f2", "float16"), ("<f4", "float32"), ("<f8", "float64"), ("|b1", "bool"), ("<i8", "int64")],
)
def test_an_interface_says_where_an_array_lies(gpu, typestr, dtype):
    x = interface(gpu, (2, 0, 5), typestr, device=1)
    array = _arrays.device_array("key", x, STREAM, dtypes=("bool", "int64", *FLOATS))
    assert array == DeviceArray(pointer_of(x), (2, 0, 5), (0, 5, 1), dtype, 1, x, "other", True)


def test_strides_in_bytes_become_strides_in_elements(gpu):
    x = interface(gpu, (2, 3), "<f2", strides=(48, -2))
    assert _arrays.device_array("key", x, STREAM).strides == (24, -1)
    x = interface(gpu, (2, 3), "<f4", strides=(6, 4))
    with pytest.raises(ValueError, match=r"^key must have") as error:
        _arrays.device_array("key", x, STREAM)
    assert str(error.value) == (
        "key must have strides of whole elements of 4 bytes, got (6, 4) bytes"
    )


def test_contiguous_strides():
    for shape in ((), (5,), (2, 3), (4, 1, 7, 2)):
        expected = tuple(stride // 4 for stride in np.zeros(shape, np.float32).strides)
        assert _arrays.contiguous_strides(shape) == expected


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        ({"mask": object()}, TypeError, "value must not be a masked array"),
        ({"stream": 0}, ValueError, "value.__cuda_array_interface__ has stream 0, which is ambiguous: 1 is the legacy default stream, 2 the per-thread one"),
        ({"typestr": ">f4"}, TypeError, "value must be an array of float16, bfloat16, float32 or float64, not float32 in another byte order"),
        ({"typestr": "<c8"}, TypeError, "value must be an array of float16, bfloat16, float32 or float64, not complex64"),
        ({"typestr": "|V2"}, TypeError, "value must be an array of float16, bfloat16, float32 or float64, not void16"),
    ],
)  # fmt: skip
def test_interfaces_that_are_refused(gpu, entries, kind, message):
    with pytest.raises(kind) as error:
        _arrays.device_array("value", interface(gpu, **entries), STREAM)
    assert str(error.value) == message


def test_one_dtype_is_named_alone(gpu):
    with pytest.raises(TypeError, match=r"^lse must be an array of float32, not float64$"):
        _arrays.device_array("lse", interface(gpu, typestr="<f8"), STREAM, dtypes=("float32",))


def test_a_misaligned_address(gpu):
    x = interface(gpu, typestr="<f4", offset=2)
    with pytest.raises(ValueError, match=r"^query must be aligned") as error:
        _arrays.device_array("query", x, STREAM)
    assert str(error.value) == (
        f"query must be aligned to its dtype, float32, got address {pointer_of(x):#x}"
    )
    assert _arrays.device_array("query", interface(gpu, typestr="<f2", offset=2), STREAM)


def test_an_address_that_is_not_the_gpus(gpu):
    gpu.fails["cuPointerGetAttribute"] = "CUDA_ERROR_INVALID_VALUE"
    x = interface(gpu)
    with pytest.raises(TypeError, match=r"^key must be on the GPU") as error:
        _arrays.device_array("key", x, STREAM)
    assert str(error.value) == (
        f"key must be on the GPU, got address {pointer_of(x):#x}, unknown to CUDA"
    )


def test_an_array_on_another_gpu_than_query(gpu):
    x = interface(gpu, device=1)
    with pytest.raises(ValueError, match=r"^key must be on the GPU of query, cuda:0, not cuda:1$"):
        _arrays.device_array("key", x, STREAM, query_on(0))
    assert _arrays.device_array("key", x, STREAM, query_on(1)).device == 1


def test_an_empty_array_is_on_any_gpu(gpu):
    """Its address is none."""
    for data in ((0, False), (None, False)):
        x = interface(gpu, (0, 3), data=data)
        assert _arrays.device_array("key", x, STREAM, query_on(1)).device == 1
        assert _arrays.device_array("key", x, STREAM)[:2] == (0, (0, 3))


def test_our_stream_waits_for_the_one_that_an_array_is_written_on(gpu):
    _arrays.device_array("key", interface(gpu, device=1, stream=5), STREAM)
    assert [x[1] for x in gpu.of("cuEventRecord")] == [5]
    assert [x[0] for x in gpu.of("cuStreamWaitEvent")] == [STREAM]
    assert gpu.of("cuCtxPushCurrent") == [(501,)]
    for stream in (STREAM, None):
        _arrays.device_array("key", interface(gpu, stream=stream), STREAM)
    _arrays.device_array("key", interface(gpu, stream=1), 0)
    assert len(gpu.of("cuEventRecord")) == 1
    _arrays.device_array("key", interface(gpu, stream=2), 0)
    assert gpu.of("cuStreamWaitEvent")[-1][0] == 0


def test_bfloat16_is_named_by_the_array_or_by_dlpack(gpu):
    x = interface(gpu, typestr="|V2")
    type(x).dtype = np.dtype(ml_dtypes.bfloat16)
    assert _arrays.device_array("key", x, STREAM).dtype == "bfloat16"
    y = interface(gpu, typestr="|V2")
    halves = np.zeros((2, 3), np.float16)
    capsules = Capsules(halves)
    type(y).__dlpack__ = lambda _, **given: capsules.__dlpack__(**given)
    type(y).__dlpack_device__ = lambda _: (2, 0)
    array = _arrays.device_array("key", y, STREAM)
    assert (array.pointer, array.dtype) == (halves.ctypes.data, "float16")


# DLPack.


@pytest.mark.parametrize("versions", [pytest.param(True, marks=needs_versions), False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "uint8", "bool"])
def test_dlpack_says_where_an_array_lies(gpu, dtype, versions):
    numbers = np.zeros((4, 6, 5), dtype)[::2, 1:, ::-1]
    x = Capsules(numbers, versions=versions)
    array = _arrays.device_array("key", x, STREAM, dtypes=("int32", "uint8", "bool", *FLOATS))
    expected = tuple(stride // numbers.itemsize for stride in numbers.strides)
    assert array[:4] == (numbers.ctypes.data, numbers.shape, expected, dtype)
    assert (array.device, array.library) == (0, "other")
    assert x.asked[-1] == (STREAM, (1, 0) if versions else None)


def test_dlpack_of_torch_has_bfloat16(gpu, torch):
    numbers = torch.zeros((3, 4), dtype=torch.bfloat16)
    array = _arrays.device_array("key", Capsules(Wrapped(numbers)), STREAM)
    assert array[:4] == (numbers.data_ptr(), (3, 4), (4, 1), "bfloat16")


class Wrapped:
    """A tensor whose capsule is asked for as NumPy's are."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **given):
        return self.tensor.__dlpack__(**given)


def test_the_default_stream_has_another_name_in_dlpack(gpu):
    x = Capsules(np.zeros(3, np.float32))
    _arrays.device_array("key", x, 0)
    assert {stream for stream, _ in x.asked} == {1}


@pytest.mark.parametrize("versions", [True, False])
def test_memory_of_dlpack_lives_as_long_as_the_array(gpu, versions):
    class Numbers(np.ndarray):
        pass

    numbers = np.zeros(3, np.float32).view(Numbers)
    alive = weakref.ref(numbers)
    array = _arrays.device_array("key", Capsules(numbers, versions=versions), STREAM)
    del numbers
    assert alive() is not None
    del array
    assert alive() is None


@needs_versions
def test_dlpack_of_what_must_not_be_written(gpu):
    numbers = np.zeros(3, np.float32)
    assert _arrays.device_array("key", Capsules(numbers), STREAM).writeable
    numbers.flags.writeable = False
    assert not _arrays.device_array("key", Capsules(numbers), STREAM).writeable


def managed(gpu, *, name=b"dltensor", version=None, strides=(3, 1), **fields):
    """Return an object whose capsule has these fields, and what it refers to."""
    shape = (ctypes.c_int64 * 2)(2, 3)
    given = (ctypes.c_int64 * 2)(*strides) if strides else None
    known = {"code": 2, "bits": 32, "lanes": 1, "byte_offset": 0} | fields
    tensor = _dlpack.Tensor(data=gpu.array(64), device_type=2, ndim=2, shape=shape, **known)
    if given:
        tensor.strides = given
    if version is None:
        whole = _dlpack.Managed(tensor=tensor)
    else:
        whole = _dlpack.ManagedVersioned(tensor=tensor, major=version)
    capsule = _arrays._new_capsule(ctypes.addressof(whole), name, None)
    kept = (shape, given, whole, name)
    methods = {"__dlpack_device__": lambda _: (2, 0), "__dlpack__": lambda _, **__: capsule}
    return attribute(**methods), kept


def test_dlpack_without_strides_and_with_an_offset(gpu):
    x, kept = managed(gpu, strides=None, byte_offset=8)
    array = _arrays.device_array("key", x, STREAM)
    assert array.strides == (3, 1)
    assert array.pointer == kept[2].tensor.data + 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lanes": 2}, "float16, bfloat16, float32 or float64, not float32 in 2 lanes"),
        ({"code": 9, "bits": 8}, "float16, bfloat16, float32 or float64, not DLPack code 9, 8"),
        ({"code": 5, "bits": 64}, "float16, bfloat16, float32 or float64, not complex64"),
    ],
)
def test_dlpack_of_other_dtypes(gpu, fields, message):
    x, _kept = managed(gpu, **fields)
    with pytest.raises(TypeError) as error:
        _arrays.device_array("key", x, STREAM)
    assert str(error.value) == f"key must be an array of {message}"


def test_capsules_that_are_not_understood(gpu):
    x, _kept = managed(gpu, name=b"used_dltensor")
    with pytest.raises(TypeError) as error:
        _arrays.device_array("key", x, STREAM)
    assert str(error.value) == "key.__dlpack__() must return a capsule named dltensor"
    x, _kept = managed(gpu, name=b"dltensor_versioned", version=2)
    with pytest.raises(TypeError) as error:
        _arrays.device_array("key", x, STREAM)
    assert str(error.value) == "key has version 2 of DLPack, 1 is understood"


def test_dlpack_of_other_devices(gpu):
    with pytest.raises(TypeError) as error:
        _arrays.device_array("key", Capsules(np.zeros(3), (1, 0)), STREAM)
    assert str(error.value) == "key must be on the GPU, got Capsules on another device"
    with pytest.raises(TypeError, match=r"^key must be on the GPU, got ndarray on another device$"):
        _arrays.device_array("key", np.zeros(3), STREAM)
    with pytest.raises(TypeError, match=r"^key must be an array on the GPU, not list$"):
        _arrays.device_array("key", [1.0], STREAM)
