# SPDX-License-Identifier: Apache-2.0
"""What of arrays on a GPU? Each library's are understood, with a fake driver over host memory."""

import contextlib
import ctypes
import sys
import weakref
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from child import start
from cuda_fake import Gpu, fake_driver

from fastattn import _dlpack
from fastattn.cuda import _arrays, _driver
from fastattn.cuda._arrays import DeviceArray, OwnArray

INTERFACE = "__cuda_array_interface__"
FLOATS = ("float16", "bfloat16", "float32", "float64")
STREAM = 77


@pytest.fixture
def gpu(monkeypatch):
    with fake_driver(monkeypatch) as fake:
        yield fake


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", exc_type=ImportError)


def attribute(**attributes):
    return type("Thing", (), attributes)()


def interface(gpu, shape=(2, 3), typestr="<f4", device=0, offset=0, read_only=False, **entries):
    """Return an array of some library that has an interface and nothing else."""
    known = {"shape": shape, "typestr": typestr, "read_only": read_only}
    return interface_at(gpu.array(4096, device, offset), **known | entries)


def interface_at(address, shape=(2, 3), typestr="<f4", read_only=False, **entries):
    known = {"shape": shape, "typestr": typestr, "data": (address, read_only), "version": 3}
    return attribute(**{INTERFACE: known | entries})


def pointer_of(x):
    return getattr(x, INTERFACE)["data"][0]


class Capsules:
    """An array with DLPack alone: NumPy's capsules, said to be of a GPU."""

    def __init__(self, array, device=(2, 0), versions=True):
        self.array, self.device, self.versions, self.asked = array, device, versions, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream, **given):
        self.asked.append((stream, given.get("max_version")))
        if given and not self.versions:
            raise TypeError("unexpected keyword max_version")
        return self.array.__dlpack__(**given)


def query_on(device=0, library="other", owner=None):
    return DeviceArray(4096, (2, 3), (3, 1), "float32", device, owner, library)


# Is it on a GPU?


def test_what_is_on_a_gpu(gpu, torch):
    with torch.device("meta"):
        meta = torch.empty(2)
    for x in (3, [1.0], "text", None, np.zeros(3), np.float32(1), torch.zeros(3), meta):
        assert _arrays.is_cuda_array(x) is False, x
    assert _arrays.is_cuda_array(tensor(torch, (2,)))
    assert _arrays.is_cuda_array(interface(gpu))
    for device, expected in (((2, 1), True), ((13, 0), True), ((1, 0), False), ((3, 0), False)):
        assert _arrays.is_cuda_array(Capsules(np.zeros(2), device)) is expected


def test_what_raises_when_asked_is_not_asked_more_than_once(gpu):
    class Odd:
        @property
        def __cuda_array_interface__(self):
            raise AttributeError("only sometimes")

    assert _arrays.is_cuda_array(Odd()) is False
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
        (
            {"stream": 0},
            ValueError,
            "value.__cuda_array_interface__ has stream 0, which is ambiguous: 1 is the legacy "
            "default stream, 2 the per-thread one",
        ),
        (
            {"typestr": ">f4"},
            TypeError,
            "value must be an array of float16, bfloat16, float32 or float64, not float32 in "
            "another byte order",
        ),
        (
            {"typestr": "<c8"},
            TypeError,
            "value must be an array of float16, bfloat16, float32 or float64, not complex64",
        ),
        (
            {"typestr": "|V2"},
            TypeError,
            "value must be an array of float16, bfloat16, float32 or float64, not void16",
        ),
    ],
)
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


@pytest.mark.parametrize("versions", [True, False])
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
    assert [stream for stream, _ in x.asked] == [1]


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


# PyTorch.


def tensor(torch, shape=(2, 3), dtype=None, *, strides=None, device="cuda:0", **attributes):
    """Return a tensor that says that it is on a GPU, at an address of the test's."""
    known = {
        "__torch_function__": torch._C._disabled_torch_function_impl,
        "data_ptr": lambda self: attributes.get("address", 4096),
        "__torch_dispatch__": classmethod(lambda *_, **__: NotImplemented),
    }
    requires_grad = attributes.pop("requires_grad", False)
    kind = type("CudaTensor", (torch.Tensor,), known | attributes)
    dtype = torch.float32 if dtype is None else dtype
    return torch.Tensor._make_wrapper_subclass(
        kind, shape, strides=strides, dtype=dtype, device=device, requires_grad=requires_grad
    )


