# SPDX-License-Identifier: Apache-2.0
"""Runs the very functions of the CUDA kernels on the CPU, a vector of threads at a time.

What differs between threads is a NumPy array over the lanes of a group (a warp, a warpgroup or the
block), what does not is a Python number; a group is a thread of the operating system, and barriers
between groups are real ones. `run` gives a kernel's function other globals: `cuda`, the types and
each statement of `ptx.py` become what is below. Timing is the worst that is allowed: a copy lands
only when somebody waits for it, shared memory holds NaN until then.

Kernels run here have no `if` on what differs between lanes (but `elect`). Not seen: bank conflicts,
wrong PTX text, threads of one group that drift apart. emulator_sm90.py has the rest of sm_90a.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from numba.cuda import types
from threadpoolctl import threadpool_limits

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PATIENCE = 20  # seconds at a barrier, then it is a deadlock
NAN_BYTE = 0xFF  # of all dtypes: a number of such bytes is NaN
GAP = 4096  # bytes that belong to nobody, between arrays


class Memory:
    """The device's memory: arrays at addresses of their own."""

    def __init__(self) -> None:
        self.top = 1 << 20
        self.arrays: list[tuple[int, np.ndarray]] = []

    def place(self, array: np.ndarray) -> int:
        """Return the address of an array, which is read and written in place."""
        assert array.flags.c_contiguous
        address = self.top
        self.arrays.append((address, array.reshape(-1).view(np.uint8)))
        self.top += (array.nbytes + GAP - 1) // GAP * GAP + GAP
        return address

    def locate(self, addresses: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of the array that all addresses are in, and where they are there."""
        addresses = np.asarray(addresses, np.int64)
        for start, data in self.arrays:
            if ((addresses >= start) & (addresses < start + len(data))).all():
                return data, addresses - start
        raise IndexError(f"no array at {addresses.min():#x}..{addresses.max():#x}")

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return (lanes, size) bytes."""
        data, at = self.locate(addresses)
        return data[at[:, None] + np.arange(size)]

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store (lanes,) numbers."""
        size = values.itemsize
        data, at = self.locate(addresses)
        assert (at % size == 0).all(), "a misaligned store"
        data[at[:, None] + np.arange(size)] = as_bytes(values)


def as_bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


class LocalArray:
    """A cuda.local.array: registers of every lane."""

    def __init__(self, count: int, dtype: Any, lanes: int) -> None:
        self.values = np.empty((count, lanes), dtype)
        if self.values.dtype.kind == "f":
            self.values[:] = np.nan

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[i].copy()

    def __setitem__(self, i: int, value: Any) -> None:
        self.values[i] = value


@dataclass
class Barrier:
    arrived: int = 0
    passed: int = 0
    any_here: bool = False
    any_last: bool = False


@dataclass
class Block:
    """What the groups of a block share."""

    memory: Memory
    shared: np.ndarray
    number: int
    blocks: int
    threads: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    barriers: dict[int, Barrier] = field(default_factory=dict)
    error: BaseException | None = None


class Group:
    """Threads of a block that run in step; `meanings` says what each statement does."""

    def __init__(self, block: Block, threads: np.ndarray) -> None:
        self.block, self.threads, self.lanes = block, threads, len(threads)
        self.copies: list[Any] = []  # not committed yet
        self.committed: list[list[Any]] = []

    def spread(self, x: Any, dtype: Any = np.int64) -> np.ndarray:
        """Return a value of every lane."""
        return np.broadcast_to(np.asarray(x, dtype), (self.lanes,))

    def floats(self, x: Any) -> np.ndarray:
        return self.spread(x, np.float32)

    def within_shared(self, addresses: Any, size: int) -> np.ndarray:
        """Return (lanes, size) places in shared memory."""
        at = self.spread(addresses)
        assert at.min() >= 0, "before shared memory"
        assert at.max() + size <= len(self.block.shared), "beyond shared memory"
        assert (at % size == 0).all(), "misaligned in shared memory"
        return at[:, None] + np.arange(size)

    def shared_bytes(self, addresses: Any, size: int) -> np.ndarray:
        return self.block.shared[self.within_shared(addresses, size)]

    def store_shared(self, addresses: Any, values: np.ndarray) -> None:
        self.block.shared[self.within_shared(addresses, values.itemsize)] = as_bytes(values)

    def arrive(self, number: int, threads: int, waits: bool, mark: bool = False) -> bool:
        """Come to a named barrier; return whether any lane that came was marked."""
        block = self.block
        with block.changed:
            barrier = block.barriers.setdefault(int(number), Barrier())
            here = barrier.passed
            barrier.arrived += self.lanes
            barrier.any_here |= mark
            assert barrier.arrived <= threads, f"too many threads at barrier {number}"
            if barrier.arrived == threads:
                barrier.any_last, barrier.any_here = barrier.any_here, False
                barrier.arrived = 0
                barrier.passed += 1
                block.changed.notify_all()
            elif waits:
                self.wait(lambda: barrier.passed != here, f"barrier {number}")
            return barrier.any_last

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Wait, holding the block's condition."""
        block = self.block
        done = block.changed.wait_for(lambda: block.error is not None or ready(), PATIENCE)
        if block.error is not None:
            raise RuntimeError("another group of the block failed")
        if not done:
            raise RuntimeError(f"deadlock: {what}")

    def finish(self) -> None:
        """Assert that nothing is left undone when the function returns."""
        assert not self.copies + self.committed, "copies are in flight at the end"

    def cuda(self) -> Any:
        """Return what numba.cuda is to a kernel."""
        block = self.block
        return SimpleNamespace(
            threadIdx=SimpleNamespace(x=self.threads if self.lanes > 1 else self.threads[0]),
            blockIdx=SimpleNamespace(x=block.number),
            gridDim=SimpleNamespace(x=block.blocks),
            shared=SimpleNamespace(array=lambda *_, **__: None),
            local=SimpleNamespace(array=lambda n, dtype: LocalArray(n, dtype, self.lanes)),
            syncthreads=lambda: self.arrive(0, block.threads, True),
        )

    def meanings(self) -> dict[str, Callable[..., Any]]:
        """Return what each family of statements does; made for a statement by calling it."""
        block, memory, lanes = self.block, self.block.memory, self.lanes

        def uniform(x):
            x = self.spread(x)
            assert (x == x[0]).all(), "uniform() of what differs"
            return int(x[0])

        def wait_copies(left):
            def wait():
                while len(self.committed) > left:
                    for target, source, size in self.committed.pop(0):
                        assert (source[size > 0] % 16 == 0).all(), "a misaligned copy"
                        data = np.zeros((len(target), 16), np.uint8)
                        if (size > 0).any():
                            data[size > 0] = read(source[size > 0], 16)
                        block.shared[target] = data

            return wait

        def read(addresses, size):
            """Return bytes of arrays that may differ from lane to lane."""
            data = np.empty((len(addresses), size), np.uint8)
            left = np.ones(len(addresses), bool)
            while left.any():
                array, _ = memory.locate(addresses[left][:1])
                start = next(a for a, known in memory.arrays if known is array)
                here = left & (addresses >= start) & (addresses < start + len(array))
                data[here] = memory.read(addresses[here], size)
                left &= ~here
            return data

        def copy_16(target, source, size):
            places = self.within_shared(target, 16)
            block.shared[places] = NAN_BYTE
            self.copies.append((places, self.spread(source).copy(), self.spread(size).copy()))

        def copy_16_if(condition, target, source):
            on = self.spread(condition, bool)
            # Lanes that do not copy may be given an address that is not in shared memory.
            places = self.within_shared(np.where(on, self.spread(target), 0), 16)[on]
            block.shared[places] = NAN_BYTE
            self.copies.append((places, self.spread(source)[on], np.full(on.sum(), 16)))

        def commit_copies():
            self.committed.append(self.copies)
            self.copies = []

        def matrices(transposed):
            def load(d, d_at, address):
                rows = self.shared_bytes(address, 16).view(np.uint16)
                rows = rows.reshape(lanes // 32, 4, 8, 8)  # warp, matrix, row, number
                if transposed:
                    rows = rows.transpose(0, 1, 3, 2)
                pairs = np.ascontiguousarray(rows).view(np.int32).reshape(lanes // 32, 4, 32)
                for i in range(4):
                    d.values[d_at + i] = pairs[:, i].reshape(lanes)

            return load

        def multiply(dtype):
            def halves(x):  # (warps, 8 rows, 8 columns)
                numbers = np.ascontiguousarray(self.spread(x, np.int32)).view(DTYPES[dtype])
                return numbers.astype(np.float32).reshape(lanes // 32, 8, 8)

            def accumulate(d, d_at, a, a_at, b0, b1):
                parts = [halves(a.values[a_at + i]) for i in range(4)]
                left = np.block([[parts[0], parts[2]], [parts[1], parts[3]]])
                right = np.concatenate([halves(b0), halves(b1)], axis=2)
                c = left @ right.transpose(0, 2, 1)  # (warps, 16, 8)
                for h in range(2):
                    for e in range(2):
                        d.values[d_at + h * 2 + e] += c[:, 8 * h : 8 * h + 8, e::2].reshape(lanes)

            return accumulate

        def pack(dtype):
            def rounded(low, high):
                pair = np.stack([self.floats(low), self.floats(high)], 1)
                return pair.astype(DTYPES[dtype]).view(np.int32)[:, 0]

            return rounded

        def load(dtype):
            def loaded(address):
                return read(self.spread(address), np.dtype(dtype).itemsize).view(dtype)[:, 0]

            return loaded

        def store(dtype):
            def stored(condition, address, value):
                writes = self.spread(condition, bool)
                if writes.any():
                    memory.write(self.spread(address)[writes], self.spread(value, dtype)[writes])

            return stored

        def load_float32_if(condition, address, otherwise):
            loads = self.spread(condition, bool)
            result = self.floats(otherwise).copy()
            if loads.any():
                result[loads] = read(self.spread(address)[loads], 4).view(np.float32)[:, 0]
            return result

        def store_float32_4_if(condition, address, v, v_at):
            writes = self.spread(condition, bool)
            if writes.any():
                assert (self.spread(address)[writes] % 16 == 0).all(), "a misaligned store"
                for i in range(4):
                    address_i = self.spread(address)[writes] + 4 * i
                    memory.write(address_i, v.values[v_at + i][writes])

        def load_shared_floats(count):
            def loaded(d, d_at, address):
                numbers = self.shared_bytes(address, 4 * count).view(np.float32)
                d.values[d_at : d_at + count] = numbers.T

            return loaded

        def store_shared_float32_2(address, x, y):
            pair = np.stack([self.floats(x), self.floats(y)], 1)
            self.block.shared[self.within_shared(address, 8)] = as_bytes(pair)

        def extreme(of_floats, of_integers):
            def chosen(x, y):
                x, y = np.asarray(x), np.asarray(y)
                result = (of_floats if "f" in x.dtype.kind + y.dtype.kind else of_integers)(x, y)
                return result if result.ndim else result[()]

            return chosen

        def store_16_if(condition, address, values, at):
            where = self.spread(condition, bool)
            if where.any():
                target, places = memory.locate(self.spread(address)[where])
                assert (places % 16 == 0).all(), "a misaligned store"
                words = np.stack([values[at + i] for i in range(4)], 1)[where]
                target[places[:, None] + np.arange(16)] = as_bytes(words)

        def load_float32_4(d, d_at, address):
            numbers = read(self.spread(address), 16).view(np.float32)
            for i in range(4):
                d[d_at + i] = numbers[:, i]

        store_int32 = store(np.int32)
        simple = {
            "select": lambda c, x, y: np.where(c, x, y)[()],
            "minimum": extreme(np.fmin, np.minimum),
            "maximum": extreme(np.fmax, np.maximum),
            "both": np.logical_and,
            "elect": lambda c: bool(np.any(c)),
            "shared_address": lambda array: 0,
            "uniform": uniform,
            "ex2": lambda x: np.exp2(self.floats(x)),
            "lg2": lambda x: np.log2(self.floats(x)),
            "rcp": lambda x: np.float32(1) / self.floats(x),
            "product": lambda x, y: self.floats(x) * self.floats(y),
            "quotient": lambda x, y: x // y,
            "exchange": lambda x, m: self.floats(x)[np.arange(lanes) ^ m],
            "load_int64": load(np.int64),
            "load_float32": load(np.float32),
            "load_float32_if": load_float32_if,
            "store_int32": lambda address, value: store_int32(
                np.arange(lanes) == 0, address, value
            ),
            "store_int32_if": store_int32,
            "store_float32_if": store(np.float32),
            "store_float32_4_if": store_float32_4_if,
            "store_16_if": store_16_if,
            "load_float32_4": load_float32_4,
            "exchange_int32": lambda x, m: self.spread(x)[np.arange(lanes) ^ m],
            "copy_16": copy_16,
            "copy_16_if": copy_16_if,
            "commit_copies": commit_copies,
            "load_matrices": matrices(False),
            "load_matrices_transposed": matrices(True),
            "load_shared_float32": lambda s: self.shared_bytes(s, 4).view(np.float32)[:, 0],
            "load_shared_float32_2": load_shared_floats(2),
            "load_shared_float32_4": load_shared_floats(4),
            "store_shared_int32": lambda s, v: self.store_shared(s, self.spread(v, np.int32)),
            "store_shared_float32": lambda s, v: self.store_shared(s, self.floats(v)),
            "store_shared_float32_2": store_shared_float32_2,
            "sync_warp": lambda: None,
            "any_in_block": lambda c: int(
                self.arrive(0, block.threads, True, bool(np.any(self.spread(c))))
            ),
        }
        made_for = {"wait_copies": wait_copies, "multiply": multiply, "pack": pack}
        return {
            **{name: lambda statement, f=f: f for name, f in simple.items()},
            **{name: lambda statement, f=f: f(**statement.facts) for name, f in made_for.items()},
        }


def fits_int32(x: Any) -> Any:
    low, high = (np.min(x), np.max(x)) if isinstance(x, np.ndarray) else (x, x)
    assert -(2**31) <= low <= high < 2**31, f"beyond int32: {low}..{high}"
    return x.astype(np.int64) if isinstance(x, np.ndarray) else int(x)


def rebound(function: Callable[..., Any], group: Any) -> Callable[..., Any]:
    """Return a function with every statement, type and device function in it replaced."""
    from numba import cuda

    meanings = group.meanings()
    known: dict[Any, Any] = {
        types.int32: fits_int32,
        types.int64: lambda x: x.astype(np.int64) if isinstance(x, np.ndarray) else int(x),
        types.uint32: np.uint32,
        types.uint64: np.uint64,
        types.float64: np.float64,
        types.float32: lambda x: (
            x.astype(np.float32) if isinstance(x, np.ndarray) else np.float32(x)
        ),
        cuda: group.cuda(),
    }
    done: dict[int, Any] = {}

    def replaced(x: Any) -> Any:
        statement = getattr(x, "statement", None)
        if statement is not None:
            if id(statement) not in done:
                done[id(statement)] = meanings[statement.family](statement)
            return done[id(statement)]
        if type(x).__name__ == "_Intrinsic":  # of Numba, without a statement: known by its name
            return meanings[x._name](None)
        if hasattr(x, "py_func"):
            return translated(x.py_func)
        try:
            return known.get(x, x)
        except TypeError:  # not hashable
            return x

    def translated(f: Callable[..., Any]) -> Callable[..., Any]:
        if id(f) not in done:
            names = {*f.__code__.co_names}
            scope = {k: replaced(v) for k, v in f.__globals__.items() if k in names}
            scope["__builtins__"] = builtins
            cells = tuple(CellType(replaced(cell.cell_contents)) for cell in f.__closure__ or ())
            done[id(f)] = FunctionType(f.__code__, scope, f.__name__, f.__defaults__, cells)
        return done[id(f)]

    return translated(function)


@threadpool_limits.wrap(limits=1)  # small products: more threads would only wait for each other
def run(
    kernel: Any,
    blocks: int,
    arguments: tuple[Any, ...],
    memory: Memory,
    *,
    lanes: int | None = None,
    group_type: type[Group] = Group,
) -> None:
    """Run a kernel's blocks, one after the other.

    lanes: how many threads run in step: all of a block unless given, 32 to see what a barrier too
    few does. A device function may not return from within a branch.
    """
    lanes = lanes or kernel.threads
    for number in range(blocks):
        shared = np.full(kernel.shared_bytes, NAN_BYTE, np.uint8)
        block = Block(memory, shared, number, blocks, kernel.threads)

        def work(threads: np.ndarray, block: Block = block) -> None:
            group = group_type(block, threads)
            try:
                with np.errstate(all="ignore"):
                    rebound(kernel.function, group)(*arguments)
                group.finish()
            except BaseException as error:
                with block.changed:
                    block.error = block.error or error
                    block.changed.notify_all()

        groups = np.arange(kernel.threads).reshape(-1, lanes)
        if len(groups) == 1:
            work(groups[0])
        else:
            workers = [threading.Thread(target=work, args=(group,)) for group in groups]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        if block.error is not None:
            raise block.error
