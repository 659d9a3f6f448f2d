# SPDX-License-Identifier: Apache-2.0
"""How ranks exchange bytes: what the algorithms need of an engine.

An engine (`_mpi.py`, `_torch.py`) starts sending to some ranks and receiving from others, and says
when that is done. All else is made of this one operation, so that every engine gives the same bits,
and every wait has its end: `Peers` waits, no longer than the call's timeout, and its errors name
the rank and the step.
"""

from __future__ import annotations

import abc
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Bytes = NDArray[np.uint8]
    Messages = Sequence[tuple[int, Array]]  # whom they are for or from, and C-contiguous arrays

LARGEST_MESSAGE = 2**30  # bytes: MPI counts in 32 bits
FIRST_PAUSE, LONGEST_PAUSE = 20e-6, 1e-3  # seconds between looks at what has not arrived
SPINNING = 1e-3  # seconds for which a wait looks without a pause: most messages are there by then


class Transfer(abc.ABC):
    """Messages on their way."""

    @abc.abstractmethod
    def poll(self) -> bool:
        """Let the engine move bytes, if it does only when it is called; tell whether all is done.

        An engine with a thread of its own may always say no here.
        """

    @abc.abstractmethod
    def wait(self, seconds: float | None) -> bool:
        """Wait until all is done, at most so long; tell whether it is."""


class Engine(abc.ABC):
    """One rank's way to the others of its communicator.

    Attributes
    ----------
    rank, size : int
    broken : str
        Why nothing more can be exchanged: messages of an earlier call may still be on their way.
    """

    rank: int
    size: int
    broken: str = ""

    @abc.abstractmethod
    def start(
        self, sends: list[tuple[int, Bytes]], receives: list[tuple[int, Bytes]], tag: int
    ) -> Transfer:
        """Start to send and to receive. Between two ranks, messages of one tag keep their order."""


def polled(done: Callable[[], bool], seconds: float | None) -> bool:
    """Look until done() holds, at most so long; tell whether it does."""
    started, pause = time.monotonic(), FIRST_PAUSE
    while not done():
        waited = time.monotonic() - started
        if seconds is not None and waited > seconds:
            return False
        if waited > SPINNING:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    return True


class Peers:
    """The ranks of one call: exchanges that end, with an error that names rank and step.

    Parameters
    ----------
    engine : Engine
    call : str
        The public function, for errors.
    timeout : float, optional
        Seconds to wait for other ranks in one step; None: as long as the engine does.
    """

    def __init__(self, engine: Engine, call: str, timeout: float | None) -> None:
        if engine.broken:
            raise RuntimeError(
                f"comm must be one whose calls have all ended well, got one on which "
                f"{engine.broken}: make a new communicator"
            )
        self.engine, self.call, self.timeout = engine, call, timeout
        self.rank, self.size = engine.rank, engine.size

    def start(
        self, step: str, sends: Messages = (), receives: Messages = (), tag: int = 0
    ) -> Exchange:
        """Start to send arrays to ranks, and to receive arrays from ranks; empty ones are not."""
        exchange = Exchange(self, step, sends, receives)
        with _naming(exchange):
            exchange.transfer = self.engine.start(
                list(_messages(sends)), list(_messages(receives)), tag
            )
        return exchange

    def exchange(self, step: str, sends: Messages, receives: Messages) -> None:
        """Send arrays to ranks and receive arrays from ranks, and return when that is done."""
        self.start(step, sends, receives).wait()

    def all_gather(self, step: str, mine: Bytes) -> Array:
        """Return the bytes of all ranks, equally many of each, in the order of ranks.

        Each round doubles what a rank knows, so that 1024 ranks take 10.
        """
        known = np.empty((self.size, len(mine)), np.uint8)  # from this rank on
        known[0] = mine
        have = 1
        while have < self.size:
            count = min(have, self.size - have)
            self.exchange(
                step,
                [((self.rank - have) % self.size, known[:count])],
                [((self.rank + have) % self.size, known[have : have + count])],
            )
            have += count
        return np.roll(known, self.rank, axis=0)


class Exchange:
    """What `Peers.start` has started."""

    def __init__(self, peers: Peers, step: str, sends: Messages, receives: Messages) -> None:
        self._peers, self._step = peers, step
        self._sends, self._receives = sends, receives  # and so their memory, until it is done
        self.transfer: Transfer | None = None

    def poll(self) -> None:
        """Let the engine move bytes."""
        if self.transfer is not None:
            with _naming(self):
                self.transfer.poll()

    def wait(self) -> None:
        """Wait until all is sent and received."""
        if self.transfer is None:
            return
        with _naming(self):
            done = self.transfer.wait(self._peers.timeout)
        if not done:
            self.fail(TimeoutError, f"was not done after timeout={self._peers.timeout} s")
        self.transfer = None

    def fail(self, kind: type[Exception], what: str) -> None:
        """Raise an error that names this rank, the step and the other ranks."""
        peers = self._peers
        parts = [
            f"{verb} {_ranks([rank for rank, _ in messages])}"
            for verb, messages in (("receiving from", self._receives), ("sending to", self._sends))
            if messages
        ]
        message = f"{peers.call} on rank {peers.rank}: {self._step}: {' and '.join(parts)} {what}"
        peers.engine.broken = peers.engine.broken or f"{peers.call} has failed ({self._step})"
        _unfinished.append(self)
        raise kind(message)


_unfinished: list[Exchange] = []  # what failed: an engine may still write to its arrays


@contextmanager
def _naming(exchange: Exchange) -> Iterator[None]:
    """Errors of an engine inside the with statement become one that names rank and step."""
    try:
        yield
    except RuntimeError as error:  # of mpi4py and of torch alike
        text = " ".join(str(error).split())
        try:
            exchange.fail(ConnectionError, f"failed: {text}")
        except ConnectionError as named:
            raise named from error


def _messages(messages: Messages) -> Iterator[tuple[int, Bytes]]:
    """Yield the bytes of arrays that have any, in parts that an engine can count."""
    for rank, array in messages:
        whole = array.reshape(-1).view(np.uint8)
        for start in range(0, len(whole), LARGEST_MESSAGE):
            yield rank, whole[start : start + LARGEST_MESSAGE]


def _ranks(ranks: list[int]) -> str:
    distinct = sorted(set(ranks))
    if len(distinct) == 1:
        return f"rank {distinct[0]}"
    shown = ", ".join(map(str, distinct[:8]))
    return f"ranks {shown}" + (", .." if len(distinct) > 8 else "")