@pytest.mark.promise("gpu-answered-in-kind")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_tensor_says_where_it_lies(gpu, torch, dtype):
    x = tensor(torch, (2, 3, 4), getattr(torch, dtype), strides=(100, 0, 1), device="cuda:1")
    array = _arrays.device_array("query", x, STREAM)
    assert array[:5] == (4096, (2, 3, 4), (100, 0, 1), dtype, 1)
    assert array.owner is x
    assert (array.library, array.writeable) == ("torch", True)
    assert gpu.calls == []


@pytest.mark.parametrize(
    ("attributes", "kind", "message"),
    [
        (
            {"requires_grad": True},
            TypeError,
            "key requires grad, and this call has no gradient: use fastattn.torch.attention, or "
            "pass key.detach()",
        ),
        ({"is_nested": True}, TypeError, "key must be a dense tensor, not a nested one"),
        (
            {"is_quantized": True},
            TypeError,
            "key must not be quantised, got a tensor of torch.float32: key.dequantize()",
        ),
        (
            {"device": "meta"},
            TypeError,
            "key must hold numbers, got a tensor on the device meta",
        ),
        (
            {"device": "cpu"},
            TypeError,
            "key must be on the GPU, got a tensor on cpu: key.to(query.device)",
        ),
        (
            {"address": 0},
            TypeError,
            "key must be a tensor with memory of its own, got torch.float32 in a CudaTensor",
        ),
        (
            {"address": 4098},
            ValueError,
            "key must be aligned to its dtype, float32, got address 0x1002",
        ),
    ],
)
def test_tensors_that_are_refused(gpu, torch, attributes, kind, message):
    with pytest.raises(kind) as error:
        _arrays.device_array("key", tensor(torch, **attributes), STREAM)
    assert str(error.value) == message


def test_sparse_tensors_are_refused(gpu, torch):
    x = tensor(torch, layout=torch.sparse_csr)
    with pytest.raises(TypeError) as error:
        _arrays.device_array("key", x, STREAM)
    assert str(error.value) == (
        "key must be a dense tensor, got one of layout torch.sparse_csr: key.to_dense()"
    )


def test_complex_tensors_are_refused(gpu, torch):
    with pytest.raises(TypeError, match=r"float64, not complex64$"):
        _arrays.device_array("key", tensor(torch, dtype=torch.complex64), STREAM)


def test_faked_tensors_are_refused(gpu, torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty((2, 3), device="cuda")
    assert _arrays.is_cuda_array(x)
    with pytest.raises(TypeError, match=r"memory of its own, got torch\.float32 in a FakeTensor$"):
        _arrays.device_array("key", x, STREAM)


def test_wrapped_tensors_are_refused(gpu, torch):
    def nowhere(_):
        raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")

    with pytest.raises(TypeError, match=r"memory of its own, got torch\.float32 in a CudaTensor$"):
        _arrays.device_array("key", tensor(torch, data_ptr=nowhere), STREAM)


def test_gradients_that_are_off_are_not_asked_for(gpu, torch):
    x = tensor(torch, requires_grad=True)
    with torch.no_grad():
        assert _arrays.device_array("key", x, STREAM).pointer == 4096


def test_a_negative_bit_is_resolved(gpu, torch):
    resolved = tensor(torch, address=8192)
    x = tensor(torch, is_neg=lambda _: True, resolve_neg=lambda _: resolved)
    array = _arrays.device_array("key", x, STREAM)
    assert (array.pointer, array.owner) == (8192, resolved)


def test_an_empty_tensor_needs_no_memory(gpu, torch):
    assert _arrays.device_array("key", tensor(torch, (0, 3), address=0), STREAM).pointer == 0


@pytest.mark.promise("gpu-answered-in-kind")
def test_results_of_torch_come_from_torch(gpu, torch, monkeypatch):
    made = []

    def empty(shape, *, dtype, device):
        made.append((shape, dtype, device))
        return tensor(torch, shape, dtype, device=device, address=65536)

    query = _arrays.device_array("query", tensor(torch, device="cuda:1"), STREAM)
    monkeypatch.setattr(torch, "empty", empty)
    result = _arrays.empty(query, (2, 5), "bfloat16", STREAM)
    assert made == [((2, 5), torch.bfloat16, torch.device("cuda:1"))]
    assert result[:5] == (65536, (2, 5), (5, 1), "bfloat16", 1)
    assert _arrays.answer(query, result) is result.owner
    assert result.owner._version == 0
    assert gpu.calls == []


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 5)])
def test_a_result_of_torch_is_laid_out_like_query(gpu, torch, monkeypatch, shape):
    laid_out = {"strides": (4, 8, 1), "device": "cuda:1"}
    query = _arrays.device_array("query", tensor(torch, (2, 3, 4), **laid_out), STREAM)
    like = tensor(torch, (2, 3, 4), **laid_out, address=65536)
    plain = tensor(torch, shape, device="cuda:1", address=4096)
    monkeypatch.setattr(torch, "empty_like", {query.owner: like}.__getitem__)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: plain)
    result = _arrays.empty(query, shape, "float32", STREAM, is_result=True)
    made = like if shape == query.shape else plain
    assert result.owner is made
    assert result.pointer == made.data_ptr()
    assert result.strides == made.stride()


