# SPDX-License-Identifier: Apache-2.0
"""Whose CUDA array is this? Where it lies, on which stream it is ready, and results in kind.

Called by `_attention.py` and `_problem.py` for every array on a GPU; calls `_driver.py`. Understood
are tensors of PyTorch, arrays of CuPy, JAX and Numba, and all that has `__cuda_array_interface__`
or DLPack. Nothing is copied, and no library is imported: an array of one cannot be met before.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import sys
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._arguments import FLOAT_NAMES, may_share_memory, overlaps_itself, whole_number
from fastattn._arrays import (
    DLPACK_CUDA,
    DLPACK_CUDA_MANAGED,
    INTERFACE,
    check_no_gradient,
    check_tensor,
    library_of,
)
from fastattn._dlpack import (
    DLTENSOR,
    DLTENSOR_VERSIONED,
    KINDS,
    READ_ONLY,
    VERSION,
    Managed,
    ManagedVersioned,
    Tensor,
    is_capsule,
    pointer_in,
)
from fastattn.cuda import _driver

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

ITEM_BYTES = {"bfloat16": 2}  # of what NumPy has no name for


class DeviceArray(NamedTuple):
    """An array on a GPU, as a kernel takes it."""

    pointer: int  # of the first element
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str
    device: int  # its ordinal
    owner: Any  # keeps the memory; of a result, what the caller gets
    library: str  # torch, jax, cupy, numba or other
    writeable: bool = True


def library_name(x: Any) -> str:
    """Return the name of the library that x is an array of: torch, jax, cupy, numba or other."""
    for name, module, kind in (
        ("torch", "torch", "Tensor"),
        ("jax", "jax", "Array"),
        ("cupy", "cupy", "ndarray"),
        ("numba", "numba.cuda.cudadrv.devicearray", "DeviceNDArrayBase"),
    ):
        array = getattr(sys.modules.get(module), kind, None)
        if array is not None and isinstance(x, array):
            return name
    return "other"


def current_stream(library: str, query: Any) -> int:
    """Return the stream that the caller's library is working on, on query's device."""
    if library == "torch":
        stream: int = sys.modules["torch"].cuda.current_stream(query.device).cuda_stream
        return stream
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream(query.device.id).ptr)
    return _driver.DEFAULT_STREAM


@contextlib.contextmanager
def working_on(library: str, query: Any, stream: int | None) -> Iterator[int]:
    """Give the stream of a call; query's library takes memory for that stream meanwhile.

    Memory that was taken for another stream would be given to others of that stream as soon as it
    is let go of, before the kernels have read it.
    """
    given = None if stream is None else whole_number("stream", stream)
    current = current_stream(library, query)
    if given is None or given == current:
        yield current
        return
    inside: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    is_default = given in (_driver.DEFAULT_STREAM, _driver.LEGACY_STREAM)
    if library == "torch":
        cuda, device = sys.modules["torch"].cuda, query.device
        inside = cuda.stream(
            cuda.default_stream(device) if is_default else cuda.ExternalStream(given, device)
        )
    elif library == "cupy":
        cuda = sys.modules["cupy"].cuda
        inside = cuda.Stream.null if is_default else cuda.ExternalStream(given)
    with inside:
        yield given


def operands(
    library: str, query: Any, key: Any, value: Any, stream: int
) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
    """Return where query, of that library, and key and value lie."""
    q = device_array("query", query, stream, library=library)
    return q, device_array("key", key, stream, q), device_array("value", value, stream, q)


def device_array(
    name: str,
    x: Any,
    stream: int,
    query: DeviceArray | None = None,
    dtypes: tuple[str, ...] = FLOAT_NAMES,
    library: str = "",
) -> DeviceArray:
    """Return where an argument lies; what follows on the stream may read it.

    It must have one of the dtypes, and lie on the device of query if that is given. Its library is
    found out unless it is known.
    """
    library = library or library_name(x)
    if library == "torch":
        array = _of_torch(name, x)
    elif library == "jax":
        array = _of_jax(name, x, stream)
    elif hasattr(x, INTERFACE):
        array = _of_interface(name, x, library, stream, query)
    elif hasattr(x, "__dlpack__"):
        array = _of_dlpack(name, x, library, stream)
    else:
        raise TypeError(f"{name} must be an array on the GPU, not {type(x).__name__}")
    if query is not None and array.device != query.device:
        raise ValueError(
            f"{name} must be on the GPU of query, cuda:{query.device}, not cuda:{array.device}"
        )
    if array.dtype not in dtypes:
        kinds = ", ".join(dtypes[:-1]) + " or " + dtypes[-1] if len(dtypes) > 1 else dtypes[0]
        raise TypeError(f"{name} must be an array of {kinds}, not {array.dtype}")
    if array.pointer % item_bytes(array.dtype):
        raise ValueError(
            f"{name} must be aligned to its dtype, {array.dtype}, got address {array.pointer:#x}"
        )
    return array


def destination(
    out: Any,
    query: DeviceArray,
    shape: tuple[int, ...],
    dtype: str,
    inputs: Iterable[DeviceArray],
    stream: int,
) -> DeviceArray:
    """Return the out that was given, if the result can be written there while inputs are read."""
    if query.library == "jax":
        raise TypeError("out must not be given if query is a JAX array: these are never written")
    if library_name(out) != query.library:
        kind = "a tensor" if query.library == "torch" else f"an array of {query.library}"
        wanted = "an array on the GPU" if query.library == "other" else kind
        raise TypeError(f"out must be {wanted}, as query is, not {type(out).__name__}")
    if query.library == "torch" and out.is_neg():
        raise ValueError("out must be written as it is, got a tensor whose negative bit is set")
    array = device_array("out", out, stream, query, (dtype,))
    if array.shape != shape:
        raise ValueError(
            f"out must have the shape of the result, {shape}, got out.shape={array.shape}"
        )
    if not array.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if math.prod(shape) and shape[-1] > 1 and array.strides[-1] != 1:
        raise ValueError(
            f"out must be contiguous along its last axis, got strides of {array.strides} elements"
        )
    addresses = _addresses(array)
    if addresses.size and overlaps_itself(addresses):
        raise ValueError(f"out must not overlap itself, got strides of {array.strides} elements")
    if any(may_share_memory(addresses, _addresses(x)) for x in inputs):
        raise ValueError("out must not overlap an input, got an array that shares its memory")
    return array


def empty(
    query: DeviceArray,
    shape: tuple[int, ...],
    dtype: str,
    stream: int,
    is_result: bool = False,
) -> DeviceArray:
    """Return memory for a result, or for intermediate ones, of the library that query is of.

    It is there for what follows on the stream; with PyTorch and CuPy, in their pools, which graphs
    know. PyTorch's result is laid out like query, as its own function's is.
    """
    x: Any
    if query.library == "torch":
        torch = sys.modules["torch"]
        if is_result and shape == query.shape and query.strides[-1:] == (1,):
            x = torch.empty_like(query.owner)
            return query._replace(pointer=x.data_ptr(), strides=tuple(x.stride()), owner=x)
        x = torch.empty(shape, dtype=getattr(torch, dtype), device=query.owner.device)
        pointer = x.data_ptr()
    elif query.library == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(query.device):
            # bfloat16 has a name only in the array that came with it.
            x = cupy.empty(shape, query.owner.dtype if dtype == query.dtype else dtype)
        pointer = x.data.ptr
    elif query.library == "numba" and dtype not in ITEM_BYTES:
        numba = sys.modules["numba.cuda"]
        with numba.gpus[query.device]:
            x = numba.device_array(shape, dtype)
        pointer = getattr(x, INTERFACE)["data"][0]
    else:
        x = OwnArray(shape, dtype, stream, query.device)
        pointer = x.pointer
    strides = contiguous_strides(shape)
    return DeviceArray(pointer, shape, strides, dtype, query.device, x, query.library)


def to_caller(query: DeviceArray, result: DeviceArray, is_given: bool = False) -> Any:
    """Return a result, written by what is on the stream, as what query is.

    is_given: it is the out that the caller gave.
    """
    if query.library == "jax":
        return sys.modules["jax"].dlpack.from_dlpack(result.owner)
    if is_given and query.library == "torch" and not result.owner.is_inference():
        # It was written without torch's knowledge.
        sys.modules["torch"].autograd.graph.increment_version(result.owner)
    return result.owner


def keep(stream: int, arrays: Iterable[DeviceArray]) -> None:
    """Keep memory until all that is on the stream has read it.

    Needed where a library may give it to others on streams that do not wait for this one: PyTorch,
    CuPy and Numba do not.
    """
    foreign = [array for array in arrays if array.library in ("jax", "other")]
    if foreign:
        _driver.keep(stream, _driver.device(foreign[0].device), [x.owner for x in foreign])


def item_bytes(dtype: str) -> int:
    """Return the bytes of an element."""
    return ITEM_BYTES.get(dtype) or np.dtype(dtype).itemsize


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of an array whose rows follow each other."""
    inner = itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1)
    return tuple(reversed(list(inner))) if shape else ()


