# SPDX-License-Identifier: Apache-2.0
"""Is the GPU asked for what was meant? Devices, launches, memory and errors, with a fake driver."""
# ruff: noqa: E501 - the tables have a line per case

import ctypes
import os
import struct
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastattn.cuda import _driver
from fastattn.cuda._build import Binary
from tests.cuda.fake_driver import Gpu, fake_driver
from tests.support.child import run

ALL_KINDS = ("int32", "int64", "float32", "float64", "tensor_map", "uint32")
ARGUMENTS = (-5, 2**62 + 3, 1.5, 1e300, bytes(range(128)), 2**32 - 7)


def binary(parameters=ALL_KINDS, shared=100_000, **fields):
    known = {"name": "kernel", "cubin": b"\x7fELF", "threads": 384, "architecture": "sm_90a"}
    return Binary(parameters=parameters, shared_bytes=shared, **known | fields)


@pytest.fixture
def gpu(monkeypatch):
    with fake_driver(monkeypatch) as fake:
        yield fake


@pytest.fixture
def uninitialised(monkeypatch):
    """Let the driver be initialised anew, with a fake module in the place of cuda.bindings."""
    fake = Gpu()
    monkeypatch.setattr(_driver, "_bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    return fake


# Beginning.


def test_the_driver_is_initialised_once(uninitialised):
    assert _driver.driver() is _driver.driver() is uninitialised
    assert uninitialised.names() == ["cuInit", "cuDriverGetVersion"]


def test_without_cuda_bindings(monkeypatch):
    monkeypatch.setattr(_driver, "_bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ImportError, match=r"^fastattn\.cuda needs cuda-bindings \(.*\): pip ins"):
        _driver.count()


def test_without_a_driver(uninitialised):
    def missing(_flags):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    uninitialised.hooks["cuInit"] = missing
    with pytest.raises(RuntimeError, match="found no NVIDIA driver") as error:
        _driver.count()
    assert str(error.value) == (
        "fastattn.cuda found no NVIDIA driver (libcuda.so.1): install one, or let "
        "fastattn.attention compute on the CPU: Failed to dlopen libcuda.so.1"
    )


def test_a_driver_too_old_for_libraries_of_kernels(uninitialised):
    uninitialised.answers["cuDriverGetVersion"] = 11080
    for _ in range(2):  # nothing is remembered of a driver that will not do
        with pytest.raises(RuntimeError) as error:
            _driver.count()
        assert str(error.value) == (
            "fastattn.cuda needs an NVIDIA driver for CUDA 12.0 or later, this one is for CUDA "
            "11.8: update the NVIDIA driver (https://www.nvidia.com/drivers)"
        )


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        ("CUDA_ERROR_NO_DEVICE", ": there is no GPU, or CUDA_VISIBLE_DEVICES hides it: fastattn.attention computes on the CPU"),
        ("CUDA_ERROR_NOT_INITIALIZED", ": CUDA does not survive a fork: start processes by " 'multiprocessing.get_context("spawn") or "forkserver"'),
        ("CUDA_ERROR_INSUFFICIENT_DRIVER", ": update the NVIDIA driver (https://www.nvidia.com/drivers)"),
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", ": reboot: the driver's parts are of different versions"),
        ("CUDA_ERROR_STUB_LIBRARY", ": libcuda.so.1 is the toolkit's stub: take it off LD_LIBRARY_PATH"),
        ("CUDA_ERROR_UNKNOWN", ""),
    ],
)  # fmt: skip
def test_what_to_do_if_the_driver_does_not_start(uninitialised, failure, advice):
    uninitialised.fails["cuInit"] = failure
    with pytest.raises(RuntimeError) as error:
        _driver.count()
    assert str(error.value) == f"cuInit: {failure} (what {failure} is){advice}"


def use_after_fork():
    """Return what a forked child is told, and what a child of one that had not used CUDA is."""
    sys.modules["cuda.bindings.driver"] = Gpu()
    told = []
    for uses_before in (False, True):
        if uses_before:
            _driver.count()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                text = f"{_driver.count()} GPUs"
            except RuntimeError as error:
                text = str(error)
            os.write(write, text.encode())
            os._exit(0)
        os.waitpid(child, 0)
        told.append(os.read(read, 1000).decode())
    return told


