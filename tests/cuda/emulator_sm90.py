# SPDX-License-Identifier: Apache-2.0
"""Runs kernels for Hopper on the CPU: what `emulator` does, for warpgroups that work apart.

Called by the tests of `wgmma` and `wgmma_backward`. Each warpgroup is one lock-stepped group of 128
lanes, in a thread of its own, of which one runs at a time: it hands over where it arrives at a
barrier, starts a copy, or has to wait. So a run is repeatable, and a deadlock is found at once.

Everything asynchronous is as late and as destructive as the hardware may be. A copy overwrites its
target with NaN when it starts, and lands when somebody waits for its barrier. A matrix product
leaves NaN in its accumulators until the wait; it reads its operands when it starts or when it is
waited for (`Timing.early_products`), so that tests run both. `wgmma` is emulated from its PTX text.
"""

from __future__ import annotations

import functools
import random
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_limits

from tests.cuda import emulator

LANES = 128
PTX_DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


class Deadlock(RuntimeError):
    """No warpgroup can go on."""


class Fault(RuntimeError):
    """What the hardware does not allow, or leaves undefined."""


class Aborted(BaseException):
    """Another warpgroup failed."""


@dataclass(frozen=True)
class Timing:
    """Who runs next, and when products read their operands.

    Whoever arrives at a barrier or starts something lets another run: the next one, or a random
    one if there is a seed; the slow one only when no other can.
    """

    early_products: bool = False
    seed: int | None = None
    slow: int | None = None


class TensorMap:
    """A tensor map: a 4-D array, its last axis contiguous, in boxes of `rows` x 64 values."""

    def __init__(self, array, rows):
        self.array, self.rows = array, rows
        if any(stride % 16 for stride in array.strides[:3]) or array.strides[3] != 2:
            raise Fault(f"TMA does not take strides {array.strides}")
        if rows > 256:
            raise Fault(f"a box of {rows} rows")


class Turns:
    """Lets one of n threads run at a time."""

    def __init__(self, n, timing):
        self.changed = threading.Condition()
        self.turn = 0
        self.ready = [lambda: True] * n  # may it go on?
        self.running = set(range(n))
        self.error = None
        self.slow = timing.slow
        self.random = None if timing.seed is None else random.Random(timing.seed)

    def _next(self, me):
        """Return who can run, others first."""
        n = len(self.ready)
        order = [(me + 1 + i) % n for i in range(n)]
        able = [i for i in order if i in self.running and self.ready[i]()]
        if self.slow in able and len(able) > 1:
            able.remove(self.slow)
        if self.random and able:
            return self.random.choice(able)
        return able[0] if able else None

    def _hand_over(self, me):
        following = self._next(me)
        if following is None and self.running and self.error is None:
            self.error = Deadlock(f"warpgroups {sorted(self.running)} wait for ever")
        self.turn = following
        self.changed.notify_all()

    def _until_mine(self, me):
        self.changed.wait_for(lambda: self.turn == me or self.error is not None)
        if self.error is not None:
            raise Aborted

    def begin(self, me):
        """Wait for the first turn."""
        with self.changed:
            self._until_mine(me)

    def offer(self, me):
        """Let the others run."""
        with self.changed:
            self._hand_over(me)
            self._until_mine(me)

    def wait(self, me, ready):
        """Go on when `ready()`."""
        with self.changed:
            self.ready[me] = ready
            if not ready() or self.random or me == self.slow:
                self._hand_over(me)
                self._until_mine(me)
            self.ready[me] = lambda: True

    def end(self, me, error=None):
        """Leave, perhaps because of an error."""
        with self.changed:
            self.running.discard(me)
            if error is not None and self.error is None:
                self.error = error
            self._hand_over(me)


@dataclass
class Named:
    """A named barrier."""

    threads: int
    arrived: int = 0
    passed: int = 0
    marked: bool = False  # by a thread that waits now
    was_marked: bool = False  # by a thread that passed last


