# SPDX-License-Identifier: Apache-2.0
"""How the CPU is measured: its clock, its caches, its memory, its limits.

Called by worker.py, for which gpu.py answers the same questions about a GPU.
"""

import ctypes
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.bench.cases import Array, Case

SETTLE_SECONDS, QUIET_SECONDS = 1.0, 0.02  # at most; how long a quiet process is watched
FLUSH_BYTES = 512 << 20  # more than any cache
MEMORY_SHARE = 0.8  # of what the machine has free, for one library


class Processor:
    """The CPU, and the memory of this process."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._cold: Array | None = None  # to read it pushes all other memory out of the caches
        self._resident: int | None = None
        self._matrix: Any = None  # see _product()

    def release(self) -> None:
        """Free the memory of the case before."""
        self._cold = self._matrix = None

    def limit_memory(self) -> None:
        """Let a call that asks for too much fail in this process, not bring down the machine."""
        free = int(_kibibytes("MemAvailable", "/proc/meminfo") * MEMORY_SHARE)
        limit = (_kibibytes("VmSize") + free) * 1024
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or limit <= hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))

    def reset_peak(self) -> None:
        """Make the kernel forget the peak of this process; remember the bytes resident now."""
        try:
            ctypes.CDLL(None).malloc_trim(0)  # memory that is free would hide what the call takes
            Path("/proc/self/clear_refs").write_text("5")
        except (AttributeError, OSError):
            self._resident = None
            return
        self._resident = _kibibytes("VmRSS") * 1024

    def extra_bytes(self, output_bytes: int) -> int | None:
        """Return the peak since `reset_peak`, less the result; None if the system does not tell."""
        if self._resident is None:
            return None
        return max(_kibibytes("VmHWM") * 1024 - self._resident - output_bytes, 0)

    def timed(self, case: Case, call: Callable[[], Any], loops: int, cold: bool = False) -> float:
        """Return the seconds of a call, the mean of `loops`; cold: inputs are in no cache."""
        if case.before:
            self._product(case.before)
        if case.sleep_ms:
            time.sleep(case.sleep_ms / 1000)
        if cold:
            if self._cold is None:
                self._cold = np.ones(FLUSH_BYTES // 8)
            self._cold.sum()  # read: written lines would go back to memory while the call runs
        begin = time.perf_counter()
        for _ in range(loops):
            call()
        return (time.perf_counter() - begin) / loops

    def _product(self, library: str) -> None:
        """Multiply matrices for about a millisecond, with that library's threads."""
        if self._matrix is None:
            self._matrix = np.ones((512, 512), np.float32)
            if library == "torch":
                import torch

                self._matrix = torch.from_numpy(self._matrix)
        self._matrix @ self._matrix

    def probe(self, limit: str, seconds: float) -> float:
        """Measure a limit: "read" in bytes/s, of a dtype's arithmetic in FLOP/s."""
        import fastattn
        from fastattn import _core

        fastattn.set_num_threads(self._threads)
        if limit == "read":
            return _core.probe_read(FLUSH_BYTES >> 20, 3)
        # The best of three: a limit is what the machine can do, and threads may start out badly.
        return max(_core.probe_fma(limit, seconds / 3) for _ in range(3))

    def settle(self) -> None:
        """Return when threads have stopped spinning; those of some libraries do so after a call."""
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
