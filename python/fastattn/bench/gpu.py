# SPDX-License-Identifier: Apache-2.0
"""How a GPU is measured: its clock, its cache, its memory, its limits, its name.

Called by worker.py, for which processor.py answers the same questions about the CPU. PyTorch is
the only way to the GPU here: it has the arrays of all libraries, the events that are the clock, and
the matrix product and the copy that are the limits.
"""

import importlib
import importlib.util
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from fastattn.bench.cases import Case

FLUSH_BYTES = 512 << 20  # more than any L2 cache; also what the probed copy copies
PRODUCT_ROWS = 8192  # rows and columns of the matrices that are multiplied as the limit
PROBES = 3
SMI_SECONDS = 10
SMI_FIELDS = {  # what nvidia-smi calls them
    "driver": "driver_version",
    "clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.max.memory",
    "power_limit_w": "power.limit",
}


class Gpu:
    """The GPU that is PyTorch's current one, and this process's memory on it."""

    def __init__(self, _threads: int) -> None:
        self._torch = usable_torch()
        self._cold: Any = None  # to read it pushes all other memory out of the L2 cache
        self._allocated = 0

    def describe(self) -> dict[str, Any]:
        """Name the GPU, and what it runs with; clocks and driver where nvidia-smi tells them."""
        found = self._torch.cuda.get_device_properties(0)
        return {
            "gpu": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "gpu_memory_bytes": found.total_memory,
            "cuda": self._torch.version.cuda,
        } | asked_of_nvidia_smi(str(getattr(found, "uuid", "")))

    def release(self) -> None:
        """Free the memory of the case before, for other processes too."""
        self._cold = None
        self._torch.cuda.empty_cache()

    def limit_memory(self) -> None:
        """Do nothing: a call that asks for more memory than the GPU has fails, and does no harm."""

    def reset_peak(self) -> None:
        """Forget the peak of PyTorch's memory; fastattn's intermediate results are a part of it."""
        self._torch.cuda.reset_peak_memory_stats()
        self._allocated = self._torch.cuda.memory_allocated()

    def extra_bytes(self, output_bytes: int) -> int | None:
        """Return the peak of memory since `reset_peak`, less the result."""
        peak = self._torch.cuda.max_memory_allocated()
        return max(int(peak - self._allocated - output_bytes), 0)

    def timed(self, case: Case, call: Callable[[], Any], loops: int, cold: bool = False) -> float:
        """Return the seconds of a call, the mean of `loops`; cold: inputs are not in the L2 cache.

        They are the GPU's seconds, or for a case of launches those that the host needs to start it.
        """
        if case.call == "launch":
            self._torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(loops):
                call()
            return (time.perf_counter() - begin) / loops
        return self._gpu_seconds(self._flush if cold else call, call, loops)

    def _gpu_seconds(self, before: Callable[[], Any], call: Callable[[], Any], loops: int) -> float:
        """Time calls by events, which the GPU reaches when it has done the work `before`.

        This work keeps the GPU busy until the host has launched the calls: launches count nothing.
        """
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        begin.record()
        for _ in range(loops):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / loops

    def _flush(self) -> None:
        if self._cold is None:
            self._cold = self._bytes()
        self._cold.sum()  # read: written lines would go back to memory while the call runs

    def _bytes(self) -> Any:
        return self._torch.ones(FLUSH_BYTES // 4, dtype=self._torch.float32, device="cuda")

    def probe(self, limit: str, seconds: float) -> float:
        """Measure a limit: "copy" in bytes/s, read and written; "matmul" in FLOP/s of bfloat16."""
        torch = self._torch
        if limit == "copy":
            source, target = self._bytes(), self._bytes()
            amount = 2 * FLUSH_BYTES

            def call() -> None:
                target.copy_(source)
        else:
            shape = (PRODUCT_ROWS, PRODUCT_ROWS)
            a, b = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            product = torch.empty_like(a)
            amount = 2 * PRODUCT_ROWS**3

            def call() -> None:
                torch.matmul(a, b, out=product)

        took = self._gpu_seconds(call, call, 1)
        loops = max(1, int(seconds / PROBES / took))
        return amount / min(self._gpu_seconds(call, call, loops) for _ in range(PROBES))

    def settle(self) -> None:
        """Return when the GPU has done all its work."""
        self._torch.cuda.synchronize()


def usable_torch() -> Any:
    """Return the module torch if it has a GPU to work on; say what is missing otherwise."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError("--device cuda needs PyTorch, which is not installed: pip install torch")
    torch = importlib.import_module("torch")
    if torch.version.cuda is None:
        raise RuntimeError(
            f"--device cuda needs a PyTorch that was built for CUDA, this is {torch.__version__}: "
            "https://pytorch.org/get-started"
        )
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "none is visible"
        except Exception as error:  # of many kinds; its first sentence says it
            reason = str(error).split(".", maxsplit=1)[0]
        raise RuntimeError(
            f"--device cuda found no GPU ({reason}): see nvidia-smi, CUDA_VISIBLE_DEVICES"
        )
    return torch


def asked_of_nvidia_smi(uuid: str) -> dict[str, str]:
    """Return what nvidia-smi says of SMI_FIELDS; nothing where it is not installed."""
    if not uuid or shutil.which("nvidia-smi") is None:
        return {}
    asked = f"--query-gpu={','.join(SMI_FIELDS.values())}"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", asked, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    answers = (text.strip() for text in done.stdout.split(","))
    return {
        name: text
        for name, text in zip(SMI_FIELDS, answers, strict=False)
        if text and not text.startswith("[")  # [N/A], [Not Supported]
    }
