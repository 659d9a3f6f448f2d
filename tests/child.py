# SPDX-License-Identifier: Apache-2.0
"""Runs a test function in a Python process of its own.

For what cannot be shown inside pytest's process: crashes, hangs, environment variables that are read
once, import order, memory peaks. The tests call run(); the functions that it is given import what
they need themselves, so that nothing is imported before its time.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
THREAD_VARIABLES = ("OMP_", "GOMP_", "MKL_", "OPENBLAS_", "FASTATTN_")


def environment(**changes: str | None) -> dict[str, str]:
    """Return this process's environment without its thread settings, then changed as asked."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(THREAD_VARIABLES)}
    return base | {k: v for k, v in changes.items() if v is not None}


def command(function: Callable[..., Any], *arguments: object) -> list[str]:
    """Return the command that calls a function of a module in this folder and prints the result."""
    call = f"{function.__module__}.{function.__name__}(*{arguments!r})"
    imports = f"import json, sys; sys.path.insert(0, {str(TESTS)!r}); import {function.__module__}"
    return [sys.executable, "-c", f"{imports}; print(json.dumps({call}))"]


def run(
    function: Callable[..., Any],
    *arguments: object,
    env: Mapping[str, str | None] | None = None,
    timeout: float = 60,
    prefix: tuple[str, ...] = (),
) -> Any:
    """Call the function in a new process; return what it returns, through JSON.

    A process that is killed by a signal, or that hangs and is then ended together with its own
    children, fails with what it had written to stderr.
    """
    process = subprocess.Popen(
        [*prefix, *command(function, *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**(env or {})),
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end after {timeout} s\n{stdout}\n{stderr}") from None
    assert process.returncode == 0, f"exit status {process.returncode}\n{stdout}\n{stderr}"
    return json.loads(stdout.splitlines()[-1])
