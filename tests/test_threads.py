# SPDX-License-Identifier: Apache-2.0
"""Threads: forks, concurrent callers, thread counts, Ctrl-C, interpreter exit, floating-point modes.

Each check runs in a process of its own with a time limit: what fails here hangs or kills the process.
"""

import ctypes
import functools
import importlib
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from child import command, environment, run

LINUX_TASKS = Path("/proc/self/task")


def problem(heads=4, length=512):
    """Return an array that is query, key and value of a call worth a team of threads."""
    import numpy as np

    return np.random.default_rng(0).random((1, heads, length, 64), np.float32)


def tasks():
    """Return how many threads this process has."""
    return len(list(LINUX_TASKS.iterdir()))


# A forked process gets this long for a call of a millisecond; then SIGALRM ends it.
FORK_SECONDS = 20


def in_forked_child(check):
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


def in_thread_of_child(check):
    """Run check() in a new thread and return what it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(check()))
    thread.start()
    thread.join()
    return results[0]


def attend_in_worker(index):
    """Attend in a process of a pool; the alarm ends it if it hangs."""
    import fastattn

    signal.alarm(FORK_SECONDS)
    query = problem()
    return float(fastattn.attention(query, query, query).sum(dtype="f8")) + index


def fork_report(torch_import):
    """Fork in every way, and return what became of each child."""
    if torch_import == "torch first":
        import torch
    import fastattn
    import numpy as np

    if torch_import == "torch second":
        import torch

    query = problem()
    expected = fastattn.attention(query, query, query)

    def attends():
        return np.array_equal(fastattn.attention(query, query, query), expected)

    report = {
        "fork": in_forked_child(attends),
        "fork, then a thread": in_forked_child(lambda: in_thread_of_child(attends)),
        "fork of a fork": in_forked_child(lambda: attends() and in_forked_child(attends) == "ok"),
        "fork, other thread count": in_forked_child(
            lambda: (fastattn.set_num_threads(3), attends())[1]
        ),
    }
    long = problem(8, 2048)
    stop = threading.Event()

    def keep_attending():
        while not stop.is_set():
            fastattn.attention(long, long, long)

    other = threading.Thread(target=keep_attending)
    other.start()
    time.sleep(0.1)
    report["fork during a call"] = in_forked_child(attends)
    stop.set()
    other.join()

    if torch_import != "no torch":
        numbers = torch.arange(1 << 20, dtype=torch.float32)

        def torch_computes():
            return float(numbers.sqrt().sum()) > 0

        class Dataset(torch.utils.data.Dataset):
            def __len__(self):
                return 6

            def __getitem__(self, index):
                signal.alarm(FORK_SECONDS)
                return float(np.abs(fastattn.attention(query, query, query) - expected).max())

        report["torch in the child"] = in_forked_child(torch_computes)
        report["both in the child"] = in_forked_child(
            lambda: attends() and torch_computes() and attends()
        )
        loader = torch.utils.data.DataLoader(
            Dataset(), batch_size=2, num_workers=2, multiprocessing_context="fork"
        )
        signal.alarm(2 * FORK_SECONDS)
        report["DataLoader"] = "ok" if sum(float(batch.sum()) for batch in loader) == 0 else "wrong"
        signal.alarm(0)

    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        sums = pool.map_async(attend_in_worker, range(4))
        try:
            total = float(expected.sum(dtype="f8"))
            right = sums.get(FORK_SECONDS) == [total + index for index in range(4)]
            report["pool"] = "ok" if right else "wrong"
        except multiprocessing.TimeoutError:
            report["pool"] = "hang"
    report["parent after all that"] = "ok" if attends() else "wrong"
    return report


@functools.cache
def report_of(threads, torch_import):
    return run(fork_report, torch_import, env={"OMP_NUM_THREADS": threads}, timeout=180)


FORKS = [
    "fork",
    "fork, then a thread",
    "fork of a fork",
    "fork, other thread count",
    "fork during a call",
    "pool",
    "parent after all that",
]
TORCH_FORKS = ["torch in the child", "both in the child", "DataLoader"]


@pytest.mark.parametrize("torch_import", ["no torch", "torch first", "torch second"])
@pytest.mark.parametrize("threads", [None, "1", "4"], ids=lambda n: f"OMP_NUM_THREADS {n}")
@pytest.mark.parametrize("way", FORKS + TORCH_FORKS)
def test_fork(way, threads, torch_import):
    if torch_import != "no torch":
        pytest.importorskip("torch", exc_type=ImportError)
    elif way in TORCH_FORKS:
        pytest.skip("needs torch")
    assert report_of(threads, torch_import)[way] == "ok"


def start_elsewhere(method):
    """Attend in a process that multiprocessing starts."""
    import multiprocessing

    import fastattn
    import numpy as np

    query = problem()
    expected = fastattn.attention(query, query, query)
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply_async(fastattn.attention, (query, query, query)).get(60)
    assert np.array_equal(there, expected)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_started_processes(method):
    run(start_elsewhere, method, timeout=90)


def count_tasks(callers):
    """Return the threads that calls add, when so many Python threads call at once."""
    import fastattn

    fastattn.set_num_threads(4)
    query = problem(8, 768)
    before = tasks()
    stop = time.monotonic() + 1.0
    started = threading.Barrier(callers + 1)

    def keep_attending():
        started.wait()
        while time.monotonic() < stop:
            fastattn.attention(query, query, query)

    threads = [threading.Thread(target=keep_attending) for _ in range(callers)]
    for thread in threads:
        thread.start()
    started.wait()
    most = 0
    while time.monotonic() < stop:
        most = max(most, tasks())
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    return most - before - callers


def test_concurrent_callers_share_one_team():
    assert 2 <= run(count_tasks, 6) <= 4


def share_inputs():
    """Attend to the same arrays from 8 threads at once, and compare bit by bit."""
    import fastattn
    import numpy as np

    fastattn.set_num_threads(2)
    query = problem(4, 300)
    mask = np.random.default_rng(1).random((300, 300)) < 0.7
    expected = fastattn.attention(query, query, query, mask=mask)
    outs = [np.empty_like(expected) for _ in range(8)]
    barrier = threading.Barrier(8)

    def attend(out):
        barrier.wait()
        for _ in range(20):
            out.fill(np.nan)
            fastattn.attention(query, query, query, mask=mask, out=out)
            assert np.array_equal(out, expected)

    failures = []
    threading.excepthook = failures.append
    threads = [threading.Thread(target=attend, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_sharing_inputs():
    run(share_inputs)


def default_threads():
    import fastattn

    return fastattn.get_num_threads()


def threads_in_use():
    """Return the thread count, as set, as planned, and as the process really has afterwards."""
    import fastattn

    query = problem(16, 512)
    before = tasks()
    fastattn.attention(query, query, query)
    plan = fastattn.explain(query, query, query)
    return [fastattn.get_num_threads(), plan["threads"], tasks() - before]


def threads_after_setting(count):
    import fastattn

    fastattn.set_num_threads(count)
    return threads_in_use()


CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, CPUS),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"FASTATTN_NUM_THREADS": "7"}, 7),
        ({"FASTATTN_NUM_THREADS": "7", "OMP_NUM_THREADS": "3"}, 7),
        ({"OMP_NUM_THREADS": "1"}, 1),
    ],
    ids=str,
)
def test_thread_variables(env, expected):
    count, planned, added = run(threads_in_use, env={**env, "FASTATTN_CGROUP_ROOT": "/nowhere"})
    assert count == planned == expected
    assert added == (expected if expected > 1 else 0)  # the owner thread is one of the team


def test_set_num_threads_wins():
    env = {"FASTATTN_NUM_THREADS": "7", "OMP_NUM_THREADS": "2"}
    assert run(threads_after_setting, 5, env=env) == [5, 5, 5]
    assert run(threads_after_setting, 1, env=env) == [1, 1, 0]


@pytest.mark.parametrize("garbage", ["", "0", "-2", "many", "3x", "99999999999999999999"])
@pytest.mark.parametrize("variable", ["FASTATTN_NUM_THREADS", "OMP_NUM_THREADS"])
def test_useless_thread_variables_are_ignored(variable, garbage):
    env = {variable: garbage, "FASTATTN_CGROUP_ROOT": "/nowhere"}
    assert run(default_threads, env=env) == CPUS


def limit_with_threadpoolctl():
    import fastattn
    from threadpoolctl import threadpool_limits

    query = problem()
    before = tasks()
    with threadpool_limits(1):
        assert fastattn.get_num_threads() == 1
        fastattn.attention(query, query, query)
        assert tasks() == before
    return fastattn.get_num_threads()


def test_threadpoolctl():
    pytest.importorskip("threadpoolctl")
    assert run(limit_with_threadpoolctl, env={"OMP_NUM_THREADS": "3"}) == 3
    env = {"FASTATTN_CGROUP_ROOT": "/nowhere"}
    assert run(limit_with_threadpoolctl, env=env) == CPUS


def threads_after_narrowing():
    import fastattn

    fastattn.attention(*[problem()] * 3)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return fastattn.get_num_threads()


def test_affinity():
    assert run(threads_after_narrowing) == 1
    if shutil.which("taskset"):
        cpu = str(min(os.sched_getaffinity(0)))
        assert run(default_threads, prefix=("taskset", "-c", cpu)) == 1


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "100001 100000\n"}, 2),
        ({"cpu.max": "1000000 100000\n"}, 10),
        ({"cpu.max": "nonsense\n"}, math.inf),
        ({"cpu.max": "0 0\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "70000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({}, math.inf),
    ],
    ids=str,
)
def test_quota(tmp_path, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    env = {"FASTATTN_CGROUP_ROOT": str(tmp_path)}
    assert run(default_threads, env=env) == min(CPUS, cpus)
    env["OMP_NUM_THREADS"] = "3"
    assert run(default_threads, env=env) == 3


def long_arguments():
    """Return query, key, value and out of a call of minutes, in little memory."""
    import numpy as np

    rng = np.random.default_rng(0)
    query = np.broadcast_to(rng.random((1, 1, 1024, 64), np.float32), (1, 4096, 1024, 64))
    key = np.broadcast_to(rng.random((1, 1, 32768, 64), np.float32), (1, 4096, 32768, 64))
    return query, key, key[..., :1], np.empty((1, 4096, 1024, 1), np.float32)


def wait_for_interrupt():
    """Start a call of minutes; say when; return once it was interrupted and the next call was right."""
    import fastattn
    import numpy as np

    query, key, value, out = long_arguments()
    small = problem()
    expected = fastattn.attention(small, small, small)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        fastattn.attention(query, key, value, out=out)
    except KeyboardInterrupt:
        sys.stdout.write("interrupted\n")
        sys.stdout.flush()
    assert np.array_equal(fastattn.attention(small, small, small), expected)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_interrupt(threads):
    process = subprocess.Popen(
        command(wait_for_interrupt),
        stdout=subprocess.PIPE,
        text=True,
        env=environment(FASTATTN_NUM_THREADS=threads),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - sent < 1
        process.communicate()
        watchdog.cancel()
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def handle_another_signal():
    """Attend while a timer's handler runs Python code: it runs, and the result is whole."""
    import fastattn
    import numpy as np

    query = problem(8, 2048)
    expected = fastattn.attention(query, query, query)
    ticks = []
    signal.signal(signal.SIGALRM, lambda *_: ticks.append(time.monotonic()))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    for _ in range(10):
        assert np.array_equal(fastattn.attention(query, query, query), expected)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert ticks

    def complain(*_):
        raise ValueError("from the handler")

    signal.signal(signal.SIGALRM, complain)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    arguments = long_arguments()
    with pytest.raises(ValueError, match="from the handler"):
        fastattn.attention(*arguments[:3], out=arguments[3])
    assert np.array_equal(fastattn.attention(query, query, query), expected)


