# SPDX-License-Identifier: Apache-2.0
"""Whose array is this? Tensors of PyTorch, arrays of JAX and of others, to NumPy and back.

A call asks `library_of` about query, once; the answer reads query, makes room for the result, finds
the `out` that was given, and returns the results as what query is, whatever the other arguments
are. `_arguments.py` asks `as_numpy` about every other argument that is no NumPy array. Nothing is
copied that NumPy can read in place. Neither framework is imported here: an array of one cannot be
met before somebody imported it. Other libraries are asked for DLPack (`_dlpack.py`).

An object is read only if it is its numbers and nothing beside. NumPy's protocols tell: what
overrides how NumPy's functions treat it has a mask, a unit, labels or work still to do, which would
be lost. Such an object is refused, and so is a table.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn import _core, _dlpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# NumPy has no bfloat16 of its own: without ml_dtypes, its bits are passed on.
BFLOAT16_BITS = np.dtype("V2")
INTERFACE = "__cuda_array_interface__"
DLPACK_CUDA, DLPACK_CUDA_MANAGED = _dlpack.CUDA, _dlpack.CUDA_MANAGED  # what a GPU reads
GPU_PLATFORMS = ("gpu", "cuda")  # of JAX
JAX_ALIGNMENT = 64  # bytes: what lies so is not copied on its way to JAX
NUMBERS = (bool, int, float, np.generic)
OVERRIDES = ("__array_ufunc__", "__array_function__")


def framework(x: Any) -> Any:
    """Return the module torch or jax if x is an array of it, else None."""
    for name, array in (("torch", "Tensor"), ("jax", "Array")):
        module = sys.modules.get(name)
        kind = getattr(module, array, None)
        if kind is not None and isinstance(x, kind):
            return module
    return None


def library_of(x: Any) -> Library:
    """Return the library whose array x is: NUMPY, if x is an ndarray."""
    if isinstance(x, np.ndarray):
        return NUMPY
    module = framework(x)
    if module is not None:
        return _Torch(module, x) if module.__name__ == "torch" else _Jax(module, x)
    if hasattr(x, INTERFACE) or _dlpack.device_of(x) in (DLPACK_CUDA, DLPACK_CUDA_MANAGED):
        return _OnGpu(None, x)
    return _Other(None, x)


def as_numpy(name: str, x: Any) -> Any:
    """Return a view of an array that is no NumPy array, in lists too; anything else as it is."""
    if type(x) is np.ndarray or isinstance(x, NUMBERS):
        return x
    if isinstance(x, list | tuple):
        return [as_numpy(name, item) for item in x]
    return library_of(x).array(name, x)


class _PoolOfCaller:
    """Calls inside a with statement run in the calling thread's own pool of threads.

    torch's operators use that pool too: a second one would make them slow (cpp/parallel.h).
    """

    def __enter__(self) -> None:
        _core.use_pool_of_caller(True)

    def __exit__(self, *error: object) -> None:
        _core.use_pool_of_caller(False)


pool_of_caller = _PoolOfCaller()


class Library:
    """What a call does with arrays of NumPy; a subclass says what differs for another library's."""

    def __init__(self, module: Any, query: Any) -> None:
        self.module = module
        self.query = query

    @property
    def on_gpu(self) -> bool:
        """Whether query is on a GPU, and so the call one of `fastattn.cuda`."""
        return False

    def array(self, name: str, x: Any) -> Any:
        """Return the NumPy array that x is, or x if NumPy itself can tell."""
        if type(x) is np.ndarray:
            return x
        if not is_numbers(x):
            raise TypeError(
                f"{name} must be an array of numbers and nothing beside, not {type(x).__name__}, "
                "whose mask, unit, labels or rules would be lost: "
                f"numpy.asarray({name}) is the numbers alone"
            )
        return _of_dlpack(name, x) if _exports(x) else x

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array for a result."""
        return np.empty(shape, dtype)

    def destination(self, name: str, out: Any) -> Any:
        """Return a view of the out that was given."""
        return out

    def compute(self, call: Any, *arguments: Any, **named: Any) -> Any:
        """Return what a call that computes returns, made where the library's own would be."""
        return call(*arguments, **named)

    def to_caller(self, out: Any, *results: Array | None) -> tuple[Any, ...]:
        """Return results as the library's arrays; the first as the out that was given, if any."""
        given = () if out is None else (out,)
        rest = results[len(given) :]
        return *given, *(x if x is None else self.converted(x) for x in rest)

    def converted(self, x: Array) -> Any:
        """Return a result as an array of the library."""
        return x