def test_an_out_of_torch_is_known_to_be_written(gpu, torch):
    query = _arrays.device_array("query", tensor(torch), STREAM)
    out = tensor(torch, address=65536)
    result = _arrays.destination(out, query, (2, 3), "float32", [query], STREAM)
    assert _arrays.answer(query, result, is_given=True) is out
    assert out._version == 1


def test_the_stream_of_torch(gpu, torch, monkeypatch):
    streams = {torch.device("cuda:1"): SimpleNamespace(cuda_stream=4711)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    assert _arrays.current_stream(tensor(torch, device="cuda:1")) == 4711


@pytest.mark.parametrize(
    ("stream", "inside"),
    [(None, []), (4711, []), (12, [("stream", 12)]), (0, [("default",)]), (1, [("default",)])],
)
def test_torch_takes_memory_for_the_stream_of_the_call(gpu, torch, monkeypatch, stream, inside):
    entered = []
    device = torch.device("cuda:1")

    @contextlib.contextmanager
    def enter(given):
        entered.append(given)
        yield
        entered.append("left")

    def external(number, on):
        assert on == device
        return ("stream", number)

    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "ExternalStream", external)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda on: ("default",))
    monkeypatch.setattr(
        torch.cuda, "current_stream", {device: SimpleNamespace(cuda_stream=4711)}.__getitem__
    )
    with _arrays.working_on(tensor(torch, device="cuda:1"), stream) as found:
        assert found == (4711 if stream is None else stream)
        assert entered == inside
    assert entered == [*inside, "left"] if inside else entered == []


# CuPy, Numba.


