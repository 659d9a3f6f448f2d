# SPDX-License-Identifier: Apache-2.0
"""Which engine a communicator belongs to, and a call's way to it.

No engine is imported that is not in use: a communicator cannot be met before somebody imported its
package.
"""

from __future__ import annotations

import sys
from typing import Any

from fastattn._arguments import positive_number
from fastattn.distributed._engine import Engine, Peers


def engine_of(comm: Any) -> Engine:
    """Return the engine that a communicator belongs to."""
    if isinstance(comm, Engine):
        return comm
    if "mpi4py.MPI" in sys.modules:
        from fastattn.distributed import _mpi

        if _mpi.is_communicator(comm):
            return _mpi.engine_of(comm)
    if "torch" in sys.modules:
        from fastattn.distributed import _torch

        if _torch.is_group(comm):
            return _torch.engine_of(comm)
    raise TypeError(
        "comm must be an intracommunicator of mpi4py, or a ProcessGroup or DeviceMesh of "
        f"torch.distributed, not {type(comm).__name__}"
    )


def peers_of(comm: Any, call: str, timeout: Any) -> Peers:
    """Return the ranks of a call. Its timeout is checked later, when other ranks can be told."""
    engine = engine_of(comm)
    try:
        return Peers(engine, call, seconds(timeout))
    except (TypeError, ValueError):
        return Peers(engine, call, None)


def seconds(timeout: Any) -> float | None:
    """Return the timeout of a call; None is without end."""
    return None if timeout is None else positive_number("timeout", timeout)
