# SPDX-License-Identifier: Apache-2.0
"""One launch of one kernel, and the small launches that bring arguments where kernels read them.

Called by `_forward.py` and `_backward.py`. Calls `_cache.py` for machine code and `_driver.py` to
run it; tests put an emulator in the place of `ready`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn.cuda import _arrays, _cache, _driver
from fastattn.cuda._arrays import DeviceArray, item_bytes
from fastattn.cuda._build import check_numba
from fastattn.cuda._problem import DeviceOptions, Problem, problems
from fastattn.cuda._recipe import Address, MapOf, Tape

if TYPE_CHECKING:
    from fastattn.cuda.kernels import Kernel

ROW_BYTES = 16  # what tensor-core kernels copy at once: rows begin at multiples of it
# As what numbers of so many bytes are copied.
STORED = {1: "uint8", 2: "uint16", 4: "float32", 8: "float64"}


class Place(NamedTuple):
    """Where a call runs."""

    device: Any  # of _driver
    stream: int
    query: DeviceArray  # whose library memory is from
    tape: Tape | None = None  # where it is noted what the call does


def place_of(query: DeviceArray, stream: int, tape: Tape | None = None) -> Place:
    """Return where a call on such a query runs, if kernels can run there."""
    device = _driver.device(query.device)
    check_numba()
    return Place(device, stream, query, tape)


def ready(kernel: Kernel, device: Any) -> Any:
    """Return a kernel that is compiled and loaded."""
    return _driver.load(_cache.load(kernel, device.capability), device)


def launch(kernel: Kernel, place: Place, blocks: int, *arguments: Any) -> None:
    """Start a kernel; an argument is a number, an array, a MapOf, None, or a tuple of these."""
    function = ready(kernel, place.device)
    flat = tuple(_flat(arguments))
    if place.tape is not None:
        place.tape.launch(function, blocks, flat)
    function.launch((blocks,), place.stream, tuple(map(_passed, flat)))


def _passed(x: Any) -> Any:
    """Return what a launch passes."""
    if isinstance(x, Address):
        return int(x)
    return _driver.tensor_map(*x) if isinstance(x, MapOf) else x


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the parameters that Numba makes of arguments."""
    for x in arguments:
        if x is None:
            yield 0
        elif isinstance(x, DeviceArray):
            item = item_bytes(x.dtype)
            # Of its array's structure, kernels read the address, the shape and the strides.
            yield from (0, 0, math.prod(x.shape), item, x.pointer, *x.shape)
            yield from (stride * item for stride in x.strides)
        elif isinstance(x, tuple) and not isinstance(x, MapOf):
            yield from _flat(x)
        else:
            yield x


def scratch(
    place: Place, shape: tuple[int, ...], dtype: str, is_result: bool = False
) -> DeviceArray:
    """Return memory: for the result, or for what is intermediate."""
    array = _arrays.empty(place.query, shape, dtype, place.stream, is_result)
    return array if place.tape is None else place.tape.taken(array, is_result)


def upload(place: Place, numbers: np.ndarray[Any, Any]) -> DeviceArray:
    """Return numbers of the host, of 8 bytes each, in the device's memory."""
    from fastattn.cuda.kernels import copies

    target = scratch(place, numbers.shape, numbers.dtype.name)
    flat = target._replace(shape=(numbers.size,), strides=(1,), dtype="int64")
    words = np.zeros(-(-numbers.size // copies.NUMBERS) * copies.NUMBERS, np.int64)
    words[: numbers.size] = np.ascontiguousarray(numbers).reshape(-1).view(np.int64)
    for first in range(0, numbers.size, copies.NUMBERS):
        some = tuple(words[first : first + copies.NUMBERS].tolist())
        launch(copies.write(), place, 1, flat, first, some)
    return target


def problems_on(
    place: Place,
    query: DeviceArray,
    key: DeviceArray,
    value: DeviceArray,
    out: DeviceArray,
    lse: DeviceArray,
    options: DeviceOptions,
    more: Any = (),
) -> Iterator[Problem]:
    """Yield the call's problems, with all of their arrays as kernels read them on the device."""

    def moved(x: Any) -> Any:
        return x if x is None or isinstance(x, DeviceArray) else upload(place, x)

    on_device = options._replace(
        alibi_slopes=moved(options.alibi_slopes),
        sinks=moved(options.sinks),
        lengths=moved(options.lengths),
        offsets=moved(options.offsets),
        key_offsets=moved(options.key_offsets),
    )
    for problem in problems(query, key, value, out, lse, on_device, more):
        yield problem._replace(
            lengths=as_int64(place, problem.lengths),
            offsets=as_int64(place, problem.offsets),
            key_offsets=as_int64(place, problem.key_offsets),
        )


def as_int64(place: Place, numbers: DeviceArray | None) -> DeviceArray | None:
    """Return integers of one axis as int64 that follow each other."""
    from fastattn.cuda.kernels import copies

    if numbers is None or (numbers.dtype == "int64" and numbers.strides == (1,)):
        return numbers
    target = scratch(place, numbers.shape, "int64")
    count = numbers.shape[0]
    launch(copies.convert(numbers.dtype), place, copies.blocks(count), target, numbers)
    return target


def is_aligned(array: DeviceArray) -> bool:
    """Tell whether tensor-core kernels can read, or write, an array as it lies."""
    whole = ROW_BYTES // item_bytes(array.dtype)
    steps = zip(array.shape[:-1], array.strides[:-1], strict=True)
    return (
        array.pointer % ROW_BYTES == 0
        and array.strides[-1] == 1
        and all(size == 1 or (stride >= 0 and stride % whole == 0) for size, stride in steps)
    )


def aligned(place: Place, array: DeviceArray) -> DeviceArray:
    """Return an array of (batch, heads, rows, columns), or a copy, whose rows are aligned."""
    if is_aligned(array):
        return array
    target = scratch(place, array.shape, array.dtype)
    copy(place, target, array)
    return target


def copy(place: Place, target: DeviceArray, source: DeviceArray) -> None:
    """Copy an array of four axes."""
    from fastattn.cuda.kernels import copies

    rows = math.prod(source.shape[:3])
    launch(copies.copy(STORED[item_bytes(source.dtype)]), place, rows, target, source)


def add(
    place: Place, target: DeviceArray, source: DeviceArray, shape: tuple[int, int, int]
) -> None:
    """Sum a contiguous array, seen as three axes, over the middle one."""
    from fastattn.cuda.kernels import copies

    outer, count, inner = shape
    flat = target._replace(shape=(outer, inner), strides=(inner, 1))
    whole = source._replace(shape=shape, strides=(count * inner, inner, 1))
    kernel = copies.add(target.dtype, source.dtype)
    launch(kernel, place, copies.blocks(outer * inner), flat, whole)


def clear(place: Place, array: DeviceArray) -> None:
    """Fill a contiguous array with zeros."""
    size = math.prod(array.shape) * item_bytes(array.dtype)
    _driver.clear(array.pointer, size, place.stream, place.device)