def test_cuda_does_not_survive_a_fork():
    assert run(use_after_fork) == [
        "2 GPUs",
        "fastattn.cuda was used before this process was forked: CUDA does not survive a fork: "
        'start processes by multiprocessing.get_context("spawn") or "forkserver"',
    ]


# Devices.


def test_a_device_says_what_it_is(gpu):
    assert _driver.count() == 2
    device = _driver.device(1)
    assert device is _driver.device(1)
    assert (device.name, device.capability) == ("Fake GPU", (9, 0))
    assert (device.multiprocessors, device.shared_bytes) == (132, 232448)
    assert gpu.of("cuDevicePrimaryCtxRetain") == [(1,)]


@pytest.mark.parametrize("ordinal", [-1, 2])
def test_a_device_that_is_not_there(gpu, ordinal):
    with pytest.raises(ValueError, match=f"^there is no GPU {ordinal}, only 2 in all$"):
        _driver.device(ordinal)


def test_the_context_is_current_inside_and_popped_on_an_error(gpu):
    with _driver.device(0), _driver.device(1):
        assert gpu.stack() == [500, 501]
    with pytest.raises(ZeroDivisionError), _driver.device(1):
        raise ZeroDivisionError
    assert gpu.stack() == []


def test_many_threads_get_one_device(gpu):
    barrier = threading.Barrier(8)
    gpu.hooks["cuDeviceGetName"] = lambda *_: threading.Event().wait(0.01)

    def get(_):
        barrier.wait()
        return id(_driver.device(0))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(get, range(8)))) == 1
    assert len(gpu.of("cuDevicePrimaryCtxRetain")) == 1


# Loading.


def test_a_kernel_is_loaded_once_and_given_its_shared_memory(gpu):
    first, second = (_driver.load(binary(), _driver.device(i)) for i in range(2))
    assert first is _driver.load(binary(), _driver.device(0))
    assert first is not second
    assert gpu.of("cuLibraryLoadData") == [(b"\x7fELF", [], [], 0, [], [], 0)]
    assert [x[1] for x in gpu.of("cuLibraryGetKernel")] == [b"kernel"]
    name = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    kernel = gpu.of("cuKernelGetFunction")[0][0]
    assert gpu.of("cuKernelSetAttribute") == [(name, 100_000, kernel, i) for i in range(2)]


@pytest.mark.parametrize(
    ("dynamic", "static", "times"), [(49152, 0, 0), (49152, 16, 1), (49153, 0, 1)]
)
def test_more_than_48_kib_of_shared_memory_is_asked_for(gpu, dynamic, static, times):
    known = binary(shared=dynamic, static_shared_bytes=static)
    _driver.load(known, _driver.device(0))
    assert len(gpu.of("cuKernelSetAttribute")) == times


def test_more_shared_memory_than_there_is(gpu):
    known = binary(shared=232_000, static_shared_bytes=449)
    with pytest.raises(RuntimeError) as error:
        _driver.load(known, _driver.device(0))
    assert str(error.value) == (
        "kernel needs 232449 bytes of shared memory in a block, Fake GPU has 232448"
    )
    assert gpu.of("cuLibraryLoadData") == []


