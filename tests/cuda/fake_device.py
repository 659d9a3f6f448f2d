# SPDX-License-Identifier: Apache-2.0
"""A GPU that is none: whole calls of fastattn.cuda on the CPU, launch by launch.

`device` puts it in the place of the driver. Arrays lie in an emulator's memory, at addresses of
their own; a launch runs the kernel's function there, of tensor-core kernels as vectors of threads
(emulator.py), of plain Numba kernels as one greenlet per CUDA thread.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Self

import greenlet
import numpy as np
import pytest
from numba.cuda import types

from fastattn.cuda import _arrays, _attention, _driver, _launch, _recipe
from tests.cuda.emulator import DTYPES, Memory, rebound, run
from tests.cuda.emulator_sm90 import TensorMap
from tests.cuda.emulator_sm90 import run as run_hopper


def junk(shape: Any, dtype: Any) -> np.ndarray:
    """Return memory that nobody has written."""
    return np.full(shape, np.array(np.nan if np.dtype(dtype).kind == "f" else -77).astype(dtype))


class FakeArray:
    """An array on the device, of a library of its own."""

    def __init__(self, device: FakeDevice, values: Any) -> None:
        self.device, self.values = device, values
        base = values if values.base is None else values.base
        self.address = device.address_of(base) + values.ctypes.data - base.ctypes.data
        self.dtype = values.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        values = self.values
        return {
            "version": 3,
            "shape": values.shape,
            "strides": values.strides,
            "typestr": "<V2" if values.dtype == DTYPES["bfloat16"] else values.dtype.str,
            "data": (self.address if values.size else 0, False),
            "stream": None,
        }


class FakeDevice:
    """What `_driver.Device` is to the calls."""

    def __init__(self, capability: tuple[int, int], warps_apart: bool) -> None:
        self.capability, self.ordinal, self.name = capability, 0, "an emulator"
        self.multiprocessors = 3
        self.shared_bytes = 227 * 1024
        self.memory = Memory()
        self.addresses: dict[int, int] = {}
        self.kept: list[Any] = []
        self.launched: list[str] = []
        self.warps_apart = warps_apart

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def address_of(self, base: np.ndarray) -> int:
        if id(base) not in self.addresses:
            self.addresses[id(base)] = self.memory.place(base)
            self.kept.append(base)
        return self.addresses[id(base)]

    def array(self, values: Any) -> FakeArray:
        """Return an array on the device; views of an array share its memory."""
        return FakeArray(self, values)

    def allocate(self, size: int, stream: int, on: Any) -> int:
        return self.memory.place(np.full(max(size, 1), 0xFF, np.uint8))

    def clear(self, address: int, size: int, stream: int, on: Any) -> None:
        if size:
            data, at = self.memory.locate([address, address + size - 1])
            data[at[0] : at[1] + 1] = 0

    def view(self, pointer: int, shape: Any, strides: Any, dtype: Any) -> np.ndarray:
        """Return an array in the device's memory; strides in bytes."""
        if 0 in shape:
            return np.empty(shape, dtype)
        data, at = self.memory.locate([pointer])
        return np.ndarray(shape, dtype, data.data, int(at[0]), strides)

    def values(self, result: Any) -> np.ndarray:
        """Return a result's values."""
        if isinstance(result, FakeArray):
            return result.values
        dtype, shape = result.dtype_name, result.shape
        kind = DTYPES.get(dtype) or np.dtype(dtype)
        strides = [n * kind.itemsize for n in _arrays.contiguous_strides(shape)]
        return self.view(result.pointer, shape, strides, kind).copy()

    def ready(self, kernel: Any, on: Any) -> FakeFunction:
        return FakeFunction(kernel, self)

    def tensor_map(
        self, address: int, shape: Any, strides: Any, box: Any, dtype: str, on: Any
    ) -> TensorMap:
        """Return what the emulator takes for a tensor map."""
        assert address % 16 == 0
        assert all(stride >= 0 and stride % 8 == 0 for stride in strides)
        in_bytes = tuple(2 * stride for stride in (*strides[::-1], 1))
        return TensorMap(self.view(address, shape[::-1], in_bytes, DTYPES[dtype]), box[1])


def single(x: float) -> np.float32:
    """Return what a launch passes as float32: it refuses what is too large."""
    return np.float32(struct.unpack("f", struct.pack("f", x))[0])


