# SPDX-License-Identifier: Apache-2.0
"""Runs a test function in a Python process of its own, and returns what it returned.

For what cannot be shown inside pytest's process: crashes, hangs, environment variables that are
read once, import order, memory peaks.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
THREAD_VARIABLES = ("OMP_", "GOMP_", "MKL_", "OPENBLAS_", "FASTATTN_")


def start(
    function: Callable[..., Any],
    *arguments: object,
    env: Mapping[str, str] | None = None,
    imports: Iterable[str] = (),
    prefix: Iterable[str] = (),
) -> subprocess.Popen[str]:
    """Start a process that calls the function and prints the result as JSON.

    It has no thread settings but those in env, imports what is asked for before all else, and runs
    under the command that is its prefix.
    """
    module, name = function.__module__, function.__name__
    lines = [
        *(f"import {name}" for name in imports),
        f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); import {module}",
        f"print(json.dumps({module}.{name}(*{arguments!r})))",
    ]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(THREAD_VARIABLES)}
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", "\n".join(lines)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | dict(env or {}),
        start_new_session=True,
    )


def run(function: Callable[..., Any], *arguments: object, timeout: float = 60, **how: Any) -> Any:
    """Call the function in a process that start() starts; return what it returns, through JSON.

    A process that is killed by a signal, or that hangs and is then ended together with its own
    children, fails with what it had written.
    """
    process = start(function, *arguments, **how)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end after {timeout} s\n{stdout}\n{stderr}") from None
    assert process.returncode == 0, f"exit status {process.returncode}\n{stdout}\n{stderr}"
    return json.loads(stdout.splitlines()[-1])