def test_loading_is_no_part_of_a_capture(gpu):
    _driver.load(binary(), _driver.device(0))
    names = gpu.names()
    modes = [i for i, name in enumerate(names) if name == "cuThreadExchangeStreamCaptureMode"]
    assert modes[0] < names.index("cuLibraryLoadData") < names.index("cuKernelGetFunction")
    assert names.index("cuKernelGetFunction") < modes[1]
    assert gpu.of("cuThreadExchangeStreamCaptureMode") == [
        ("CU_STREAM_CAPTURE_MODE_RELAXED",),
        ("mode before",),
    ]


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        ("CUDA_ERROR_NO_BINARY_FOR_GPU", "the driver takes no such code for this GPU: update the NVIDIA driver (https://www.nvidia.com/drivers), and empty fastattn's cache"),
        ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "update the NVIDIA driver (https://www.nvidia.com/drivers), or install an older nvidia-nvvm"),
        ("CUDA_ERROR_INVALID_IMAGE", "update the NVIDIA driver (https://www.nvidia.com/drivers), and empty fastattn's cache"),
    ],
)  # fmt: skip
def test_code_that_the_driver_does_not_take(gpu, failure, advice):
    gpu.fails["cuLibraryLoadData"] = failure
    for _ in range(2):  # and nothing is remembered
        with pytest.raises(RuntimeError) as error:
            _driver.load(binary(), _driver.device(0))
        assert str(error.value) == f"cuLibraryLoadData: {failure} (what {failure} is): {advice}"
    assert gpu.of("cuThreadExchangeStreamCaptureMode")[-1] == ("mode before",)
    gpu.fails.clear()
    _driver.load(binary(), _driver.device(0))


def test_many_threads_load_one_function(gpu):
    barrier = threading.Barrier(8)
    gpu.hooks["cuLibraryLoadData"] = lambda *_: threading.Event().wait(0.01)
    device = _driver.device(0)

    def load(_):
        barrier.wait()
        return id(_driver.load(binary(), device))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(load, range(8)))) == 1
    assert len(gpu.of("cuLibraryLoadData")) == 1


def test_a_function_that_an_old_driver_lacks(gpu):
    def missing(*_):
        raise RuntimeError("function cuLibraryLoadData is not found")

    gpu.hooks["cuLibraryLoadData"] = missing
    with pytest.raises(RuntimeError) as error:
        _driver.load(binary(), _driver.device(0))
    assert str(error.value) == (
        "cuLibraryLoadData: function cuLibraryLoadData is not found: update the NVIDIA driver "
        "(https://www.nvidia.com/drivers)"
    )


# Launching.


def parameters(address, kinds):
    """Return the bytes of each parameter, as the driver would copy them."""
    widths = {"int32": 4, "uint32": 4, "int64": 8, "float32": 4, "float64": 8, "tensor_map": 128}
    pointers = (ctypes.c_void_p * len(kinds)).from_address(address)
    return [
        (pointer, ctypes.string_at(pointer, widths[kind]))
        for pointer, kind in zip(pointers, kinds, strict=True)
    ]


def test_a_launch_passes_what_it_was_given(gpu):
    seen = []
    gpu.hooks["cuLaunchKernel"] = lambda *given: seen.extend(parameters(given[9], ALL_KINDS))
    function = _driver.load(binary(), _driver.device(1))
    gpu.calls.clear()
    function.launch((7, 5), 1234, ARGUMENTS)
    assert gpu.names() == ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
    assert gpu.of("cuCtxPushCurrent") == [(501,)]
    given = gpu.of("cuLaunchKernel")[0]
    assert given[:9] == (function.handle, 7, 5, 1, 384, 1, 1, 100_000, 1234)
    assert given[10] == 0
    expected = [struct.pack(code, x) for code, x in zip("iqfd", ARGUMENTS, strict=False)]
    assert [content for _, content in seen] == [
        *expected,
        ARGUMENTS[4],
        struct.pack("I", 2**32 - 7),
    ]
    widths = (4, 8, 4, 8, 64, 4)
    assert [x % width for (x, _), width in zip(seen, widths, strict=True)] == [0] * 6


@pytest.mark.parametrize("grid", [(0,), (3, 0), (3, 2, 0)])
def test_a_grid_of_no_blocks_is_no_launch(gpu, grid):
    _driver.load(binary(), _driver.device(0)).launch(grid, 0, ARGUMENTS)
    assert gpu.of("cuLaunchKernel") == []


@pytest.mark.parametrize("arguments", [ARGUMENTS[:-1], (*ARGUMENTS, 1), (2**31, *ARGUMENTS[1:])])
def test_arguments_that_do_not_fit_are_not_launched(gpu, arguments):
    function = _driver.load(binary(), _driver.device(0))
    with pytest.raises(struct.error):
        function.launch((1,), 0, arguments)
    assert gpu.of("cuLaunchKernel") == []
    assert gpu.stack() == []


