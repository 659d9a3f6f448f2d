# SPDX-License-Identifier: Apache-2.0
"""How keys and values come to this rank, and their gradients back to their owners.

Where every rank needs the keys of all, they rotate: each rank hands on to the next what it had from
the one before, and talks to these two alone. Their gradients rotate one step behind, in float32,
each rank adding its own, and come home at the end. Where some blocks are not needed, as with a
window, or where causal queries come before, each rank has what it needs straight from its owner.

What comes next is received while this block is computed. Blocks come in a fixed order, and sums are
taken in it, so that results are the same bits each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from fastattn.distributed._engine import Exchange, Peers
    from fastattn.distributed._problem import Problem

    Array = NDArray[Any]
    Poll = Callable[[], None]
    Arrived = tuple[int, Array, Array, Poll]  # whose keys and values; poll while computing

KEYS, GRADIENTS = 0, 1  # tags


class Shape:
    """How a rank's keys and values lie in a buffer, one behind the other."""

    def __init__(self, problem: Problem, dtype: np.dtype[Any] | None = None) -> None:
        self._shapes = [x.shape for x in (problem.key, problem.value)]
        self._dtype = problem.key.dtype if dtype is None else dtype
        self._lengths = problem.kv_layout.lengths

    def of(self, buffer: Array, rank: int) -> Array:
        """Return the part of a buffer that a rank's rows take."""
        return buffer[: sum(self._sizes(rank))]

    def views(self, buffer: Array, rank: int) -> tuple[Array, Array]:
        """Return a rank's keys and values in a buffer."""
        rows, (first, second) = self._lengths[rank], self._sizes(rank)
        parts = (buffer[:first], buffer[first : first + second])
        key, value = (
            part.reshape(*shape[:-2], rows, shape[-1])
            for part, shape in zip(parts, self._shapes, strict=True)
        )
        return key, value

    def buffer(self) -> Array:
        """Return a buffer with room for any rank's rows."""
        return np.empty(
            max(sum(self._sizes(rank)) for rank in range(len(self._lengths))), self._dtype
        )

    def packed(self, rank: int, key: Array, value: Array) -> Array:
        """Return a buffer that holds a rank's keys and values."""
        buffer = self.buffer()
        for place, x in zip(self.views(buffer, rank), (key, value), strict=True):
            place[...] = x
        return buffer

    def _sizes(self, rank: int) -> list[int]:
        rows = self._lengths[rank]
        return [int(np.prod(shape[:-2], dtype=int)) * rows * shape[-1] for shape in self._shapes]


def rotates(problem: Problem) -> bool:
    """Tell whether every rank needs the keys of all."""
    return bool(problem.sees.all())


def sources(problem: Problem) -> list[int]:
    """Return whose keys this rank needs, in the order in which it has them."""
    rank, size = problem.rank, problem.layout.ranks
    order = [(rank - i) % size for i in range(size)]
    return [source for source in order if problem.sees[rank, source]]


def blocks(peers: Peers, problem: Problem) -> Iterator[Arrived]:
    """Yield the keys and values of each rank that this one needs, its own first."""
    return (_rotating if rotates(problem) else _straight)(peers, problem)


def _rotating(peers: Peers, problem: Problem) -> Iterator[Arrived]:
    rank, size = peers.rank, peers.size
    shape = Shape(problem)
    buffers = [shape.packed(rank, problem.key, problem.value)]
    buffers += [shape.buffer() for _ in range(min(size, 3) - 1)]
    sending: list[Exchange] = []  # of each step, the last two not surely done
    for step in range(size):
        source = (rank - step) % size
        buffer = buffers[step % 3]
        receiving = None
        if step < size - 1:
            if step >= 2:
                sending.pop(0).wait()  # out of the buffer that is received into now
            words = f"step {step + 1} of {size - 1}"
            message = (rank + 1) % size, shape.of(buffer, source)
            coming = (source - 1) % size
            place = (rank - 1) % size, shape.of(buffers[(step + 1) % 3], coming)
            receiving = peers.start(words, receives=[place], tag=KEYS)
            sending.append(peers.start(words, sends=[message], tag=KEYS))
        yield source, *shape.views(buffer, source), _polling(receiving, *sending)
        if receiving is not None:
            receiving.wait()
    for exchange in sending:
        exchange.wait()


def _straight(peers: Peers, problem: Problem) -> Iterator[Arrived]:
    rank, size, sees = peers.rank, peers.size, problem.sees
    shape = Shape(problem)
    own = shape.packed(rank, problem.key, problem.value)
    readers = [((rank + i) % size, shape.of(own, rank)) for i in range(1, size)]
    readers = [(reader, message) for reader, message in readers if sees[reader, rank]]
    sending = peers.start("handing out this rank's keys", sends=readers, tag=KEYS)
    others = [source for source in sources(problem) if source != rank]
    places = [shape.buffer() for _ in others[:2]]

    def start(step: int) -> Exchange | None:
        if step == len(others):
            return None
        place = others[step], shape.of(places[step % 2], others[step])
        words = f"step {step + 1} of {len(others)}"
        return peers.start(words, receives=[place], tag=KEYS)

    receiving = start(0)
    if sees[rank, rank]:
        yield rank, *shape.views(own, rank), _polling(receiving, sending)
    for step, source in enumerate(others):
        assert receiving is not None
        receiving.wait()
        receiving = start(step + 1)
        yield source, *shape.views(places[step % 2], source), _polling(receiving, sending)
    sending.wait()