class _Other(Library):
    """A library that nobody here knows, or none: a list, a number."""

    def destination(self, name: str, out: Any) -> Any:
        return _of_dlpack(name, out, to_write=True) if _exports(out) else out

    def converted(self, x: Array) -> Any:
        namespace = _namespace(self.query)
        if namespace is None:
            return x
        array = namespace.from_dlpack(_dlpack.exporter(x))
        device = getattr(self.query, "device", None)
        if device is None or device == getattr(array, "device", device):
            return array
        return array.to_device(device)


class _Torch(Library):
    @property
    def on_gpu(self) -> bool:
        return bool(self.query.is_cuda)

    def array(self, name: str, x: Any) -> Array:
        check_no_gradient(self.module, name, x)
        check_tensor(self.module, name, x)
        return _named(array_of_tensor(self.module, name, x))

    def destination(self, name: str, out: Any) -> Array:
        if framework(out) is not self.module:
            raise TypeError(f"{name} must be a tensor, as query is, not {type(out).__name__}")
        check_written(out, name)
        return self.array(name, out)

    def compute(self, call: Any, *arguments: Any, **named: Any) -> Any:
        with pool_of_caller:
            return call(*arguments, **named)

    def to_caller(self, out: Any, *results: Array | None) -> tuple[Any, ...]:
        if out is not None:
            written(self.module, out)
        return super().to_caller(out, *results)

    def converted(self, x: Array) -> Any:
        return tensor_of_array(self.module, x)


class _Jax(Library):
    @property
    def on_gpu(self) -> bool:
        if isinstance(self.query, self.module.core.Tracer):
            return False
        return any(each.platform in GPU_PLATFORMS for each in self.query.devices())

    def array(self, name: str, x: Any) -> Array:
        if isinstance(x, self.module.core.Tracer):
            raise TypeError(
                f"{name} is traced by JAX (in jit, grad or vmap): use "
                "fastattn.jax.dot_product_attention there"
            )
        if x.is_deleted():
            raise ValueError(f"{name} must hold numbers, got an array that was deleted or donated")
        if not x.is_fully_addressable:
            raise TypeError(
                f"{name} must be in this process, got an array that is partly in others: "
                f"jax.experimental.multihost_utils.process_allgather({name})"
            )
        devices = sorted(map(str, x.devices()))
        if len(devices) != 1 or next(iter(x.devices())).platform != "cpu":
            raise TypeError(
                f"{name} must be on one CPU device, got an array on {', '.join(devices)}: "
                f"jax.device_put({name}, jax.devices('cpu')[0])"
            )
        try:
            return np.asarray(x)
        except (RuntimeError, TypeError) as error:  # the keys of random numbers, for one
            raise TypeError(f"{name} must be an array that NumPy can read: {error}") from error

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = math.prod(shape) * dtype.itemsize
        space = np.empty(size + JAX_ALIGNMENT, np.uint8)
        start = -space.ctypes.data % JAX_ALIGNMENT
        return space[start : start + size].view(dtype).reshape(shape)

    def destination(self, name: str, out: Any) -> Array:
        raise TypeError(
            f"{name} must not be given if query is a JAX array: these are never written"
        )

    def converted(self, x: Array) -> Any:
        if x.dtype == np.float64:
            with self.module.enable_x64(True):  # query may outlive the scope in which it was made
                return self.module.device_put(x, self.query.sharding)
        return self.module.device_put(x, self.query.sharding)


class _OnGpu(Library):
    """A library, neither PyTorch nor JAX, whose arrays are on a GPU."""

    @property
    def on_gpu(self) -> bool:
        return True

    def array(self, name: str, x: Any) -> Array:
        raise TypeError(f"{name} must be on the CPU, got {type(x).__name__} on a GPU")


NUMPY = Library(np, None)


def is_numbers(x: Any) -> bool:
    """Tell whether an array that is neither of PyTorch nor of JAX is its numbers alone."""
    kind = type(x)
    if issubclass(kind, np.ma.MaskedArray | np.matrix) or hasattr(kind, "__dataframe__"):
        return False
    own = ((getattr(kind, name, None), getattr(np.ndarray, name)) for name in OVERRIDES)
    return all(found is None or found is default for found, default in own)


def check_no_gradient(torch: Any, name: str, x: Any) -> None:
    """Accept a tensor that asks for no gradient."""
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, and this call has no gradient: use fastattn.torch.attention, "
            f"or pass {name}.detach()"
        )


def check_written(out: Any, name: str = "out") -> None:
    """Accept a tensor that holds the numbers that its memory does."""
    if out.is_neg():
        raise ValueError(f"{name} must be written as it is, got a tensor whose negative bit is set")


