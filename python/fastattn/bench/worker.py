# SPDX-License-Identifier: Apache-2.0
"""One library in a process of its own, which answers requests and sleeps in between.

measure.py starts it and sends requests through a socket; libraries.py calls the library. A process
holds one library alone, because the threads of one slow another's, and so does a shared allocator.
"""

import contextlib
import functools
import os
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import IO, Any

import numpy as np

from fastattn.bench.accuracy import sampled
from fastattn.bench.calls import Prepared
from fastattn.bench.cases import Array, Case, make_inputs, shrunk
from fastattn.bench.gpu import Gpu
from fastattn.bench.libraries import NEEDS, WORKERS, thread_environment
from fastattn.bench.processor import Processor

WARM_SECONDS = 0.05  # of calls before the first sample of a turn
SAMPLE_SECONDS = 1e-3  # a shorter call is repeated until a sample lasts so long
VARIANTS = {"cpu": "FASTATTN_ISA", "cuda": "FASTATTN_CUDA_KERNEL"}


MACHINES: dict[str, type[Processor | Gpu]] = {"cpu": Processor, "cuda": Gpu}


class Worker:
    """The requests that a worker answers: each public method is one."""

    def __init__(self, library: str, threads: int, device: str = "cpu") -> None:
        self._prepare = WORKERS[device][library]
        self._threads = threads
        self._device = device
        self._case: Case
        self._prepared: Prepared | None = None

    @functools.cached_property
    def _machine(self) -> Processor | Gpu:
        return MACHINES[self._device](self._threads)

    def describe(self) -> dict[str, Any]:
        """Describe the GPU."""
        assert isinstance(self._machine, Gpu)
        return self._machine.describe()

    def prepare(self, case: Case) -> tuple[dict[str, Any], Array]:
        """Prepare the case and call it once; return how and what it took, and the sampled rows."""
        machine = self._machine
        self._prepared = None  # frees the case before
        machine.release()
        machine.limit_memory()
        small = shrunk(case)
        self._prepare(small, make_inputs(small), self._threads).call()
        prepared = self._prepare(case, make_inputs(case), self._threads)
        results: list[Any] = []

        def call() -> None:
            results.clear()
            results.append(prepared.call())

        machine.reset_peak()
        seconds = machine.timed(case, call, 1)
        extra = machine.extra_bytes(0 if prepared.into else case.output_bytes)
        rows = prepared.to_numpy(results.pop())[np.ix_(*sampled(case))].astype(np.float64)
        self._case, self._prepared = case, prepared
        return {"how": prepared.how, "first_seconds": seconds, "extra_bytes": extra}, rows

    def measure(self, seconds: float) -> list[float]:
        """Call it for this many seconds, once at least; return the seconds of each call."""
        assert self._prepared is not None
        case, call, timed = self._case, self._prepared.call, self._machine.timed
        begin = time.perf_counter()
        took = timed(case, call, 1)
        if took > seconds:
            return [took]
        while time.perf_counter() < begin + WARM_SECONDS:  # threads find their cores
            took = timed(case, call, 1)
        from_memory = "read" in case.bound_by
        loops = max(1, int(SAMPLE_SECONDS / took))
        if from_memory or case.sleep_ms or case.before:  # which are before a sample
            loops = 1
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            samples.append(timed(case, call, loops, cold=from_memory))
        return samples

    def probe(self, limit: str, seconds: float) -> float:
        """Measure a limit of the machine, in bytes/s or FLOP/s."""
        return self._machine.probe(limit, seconds)

    def settle(self) -> None:
        """Return when the request is done and nothing of it keeps the machine busy."""
        self._machine.settle()


def start(
    library: str, threads: int, isa: str | None, device: str, errors: IO[bytes]
) -> tuple[Any, Connection]:
    """Start a worker; return its process, and the connection to ask it through."""
    ours, its = socket.socketpair()
    # The library comes first, so that it loads the runtime libraries that it was built with.
    modules = ", ".join(NEEDS.get(library, (library,)))
    code = f"import {modules}; from {__name__} import serve; serve()"
    arguments = (library, str(threads), device, str(its.fileno()))
    process = Popen(
        [sys.executable, "-P", "-c", code, *arguments],
        env=os.environ | thread_environment(threads) | ({VARIANTS[device]: isa} if isa else {}),
        stdin=DEVNULL,
        stdout=DEVNULL,
        stderr=errors,
        pass_fds=(its.fileno(),),
        start_new_session=True,  # Ctrl-C is for the parent
    )
    its.close()
    return process, Connection(ours.detach())


def serve() -> None:
    """Answer requests until the parent is gone: (True, answer) or (False, reason)."""
    library, threads, device, handle = sys.argv[1:]
    connection = Connection(int(handle))
    with contextlib.suppress(OSError):  # if memory runs out, end this process before others
        Path("/proc/self/oom_score_adj").write_text("1000")
    worker = Worker(library, int(threads), device)
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(worker, name)(*arguments)
            worker.settle()
        except Exception as error:  # whatever a library raises is an answer
            answer = False, _reason(error)
        connection.send(answer)


def _reason(error: Exception) -> str:
    """Return the reason in one short line."""
    exhausted = ("RESOURCE_EXHAUSTED", "CUDA out of memory")  # what jax says, and torch
    if isinstance(error, MemoryError) or any(text in str(error) for text in exhausted):
        return "not enough memory"
    line = " ".join(str(error).split()) or type(error).__name__
    line = line.rsplit("Status Message: ", 1)[-1]  # the text of onnxruntime before it tells nothing
    return line if len(line) <= 160 else f"...{line[-157:]}"
