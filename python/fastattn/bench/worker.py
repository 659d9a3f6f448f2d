# SPDX-License-Identifier: Apache-2.0
"""One library in a process of its own, which does what it is asked and waits in between.

Started by measure.py, which asks through a socket; calls libraries.py for the library. A process
holds one library alone, because the threads of one slow another's, and so does a shared allocator.
"""

import contextlib
import ctypes
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import IO, Any

import numpy as np

from fastattn.bench.accuracy import sampled
from fastattn.bench.calls import Prepared
from fastattn.bench.cases import Array, Case, make_inputs, shrunk
from fastattn.bench.libraries import NEEDS, PREPARE, thread_environment

WARM_SECONDS = 0.05  # of calls before the first sample of a turn
SETTLE_SECONDS, QUIET_SECONDS = 1.0, 0.02  # at most; how long a quiet process is watched
SAMPLE_SECONDS = 1e-3  # a shorter call is repeated until a sample lasts so long
FLUSH_BYTES = 512 << 20  # more than any cache
MEMORY_SHARE = 0.8  # of what the machine has free, for one library


class Worker:
    """The requests that a worker answers: each public method is one."""

    def __init__(self, library: str, threads: int) -> None:
        self._prepare = PREPARE[library]
        self._threads = threads
        self._case: Case
        self._prepared: Prepared | None = None
        self._cold: Array | None = None  # memory that takes the place of all others in the caches

    def prepare(self, case: Case) -> tuple[dict[str, Any], Array]:
        """Make the case ready and call it once; return what that showed, and the sampled rows."""
        self._prepared = self._cold = None  # frees the case before
        _limit_memory()
        small = shrunk(case)
        self._prepare(small, make_inputs(small), self._threads).call()
        prepared = self._prepare(case, make_inputs(case), self._threads)
        resident = _reset_peak()
        begin = time.perf_counter()
        result = prepared.call()
        seconds = time.perf_counter() - begin
        extra = None  # where the system does not tell
        if resident is not None:
            extra = max(_kibibytes("VmHWM") * 1024 - resident - case.output_bytes, 0)
        rows = prepared.to_numpy(result)[np.ix_(*sampled(case))].astype(np.float64)
        self._case, self._prepared = case, prepared
        return {"how": prepared.how, "first_seconds": seconds, "extra_bytes": extra}, rows

    def measure(self, seconds: float) -> list[float]:
        """Call it for so many seconds, once at least, and return the seconds of each call."""
        assert self._prepared is not None
        call = self._prepared.call
        begin = time.perf_counter()
        took = _timed(call, 1)
        if took > seconds:
            return [took]
        while time.perf_counter() < begin + WARM_SECONDS:  # threads find their cores
            took = _timed(call, 1)
        from_memory = "read" in self._case.bound_by
        loops = 1 if from_memory else max(1, int(SAMPLE_SECONDS / took))
        if from_memory and self._cold is None:
            self._cold = np.ones(FLUSH_BYTES // 8)
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            if self._cold is not None:
                self._cold.sum()  # read, for what is written would go back while the call runs
            samples.append(_timed(call, loops))
        return samples

    def probe(self, limit: str, seconds: float) -> float:
        """Measure a limit of the machine: "read" in bytes/s, of a dtype's arithmetic in FLOP/s."""
        import fastattn
        from fastattn import _core

        fastattn.set_num_threads(self._threads)
        if limit == "read":
            return _core.probe_read(FLUSH_BYTES >> 20, 3)
        # The best of three: a limit is what the machine can do, and threads may start out badly.
        return max(_core.probe_fma(limit, seconds / 3) for _ in range(3))


def _timed(call: Callable[[], Any], loops: int) -> float:
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - begin) / loops


def _settle() -> None:
    """Return when the threads have stopped spinning: a library's may do so for a while."""
    end = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < end:
        begin = time.process_time()
        time.sleep(QUIET_SECONDS)
        if time.process_time() - begin < 0.1 * QUIET_SECONDS:
            break


def _kibibytes(field: str, file: str = "/proc/self/status") -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(f"{file} has no {field}")


def _reset_peak() -> int | None:
    """Make the kernel forget the peak of this process; return the bytes resident now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free must not hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return _kibibytes("VmRSS") * 1024


def _limit_memory() -> None:
    """Let a call that asks for too much fail in this process, not bring down the machine."""
    free = int(_kibibytes("MemAvailable", "/proc/meminfo") * MEMORY_SHARE)
    limit = (_kibibytes("VmSize") + free) * 1024
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or limit <= hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def start(library: str, threads: int, isa: str | None, errors: IO[bytes]) -> tuple[Any, Connection]:
    """Start a worker; return its process, and the connection to ask it through."""
    ours, its = socket.socketpair()
    # The library comes first, so that it loads the runtime libraries that it was built with.
    modules = ", ".join(NEEDS.get(library, (library,)))
    code = f"import {modules}; from {__name__} import serve; serve()"
    arguments = (library, str(threads), str(its.fileno()))
    process = Popen(
        [sys.executable, "-P", "-c", code, *arguments],
        env=os.environ | thread_environment(threads) | ({"FASTATTN_ISA": isa} if isa else {}),
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
    library, threads, handle = sys.argv[1:]
    connection = Connection(int(handle))
    with contextlib.suppress(OSError):  # if memory runs out, end this process before others
        Path("/proc/self/oom_score_adj").write_text("1000")
    worker = Worker(library, int(threads))
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(worker, name)(*arguments)
            _settle()
        except Exception as error:  # whatever a library raises is an answer
            answer = False, _reason(error)
        connection.send(answer)


def _reason(error: Exception) -> str:
    """One short line."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # jax's
        return "not enough memory"
    line = " ".join(str(error).split()) or type(error).__name__
    line = line.rsplit("Status Message: ", 1)[-1]  # onnxruntime's text before it says nothing
    return line if len(line) <= 160 else f"...{line[-157:]}"