@dataclass
class Mbarrier:
    """A barrier in shared memory."""

    count: int
    pending: int
    bytes: int = 0  # announced, not yet there
    phase: int = 0

    def advance(self):
        if self.pending < 0:
            raise Fault("more arrivals at an mbarrier than it counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class Block:
    """What the warpgroups of a block share."""

    memory: emulator.Memory
    shared: np.ndarray
    number: int
    blocks: int
    threads: int
    timing: Timing
    turns: Turns
    mbarriers: dict[int, Mbarrier] = field(default_factory=dict)
    copies: dict[int, list[Any]] = field(default_factory=dict)  # by mbarrier: what lands there
    barriers: dict[int, Named] = field(default_factory=dict)


def swizzled(address):
    """Return where TMA's 128-byte mode puts what would be at an address."""
    return address ^ ((address >> 3) & 0x70)


@functools.cache
def _fragment(n):
    """Return (rows, columns) of a thread's n / 2 accumulators: arrays (n / 2, 128)."""
    lane, warp = np.arange(LANES) % 32, np.arange(LANES) // 32
    element = np.arange(n // 2)[:, None]
    rows = warp * 16 + lane // 4 + 8 * (element // 2 % 2)
    return rows, element // 4 * 8 + lane % 4 * 2 + element % 2


@dataclass(frozen=True)
class Product:
    """What a wgmma statement does, read from its text."""

    n: int
    dtype: type
    accumulate: bool
    a_steps: tuple  # descriptor steps, or slices of the registers
    b_steps: tuple
    a_trans: bool
    b_trans: bool
    a_shared: bool


_STEP = re.compile(r"add\.s64 (d[ab]), %([ab]), (-?\d+);")
_MULTIPLY = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2 %d, "
    r"(?:da|%a\[(\d+):(\d+)\]), db, (first|next), 1, 1, (?:([01]), )?([01]);"
)
_PREDICATE = re.compile(r"setp\.ne\.b32 (first|next), ([01]), 0;")


@functools.cache
def product_of(text):
    """Parse a wgmma statement; anything unknown in it is an error."""
    predicates = {name: value == "1" for name, value in _PREDICATE.findall(text)}
    here, a_steps, b_steps, seen = {}, [], [], set()
    at = text.index("wgmma.fence.sync.aligned;")
    body = text[at:].removeprefix("wgmma.fence.sync.aligned;").strip()
    while not body.startswith("wgmma.commit_group.sync.aligned; }"):
        if match := _STEP.match(body):
            here[match[1]] = int(match[3])
            if match[1][1] != match[2]:
                raise Fault(f"descriptors mixed up: {match[0]}")
        elif match := _MULTIPLY.match(body):
            n, kind, begin, end, predicate, a_trans, b_trans = match.groups()
            accumulates = predicates[predicate]
            a_steps.append(here["da"] if begin is None else (int(begin), int(end)))
            b_steps.append(here["db"])
            if len(b_steps) == 1:
                accumulate = accumulates
            elif not accumulates:
                raise Fault("a later wgmma of a statement overwrites the earlier one's sum")
            if (begin is None) != (a_trans is not None):
                raise Fault("a_trans goes with A in shared memory")
            seen.add((int(n), kind, begin is None, a_trans, b_trans))
        else:
            raise Fault(f"not understood: {body[:60]}")
        body = body[match.end() :].strip()
    ((n, kind, a_shared, a_trans, b_trans),) = seen
    return Product(
        n,
        PTX_DTYPES[kind],
        accumulate,
        tuple(a_steps),
        tuple(b_steps),
        a_trans == "1",
        b_trans == "1",
        a_shared,
    )


@functools.cache
def _places(rows, trans, leading, stride):
    """Return the addresses of a `rows` x 16 matrix relative to its first."""
    row, k = np.arange(rows)[:, None], np.arange(16)[None]
    if trans:  # k down the rows of the box
        return row // 64 * leading + row % 64 * 2 + k // 8 * stride + k % 8 * 128
    return row // 8 * stride + row % 8 * 128 + k * 2


class Warpgroup(emulator.Group):
    """128 threads of a block, in step."""

    def __init__(self, block, threads):
        super().__init__(block, threads)
        self.number = int(threads[0]) // LANES
        self.products = []

    def meanings(self):
        """Return what each family of statements does: those of `emulator`, and these."""
        simple = {name[3:]: getattr(self, name) for name in dir(self) if name.startswith("do_")}
        made_for = {"wgmma": self.wgmma, "wgmma_wait": self.wgmma_wait}
        return {
            **super().meanings(),
            **{name: lambda statement, f=f: f for name, f in simple.items()},
            **{name: lambda statement, f=f: partial(f, statement) for name, f in made_for.items()},
        }

    def finish(self):
        """See that nothing is left undone when the function returns."""
        super().finish()
        if self.products:
            raise Fault("a product is still running at the end")

    # ---- barriers and copies
    def do_mbarrier_init(self, b, n):
        self.block.mbarriers[int(b)] = Mbarrier(int(n), int(n))

    def _arrive(self, b, size):
        barrier = self.block.mbarriers[int(b)]
        barrier.bytes += size
        barrier.pending -= 1
        barrier.advance()
        self.block.turns.offer(self.number)

    def do_mbarrier_arrive(self, b):
        self._arrive(b, 0)

    def do_mbarrier_expect(self, b, n):
        self._arrive(b, int(n))

    def do_mbarrier_wait(self, b, parity):
        barrier, copies = self.block.mbarriers[int(b)], self.block.copies

        def ready():
            for land in copies.pop(int(b), []):
                land()
            return barrier.phase & 1 != int(parity)

        self.block.turns.wait(self.number, ready)

    def do_fence_mbarrier_init(self):
        pass

    def do_fence_proxy_async(self):
        pass

    def do_tma_prefetch(self, tensor_map):
        assert isinstance(tensor_map, TensorMap)

    def _copy(self, places, raw, b):
        """Poison the target; the bytes land when somebody waits."""
        barrier = self.block.mbarriers[int(b)]

        def land():
            self.block.shared[places] = raw
            barrier.bytes -= raw.size
            barrier.advance()

        self.block.shared[places] = 0xFF
        self.block.copies.setdefault(int(b), []).append(land)
        self.block.turns.offer(self.number)

    def do_tma_load_4d(self, s, tensor_map, x, y, z, w, b):
        s, x, y, z, w = (int(value) for value in (s, x, y, z, w))
        if s % 1024:
            raise Fault(f"TMA to {s}: its swizzle is that of multiples of 1024")
        box = np.zeros((tensor_map.rows, 64), tensor_map.array.dtype)
        batches, heads, rows, columns = tensor_map.array.shape
        if 0 <= z < heads and 0 <= w < batches:
            begin, end = max(y, 0), min(y + tensor_map.rows, rows)
            left, right = max(x, 0), min(x + 64, columns)
            if begin < end and left < right:
                part = tensor_map.array[w, z, begin:end, left:right]
                box[begin - y : end - y, left - x : right - x] = part
        raw = box.view(np.uint8).reshape(-1)
        self._copy(swizzled(s + np.arange(raw.size)), raw, b)

    def do_bulk_load(self, s, g, n, b):
        s, g, n = int(s), int(g), int(n)
        if s % 16 or g % 16 or n % 16 or n <= 0:
            raise Fault(f"bulk copy of {n} bytes from {g} to {s}")
        source, at = self.block.memory.locate(np.asarray([g, g + n - 1]))
        self._copy(s + np.arange(n), source[int(at[0]) : int(at[0]) + n].copy(), b)

    # ---- named barriers, cuda.syncthreads() among them
    def arrive(self, number, threads, waits, mark=False):
        """Come to a named barrier; return whether any thread that came was marked."""
        number, threads = int(number), int(threads)
        if not 0 <= number < 16 or threads % 32:
            raise Fault(f"named barrier {number} of {threads} threads")
        barrier = self.block.barriers.setdefault(number, Named(threads))
        if barrier.arrived and barrier.threads != threads:
            raise Fault(f"named barrier {number} of {threads} and of {barrier.threads} threads")
        here = barrier.passed
        barrier.threads = threads
        barrier.arrived += LANES
        barrier.marked |= mark
        if barrier.arrived > threads:
            raise Fault(f"named barrier {number}: more than {threads} threads")
        if barrier.arrived == threads:
            barrier.was_marked, barrier.marked = barrier.marked, False
            barrier.arrived = 0
            barrier.passed += 1
        if waits:
            self.block.turns.wait(self.number, lambda: barrier.passed != here)
        else:
            self.block.turns.offer(self.number)
        return barrier.was_marked

    def do_named_sync(self, i, n):
        self.arrive(i, n, True)

    def do_named_arrive(self, i, n):
        self.arrive(i, n, False)

    def do_named_or(self, i, n, c):
        return int(self.arrive(i, n, True, bool(np.any(self.spread(c)))))

    def do_registers(self):
        pass

    # ---- memory
    def do_add_shared_int32(self, s, v):
        word = self.block.shared[int(s) : int(s) + 4].view(np.int32)
        before = int(word[0])
        word += np.int32(v)
        return before

    def do_add_float32_2(self, g, x, y):
        address = self.spread(g)
        if np.any(address % 8):
            raise Fault("red.v2.f32 at an address that is no multiple of 8")
        for shift, value in ((0, x), (4, y)):
            target, at = self.block.memory.locate(address + shift)
            np.add.at(target.view(np.float32), at // 4, self.floats(value))

    # ---- products
    def do_shared_address(self, _):
        return 16  # no multiple of what TMA wants: that is the kernel's affair

    def _matrix(self, descriptor, steps, rows, trans, dtype):
        descriptor = int(descriptor)
        if descriptor >> 62 != 1 or (descriptor >> 49) & 7:
            raise Fault(f"descriptor {descriptor:#x} is not of the 128-byte swizzle")
        leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (16, 32))
        starts = [((descriptor + step) & 0x3FFF) << 4 for step in steps]
        places = _places(rows, trans, leading, stride)
        where = swizzled(np.concatenate([places + start for start in starts], 1))
        words = self.block.shared.view(np.uint16)[where >> 1]
        return words.view(dtype).astype(np.float32)

    def _factor(self, array, at, steps, dtype):
        """Return the 64 rows that packed registers hold."""
        factor = np.empty((64, 16 * len(steps)), np.float32)
        lane, warp = np.arange(LANES) % 32, np.arange(LANES) // 32
        for k, (begin, end) in enumerate(steps):
            for i in range(end - begin):
                pairs = np.ascontiguousarray(array[at + begin + i].astype(np.int32)).view(dtype)
                rows = warp * 16 + lane // 4 + i % 2 * 8
                columns = k * 16 + i // 2 * 8 + lane % 4 * 2
                for e in range(2):
                    factor[rows, columns + e] = pairs.reshape(LANES, 2)[:, e].astype(np.float32)
        return factor

    def wgmma(self, statement, d, d_at, *rest):
        what = product_of(statement.text)
        count = what.n // 2
        before = [d[d_at + i] for i in range(count)] if what.accumulate else None
        for i in range(count):
            d[d_at + i] = np.full(LANES, np.nan, np.float32)

        def compute():
            b = self._matrix(rest[-1], what.b_steps, what.n, what.b_trans, what.dtype)
            if what.a_shared:
                a = self._matrix(rest[0], what.a_steps, 64, what.a_trans, what.dtype)
            else:
                a = self._factor(rest[0], rest[1], what.a_steps, what.dtype)
            # Not a @ b.T: threads of a BLAS take longer to meet than these products take.
            return np.einsum("ik,jk->ij", a, b)[_fragment(what.n)]

        early = compute() if self.block.timing.early_products else None

        def finish():
            result = compute() if early is None else early
            for i in range(count):
                d[d_at + i] = result[i] if before is None else before[i] + result[i]

        self.products.append(finish)
        self.block.turns.offer(self.number)

    def wgmma_wait(self, statement, *_):
        if len(self.products) > statement.facts["pending"]:
            self.block.turns.offer(self.number)
        while len(self.products) > statement.facts["pending"]:
            self.products.pop(0)()


@threadpool_limits.wrap(limits=1)
def run(kernel, blocks, arguments, memory, timing=None):
    """Run a Kernel's blocks, one after the other. A tensor map's argument is a TensorMap."""
    timing = timing or Timing()
    groups = kernel.threads // LANES
    for number in range(blocks):
        shared = np.full(kernel.shared_bytes, emulator.NAN_BYTE, np.uint8)
        turns = Turns(groups, timing)
        block = Block(memory, shared, number, blocks, kernel.threads, timing, turns)

        def work(i, block=block):
            error = None
            try:
                block.turns.begin(i)
                group = Warpgroup(block, np.arange(LANES) + i * LANES)
                with np.errstate(all="ignore"):
                    emulator.rebound(kernel.function, group)(*arguments)
                group.finish()
            except Aborted:
                pass
            except BaseException as failure:
                error = failure
            block.turns.end(i, error)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(groups)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if turns.error is not None:
            raise turns.error
        if any(block.copies.values()):
            raise Fault("a copy to shared memory is still running at the end")
        waiting = [i for i, barrier in block.barriers.items() if barrier.arrived]
        if waiting:
            raise Fault(f"arrivals at named barriers {waiting} that nobody waited for")
