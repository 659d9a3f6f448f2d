# SPDX-License-Identifier: Apache-2.0
"""The GPU: devices, loading and launching kernels, tensor maps, device memory, streams.

Called by every other file of `fastattn.cuda` that needs a GPU; the only one that knows
`cuda.bindings.driver`. Nothing here waits for the GPU. A stream is its handle as an int; 0 is the
legacy default stream. The device's primary context is used, as by PyTorch, CuPy, JAX and Numba,
and made current for the time of a call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn, Self

from fastattn.cuda._build import INSTALL, TENSOR_MAP, TENSOR_MAP_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastattn.cuda._build import Binary

LEAST_CUDA = 12000  # the driver's: libraries of kernels and tensor maps are of CUDA 12.0
PLAIN_SHARED_BYTES = 48 * 1024  # of a block; more must be asked for
DEFAULT_STREAM, LEGACY_STREAM = 0, 1  # two names of one stream
# How struct writes a parameter, and to what address it is aligned.
FORMATS = {
    "int32": "i",
    "uint32": "I",
    "int64": "q",
    "float32": "f",
    "float64": "d",
    TENSOR_MAP: "128s",
}
TENSOR_MAP_ALIGNMENT = 64
SWIZZLE_BYTES = 128
MOST_BOX = 256  # elements of a tensor map's box along an axis
UPDATE = "update the NVIDIA driver (https://www.nvidia.com/drivers)"
RESTART = "an earlier kernel of this process failed, its CUDA context is lost: restart the process"
ADVICE = {
    "CUDA_ERROR_NO_DEVICE": (
        "there is no GPU, or CUDA_VISIBLE_DEVICES hides it: fastattn.attention computes on the CPU"
    ),
    "CUDA_ERROR_NOT_INITIALIZED": (
        "CUDA does not survive a fork: start processes by "
        'multiprocessing.get_context("spawn") or "forkserver"'
    ),
    "CUDA_ERROR_INSUFFICIENT_DRIVER": UPDATE,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot: the driver's parts are of different versions",
    "CUDA_ERROR_STUB_LIBRARY": "libcuda.so.1 is the toolkit's stub: take it off LD_LIBRARY_PATH",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": f"{UPDATE}, or install an older nvidia-nvvm",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": (
        "the driver takes no such code for this GPU: " + UPDATE + ", and empty fastattn's cache"
    ),
    "CUDA_ERROR_INVALID_IMAGE": UPDATE + ", and empty fastattn's cache",
    "CUDA_ERROR_OUT_OF_MEMORY": "free some of the GPU's memory, or take a smaller batch",
    "CUDA_ERROR_ILLEGAL_ADDRESS": RESTART,
    "CUDA_ERROR_MISALIGNED_ADDRESS": RESTART,
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": RESTART,
    "CUDA_ERROR_LAUNCH_FAILED": RESTART,
    "CUDA_ERROR_LAUNCH_TIMEOUT": RESTART,
    "CUDA_ERROR_ECC_UNCORRECTABLE": "the GPU's memory is faulty: reset or replace it",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": (
        "this cannot be captured in a graph: call once before the capture"
    ),
    "CUDA_ERROR_STREAM_CAPTURE_ISOLATION": (
        "an array was written on a stream outside the capture: synchronise before the capture"
    ),
}

_lock = threading.RLock()
_bindings: Any = None  # cuda.bindings.driver, once CUDA is initialised
_forked = False  # since then


def driver() -> Any:
    """Return the module cuda.bindings.driver, CUDA being initialised."""
    if _bindings is None:
        _initialise()
    if _forked:
        raise RuntimeError(
            "fastattn.cuda was used before this process was forked: "
            + ADVICE["CUDA_ERROR_NOT_INITIALIZED"]
        )
    return _bindings


def _initialise() -> None:
    global _bindings
    with _lock:
        try:
            module = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise ImportError(f"fastattn.cuda needs cuda-bindings ({error}): {INSTALL}") from error
        try:
            status, *_ = module.cuInit(0)
        except RuntimeError as error:  # of the bindings, which look for libcuda.so.1 only now
            raise RuntimeError(
                "fastattn.cuda found no NVIDIA driver (libcuda.so.1): install one, or let "
                f"fastattn.attention compute on the CPU: {error}"
            ) from error
        _succeeded("cuInit", module, status)
        status, version = module.cuDriverGetVersion()
        _succeeded("cuDriverGetVersion", module, status)
        if version < LEAST_CUDA:
            raise RuntimeError(
                "fastattn.cuda needs an NVIDIA driver for CUDA 12.0 or later, this one is for CUDA "
                f"{version // 1000}.{version % 1000 // 10}: {UPDATE}"
            )
        _bindings = module


def _note_fork() -> None:
    global _forked
    _forked = _bindings is not None


os.register_at_fork(after_in_child=_note_fork)


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver and return its result, if it has one; raise on an error."""
    module = driver()
    try:
        status, *results = getattr(module, name)(*arguments)
    except RuntimeError as error:  # of the bindings: the driver has no such function
        raise RuntimeError(f"{name}: {error}: {UPDATE}") from error
    _succeeded(name, module, status)
    return results[0] if results else None


