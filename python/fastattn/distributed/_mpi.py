# SPDX-License-Identifier: Apache-2.0
"""The engine of MPI, through mpi4py.

Messages travel on a duplicate of the caller's communicator, which meets none of the caller's own.
It is made in the first call, belongs to the communicator as an attribute, and is freed with it. An
MPI may move bytes only while it is called, so that a rank that computes polls now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from fastattn.distributed._engine import Engine, Transfer, polled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]


def is_communicator(comm: Any) -> bool:
    """Tell whether a communicator is one of mpi4py, within a group."""
    return isinstance(comm, MPI.Intracomm)


def engine_of(comm: MPI.Intracomm) -> Engine:
    """Return the engine of a communicator."""
    if comm == MPI.COMM_NULL:
        raise ValueError("comm must be a communicator in use, got one that was freed, or COMM_NULL")
    known: Any = comm.Get_attr(_engines)
    engine: MPIEngine = known or MPIEngine(comm)
    if known is None:
        comm.Set_attr(_engines, engine)
    return engine


class MPIEngine(Engine):
    """The ranks of a communicator of MPI."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._made: MPI.Request | None
        self._comm, self._made = comm.Idup()  # complete once all ranks have called

    def start(
        self, sends: list[tuple[int, Bytes]], receives: list[tuple[int, Bytes]], tag: int
    ) -> Transfer:
        return _Transfer(self, sends, receives, tag)

    def is_ready(self) -> bool:
        """Tell whether the duplicate is complete."""
        if self._made is not None and self._made.Test():
            self._made = None
        return self._made is None

    def requests(
        self, sends: list[tuple[int, Bytes]], receives: list[tuple[int, Bytes]], tag: int
    ) -> list[MPI.Request]:
        """Start the messages."""
        comm, of = self._comm, MPI.BYTE
        started = [comm.Irecv([x, of], rank, tag) for rank, x in receives]
        return started + [comm.Isend([x, of], rank, tag) for rank, x in sends]

    def free(self) -> None:
        """Free the duplicate."""
        if self.is_ready() and not MPI.Is_finalized():
            self._comm.Free()


class _Transfer(Transfer):
    def __init__(self, engine: MPIEngine, *messages: Any) -> None:
        self._engine, self._messages = engine, messages
        self._requests: list[MPI.Request] | None = None
        self.poll()

    def poll(self) -> bool:
        if self._requests is None:
            if not self._engine.is_ready():
                return False
            self._requests = self._engine.requests(*self._messages)
        return bool(MPI.Request.Testall(self._requests))

    def wait(self, seconds: float | None) -> bool:
        return polled(self.poll, seconds)


def _freed(comm: MPI.Comm, key: int, engine: MPIEngine) -> None:
    engine.free()


_engines = MPI.Comm.Create_keyval(delete_fn=_freed)