def check_tensor(torch: Any, name: str, x: Any, on_gpu: bool = False) -> None:
    """Accept a tensor whose values lie, as strides tell, in the memory of the CPU, or of a GPU."""
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, not a nested one (fastattn.varlen_attention takes the "
            "values and offsets of jagged ones)"
        )
    if x.device.type == "meta":
        raise TypeError(f"{name} must hold numbers, got a tensor on the device meta")
    if x.device.type != ("cuda" if on_gpu else "cpu"):
        raise TypeError(f"{name} must be on the CPU, got a tensor on {x.device}: {name}.cpu()")
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got one of layout {x.layout}: {name}.to_dense()"
        )
    if x.is_quantized:
        raise TypeError(
            f"{name} must not be quantised, got a tensor of {x.dtype}: {name}.dequantize()"
        )


def overridden(torch: Any, kind: type[Any]) -> str:
    """Name the method by which a class of tensors says that they are not their memory; "": none."""
    plain = torch.Tensor
    if kind.__torch_dispatch__ is not plain.__torch_dispatch__:
        return "__torch_dispatch__"
    function = kind.__torch_function__
    if function is torch._C._disabled_torch_function_impl:
        return ""
    try:
        same = function.__func__ is plain.__torch_function__.__func__
    except AttributeError:  # no method of the class
        same = False
    return "" if same else "__torch_function__"


def array_of_tensor(torch: Any, name: str, x: Any) -> Array:
    """Return the array that such a tensor's memory is; of bfloat16, its bits."""
    try:
        method = type(x) is not torch.Tensor and overridden(torch, type(x))
        if method:
            raise TypeError(f"the class overrides {method}, and need not be what its memory holds")
        x = x.detach().resolve_neg()
        if not x.data_ptr() and x.numel():  # NumPy would take memory of its own
            raise TypeError("it has no memory")
        if x.dtype == torch.bfloat16:
            bits: Array = x.view(torch.int16).numpy().view(BFLOAT16_BITS)
            return bits
        array: Array = x.numpy()
    except (RuntimeError, TypeError) as error:  # wrapped, faked, or of a dtype that NumPy lacks
        raise TypeError(
            f"{name} must be a tensor that NumPy can read, got {x.dtype} in a "
            f"{type(x).__name__}: {error}"
        ) from error
    return array


def written(torch: Any, x: Any) -> None:
    """Tell torch that a tensor was written, which it cannot know."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def tensor_of_array(torch: Any, x: Array) -> Any:
    """Return the tensor that an array's memory is."""
    if x.dtype == BFLOAT16_BITS or x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def rounded_to(dtype: np.dtype[Any], x: Array) -> Array:
    """Return float32 or float64 numbers in a narrower dtype, if it is one; bits too."""
    if dtype != BFLOAT16_BITS:
        return x.astype(dtype, copy=False)
    single = x.astype(np.float32)
    bits = single.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)  # of a NaN, it might be Inf
    kept = np.where(np.isnan(single), bits | 0x400000, nearest)
    upper: Array = (kept >> 16).astype(np.uint16)
    return np.asarray(upper).view(BFLOAT16_BITS)


def widened(x: Array) -> Array:
    """Return numbers that NumPy can add: float32 if they are bits of bfloat16."""
    if x.dtype != BFLOAT16_BITS:
        return x
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _named(array: Array) -> Array:
    """Return bits of bfloat16 as NumPy's bfloat16, if it has one; other arrays as they are."""
    if array.dtype != BFLOAT16_BITS:
        return array
    try:
        import ml_dtypes
    except ImportError:
        return array
    return array.view(ml_dtypes.bfloat16)


def _exports(x: Any) -> bool:
    """Tell whether x is an array that DLPack says more of than NumPy knows."""
    return hasattr(type(x), "__dlpack__") and not isinstance(x, np.ndarray)


def _of_dlpack(name: str, x: Any, to_write: bool = False) -> Array:
    """Return a view of an array of a library that NumPy does not know."""
    kind = type(x).__name__
    if _dlpack.device_of(x) not in (None, *_dlpack.HOST):
        where = f"device {_dlpack.device_of(x)} of DLPack"
        raise TypeError(f"{name} must be on the CPU, got {kind} on {where}")
    try:
        array = _dlpack.array_of(x, to_write)
    except MemoryError:
        raise
    except Exception as error:
        other = None if to_write else _array_without_dlpack(x)
        if other is None:
            use = "write" if to_write else "read"
            raise TypeError(
                f"{name} must be an array that NumPy can {use}, got {kind}: {error}"
            ) from error
        return other
    return _named(array)


def _array_without_dlpack(x: Any) -> Array | None:
    """Return the array that x also is by another protocol of NumPy's."""
    try:
        array = np.asarray(x)
    except Exception:
        return None
    return None if array.dtype == object else array


def _namespace(x: Any) -> Any:
    """Return the module of functions on such arrays, if it can be given one, else None."""
    find = getattr(type(x), "__array_namespace__", None)
    module = None if find is None else find(x)
    return module if hasattr(module, "from_dlpack") else None