def _polling(*exchanges: Exchange | None) -> Poll:
    def poll() -> None:
        for exchange in exchanges:
            if exchange is not None:
                exchange.poll()

    return poll


class Homeward:
    """Gradients of keys and values on their way to the keys' owners; subclasses say which way.

    For each rank whose keys this one has met, in the order of `blocks`: `sums` gives zeros, which
    the caller adds to, and `send` sends them. `arrived` gives what all have sent to this rank.
    """

    def __init__(self, peers: Peers, problem: Problem) -> None:
        self.peers = peers
        self.shape = Shape(problem, problem.wide)
        self._buffers = [self.shape.buffer(), self.shape.buffer()]  # one is summed, one is sent
        self._sending: list[Exchange | None] = [None, None]
        self._step = -1
        self.receiving: Exchange | None = None
        self.incoming = self.shape.buffer()

    def sums(self, source: int) -> tuple[Array, Array]:
        """Return zeros, for the gradients of a rank's keys and values."""
        self._step += 1
        sending = self._sending[self._step % 2]
        if sending is not None:
            sending.wait()
        self.part(source)[...] = 0
        return self.shape.views(self.part(source), source)

    def part(self, source: int) -> Array:
        """Return the sums of a rank's keys and values, in one array."""
        return self.shape.of(self._buffers[self._step % 2], source)

    def start_to(self, reader: int, source: int) -> None:
        """Start to send the sums of a rank's keys and values."""
        message = reader, self.part(source)
        words = f"gradients of the keys of rank {source}"
        self._sending[self._step % 2] = self.peers.start(words, sends=[message], tag=GRADIENTS)

    def start_from(self, sender: int, source: int) -> None:
        """Start to receive the sums of a rank's keys and values."""
        place = sender, self.shape.of(self.incoming, source)
        words = f"gradients of the keys of rank {source}"
        self.receiving = self.peers.start(words, receives=[place], tag=GRADIENTS)

    def poll(self) -> None:
        """Let the engine move bytes."""
        _polling(self.receiving, *self._sending)()

    def finish(self) -> None:
        """Wait until all is sent."""
        for sending in self._sending:
            if sending is not None:
                sending.wait()

    def send(self, source: int) -> None:
        """Send what sums(source) returned, now that this rank's part is in it."""
        raise NotImplementedError

    def arrived(self) -> tuple[Array, Array]:
        """Return the gradients of this rank's keys and values, when all ranks have sent theirs."""
        raise NotImplementedError


class _Rotating(Homeward):
    """From rank to rank, each adding its own, and at the end to the owner, who is the next."""

    def send(self, source: int) -> None:
        rank, size = self.peers.rank, self.peers.size
        if self.receiving is not None:
            self.receiving.wait()
            self.part(source)[...] += self.shape.of(self.incoming, source)
        if size > 1:
            self.start_to((rank + 1) % size, source)
            self.start_from((rank - 1) % size, (source - 1) % size)

    def arrived(self) -> tuple[Array, Array]:
        rank = self.peers.rank
        if self.receiving is None:
            return self.shape.views(self.part(rank), rank)
        self.receiving.wait()
        self.finish()
        return self.shape.views(self.shape.of(self.incoming, rank), rank)


class _Straight(Homeward):
    """To the owner, who adds them up in the order of the distance that they come from.

    A rank takes what comes from a distance before it sends over a larger one: so none waits for
    another in a circle.
    """

    def __init__(self, peers: Peers, problem: Problem) -> None:
        super().__init__(peers, problem)
        rank, size = peers.rank, peers.size
        self._total = self.shape.of(self.shape.buffer(), rank)
        self._total[...] = 0
        self._distances = [i for i in range(1, size) if problem.sees[(rank + i) % size, rank]]

    def sums(self, source: int) -> tuple[Array, Array]:
        self._take(below=(self.peers.rank - source) % self.peers.size)
        return super().sums(source)

    def send(self, source: int) -> None:
        if source == self.peers.rank:
            self._total += self.part(source)
        else:
            self.start_to(source, source)

    def arrived(self) -> tuple[Array, Array]:
        self._take(below=self.peers.size)
        self.finish()
        return self.shape.views(self._total, self.peers.rank)

    def _take(self, below: int) -> None:
        """Add what comes from nearer than a distance, and start to receive what comes next."""
        rank, size = self.peers.rank, self.peers.size
        while self._distances:
            if self.receiving is None:
                self.start_from((rank + self._distances[0]) % size, rank)
            if self._distances[0] >= below:
                return
            assert self.receiving is not None
            self.receiving.wait()
            self.receiving = None
            self._total += self.shape.of(self.incoming, rank)
            del self._distances[0]


def homeward(peers: Peers, problem: Problem) -> Homeward:
    """Return the way of gradients to their owners."""
    return (_Rotating if rotates(problem) else _Straight)(peers, problem)
