# SPDX-License-Identifier: Apache-2.0
"""What fastattn runs on: its build, the CPU, the threads, the environment variables."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fastattn import _core
from fastattn._arguments import number_of_threads
from fastattn._report import Report

VARIABLES = (
    "FASTATTN_ISA",
    "FASTATTN_NUM_THREADS",
    "FASTATTN_CGROUP_FILE",
    "FASTATTN_CGROUP_ROOT",
    "FASTATTN_CPU_ROOT",
    "OMP_NUM_THREADS",
    "FASTATTN_CUDA_KERNEL",
    "FASTATTN_CACHE_DIR",
)


def info() -> Report:
    """Describe this installation and this machine.

    Returns
    -------
    dict
        Its str() is the report: what to paste into a bug report. `isa` is the instruction set in
        use, `isas` are those that this CPU can run, best first.
    """
    build = _core.build_info()
    return Report(
        "fastattn",
        {
            "version": _core.__version__,
            "isa": _core.isa(),
            "isas": _core.supported_isas(),
            "threads": get_num_threads(),
            "cpu": _cpu_model(),
            "cpus": len(os.sched_getaffinity(0)),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "compiler": f"GCC {build['compiler']}",
            "openmp": build["openmp"],
            "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        },
    )


def set_num_threads(n: int) -> None:
    """Use so many threads from now on, in every call of this process.

    Parameters
    ----------
    n : int
        1 or more; more than there are CPUs is allowed. It wins over FASTATTN_NUM_THREADS, which
        wins over OMP_NUM_THREADS; without any of them it is the CPUs this process may use, or its
        control group's quota if that is less.

    Raises
    ------
    TypeError, ValueError
        n is not such a number.
    """
    _core.set_num_threads(number_of_threads("n", n))


def get_num_threads() -> int:
    """Return how many threads a call uses at most; one with little work uses fewer."""
    return _core.get_num_threads()


def warn_of_unknown_variables() -> None:
    """Warn of a FASTATTN_ variable that nothing reads: it is misspelled."""
    for name in os.environ:
        if name.startswith("FASTATTN_") and name not in VARIABLES:
            warnings.warn(
                f"{name} is not an environment variable of fastattn: {', '.join(VARIABLES)}",
                stacklevel=3,
            )


def _cpu_model() -> str:
    cpuinfo: Any = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return str(line.split(":", 1)[1].strip())
    return platform.processor() or platform.machine()