def _addresses(array: DeviceArray) -> NDArray[Any]:
    """Return an array at the same addresses, which must not be read: the host has not got them."""
    item = item_bytes(array.dtype)

    class Holder:
        __array_interface__ = {  # noqa: RUF012
            "version": 3,
            "shape": array.shape,
            "strides": tuple(stride * item for stride in array.strides),
            "typestr": f"<u{item}",
            "data": (array.pointer or item, False),  # NumPy 1 refuses the 0 of an empty array
        }

    return np.asarray(Holder())


# PyTorch.


def _of_torch(name: str, x: Any) -> DeviceArray:
    torch = sys.modules["torch"]
    check_no_gradient(torch, name, x)
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, not a nested one")
    if x.device.type not in ("cuda", "meta"):
        raise TypeError(
            f"{name} must be on the GPU, got a tensor on {x.device}: {name}.to(query.device)"
        )
    check_tensor(torch, name, x, on_gpu=True)
    if x.is_neg():
        x = x.resolve_neg()
    plain = type(x) is torch.Tensor or type(x) is torch.nn.Parameter
    pointer = x.data_ptr() if plain else _pointer_of_subclass(x)
    if not pointer and x.numel():
        raise TypeError(
            f"{name} must be a tensor with memory of its own, got {x.dtype} in a {type(x).__name__}"
        )
    dtype = str(x.dtype).removeprefix("torch.")
    return DeviceArray(
        pointer, tuple(x.shape), tuple(x.stride()), dtype, x.device.index, x, "torch"
    )


