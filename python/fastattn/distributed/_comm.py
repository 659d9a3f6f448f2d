# SPDX-License-Identifier: Apache-2.0
"""Which engine a communicator belongs to.

No engine is imported that is not in use: a communicator cannot be met before somebody imported its
package.
"""

from __future__ import annotations

import sys
from typing import Any

from fastattn.distributed._engine import Engine


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
