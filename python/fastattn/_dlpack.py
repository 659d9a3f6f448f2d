# SPDX-License-Identifier: Apache-2.0
"""What lies in a DLPack capsule? Arrays of other libraries become NumPy's and back, in place.

`_arrays.py` asks here about arrays of libraries that it does not know by name. The structs are
DLPack's, version 1 and before (https://dmlc.github.io/dlpack/latest/c_api.html). NumPy's own
`from_dlpack` refuses bfloat16.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

VERSION = (1, 0)
DLTENSOR, DLTENSOR_VERSIONED = b"dltensor", b"dltensor_versioned"  # a capsule's name
READ_ONLY = 1  # the flag
CPU, CUDA, CUDA_HOST, ROCM_HOST, CUDA_MANAGED = 1, 2, 3, 11, 13  # where memory lies
HOST = (CPU, CUDA_HOST, ROCM_HOST)  # what a CPU reads
BFLOAT = 4
KINDS = {0: "int", 1: "uint", 2: "float", BFLOAT: "bfloat", 5: "complex", 6: "bool"}
DTYPES = {
    **{f"{kind}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{name: name for name in ("float16", "float32", "float64", "complex64", "complex128")},
    "bool8": "bool",
    "bfloat16": "V2",  # its bits
}


class Tensor(ctypes.Structure):
    """Where the numbers lie, and what they are."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """A tensor and its owner, as before version 1."""

    _fields_ = (
        ("tensor", Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class ManagedVersioned(ctypes.Structure):
    """A tensor and its owner, since version 1."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


is_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Memory:
    """What NumPy asks for an array's memory. The capsule keeps the memory, and frees it."""

    def __init__(self, capsule: Any, interface: dict[str, Any]) -> None:
        self.capsule = capsule
        self.__array_interface__ = interface


class _OfBfloat16:
    """An array of bfloat16, as NumPy would export it if it knew the dtype."""

    def __init__(self, x: Array) -> None:
        self.bits = x.view(np.int16)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.bits.__dlpack_device__()

    def __dlpack__(self, **wanted: Any) -> Any:
        capsule = self.bits.__dlpack__(**wanted)
        _contents(capsule)[0].code = BFLOAT
        return capsule


def device_of(x: Any) -> int | None:
    """Return the type of the device that x says it is on; None where it says nothing."""
    where = getattr(type(x), "__dlpack_device__", None)
    try:
        return None if where is None else int(where(x)[0])
    except Exception:  # what is wrong with it is said when it is read
        return None


def exporter(x: Array) -> Any:
    """Return x, or for bits of bfloat16, which NumPy cannot export, what exports them."""
    return x if x.dtype.kind != "V" else _OfBfloat16(x)


def array_of(x: Any, to_write: bool = False) -> Array:
    """Return a view of an array of another library; of bfloat16, its bits.

    It is writeable if to_write, and if the library says that it is, which takes version 1.
    """
    capsule = _capsule_of(x, to_write)
    tensor, writeable = _contents(capsule)
    if tensor.device_type not in HOST:
        raise BufferError(f"its memory is on DLPack's device {tensor.device_type}")
    dtype = f"{KINDS.get(tensor.code, f'DLPack code {tensor.code}, ')}{tensor.bits}"
    if dtype not in DTYPES or tensor.lanes != 1:
        lanes = "" if tensor.lanes == 1 else f" in {tensor.lanes} lanes"
        raise BufferError(f"NumPy has no dtype for {dtype}{lanes}")
    held = np.dtype(DTYPES[dtype])
    if tensor.ndim < 0 or (tensor.ndim > 0 and not tensor.shape):
        raise BufferError(f"it has no shape of {tensor.ndim} axes")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides: Any = None  # contiguous
    if tensor.strides:
        strides = tuple(held.itemsize * stride for stride in tensor.strides[: tensor.ndim])
    interface = {
        "version": 3,
        "shape": shape,
        "strides": strides,
        "typestr": held.str,
        "descr": [("", held.str)],  # NumPy 2.1.0 crashes on V2 without it
        "data": ((tensor.data or 0) + tensor.byte_offset, not (to_write and writeable)),
    }
    return np.asarray(_Memory(capsule, interface))


def _capsule_of(x: Any, to_write: bool) -> Any:
    """Return the capsule that x exports; if to_write, of x itself and never of a copy."""
    if to_write:
        return x.__dlpack__(max_version=VERSION, copy=False)
    try:
        return x.__dlpack__(max_version=VERSION)
    except (TypeError, ValueError, NotImplementedError):  # from before there were versions
        return x.__dlpack__()


def _contents(capsule: Any) -> tuple[Tensor, bool]:
    """Return the tensor in a capsule, and whether it says that it may be written."""
    if is_capsule(capsule, DLTENSOR):
        return Managed.from_address(pointer_in(capsule, DLTENSOR)).tensor, False
    if not is_capsule(capsule, DLTENSOR_VERSIONED):
        raise TypeError("__dlpack__ must return a capsule named dltensor")
    managed = ManagedVersioned.from_address(pointer_in(capsule, DLTENSOR_VERSIONED))
    if managed.major != VERSION[0]:
        raise BufferError(f"version {managed.major} of DLPack is not understood, only 1")
    return managed.tensor, not managed.flags & READ_ONLY