def _pointer_of_subclass(x: Any) -> int:
    """Return the address of the numbers in a tensor that may be a wrapper without any; then 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a faked tensor warns
        try:
            pointer: int = x.data_ptr()
        except RuntimeError:
            return 0
    return pointer


# __cuda_array_interface__, CuPy and Numba among others.


def _of_interface(
    name: str, x: Any, library: str, stream: int, query: DeviceArray | None
) -> DeviceArray:
    interface = getattr(x, INTERFACE)
    if interface.get("mask") is not None:
        raise TypeError(f"{name} must not be a masked array")
    pointer, read_only = interface["data"]
    pointer, shape = int(pointer or 0), tuple(map(int, interface["shape"]))
    dtype = _dtype_of_interface(x, interface["typestr"])
    if dtype not in ITEM_BYTES and dtype.startswith("void") and hasattr(x, "__dlpack__"):
        return _of_dlpack(name, x, library, stream)  # which has a name for bfloat16
    strides = interface.get("strides")
    if strides is None:
        strides = contiguous_strides(shape)
    else:
        strides = _in_elements(name, strides, item_bytes(dtype))
    device = _ordinal(name, x, library, pointer, query)
    ready = interface.get("stream")
    if ready == 0:
        raise ValueError(
            f"{name}.{INTERFACE} has stream 0, which is ambiguous: 1 is the legacy default stream, "
            "2 the per-thread one"
        )
    if ready is not None:
        _driver.wait(stream, int(ready), _driver.device(device))
    return DeviceArray(pointer, shape, strides, dtype, device, x, library, not read_only)


def _dtype_of_interface(x: Any, typestr: str) -> str:
    named = np.dtype(typestr)
    if named.kind == "V":  # bfloat16 is two bytes of no kind, unless the array says more
        return str(getattr(getattr(x, "dtype", None), "name", named.name))
    return named.name if named.isnative else f"{named.name} in another byte order"


def _in_elements(name: str, strides: Iterable[int], item: int) -> tuple[int, ...]:
    strides = tuple(map(int, strides))
    if any(stride % item for stride in strides):
        raise ValueError(
            f"{name} must have strides of whole elements of {item} bytes, got {strides} bytes"
        )
    return tuple(stride // item for stride in strides)


def _ordinal(name: str, x: Any, library: str, pointer: int, query: DeviceArray | None) -> int:
    """Return the device of an array whose interface does not say it."""
    if library == "cupy":
        return int(x.device.id)
    if not pointer:  # nothing in it: anywhere
        return query.device if query else 0
    device = _driver.device_of(pointer)
    if device is None:
        raise TypeError(f"{name} must be on the GPU, got address {pointer:#x}, unknown to CUDA")
    return device


# JAX and DLPack.


def _of_jax(name: str, x: Any, stream: int) -> DeviceArray:
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise TypeError(
            f"{name} is traced by JAX (in jit, grad or vmap): fastattn.cuda takes arrays that hold "
            "numbers"
        )
    if x.is_deleted():
        raise ValueError(f"{name} must hold numbers, got an array that was deleted or donated")
    devices = sorted(map(str, x.devices()))
    if len(devices) != 1 or not library_of(x).on_gpu:
        raise TypeError(f"{name} must be on one GPU, got an array on {', '.join(devices)}")
    return _of_dlpack(name, x, "jax", stream)._replace(writeable=False)


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
# The same questions to a capsule that is being destroyed, and must not be referred to again.
_dying_capsule_is = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_dying_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _of_dlpack(name: str, x: Any, library: str, stream: int) -> DeviceArray:
    if x.__dlpack_device__()[0] not in (DLPACK_CUDA, DLPACK_CUDA_MANAGED):
        raise TypeError(f"{name} must be on the GPU, got {type(x).__name__} on another device")
    wanted = stream or _driver.LEGACY_STREAM  # DLPack's 0 is ambiguous
    try:
        capsule = x.__dlpack__(stream=wanted, max_version=VERSION)
    except TypeError:  # of before versions
        capsule = x.__dlpack__(stream=wanted)
    writeable = True
    if is_capsule(capsule, DLTENSOR):
        tensor = Managed.from_address(pointer_in(capsule, DLTENSOR)).tensor
    elif is_capsule(capsule, DLTENSOR_VERSIONED):
        managed = ManagedVersioned.from_address(pointer_in(capsule, DLTENSOR_VERSIONED))
        if managed.major != VERSION[0]:
            raise TypeError(f"{name} has version {managed.major} of DLPack, 1 is understood")
        writeable = not managed.flags & READ_ONLY
        tensor = managed.tensor
    else:
        raise TypeError(f"{name}.__dlpack__() must return a capsule named dltensor")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous_strides(shape)
    kind = KINDS.get(tensor.code, f"DLPack code {tensor.code}, ")
    dtype = kind if kind == "bool" else f"{kind}{tensor.bits}"
    if tensor.lanes != 1:
        dtype += f" in {tensor.lanes} lanes"
    # Nobody takes what is in the capsule; so the capsule gives it back when it is destroyed.
    return DeviceArray(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        strides,
        dtype,
        tensor.device_id,
        capsule,
        library,
        writeable,
    )


def _give_back(pointer: int, on: _driver.Device, stream: int, readers: set[int]) -> None:
    """Free memory after what is on its stream, and on those that it was given to."""
    with contextlib.suppress(RuntimeError, MemoryError):  # CUDA failed before, and said so
        for reader in readers:
            _driver.wait(stream, reader, on)
        _driver.free(pointer, stream, on)


class OwnArray:
    """A contiguous array in device memory of ours, for libraries that offer none for results."""

    def __init__(self, shape: tuple[int, ...], dtype: str, stream: int, device: int) -> None:
        self.shape, self.dtype_name, self.device = shape, dtype, device
        self._on, self._stream, self._readers = _driver.device(device), stream, set[int]()
        size = math.prod(shape) * item_bytes(dtype)
        self.pointer = _driver.allocate(size, stream, self._on)
        given_back = weakref.finalize(
            self, _give_back, self.pointer, self._on, stream, self._readers
        )
        given_back.atexit = False  # the end of the process gives back all

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What most libraries ask for; it has no name for bfloat16."""
        if self.dtype_name in ITEM_BYTES:
            raise AttributeError(f"{INTERFACE} cannot say {self.dtype_name}: use DLPack")
        return {
            "version": 3,
            "shape": self.shape,
            "strides": None,
            "typestr": np.dtype(self.dtype_name).str,
            "data": (self.pointer, False),
            "stream": self._stream or _driver.LEGACY_STREAM,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's name of the GPU."""
        return DLPACK_CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return a capsule, whose memory may be read by what follows on the stream."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("fastattn's results are given to their own GPU, without a copy")
        if stream != -1:  # -1: the other side sees to it
            reader = _driver.LEGACY_STREAM if stream is None else stream
            _driver.wait(reader, self._stream, self._on)
            self._readers.add(reader)
        ndim = len(self.shape)
        sizes = (ctypes.c_int64 * ndim)(*self.shape)
        strides = (ctypes.c_int64 * ndim)(*contiguous_strides(self.shape))
        kind = self.dtype_name.rstrip("0123456789")
        code = next(code for code, known in KINDS.items() if known == kind)
        managed = Managed(
            Tensor(
                self.pointer,
                DLPACK_CUDA,
                self.device,
                ndim,
                code,
                8 * item_bytes(self.dtype_name),
                1,
                sizes,
                strides,
                0,
            ),
            None,
            ctypes.cast(_deleter, ctypes.c_void_p),
        )
        address = ctypes.addressof(managed)
        with _exports_lock:
            _exports[address] = (managed, self)
        return _new_capsule(address, DLTENSOR, ctypes.cast(_destructor, ctypes.c_void_p))


# What is out in capsules, until its deleter is called.
_exports: dict[int, tuple[Managed, OwnArray]] = {}
_exports_lock = threading.RLock()


def _delete(address: int) -> None:
    with _exports_lock:
        _exports.pop(address, None)


def _destroy(capsule: int) -> None:
    if _dying_capsule_is(capsule, DLTENSOR):  # else somebody took what was in it
        _delete(_dying_capsule_pointer(capsule, DLTENSOR))


_deleter, _destructor = _Deleter(_delete), _Destructor(_destroy)
