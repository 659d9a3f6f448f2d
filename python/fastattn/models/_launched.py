# SPDX-License-Identifier: Apache-2.0
"""A command that a launcher of MPI has started on several ranks does its work once, over all.

The first rank reads what is given and prints; all compute. Whatever goes wrong is said once, and
ends every rank with exit status 2. One process needs no MPI, and imports none.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

LAUNCHERS = (  # the variables that tell a process how many ranks there are, and which one it is
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI, srun --mpi=pmi2
    ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"),  # srun --mpi=pmix
)
ERRORS = (ImportError, OSError, ValueError, MemoryError)  # that a user can do something about
FAILED = 2

T = TypeVar("T")


class World:
    """The ranks that run a command; without a communicator, this process alone.

    In the `with`, an error that other ranks cannot know of ends them, too: they would wait.

    Attributes
    ----------
    is_first : bool
        Whether this rank reads and prints.
    has_stdin : bool
        Whether stdin can be read. Of ranks it cannot: Open MPI 5 tells none of them of its end.
    over : dict
        What a call of a model is given to go over the ranks.
    """

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.is_first, self.has_stdin = comm is None or comm.rank == 0, comm is None
        self.over: dict[str, Any] = {} if comm is None else {"comm": comm, "progress": True}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all ranks after an error of this one."""
        if self._comm is None or error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, ERRORS):
            complain(f"rank {self._comm.rank}: {said(error)}")
        elif not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
            sys.stderr.flush()
        self._comm.Abort(FAILED)

    def first(self, do: Callable[[], T]) -> T:
        """Return what do() returns on the first rank, which alone calls it."""
        if self._comm is None:
            return do()
        found = self.each(do if self.is_first else lambda: None)
        shared: T = self._comm.bcast(found)
        return shared

    def each(self, do: Callable[[], T], errors: Any = ERRORS) -> T:
        """Return what do() returns on this rank; one of the errors on a rank ends all of them."""
        if self._comm is None:
            return do()
        found, error = None, None
        try:
            found = do()
        except errors as raised:
            error = said(raised)
        told = self._comm.allgather(error)
        for rank, error in enumerate(told):
            if error is not None:
                self._end(f"rank {rank}: {error}" if rank else error)
        return found  # type: ignore[return-value] # there was no error

    def _end(self, error: str) -> NoReturn:
        """End this rank as all others, when the first one has said why."""
        if self.is_first:
            complain(error)
        self._comm.Barrier()  # A launcher may kill all ranks as soon as one has failed.
        raise SystemExit(FAILED)


def world() -> World:
    """Return the ranks that a launcher of MPI has started.

    Raises
    ------
    ImportError
        On the first rank: there are several, and mpi4py does not know them. The others end.
    """
    size, rank = started()
    if size == 1:
        return World()
    error = f"{size} ranks were started, and need mpi4py"
    try:
        from mpi4py import MPI

        if MPI.COMM_WORLD.size == size:
            return World(MPI.COMM_WORLD)
        error += f" of the same MPI, and it knows {MPI.COMM_WORLD.size}"
    except (ImportError, RuntimeError) as raised:  # a RuntimeError: there is no MPI
        error += f": {raised}"
    if rank:
        raise SystemExit(0)  # The first one says it, and fails: it would be killed if this one did.
    raise ImportError(error)


def started() -> tuple[int, int]:
    """Return how many ranks a launcher says there are, and which one this is."""
    for size, rank in LAUNCHERS:
        numbers = os.environ.get(size, ""), os.environ.get(rank, "")
        if all(x.isdecimal() for x in numbers):
            return int(numbers[0]), int(numbers[1])
    return 1, 0


def said(error: BaseException) -> str:
    """Return what an error says."""
    few = "the memory is too small for it: " if isinstance(error, MemoryError) else ""
    return f"{few}{error}"


def complain(error: BaseException | str) -> None:
    """Write a line to stderr that says what is wrong."""
    text = error if isinstance(error, str) else said(error)
    sys.stderr.write(f"fastattn: error: {text}".replace("\n", " ") + "\n")
    sys.stderr.flush()