def test_other_signals():
    run(handle_another_signal)


def count_ticks(threads):
    """Return how often another thread woke during a call, and how long the call took."""
    import fastattn

    fastattn.set_num_threads(threads)
    query = problem(1, 512)
    fastattn.attention(query, query, query)
    query = problem(8, 8192)
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.monotonic()
    fastattn.attention(query, query, query)
    end = time.monotonic()
    stop.set()
    ticker.join()
    return sum(start < at < end for at in ticks), end - start


@pytest.mark.parametrize("threads", [1, 2])
def test_gil_is_released(threads):
    ticks, seconds = run(count_ticks, threads)
    assert ticks > 20 * seconds


def leave_daemon_behind(kind):
    """End the process while a daemon thread is inside a call."""
    import fastattn

    small = problem(4, 128)
    long = long_arguments()
    fastattn.set_num_threads(2)
    inside = threading.Event()

    def attend():
        inside.set()
        if kind == "one long call":
            fastattn.attention(*long[:3], out=long[3])
        while True:
            fastattn.attention(small, small, small)

    for _ in range(2):
        threading.Thread(target=attend, daemon=True).start()
    inside.wait()
    time.sleep(0.2)


@pytest.mark.parametrize("kind", ["one long call", "many short calls"])
def test_interpreter_exit(kind):
    for _ in range(3):
        run(leave_daemon_behind, kind, timeout=20)