def test_threads_do_not_mix_their_arguments(gpu):
    kinds = ("int64",) * 40
    seen = {}

    def launched(*given):
        threading.Event().wait(0.0005)  # others may run now
        seen[given[8]] = [struct.unpack("q", x)[0] for _, x in parameters(given[9], kinds)]

    gpu.hooks["cuLaunchKernel"] = launched
    function = _driver.load(binary(kinds), _driver.device(0))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: function.launch((1,), i, (i,) * 40), range(64)))
    assert seen == {i: [i] * 40 for i in range(64)}


def test_the_context_is_popped_when_a_launch_fails(gpu):
    function = _driver.load(binary(), _driver.device(0))
    gpu.fails["cuLaunchKernel"] = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(RuntimeError) as error:
        function.launch((1,), 0, ARGUMENTS)
    assert str(error.value) == (
        "cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS (what CUDA_ERROR_ILLEGAL_ADDRESS is): an "
        "earlier kernel of this process failed, its CUDA context is lost: restart the process"
    )
    assert gpu.stack() == []
    gpu.fails.clear()
    function.launch((1,), 0, ARGUMENTS)


def test_a_context_that_cannot_be_pushed_is_not_popped(gpu):
    function = _driver.load(binary(), _driver.device(0))
    gpu.calls.clear()
    gpu.fails["cuCtxPushCurrent"] = "CUDA_ERROR_UNKNOWN"
    with pytest.raises(RuntimeError, match=r"^cuCtxPushCurrent: CUDA_ERROR_UNKNOWN"):
        function.launch((1,), 0, ARGUMENTS)
    assert gpu.names() == ["cuCtxPushCurrent"]


# Tensor maps.