@pytest.fixture
def cupy(gpu, monkeypatch):
    """Put a module in the place of CuPy that has what is used of it."""
    module = ModuleType("cupy")
    inside = []

    class ndarray:
        def __init__(self, shape, dtype, device=0):
            pointer = gpu.array(4096, device)
            self.dtype, self.device = np.dtype(dtype), SimpleNamespace(id=device)
            self.data = SimpleNamespace(ptr=pointer)
            known = {"shape": shape, "typestr": self.dtype.str, "data": (pointer, False)}
            setattr(self, INTERFACE, known | {"version": 3, "stream": 1})

    class Device:
        def __init__(self, ordinal):
            self.ordinal = ordinal

        def __enter__(self):
            inside.append(self.ordinal)

        def __exit__(self, *_):
            inside.pop()

    module.ndarray = ndarray
    module.empty = lambda shape, dtype: ndarray(shape, dtype, inside[-1])
    module.cuda = SimpleNamespace(
        Device=Device, get_current_stream=lambda device: SimpleNamespace(ptr=1000 + device)
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.promise("gpu-answered-in-kind")
@pytest.mark.parametrize("dtype", FLOATS)
def test_arrays_of_cupy_are_answered_in_kind(gpu, cupy, dtype):
    x = cupy.ndarray((2, 3), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, 1)
    assert _arrays.current_stream(x) == 1001
    query = _arrays.device_array("query", x, 1)
    assert query[:5] == (x.data.ptr, (2, 3), (3, 1), dtype, 1)
    assert query.library == "cupy"
    result, lse = (_arrays.empty(query, (4, 2), name, 1) for name in (dtype, "float32"))
    assert (result.dtype, result.strides, result.device) == (dtype, (2, 1), 1)
    assert isinstance(result.owner, cupy.ndarray)
    assert result.owner.dtype == x.dtype
    assert lse.owner.dtype == np.float32
    assert result.owner.device.id == 1
    assert result.pointer == result.owner.data.ptr
    assert _arrays.answer(query, result) is result.owner
    assert gpu.of("cuPointerGetAttribute") == gpu.of("cuEventRecord") == []


@pytest.mark.parametrize(
    ("stream", "inside"), [(None, []), (1001, []), (12, ["stream 12"]), (0, ["null"])]
)
def test_cupy_takes_memory_for_the_stream_of_the_call(gpu, cupy, stream, inside):
    entered = []

    class Stream(contextlib.nullcontext):
        def __enter__(self):
            entered.append(self.enter_result)

    cupy.cuda.Stream = SimpleNamespace(null=Stream("null"))
    cupy.cuda.ExternalStream = lambda number: Stream(f"stream {number}")
    with _arrays.working_on(cupy.ndarray((2,), "float32", 1), stream) as found:
        assert found == (1001 if stream is None else stream)
        assert entered == inside


def test_a_stream_of_a_library_without_any(gpu):
    with _arrays.working_on(interface(gpu), 12) as found:
        assert found == 12
    with _arrays.working_on(interface(gpu), None) as found:
        assert found == 0


@pytest.fixture
def numba(gpu, monkeypatch):
    """Put modules in the place of Numba that have what is used of it."""
    devicearray = ModuleType("numba.cuda.cudadrv.devicearray")
    cuda = ModuleType("numba.cuda")

    class DeviceNDArrayBase:
        def __init__(self, shape, dtype):
            setattr(self, INTERFACE, getattr(interface(gpu, shape, np.dtype(dtype).str), INTERFACE))

    devicearray.DeviceNDArrayBase = DeviceNDArrayBase
    cuda.gpus = [_driver.device(0)]
    cuda.device_array = DeviceNDArrayBase
    monkeypatch.setitem(sys.modules, "numba.cuda", cuda)
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.devicearray", devicearray)
    return devicearray


@pytest.mark.promise("gpu-answered-in-kind")
def test_arrays_of_numba_are_answered_in_kind(gpu, numba):
    x = numba.DeviceNDArrayBase((2, 3), "float16")
    assert _arrays.is_cuda_array(x)
    assert _arrays.current_stream(x) == 0
    query = _arrays.device_array("query", x, 0)
    assert (query.library, query.dtype) == ("numba", "float16")
    result = _arrays.empty(query, (4,), "float32", 0)
    assert isinstance(result.owner, numba.DeviceNDArrayBase)
    assert result.pointer == pointer_of(result.owner)
    assert _arrays.answer(query, result) is result.owner
    unnamed = _arrays.empty(query, (4,), "bfloat16", 0)  # which Numba cannot say
    assert isinstance(unnamed.owner, OwnArray)


def test_the_name_that_numba_has_for_its_arrays():
    pytest.importorskip("numba_cuda", exc_type=ImportError)
    from numba.cuda.cudadrv import devicearray

    assert devicearray.__name__ == "numba.cuda.cudadrv.devicearray"
    assert issubclass(devicearray.DeviceNDArray, devicearray.DeviceNDArrayBase)


# JAX.


class JaxArray(Capsules):
    platform, deleted = "gpu", False

    def devices(self):
        names = self.platform if isinstance(self.platform, list) else [self.platform]
        return {Place(name, i) for i, name in enumerate(names)}

    def is_deleted(self):
        return self.deleted


class Place:
    def __init__(self, platform, number):
        self.platform, self.number = platform, number

    def __repr__(self):
        return f"{self.platform}:{self.number}"


@pytest.fixture
def jax(monkeypatch):
    """Put a module in the place of JAX that has what is used of it."""
    module = ModuleType("jax")
    module.Array = JaxArray
    module.core = SimpleNamespace(Tracer=type("Tracer", (JaxArray,), {}))
    module.dlpack = SimpleNamespace(from_dlpack=lambda x: ("of JAX", x, x.__dlpack__(stream=9)))
    monkeypatch.setitem(sys.modules, "jax", module)
    return module


@pytest.mark.promise("gpu-answered-in-kind")
def test_arrays_of_jax_are_answered_in_kind(gpu, jax):
    numbers = np.zeros((2, 3), np.float32)
    x = JaxArray(numbers)
    assert _arrays.is_cuda_array(x)
    assert _arrays.current_stream(x) == 0
    query = _arrays.device_array("query", x, 0)
    assert query[:5] == (numbers.ctypes.data, (2, 3), (3, 1), "float32", 0)
    assert (query.library, query.writeable) == ("jax", False)
    result = _arrays.empty(query, (4, 2), "float32", 0)
    assert gpu.of("cuMemAllocAsync") == [(32, 0)]
    gpu.calls.clear()
    _, array, _capsule = _arrays.answer(query, result)
    assert array is result.owner
    assert [x[1] for x in gpu.of("cuEventRecord")] == [0]  # JAX's stream waits for ours
    assert [x[0] for x in gpu.of("cuStreamWaitEvent")] == [9]


@pytest.mark.parametrize(
    ("attributes", "kind", "message"),
    [
        (
            {"deleted": True},
            ValueError,
            "key must hold numbers, got an array that was deleted or donated",
        ),
        (
            {"platform": ["gpu", "gpu"]},
            TypeError,
            "key must be on one GPU, got an array on gpu:0, gpu:1",
        ),
        ({"platform": "cpu"}, TypeError, "key must be on one GPU, got an array on cpu:0"),
    ],
)
def test_arrays_of_jax_that_are_refused(gpu, jax, attributes, kind, message):
    x = JaxArray(np.zeros(3, np.float32))
    for name, value in attributes.items():
        setattr(x, name, value)
    with pytest.raises(kind) as error:
        _arrays.device_array("key", x, 0)
    assert str(error.value) == message


def test_traced_arrays_are_refused(gpu, jax):
    x = jax.core.Tracer(np.zeros(3, np.float32))
    assert not _arrays.is_cuda_array(x)
    with pytest.raises(TypeError) as error:
        _arrays.device_array("key", x, 0)
    assert str(error.value) == (
        "key is traced by JAX (in jit, grad or vmap): fastattn.cuda takes arrays that hold numbers"
    )


def test_memory_of_jax_is_kept_until_it_was_read(gpu, jax, cupy):
    arrays = [_arrays.device_array("key", JaxArray(np.zeros(3, np.float32)), 0)]
    arrays.append(_arrays.device_array("key", cupy.ndarray((3,), "float32"), 0))
    _arrays.keep(STREAM, arrays[1:])
    assert gpu.of("cuEventRecord") == []  # CuPy's pool is in the order of the stream
    _arrays.keep(STREAM, arrays)
    assert [objects for _, objects in _driver._kept] == [[arrays[0].owner]]
    assert [x[1] for x in gpu.of("cuEventRecord")] == [STREAM]


def test_real_arrays_of_jax_on_the_cpu(gpu):
    jax = pytest.importorskip("jax", exc_type=ImportError)
    jax.config.update("jax_platforms", "cpu")
    x = jax.numpy.zeros(3)
    assert _arrays.is_cuda_array(x) is False
    with pytest.raises(
        TypeError, match=r"^key must be on one GPU, got an array on (cpu:|TFRT_CPU_)0$"
    ):
        _arrays.device_array("key", x, 0)

    def traced(x):
        with pytest.raises(TypeError, match=r"^key is traced by JAX"):
            _arrays.device_array("key", x, 0)
        assert _arrays.is_cuda_array(x) is False
        return x

    jax.jit(traced)(x)


# Memory of our own.


def test_our_memory_is_given_back_after_its_readers(gpu):
    own = OwnArray((2, 3), "float32", STREAM, 1)
    assert gpu.of("cuMemAllocAsync") == [(24, STREAM)]
    capsule = own.__dlpack__(stream=5)
    own.__dlpack__(stream=-1)
    gpu.calls.clear()
    pointer = own.pointer
    del own
    assert gpu.of("cuMemFreeAsync") == []  # the capsule has it
    del capsule
    assert [x[1] for x in gpu.of("cuEventRecord")] == [5]
    assert [x[0] for x in gpu.of("cuStreamWaitEvent")] == [STREAM]
    assert gpu.of("cuMemFreeAsync") == [(pointer, STREAM)]
    assert gpu.names().index("cuStreamWaitEvent") < gpu.names().index("cuMemFreeAsync")
    assert _arrays._exports == {}


def test_our_memory_without_a_reader(gpu):
    own = OwnArray((), "float64", STREAM, 0)
    pointer = own.pointer
    del own
    assert gpu.of("cuMemFreeAsync") == [(pointer, STREAM)]
    assert gpu.of("cuEventRecord") == []


def test_a_result_that_there_is_no_memory_for(gpu):
    gpu.fails["cuMemAllocAsync"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(MemoryError, match="smaller batch"):
        _arrays.empty(query_on(), (2**40,), "float32", STREAM)
    assert gpu.of("cuMemFreeAsync") == []


def test_a_context_that_is_gone_when_memory_is_given_back(gpu):
    own = OwnArray((3,), "float32", STREAM, 0)
    gpu.fails["cuCtxPushCurrent"] = "CUDA_ERROR_UNKNOWN"
    del own
    # An exception there would be a warning, and that an error.
    gpu.fails.clear()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
def test_our_memory_has_the_interface(gpu, dtype):
    own = OwnArray((2, 3), dtype, STREAM, 0)
    assert getattr(own, INTERFACE) == {
        "version": 3,
        "shape": (2, 3),
        "strides": None,
        "typestr": np.dtype(dtype).str,
        "data": (own.pointer, False),
        "stream": STREAM,
    }
    assert getattr(OwnArray((2,), dtype, 0, 0), INTERFACE)["stream"] == 1
    again = _arrays.device_array("key", own, STREAM, dtypes=(dtype,))
    assert again[:5] == (own.pointer, (2, 3), (3, 1), dtype, 0)


def test_bfloat16_of_ours_is_given_by_dlpack(gpu):
    own = OwnArray((2, 3), "bfloat16", STREAM, 1)
    assert not hasattr(own, INTERFACE)
    assert own.__dlpack_device__() == (2, 1)
    assert _arrays.is_cuda_array(own)
    again = _arrays.device_array("key", own, STREAM)
    assert again[:5] == (own.pointer, (2, 3), (3, 1), "bfloat16", 1)


def test_our_capsules_are_understood_by_others(gpu, torch):
    """The numbers that PyTorch reads there; on the CPU, where there are some."""
    own = OwnArray((2, 3), "float32", STREAM, 0)
    numbers = np.arange(6, dtype=np.float32)
    ctypes.memmove(own.pointer, numbers.ctypes.data, numbers.nbytes)
    capsule = own.__dlpack__(stream=-1)
    whole = _dlpack.Managed.from_address(_dlpack.pointer_in(capsule, _dlpack.DLTENSOR))
    whole.tensor.device_type = 1
    read = torch.utils.dlpack.from_dlpack(capsule)
    assert read.tolist() == numbers.reshape(2, 3).tolist()
    del own, capsule, whole
    assert gpu.of("cuMemFreeAsync") == []
    del read
    assert len(gpu.of("cuMemFreeAsync")) == 1
    assert _arrays._exports == {}


@pytest.mark.parametrize("given", [{"copy": True}, {"dl_device": (1, 0)}, {"dl_device": (2, 1)}])
def test_our_memory_is_given_as_it_is(gpu, given):
    own = OwnArray((3,), "float32", STREAM, 0)
    with pytest.raises(BufferError, match=r"^fastattn's results are given to their own GPU, with"):
        own.__dlpack__(stream=5, **given)
    assert own.__dlpack__(stream=None, max_version=(1, 0), dl_device=(2, 0), copy=False)
    assert [x[0] for x in gpu.of("cuStreamWaitEvent")] == [1]


# out.


def out_of(gpu, query, shape=(2, 3), dtype="float32", inputs=(), **entries):
    out = interface(gpu, **{"shape": shape} | entries)
    return _arrays.destination(out, query, (2, 3), dtype, inputs, STREAM), out


def test_an_out_is_written_where_it_lies(gpu):
    array, out = out_of(gpu, query_on(), strides=(40, 4), inputs=[query_on()])
    assert array[:3] == (pointer_of(out), (2, 3), (10, 1))


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        ({"typestr": "<f8"}, TypeError, "out must be an array of float32, not float64"),
        (
            {"shape": (3, 2)},
            ValueError,
            "out must have the shape of the result, (2, 3), got out.shape=(3, 2)",
        ),
        ({"read_only": True}, ValueError, "out must be writeable, got a read-only array"),
        (
            {"strides": (24, 8)},
            ValueError,
            "out must be contiguous along its last axis, got strides of (6, 2) elements",
        ),
        (
            {"strides": (8, 4)},
            ValueError,
            "out must not overlap itself, got strides of (2, 1) elements",
        ),
        (
            {"strides": (0, 4)},
            ValueError,
            "out must not overlap itself, got strides of (0, 1) elements",
        ),
    ],
)
def test_outs_that_are_refused(gpu, entries, kind, message):
    with pytest.raises(kind) as error:
        out_of(gpu, query_on(), **entries)
    assert str(error.value) == message


