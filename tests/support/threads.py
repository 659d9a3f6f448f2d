# SPDX-License-Identifier: Apache-2.0
"""What tests of threads and forks share; called in processes of their own."""

import os
import signal
import threading
import time
from pathlib import Path

from tests.support.child import start


def task_ids():
    """Return the threads of the process."""
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def tasks():
    """Return how many threads this process has."""
    return len(list(Path("/proc/self/task").iterdir()))


# A forked process gets this long for calls of milliseconds; then SIGALRM ends it.
FORK_SECONDS = 20


def in_fork(check):
    """Fork, run check() in the child, and return "ok", "wrong" or what killed it."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(FORK_SECONDS)
        right = False
        try:
            right = bool(check())
        finally:
            os._exit(0 if right else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {0: "ok", 1: "wrong", -signal.SIGALRM: "hang"}.get(status, f"exit status {status}")


def interrupt(function, threads):
    """Interrupt a function in another process when it says "ready": within a second it says so."""
    with start(function, env={"FASTATTN_NUM_THREADS": threads}) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - sent < 1
        assert process.wait() == 0
        watchdog.cancel()


def fork_in_a_handler(check, seconds, raises=False):
    """Fork in a signal handler during check(), a call that waits for a team; return how it ended.

    The child has only the thread that waits. There the handler returns, or raises.
    """
    children = []

    def fork(*_):
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(FORK_SECONDS)
            if raises:
                raise ValueError("in the child")

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, fork)
    main = threading.get_ident()
    threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGUSR1)).start()
    right = False
    try:
        while not children:
            right = check()
    except ValueError:
        right = raises and check()
    if children[0] == 0:
        os._exit(0 if right else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    assert right
    return status