def test_a_tensor_map_says_where_tiles_lie(gpu):
    device = _driver.device(1)
    known = _driver.tensor_map(4096, (128, 100, 6), (128, 12800), (64, 64, 1), "bfloat16", device)
    assert len(known) == 128
    assert gpu.of("cuTensorMapEncodeTiled") == [
        (
            "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16",
            3,
            4096,
            [128, 100, 6],
            [256, 25600],
            [64, 64, 1],
            [1, 1, 1],
            "CU_TENSOR_MAP_INTERLEAVE_NONE",
            "CU_TENSOR_MAP_SWIZZLE_128B",
            "CU_TENSOR_MAP_L2_PROMOTION_L2_256B",
            "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE",
        )
    ]
    again = _driver.tensor_map(4096, (128, 100, 6), (128, 12800), (64, 64, 1), "bfloat16", device)
    assert known == again
    assert len(gpu.of("cuTensorMapEncodeTiled")) == 1
    other = _driver.tensor_map(4096, (128, 100, 6), (128, 12800), (64, 64, 1), "float16", device)
    assert known != other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((8, (64, 9), (64,), (64, 8)), "a tensor map needs whole 16 bytes: address=0x8, strid"),
        ((0, (64, 9), (68,), (64, 8)), r"a tensor map needs whole 16 bytes: address=0x0, .*68"),
        ((0, (64, 9), (-64,), (64, 8)), "a tensor map needs whole 16 bytes"),
        ((0, (64, 9), (64,), (128, 8)), "a tile has at most 128 bytes in a row and 256 rows"),
        ((0, (64, 9), (64,), (64, 257)), "a tile has at most 128 bytes in a row and 256 rows"),
        ((0, (64, 9), (64,), (64, 0)), "a tile has at most 128 bytes in a row and 256 rows"),
        ((0, (64, 9), (64, 64), (64, 8)), "a tensor map has 1 to 5 axes"),
        ((0, (1,) * 6, (8,) * 5, (1,) * 6), "a tensor map has 1 to 5 axes"),
    ],
)
def test_tensor_maps_that_tma_cannot_follow(gpu, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        _driver.tensor_map(*given, "float16", _driver.device(0))
    assert gpu.of("cuTensorMapEncodeTiled") == []


# Memory and streams.


def test_memory_is_in_the_order_of_a_stream(gpu):
    device = _driver.device(1)
    address = _driver.allocate(0, 77, device)
    assert _driver.device_of(address) == 1
    _driver.free(address, 78, device)
    assert gpu.of("cuMemAllocAsync") == [(1, 77)]
    assert gpu.of("cuMemFreeAsync") == [(address, 78)]


def test_out_of_memory(gpu):
    gpu.fails["cuMemAllocAsync"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(MemoryError) as error:
        _driver.allocate(2**60, 0, _driver.device(0))
    assert str(error.value) == (
        "cuMemAllocAsync: CUDA_ERROR_OUT_OF_MEMORY (what CUDA_ERROR_OUT_OF_MEMORY is): free some "
        "of the GPU's memory, or take a smaller batch"
    )


def test_an_address_that_is_not_the_gpus(gpu):
    gpu.fails["cuPointerGetAttribute"] = "CUDA_ERROR_INVALID_VALUE"
    assert _driver.device_of(4096) is None
    gpu.fails["cuPointerGetAttribute"] = "CUDA_ERROR_UNKNOWN"
    with pytest.raises(RuntimeError, match=r"^cuPointerGetAttribute: CUDA_ERROR_UNKNOWN"):
        _driver.device_of(4096)


def test_a_stream_waits_for_another_by_an_event(gpu):
    device = _driver.device(0)
    gpu.calls.clear()
    _driver.wait(5, 9, device)
    event = gpu.of("cuEventRecord")[0][0]
    assert gpu.calls == [
        ("cuCtxPushCurrent", (500,)),
        ("cuEventCreate", (2,)),
        ("cuEventRecord", (event, 9)),
        ("cuStreamWaitEvent", (5, event, 0)),
        ("cuEventDestroy", (event,)),
        ("cuCtxPopCurrent", ()),
    ]


@pytest.mark.parametrize(("stream", "other"), [(5, 5), (0, 0), (0, 1), (1, 0)])
def test_a_stream_does_not_wait_for_itself(gpu, stream, other):
    _driver.wait(stream, other, _driver.device(0))
    assert gpu.of("cuEventCreate") == []


def test_waiting_for_a_stream_outside_a_capture(gpu):
    gpu.fails["cuStreamWaitEvent"] = "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"
    with pytest.raises(RuntimeError, match="written on a stream outside the capture: synchronise"):
        _driver.wait(5, 9, _driver.device(0))
    assert len(gpu.of("cuEventDestroy")) == 1


def test_objects_are_kept_until_the_gpu_has_read_them(gpu):
    class Memory:
        pass

    alive = {}

    def kept(name):
        memory = Memory()
        alive[name] = True
        weakref.finalize(memory, alive.pop, name)
        return memory

    device = _driver.device(0)
    gpu.fails["cuEventQuery"] = "CUDA_ERROR_NOT_READY"
    _driver.keep(5, device, [kept("first")])
    _driver.keep(5, device, [kept("second")])
    _driver.keep(5, device, [])
    assert set(alive) == {"first", "second"}
    assert len(gpu.of("cuEventQuery")) == 2  # a call asks of the oldest alone
    gpu.fails.clear()
    _driver.keep(5, device, [kept("third")])
    assert set(alive) == {"third"}
    assert len(gpu.of("cuEventDestroy")) == 3
    gpu.answers["cuStreamIsCapturing"] = 1
    _driver.keep(5, device, [kept("captured")])
    assert set(alive) == set()


def test_a_capture_survives_that_events_are_asked(gpu):
    device = _driver.device(0)
    _driver.keep(5, device, [object()])
    gpu.calls.clear()
    _driver.keep(5, device, [object()])
    names = gpu.names()
    mode = "cuThreadExchangeStreamCaptureMode"
    first, last = names.index(mode), len(names) - 1 - names[::-1].index(mode)
    assert first < names.index("cuEventQuery") < last
    assert gpu.of(mode) == [("CU_STREAM_CAPTURE_MODE_RELAXED",), ("mode before",)]