class FakeFunction:
    """A kernel that is loaded."""

    def __init__(self, kernel: Any, device: FakeDevice) -> None:
        self.kernel, self.device = kernel, device

    def launch(self, grid: tuple[int, ...], stream: int, flat: tuple[Any, ...]) -> None:
        """Run the kernel."""
        kernel, device, (blocks,) = self.kernel, self.device, grid
        device.launched.append(kernel.name)
        arguments = self.arguments(flat)
        if blocks == 0:
            return
        if any(isinstance(kind, types.Array) for kind in kernel.signature):
            threads = SingleThreads(kernel, blocks)
            for block in range(blocks):
                threads.run(block, arguments)
            return
        numbers = tuple(single(x) if isinstance(x, float) else x for x in arguments)
        if kernel.tensor_maps:
            run_hopper(kernel, blocks, numbers, device.memory)
        else:
            # decode's warps differ in what `uniform` says is the same.
            lanes = 32 if device.warps_apart or "decode" in kernel.name else None
            run(kernel, blocks, numbers, device.memory, lanes=lanes)

    def arguments(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what Numba makes of parameters."""
        parameters = iter(flat)

        def argument(kind: Any) -> Any:
            if isinstance(kind, types.Array):
                _, _, size, item, pointer = itertools.islice(parameters, 5)
                shape = tuple(itertools.islice(parameters, kind.ndim))
                strides = tuple(itertools.islice(parameters, kind.ndim))
                assert size == math.prod(shape)
                dtype = np.dtype(bool if kind.dtype == types.boolean else kind.dtype.name)
                assert item == dtype.itemsize
                return self.device.view(pointer, shape, strides, dtype)
            if isinstance(kind, types.BaseTuple):
                items = map(argument, kind.types)
                return kind.instance_class(*items) if hasattr(kind, "fields") else tuple(items)
            x = next(parameters)
            return None if kind == types.none else x

        arguments = tuple(map(argument, self.kernel.signature))
        assert not list(parameters), self.kernel.name
        return arguments


class SingleThreads:
    """numba.cuda to the threads of a plain Numba kernel: greenlets that take turns at barriers."""

    def __init__(self, kernel: Any, blocks: int) -> None:
        self.threads = kernel.threads
        self.gridDim = SimpleNamespace(x=blocks)
        self.shared = SimpleNamespace(array=self._shared_array)
        self.local = SimpleNamespace(array=junk)
        function = rebound(kernel.function, self)

        def run(*arguments: Any) -> None:
            with np.errstate(all="ignore"):  # a greenlet has settings of its own
                function(*arguments)

        self.function = run

    def run(self, block: int, arguments: tuple[Any, ...]) -> None:
        """Run a block's threads, each up to the next barrier, until all have ended."""
        self.blockIdx = SimpleNamespace(x=block)
        self.arrays: dict[int, np.ndarray] = {}  # told by the order in which they are asked for
        self.vote = self.voted = False
        self.hub = greenlet.getcurrent()
        team = [greenlet.greenlet(self.function) for _ in range(self.threads)]
        asked = [0] * self.threads
        given = [arguments] * self.threads
        while any(not thread.dead for thread in team):
            for i, thread in enumerate(team):
                if not thread.dead:
                    self.threadIdx = SimpleNamespace(x=i)
                    self.asked = asked[i]
                    thread.switch(*given[i])
                    asked[i], given[i] = self.asked, ()
            self.voted, self.vote = self.vote, False

    def _shared_array(self, shape: Any, dtype: Any) -> np.ndarray:
        self.asked += 1
        return self.arrays.setdefault(self.asked, junk(shape, dtype))

    def syncthreads(self) -> None:
        self.hub.switch()

    def syncthreads_or(self, condition: Any) -> int:
        self.vote |= bool(condition)
        self.hub.switch()
        return int(self.voted)

    def cuda(self) -> SingleThreads:
        return self

    def meanings(self) -> dict[str, Any]:
        def widen(dtype: Any) -> Any:
            return lambda _: lambda bits: np.float32(np.uint16(bits).view(dtype))

        def narrow(dtype: Any) -> Any:
            return lambda _: lambda x: np.float32(x).astype(dtype).view(np.uint16)

        return {
            **{f"_widen_{name}": widen(dtype) for name, dtype in DTYPES.items()},
            **{f"_narrow_{name}": narrow(dtype) for name, dtype in DTYPES.items()},
        }


@contextlib.contextmanager
def fake_device(capability: tuple[int, int], warps_apart: bool = False) -> Iterator[FakeDevice]:
    """Put a device that is none in the place of the driver.

    warps_apart: the warps of mma kernels run for themselves, which is slower, and shows where one
    does not wait for the others.
    """
    device = FakeDevice(capability, warps_apart)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "ready", device.ready)
        patch.setattr(_recipe, "tapes", {})
        patch.setattr(_attention, "tapes", _recipe.tapes)
        patch.setattr(_driver, "device", lambda ordinal: device)
        patch.setattr(_driver, "allocate", device.allocate)
        patch.setattr(_driver, "free", lambda *_: None)
        patch.setattr(_driver, "clear", device.clear)
        patch.setattr(_driver, "keep", lambda *_: None)
        patch.setattr(_driver, "wait", lambda *_: None)
        patch.setattr(_driver, "device_of", lambda address: 0)
        patch.setattr(_driver, "tensor_map", device.tensor_map)
        yield device