def test_an_out_that_shares_memory_with_an_input(gpu):
    whole = interface(gpu, (4, 6), strides=(24, 4))
    pointer = pointer_of(whole)

    def part(row, column):
        entries = {"shape": (2, 3), "typestr": "<f4", "strides": (24, 4), "version": 3}
        return attribute(
            **{INTERFACE: entries | {"data": (pointer + row * 24 + column * 4, False)}}
        )

    gpu.hooks["cuPointerGetAttribute"] = lambda _, address: gpu.memory.setdefault(
        address, (0, None)
    )
    query = _arrays.device_array("query", part(0, 0), STREAM)
    for row, column, overlaps in ((0, 3, False), (2, 0, False), (1, 0, True), (0, 2, True)):
        out = part(row, column)
        if overlaps:
            with pytest.raises(ValueError, match=r"^out must not overlap an input, got an array"):
                _arrays.destination(out, query, (2, 3), "float32", [query], STREAM)
        else:
            _arrays.destination(out, query, (2, 3), "float32", [query], STREAM)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("torch", "out must be a tensor, as query is, not ndarray"),
        ("cupy", "out must be an array of cupy, as query is, not ndarray"),
        ("numba", "out must be an array of numba, as query is, not ndarray"),
        ("jax", "out must not be given if query is a JAX array: these are never written"),
    ],
)
def test_an_out_is_of_querys_library(gpu, library, message):
    with pytest.raises(TypeError) as error:
        _arrays.destination(
            np.zeros((2, 3)), query_on(library=library), (2, 3), "float32", [], STREAM
        )
    assert str(error.value) == message


def test_an_out_whose_negative_bit_is_set(gpu, torch):
    out = tensor(torch, is_neg=lambda _: True)
    with pytest.raises(ValueError, match=r"^out must be written as it is, got a tensor whose neg"):
        _arrays.destination(out, query_on(library="torch"), (2, 3), "float32", [], STREAM)


def test_an_empty_out(gpu):
    query = query_on()
    out = interface(gpu, (0, 3), data=(0, False), strides=(0, 4))
    assert _arrays.destination(out, query, (0, 3), "float32", [query], STREAM).shape == (0, 3)


def end_with_memory():
    """End a process that keeps memory of ours until the GPU, which it is not asked, has read it."""
    fake = sys.modules["cuda.bindings.driver"] = Gpu()
    own = OwnArray((3,), "float32", STREAM, 0)
    _driver.keep(STREAM, _driver.device(0), [own])
    return len(fake.memory)


def test_a_process_may_end_with_memory_of_ours():
    process = start(end_with_memory)
    assert process.communicate(timeout=60) == ("1\n", "")
    assert process.returncode == 0
