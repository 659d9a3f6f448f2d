# SPDX-License-Identifier: Apache-2.0
"""Starts ranks that are processes: under mpiexec, or with torch.distributed over gloo.

Each rank calls function(comm, *arguments) of a test module; what it returns or raises is told by
rank. Whatever does not end in time is ended with all of its children.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = ("mpi", "gloo")
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "FASTATTN_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class Told(NamedTuple):
    """What a rank has told: what its function returned, or the type and text of its error."""

    value: object
    error: str
    seconds: float


def needs(engine):
    """Skip a test whose engine is not installed."""
    if engine == "mpi":
        pytest.importorskip("mpi4py", exc_type=ImportError)
        if shutil.which("mpiexec") is None:
            pytest.skip("there is no mpiexec")
    else:
        pytest.importorskip("torch", exc_type=ImportError)


def launch(engine, ranks, function, *arguments, folder, timeout=60, patience=None):
    """Return what each rank has told, None for one that was ended before, and all output.

    patience: seconds of gloo's own timeout.
    """
    needs(engine)
    called = f"{function.__module__}, {function.__name__!r}, {str(folder)!r}, *{arguments!r}"
    lines = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        f"import {function.__module__}",
        f"from tests.distributed import launch; launch.{engine}({called})",
    ]
    program = ["-c", "; ".join(lines)]
    settings = os.environ | SETTINGS | {"PATIENCE": str(patience or timeout)}
    if engine == "mpi":
        how = ["mpiexec", "--oversubscribe", "-n", str(ranks), sys.executable, "-m", "mpi4py"]
        commands = [(how, {})]
    else:
        how = [sys.executable]
        commands = [(how, {"RANK": str(i), "WORLD_SIZE": str(ranks)}) for i in range(ranks)]
    processes = [
        subprocess.Popen(
            [*command, *program],
            env=settings | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command, own in commands
    ]
    end, output = time.monotonic() + timeout, []
    try:
        for process in processes:
            output.append(process.communicate(timeout=max(end - time.monotonic(), 0.1))[0])
    finally:
        late = [process for process in processes if process.poll() is None]
        for process in late:
            os.killpg(process.pid, signal.SIGKILL)
            output.append(process.communicate()[0])
        if late:
            pytest.fail(f"no end after {timeout} s\n" + "\n".join(output))
    told = []
    for rank in range(ranks):
        path = Path(folder, f"{rank}.pickle")
        told.append(pickle.loads(path.read_bytes()) if path.exists() else None)
        path.unlink(missing_ok=True)
    return told, "\n".join(output)


def values(engine, ranks, function, *arguments, folder, **how):
    """Return what the function returned on each rank; none may raise an error."""
    told, output = launch(engine, ranks, function, *arguments, folder=folder, **how)
    assert all(x is not None and not x.error for x in told), f"{told}\n{output}"
    return [x.value for x in told]


def mpi(module, name, folder, *arguments):
    """Be a rank of MPI."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    _tell(module, name, folder, comm, comm.rank, arguments)


def gloo(module, name, folder, *arguments):
    """Be a rank of torch.distributed."""
    from datetime import timedelta

    from torch import distributed

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = distributed.FileStore(str(Path(folder, "store")), size)
    patience = timedelta(seconds=float(os.environ["PATIENCE"]))
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=patience
    )
    ended_well = _tell(module, name, folder, distributed.group.WORLD, rank, arguments)
    if ended_well:
        distributed.barrier()
    distributed.destroy_process_group()


def _tell(module, name, folder, comm, rank, arguments):
    started = time.monotonic()
    value, error = None, ""
    try:
        value = getattr(module, name)(comm, *arguments)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    told = Told(value, error, time.monotonic() - started)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(told))
    return not error