def import_again():
    """Import the package a second time, in the two ways that there are."""
    import fastattn
    import numpy as np

    query = problem()
    expected = fastattn.attention(query, query, query)
    again = importlib.reload(fastattn)
    assert np.array_equal(again.attention(query, query, query), expected)
    for name in [name for name in sys.modules if name.split(".")[0] == "fastattn"]:
        del sys.modules[name]
    anew = importlib.import_module("fastattn")
    assert anew is not fastattn
    assert np.array_equal(anew.attention(query, query, query), expected)
    assert np.array_equal(fastattn.attention(query, query, query), expected)


def test_import_again():
    run(import_again)


def free_of_the_gil():
    import fastattn

    assert fastattn.__name__ == "fastattn"
    return sys._is_gil_enabled()


@pytest.mark.skipif(
    getattr(sys, "_is_gil_enabled", lambda: True)(), reason="not a free-threaded Python"
)
def test_free_threading():
    assert run(free_of_the_gil) is False


def check_subnormals():
    """Compute with subnormal numbers, before and after calls, here and in the team's threads."""
    import fastattn
    import numpy as np

    def kept():
        return np.float32(1e-45) * np.float32(1) != 0 and np.float64(5e-324) * 1.0 != 0

    assert kept()
    query = problem()
    fastattn.attention(query, query, query)
    assert kept()
    for threads in (1, 4):
        fastattn.set_num_threads(threads)
        for dtype, least in ((np.float32, 1e-45), (np.float64, 5e-324)):
            query = np.ones((1, 4096, 64, 8), dtype)
            value = np.full((1, 4096, 1, 8), least, dtype)
            out = fastattn.attention(query, query[..., :1, :], value)
            assert np.array_equal(out, np.broadcast_to(value, out.shape))
            tiny = np.full((1, 4096, 1, 8), np.finfo(dtype).tiny / 2, dtype)
            many = fastattn.attention(
                query, np.tile(query[..., :1, :], (32, 1)), tiny.repeat(32, 2)
            )
            assert np.array_equal(many, np.broadcast_to(tiny, many.shape))
    assert kept()
    assert in_thread_of_child(kept)


