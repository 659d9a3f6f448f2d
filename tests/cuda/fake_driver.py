# SPDX-License-Identifier: Apache-2.0
"""A GPU's driver that is none: it remembers what it was asked, and fails where a test wants it to.

`fake_driver` puts it in the place of cuda.bindings.driver. Device memory is host memory, whose
addresses are those that `memory` knows; streams, events and contexts are numbers.
"""

import contextlib
import ctypes
import itertools
import threading
from collections import deque
from enum import IntEnum

from fastattn.cuda import _driver

RESULTS = {
    "CUDA_SUCCESS": 0,
    "CUDA_ERROR_INVALID_VALUE": 1,
    "CUDA_ERROR_OUT_OF_MEMORY": 2,
    "CUDA_ERROR_NOT_INITIALIZED": 3,
    "CUDA_ERROR_STUB_LIBRARY": 34,
    "CUDA_ERROR_INSUFFICIENT_DRIVER": 35,
    "CUDA_ERROR_NO_DEVICE": 100,
    "CUDA_ERROR_INVALID_IMAGE": 200,
    "CUDA_ERROR_NO_BINARY_FOR_GPU": 209,
    "CUDA_ERROR_ECC_UNCORRECTABLE": 214,
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": 222,
    "CUDA_ERROR_NOT_READY": 600,
    "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": 803,
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": 900,
    "CUDA_ERROR_STREAM_CAPTURE_ISOLATION": 905,
    "CUDA_ERROR_UNKNOWN": 999,
}
ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "MULTIPROCESSOR_COUNT": 132,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
}
NEED_CONTEXT = (
    *("cuLaunchKernel", "cuMemAllocAsync", "cuMemFreeAsync", "cuMemset", "cuTensorMap"),
    *("cuEvent", "cuStreamWait"),
)


class Names:
    """An enumeration whose members are their names."""

    CU_EVENT_DISABLE_TIMING = 2
    CU_STREAM_CAPTURE_STATUS_NONE = 0

    def __getattr__(self, name):
        return name


class Map:
    """A tensor map."""

    def __init__(self, content):
        self.buffer = ctypes.create_string_buffer(content, 128)

    def getPtr(self):
        return ctypes.addressof(self.buffer)


class Gpu:
    """The functions of the driver that are called, as cuda.bindings has them."""

    CUresult = IntEnum("CUresult", RESULTS)
    CUdevice_attribute = CUevent_flags = CUfunction_attribute = CUpointer_attribute = Names()
    CUstreamCaptureMode = CUstreamCaptureStatus = CUtensorMapDataType = Names()
    CUtensorMapInterleave = CUtensorMapSwizzle = CUtensorMapL2promotion = Names()
    CUtensorMapFloatOOBfill = Names()
    cuuint32_t = cuuint64_t = int

    def __init__(self, devices=2):
        self.calls = []
        self.fails = {}  # name: the name of the error
        self.hooks = {}  # name: what to do when it is called
        self.answers = {"cuDriverGetVersion": 13000, "cuDeviceGetCount": devices}
        self.memory = {}  # address: (device, bytes)
        self.contexts = threading.local()
        self.handles = itertools.count(1000)

    def stack(self):
        return self.contexts.__dict__.setdefault("stack", [])

    def names(self):
        return [name for name, _ in self.calls]

    def of(self, name):
        """Return the arguments of each call of a function."""
        return [arguments for called, arguments in self.calls if called == name]

    def array(self, size, device=0, offset=0):
        """Return the address of new memory."""
        buffer = ctypes.create_string_buffer(size + 256 + offset)
        address = -(-ctypes.addressof(buffer) // 256) * 256 + offset
        self.memory[address] = (device, buffer)
        return address

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments):
            if name == "cuGetErrorString":
                return self.CUresult.CUDA_SUCCESS, f"what {arguments[0].name} is".encode()
            self.calls.append((name, arguments))
            if name.startswith(NEED_CONTEXT):
                assert self.stack(), f"{name} without a context"
            if name in self.hooks:
                self.hooks[name](*arguments)
            status = self.CUresult[self.fails.get(name, "CUDA_SUCCESS")]
            result = None if status else self.answer(name, arguments)
            return (status,) if result is None and name not in self.returning else (status, result)

        return function

    returning = ("cuPointerGetAttribute", "cuMemAllocAsync", "cuLibraryLoadData")

    def answer(self, name, arguments):
        if name in self.answers:
            return self.answers[name]
        match name:
            case "cuDeviceGet":
                return arguments[0]
            case "cuDeviceGetName":
                return b"Fake GPU\0" + b" " * (arguments[0] - 9)
            case "cuDeviceGetAttribute":
                return ATTRIBUTES[arguments[0].removeprefix("CU_DEVICE_ATTRIBUTE_")]
            case "cuDevicePrimaryCtxRetain":
                return 500 + arguments[0]
            case "cuCtxPushCurrent":
                self.stack().append(arguments[0])
            case "cuCtxPopCurrent":
                return self.stack().pop()
            case "cuThreadExchangeStreamCaptureMode":
                return "mode before"
            case "cuStreamIsCapturing":
                return 0
            case "cuTensorMapEncodeTiled":
                return Map(repr(arguments).encode()[:128])
            case "cuMemAllocAsync":
                return self.array(arguments[0], self.stack()[-1] - 500)
            case "cuMemFreeAsync":
                del self.memory[arguments[0]]
            case "cuPointerGetAttribute":
                return self.memory[arguments[1]][0]
            case "cuLibraryLoadData" | "cuLibraryGetKernel" | "cuKernelGetFunction":
                return next(self.handles)
            case "cuEventCreate":
                return next(self.handles)
        return None


@contextlib.contextmanager
def fake_driver(monkeypatch):
    """Give a driver with two GPUs, which fastattn.cuda uses inside the with statement."""
    fake = Gpu()
    monkeypatch.setattr(_driver, "driver", lambda: fake)
    for name in ("_devices", "_functions", "_kernels"):
        monkeypatch.setattr(_driver, name, {})
    monkeypatch.setattr(_driver, "_kept", deque())
    _driver.tensor_map.cache_clear()
    yield fake
    _driver.tensor_map.cache_clear()
    assert fake.stack() == [], "a context was left current"
