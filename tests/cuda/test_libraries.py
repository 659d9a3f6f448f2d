# SPDX-License-Identifier: Apache-2.0
"""Arrays of PyTorch, CuPy, Numba and JAX on a GPU are understood, and answered in kind."""
# ruff: noqa: E501 - the tables have a line per case

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from fastattn.cuda import _arrays, _driver
from fastattn.cuda._arrays import OwnArray
from tests.cuda.arrays import FLOATS, INTERFACE, STREAM, Capsules, interface, pointer_of, tensor

# PyTorch.


def stream_of(x):
    """Return the stream that an array's library is working on."""
    return _arrays.current_stream(_arrays.library_name(x), x)


def working_on(query, stream):
    """Work on a stream with an array of whatever library."""
    return _arrays.working_on(_arrays.library_name(query), query, stream)


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
        ({"requires_grad": True}, TypeError, "key requires grad, and this call has no gradient: use fastattn.torch.attention, or pass key.detach()"),
        ({"is_nested": True}, TypeError, "key must be a dense tensor, not a nested one"),
        ({"is_quantized": True}, TypeError, "key must not be quantised, got a tensor of torch.float32: key.dequantize()"),
        ({"device": "meta"}, TypeError, "key must hold numbers, got a tensor on the device meta"),
        ({"device": "cpu"}, TypeError, "key must be on the GPU, got a tensor on cpu: key.to(query.device)"),
        ({"address": 0}, TypeError, "key must be a tensor with memory of its own, got torch.float32 in a CudaTensor"),
        ({"address": 4098}, ValueError, "key must be aligned to its dtype, float32, got address 0x1002"),
    ],
)  # fmt: skip
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
    assert _arrays.library_of(x).on_gpu
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
    assert _arrays.to_caller(query, result) is result.owner
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
    assert _arrays.to_caller(query, result, is_given=True) is out
    assert out._version == 1


def test_the_stream_of_torch(gpu, torch, monkeypatch):
    streams = {torch.device("cuda:1"): SimpleNamespace(cuda_stream=4711)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    assert stream_of(tensor(torch, device="cuda:1")) == 4711


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
    with working_on(tensor(torch, device="cuda:1"), stream) as found:
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
    assert stream_of(x) == 1001
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
    assert _arrays.to_caller(query, result) is result.owner
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
    with working_on(cupy.ndarray((2,), "float32", 1), stream) as found:
        assert found == (1001 if stream is None else stream)
        assert entered == inside


def test_a_stream_of_a_library_without_any(gpu):
    with working_on(interface(gpu), 12) as found:
        assert found == 12
    with working_on(interface(gpu), None) as found:
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
    assert _arrays.library_of(x).on_gpu
    assert stream_of(x) == 0
    query = _arrays.device_array("query", x, 0)
    assert (query.library, query.dtype) == ("numba", "float16")
    result = _arrays.empty(query, (4,), "float32", 0)
    assert isinstance(result.owner, numba.DeviceNDArrayBase)
    assert result.pointer == pointer_of(result.owner)
    assert _arrays.to_caller(query, result) is result.owner
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
    assert _arrays.library_of(x).on_gpu
    assert stream_of(x) == 0
    query = _arrays.device_array("query", x, 0)
    assert query[:5] == (numbers.ctypes.data, (2, 3), (3, 1), "float32", 0)
    assert (query.library, query.writeable) == ("jax", False)
    result = _arrays.empty(query, (4, 2), "float32", 0)
    assert gpu.of("cuMemAllocAsync") == [(32, 0)]
    gpu.calls.clear()
    _, array, _capsule = _arrays.to_caller(query, result)
    assert array is result.owner
    assert [x[1] for x in gpu.of("cuEventRecord")] == [0]  # JAX's stream waits for ours
    assert [x[0] for x in gpu.of("cuStreamWaitEvent")] == [9]


@pytest.mark.parametrize(
    ("attributes", "kind", "message"),
    [
        ({"deleted": True}, ValueError, "key must hold numbers, got an array that was deleted or donated"),
        ({"platform": ["gpu", "gpu"]}, TypeError, "key must be on one GPU, got an array on gpu:0, gpu:1"),
        ({"platform": "cpu"}, TypeError, "key must be on one GPU, got an array on cpu:0"),
    ],
)  # fmt: skip
def test_arrays_of_jax_that_are_refused(gpu, jax, attributes, kind, message):
    x = JaxArray(np.zeros(3, np.float32))
    for name, value in attributes.items():
        setattr(x, name, value)
    with pytest.raises(kind) as error:
        _arrays.device_array("key", x, 0)
    assert str(error.value) == message


def test_traced_arrays_are_refused(gpu, jax):
    x = jax.core.Tracer(np.zeros(3, np.float32))
    assert not _arrays.library_of(x).on_gpu
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
    assert _arrays.library_of(x).on_gpu is False
    with pytest.raises(
        TypeError, match=r"^key must be on one GPU, got an array on (cpu:|TFRT_CPU_)0$"
    ):
        _arrays.device_array("key", x, 0)

    def traced(x):
        with pytest.raises(TypeError, match=r"^key is traced by JAX"):
            _arrays.device_array("key", x, 0)
        assert _arrays.library_of(x).on_gpu is False
        return x

    jax.jit(traced)(x)