def _succeeded(name: str, module: Any, status: Any) -> None:
    if status:
        _fail(name, module, status)


def _fail(name: str, module: Any, status: Any) -> NoReturn:
    error = getattr(status, "name", f"error {int(status)}")
    found, text = module.cuGetErrorString(status)
    said = "" if found or not text else f" ({text.decode()})"
    advice = ADVICE.get(error)
    message = f"{name}: {error}{said}" + (f": {advice}" if advice else "")
    raise (MemoryError if error == "CUDA_ERROR_OUT_OF_MEMORY" else RuntimeError)(message)


def count() -> int:
    """Return how many GPUs there are."""
    number: int = call("cuDeviceGetCount")
    return number


class Device:
    """A GPU. In a with statement its primary context is current, in the thread that runs it."""

    def __init__(self, ordinal: int) -> None:
        if not 0 <= ordinal < count():
            raise ValueError(f"there is no GPU {ordinal}, only {count()} in all")
        self.ordinal = ordinal
        self.handle = call("cuDeviceGet", ordinal)
        # The bindings return all of the buffer, whatever lies behind the end of the name.
        self.name: str = call("cuDeviceGetName", 256, self.handle).partition(b"\0")[0].decode()
        major = self._attribute("COMPUTE_CAPABILITY_MAJOR")
        self.capability = (major, self._attribute("COMPUTE_CAPABILITY_MINOR"))
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        self.shared_bytes = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        # Retained for the life of the process: other libraries hold it too.
        self.context = call("cuDevicePrimaryCtxRetain", self.handle)

    def _attribute(self, name: str) -> int:
        attribute = getattr(driver().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        number: int = call("cuDeviceGetAttribute", attribute, self.handle)
        return number

    def __enter__(self) -> Self:
        call("cuCtxPushCurrent", self.context)
        return self

    def __exit__(self, *error: object) -> None:
        call("cuCtxPopCurrent")

    def __repr__(self) -> str:
        return f"Device({self.ordinal}): {self.name}"


_devices: dict[int, Device] = {}


def device(ordinal: int) -> Device:
    """Return a GPU by its number, the same object every time."""
    known = _devices.get(ordinal)
    if known is None:
        with _lock:
            known = _devices.get(ordinal)
            if known is None:
                known = _devices[ordinal] = Device(ordinal)
    return known


@contextlib.contextmanager
def _apart_from_captures() -> Iterator[None]:
    """Allow what is no part of a graph while one is captured, by this thread or another."""
    mode = call(
        "cuThreadExchangeStreamCaptureMode",
        driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED,
    )
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", mode)


class Function:
    """A kernel on a device, ready to be launched."""

    def __init__(self, binary: Binary, on: Device) -> None:
        self.binary, self.device = binary, on
        shared = binary.static_shared_bytes + binary.shared_bytes
        if shared > on.shared_bytes:
            raise RuntimeError(
                f"{binary.name} needs {shared} bytes of shared memory in a block, {on.name} has "
                f"{on.shared_bytes}"
            )
        module = driver()
        with on, _apart_from_captures():
            kernel = _kernel(binary)
            if shared > PLAIN_SHARED_BYTES:
                call(
                    "cuKernelSetAttribute",
                    module.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    binary.shared_bytes,
                    kernel,
                    on.handle,
                )
            self.handle = call("cuKernelGetFunction", kernel)
        self._prepare(binary.parameters)

    def _prepare(self, parameters: tuple[str, ...]) -> None:
        """Lay out the arguments once, so that a launch only fills them in."""
        codes, offsets, size = ["<"], [], 0
        for kind in parameters:
            width = struct.calcsize("<" + FORMATS[kind])
            padding = -size % min(width, TENSOR_MAP_ALIGNMENT)
            codes.append(f"{padding}x{FORMATS[kind]}")
            offsets.append(size + padding)
            size += padding + width
        self._struct = struct.Struct("".join(codes))
        self._memory = ctypes.create_string_buffer(size + TENSOR_MAP_ALIGNMENT)
        base = ctypes.addressof(self._memory)
        self._start = -base % TENSOR_MAP_ALIGNMENT
        addresses = [base + self._start + offset for offset in offsets]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._pointers_address = ctypes.addressof(self._pointers)
        self._fill = threading.Lock()

    def launch(self, grid: tuple[int, ...], stream: int, arguments: tuple[Any, ...]) -> None:
        """Start the kernel on a grid of blocks, of 1 to 3 axes, after what is on the stream.

        A tensor map is given as its bytes. A grid of no blocks is no launch.
        """
        x, y, z = (*grid, 1, 1)[:3]
        if x * y * z == 0:
            return
        module, binary, on = driver(), self.binary, self.device
        # The context as in a with statement, without what `call` costs each time.
        _succeeded("cuCtxPushCurrent", module, *module.cuCtxPushCurrent(on.context))
        try:
            with self._fill:  # the driver has copied the arguments when it returns
                self._struct.pack_into(self._memory, self._start, *arguments)
                (status,) = module.cuLaunchKernel(
                    self.handle,
                    *(x, y, z, binary.threads, 1, 1, binary.shared_bytes),
                    stream,
                    self._pointers_address,
                    0,
                )
        finally:
            module.cuCtxPopCurrent()
        _succeeded("cuLaunchKernel", module, status)


_kernels: dict[Binary, Any] = {}
_functions: dict[tuple[Binary, int], Function] = {}


def _kernel(binary: Binary) -> Any:
    """Return the driver's handle of a kernel, for all devices."""
    with _lock:
        if binary not in _kernels:
            library = call("cuLibraryLoadData", binary.cubin, [], [], 0, [], [], 0)
            _kernels[binary] = call("cuLibraryGetKernel", library, binary.name.encode())
        return _kernels[binary]


def load(binary: Binary, on: Device) -> Function:
    """Return a kernel on a device: loaded once, the same object every time."""
    known = _functions.get((binary, on.ordinal))
    if known is None:
        with _lock:
            known = _functions.get((binary, on.ordinal))
            if known is None:
                known = _functions[binary, on.ordinal] = Function(binary, on)
    return known


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    dtype: str,
    on: Device,
) -> bytes:
    """Return a map by which TMA copies tiles of a float16 or bfloat16 array to shared memory.

    Rows of a tile are swizzled over 128 bytes; what lies outside of the array is 0.

    Parameters
    ----------
    address
        of the first element, a multiple of 16.
    shape, box
        Elements of the array and of a tile along each axis, contiguous axis first.
    strides
        Elements from one to the next along each axis but the first, multiples of 8.
    dtype
        "float16" or "bfloat16".
    on
        Whose context is current meanwhile: another thread may have none.
    """
    rank, item = len(shape), 2
    if not (rank == len(box) == len(strides) + 1 and 1 <= rank <= 5):
        raise ValueError(f"a tensor map has 1 to 5 axes: {shape=}, {strides=}, {box=}")
    if address % 16 or any(stride * item % 16 or stride < 0 for stride in strides):
        raise ValueError(f"a tensor map needs whole 16 bytes: {address=:#x}, {strides=}")
    if box[0] * item > SWIZZLE_BYTES or not all(1 <= x <= MOST_BOX for x in box):
        raise ValueError(f"a tile has at most 128 bytes in a row and 256 rows: {box=}")
    module = driver()
    wide, narrow = module.cuuint64_t, module.cuuint32_t
    with on:
        encoded = call(
            "cuTensorMapEncodeTiled",
            getattr(module.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{dtype.upper()}"),
            rank,
            address,
            [wide(x) for x in shape],
            [wide(stride * item) for stride in strides],
            [narrow(x) for x in box],
            [narrow(1)] * rank,
            module.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            module.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            module.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            module.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    return ctypes.string_at(encoded.getPtr(), TENSOR_MAP_BYTES)


def allocate(size: int, stream: int, on: Device) -> int:
    """Return the address of device memory that is there for what follows on the stream."""
    with on:
        return int(call("cuMemAllocAsync", max(size, 1), stream))


def free(address: int, stream: int, on: Device) -> None:
    """Give back what `allocate` gave, after what is on the stream."""
    with on:
        call("cuMemFreeAsync", address, stream)


def clear(address: int, size: int, stream: int, on: Device) -> None:
    """Fill device memory with zeros, after what is on the stream."""
    with on:
        call("cuMemsetD8Async", address, 0, size, stream)


def wait(stream: int, other: int, on: Device) -> None:
    """Let what follows on a stream come after what is on another; the host does not wait."""
    if (stream or LEGACY_STREAM) == (other or LEGACY_STREAM):
        return
    with on:
        event = call("cuEventCreate", int(driver().CUevent_flags.CU_EVENT_DISABLE_TIMING))
        try:
            call("cuEventRecord", event, other)
            call("cuStreamWaitEvent", stream, event, 0)
        finally:
            call("cuEventDestroy", event)  # in fact once it has happened


# (event, objects) until it has happened, oldest first.
_kept: deque[tuple[Any, Any]] = deque()


def keep(stream: int, on: Device, objects: Any) -> None:
    """Refer to objects until the GPU is done with what is on the stream; asked at the next call.

    What a graph reads, its owner must keep: nothing is done while one is captured.
    """
    module = driver()
    with on, _lock, _apart_from_captures():  # which do not allow to ask an event
        _let_go(module)
        idle = module.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        if call("cuStreamIsCapturing", stream) != idle:
            return
        event = call("cuEventCreate", int(module.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        call("cuEventRecord", event, stream)
        _kept.append((event, objects))


def _let_go(module: Any) -> None:
    """Let go of the oldest; those behind one that is not read yet have time."""
    while _kept:
        event, _ = _kept[0]
        status, *_ = module.cuEventQuery(event)
        if status == module.CUresult.CUDA_ERROR_NOT_READY:
            return
        module.cuEventDestroy(event)
        _kept.popleft()


def device_of(address: int) -> int | None:
    """Return the ordinal of the device whose memory an address is in; None if of none."""
    module = driver()
    status, ordinal = module.cuPointerGetAttribute(
        module.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address
    )
    if status == module.CUresult.CUDA_ERROR_INVALID_VALUE:  # CUDA does not know it
        return None
    _succeeded("cuPointerGetAttribute", module, status)
    return int(ordinal)