def test_subnormals_are_kept():
    run(check_subnormals)


MXCSR_FLAGS = 0x3F  # which exceptions have happened: not a mode
FLUSH_TO_ZERO = 0x8040


class FloatingPointModes:
    """The x86 control register of the calling thread, through glibc's fegetenv and fesetenv."""

    OFFSET = 28  # of MXCSR in fenv_t

    def __init__(self):
        self.libm = ctypes.CDLL("libm.so.6")

    def get(self):
        environment = ctypes.create_string_buffer(32)
        self.libm.fegetenv(environment)
        return int.from_bytes(environment[self.OFFSET : self.OFFSET + 4], "little")

    def set(self, modes):
        environment = ctypes.create_string_buffer(32)
        self.libm.fegetenv(environment)
        environment[self.OFFSET : self.OFFSET + 4] = modes.to_bytes(4, "little")
        self.libm.fesetenv(environment)


def check_modes(isa):
    """Leave the caller's modes as they are, and compute the same whatever they are."""
    import fastattn
    import numpy as np
    from fastattn import _core

    _core.set_isa(isa)
    modes = FloatingPointModes()
    query = problem()
    query = np.concatenate([query, query[:, :1] * np.float32(1e-40)], axis=1)
    before = modes.get() & ~MXCSR_FLAGS
    results = []
    for flush in (FLUSH_TO_ZERO, 0):  # flushing first: the team's threads are made then
        for threads in (2, 1):
            fastattn.set_num_threads(threads)
            modes.set(before | flush)
            results.append(fastattn.attention(query, query, query))
            assert modes.get() & ~MXCSR_FLAGS == before | flush
    modes.set(before)
    for result in results:
        assert np.array_equal(result, results[-1])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads an x86 register")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_floating_point_modes(isa):
    from fastattn import _core

    if isa not in _core.supported_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    run(check_modes, isa)
