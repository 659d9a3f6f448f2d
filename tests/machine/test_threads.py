# SPDX-License-Identifier: Apache-2.0
"""Threads: forks, concurrent callers, thread counts, Ctrl-C, process exit, floating-point modes.

What fails here hangs or kills the process, so each check runs in a process of its own (child.py).
"""

import contextlib
import ctypes
import functools
import importlib
import itertools
import math
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fastattn
from fastattn import _core
from fastattn._quantised import BLOCKS, Quantised
from tests.support.child import run
from tests.support.threads import (
    FORK_SECONDS,
    fork_in_a_handler,
    in_fork,
    interrupt,
    task_ids,
    tasks,
)

CPUS = len(os.sched_getaffinity(0))
NO_QUOTA = {"FASTATTN_CGROUP_ROOT": "/nowhere", "FASTATTN_CPU_ROOT": "/nowhere"}


def problem(heads=4, length=512):
    """Return an array that is query, key and value of a call worth a team of threads."""
    return np.random.default_rng(0).random((1, heads, length, 64), np.float32)


def attend(array):
    return fastattn.attention(array, array, array)


def quantised(rows, columns):
    """Return a weight whose scales a linear layer looks up in a table."""
    return Quantised("Q8_0", np.zeros((rows, columns // 32), BLOCKS["Q8_0"]))


def in_thread(function):
    """Call the function in a new thread and return what it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


# Forks.


def attend_in_pool(_):
    signal.alarm(FORK_SECONDS)
    return attend(problem()).sum(dtype="f8")


def forks(with_torch):
    """Fork in every way, and return what became of the children."""
    query = problem()
    exact = fastattn.reference.attention(query, query, query)
    report = {"fork before use": in_fork(lambda: np.allclose(attend(query), exact, atol=1e-6))}
    expected = attend(query)

    def attends():
        return np.array_equal(attend(query), expected)

    report["fork"] = in_fork(attends)
    report["thread of a fork"] = in_fork(lambda: in_thread(attends))
    report["fork of a fork"] = in_fork(lambda: attends() and in_fork(attends) == "ok")
    report["unused fork's fork"] = in_fork(lambda: in_fork(attends) == "ok")
    report["other count"] = in_fork(lambda: (fastattn.set_num_threads(3), attends())[1])
    stop = threading.Event()

    def keep_attending():
        long = problem(8, 2048)
        while not stop.is_set():
            attend(long)

    other = threading.Thread(target=keep_attending)
    other.start()
    time.sleep(0.1)
    report["fork during a call"] = in_fork(attends)
    stop.set()
    other.join()
    if with_torch:
        report |= forks_with_torch(query, expected, attends)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        sums = pool.map_async(attend_in_pool, range(4)).get(FORK_SECONDS)
        report["pool"] = "ok" if set(sums) == {expected.sum(dtype="f8")} else "wrong"
    report["parent after all that"] = "ok" if attends() else "wrong"
    return report


def forks_with_torch(query, expected, attends):
    """Fork where the child uses torch; the parent must not have used torch's own threads."""
    import torch

    numbers = torch.from_numpy(np.arange(1 << 20, dtype=np.float32))

    def torch_computes():
        return float(numbers.sqrt().sum()) > 0

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            signal.alarm(FORK_SECONDS)
            return float(np.abs(attend(query) - expected).max())

    loader = torch.utils.data.DataLoader(
        Dataset(), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    return {
        "torch in the child": in_fork(torch_computes),
        "both in the child": in_fork(lambda: attends() and torch_computes() and attends()),
        "DataLoader": "ok" if sum(float(batch.sum()) for batch in loader) == 0 else "wrong",
    }


@pytest.mark.promise("fork-never-hangs")
@pytest.mark.parametrize("imports", [(), ("torch", "fastattn"), ("fastattn", "torch")], ids=str)
@pytest.mark.parametrize("threads", ["1", "4"])
def test_forks(threads, imports):
    if imports:
        pytest.importorskip("torch", exc_type=ImportError)
    env = {"OMP_NUM_THREADS": threads}
    report = run(forks, bool(imports), imports=imports, env=env, timeout=150)
    assert set(report.values()) == {"ok"}, report


def fork_during_a_first_call(of, delay):
    """Fork while another thread finds out what all calls then know; return what became of it."""
    query, weight = problem(), quantised(8, 32)
    rows = np.ones((1, 32), np.float32)

    def call():
        return attend(query) if of == "attention" else fastattn.linear(rows, weight)

    first = threading.Thread(target=call)
    first.start()
    time.sleep(delay)
    child = in_fork(lambda: np.isfinite(call()).all())
    first.join()
    return child


@pytest.mark.promise("fork-never-hangs")
@pytest.mark.parametrize("of", ["attention", "linear"])
@pytest.mark.parametrize("delay", [0, 2e-4, 5e-4, 1e-3, 3e-3])
def test_fork_during_a_first_call(of, delay):
    assert run(fork_during_a_first_call, of, delay) == "ok"


def start_elsewhere(method):
    query = problem()
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply_async(fastattn.attention, (query, query, query)).get(60)
    assert np.array_equal(there, attend(query))


@pytest.mark.promise("started-processes-compute")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_started_processes(method):
    run(start_elsewhere, method, timeout=90)


# Concurrent callers.


def call_at_once(callers):
    """Attend to the same arrays from many threads for a while; return the threads added."""
    fastattn.set_num_threads(4)
    before = tasks()
    query = problem(8, 768)
    mask = np.random.default_rng(1).random((768, 768)) < 0.7
    expected = fastattn.attention(query, query, query, mask=mask)
    stop = time.monotonic() + 1
    failures = []

    def keep_attending():
        out = np.empty_like(expected)
        while time.monotonic() < stop:
            fastattn.attention(query, query, query, mask=mask, out=out.fill(np.nan) or out)
            assert np.array_equal(out, expected)

    threading.excepthook = failures.append
    threads = [threading.Thread(target=keep_attending) for _ in range(callers)]
    for thread in threads:
        thread.start()
    most = 0
    while time.monotonic() < stop:
        most = max(most, tasks())
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert not failures
    return most - before - callers


@pytest.mark.promise("concurrent-callers-share-one-team")
def test_concurrent_callers_share_one_team():
    assert 2 <= run(call_at_once, 6) <= 4


# How many threads.


def threads_in_use(count=None):
    """Return the thread count as set, as planned, and as the process really has afterwards."""
    if count is not None:
        fastattn.set_num_threads(count)
    query = problem(16)
    before = tasks()
    attend(query)
    plan = fastattn.explain(query, query, query)
    return [fastattn.get_num_threads(), plan["threads"], tasks() - before]


@pytest.mark.promise("thread-count-has-an-order")
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, CPUS),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"FASTATTN_NUM_THREADS": "7"}, 7),
        ({"FASTATTN_NUM_THREADS": "7", "OMP_NUM_THREADS": "3"}, 7),
        ({"OMP_PROC_BIND": "true"}, CPUS),
        ({"OMP_DYNAMIC": "true", "OMP_NUM_THREADS": "5"}, 5),
    ],
    ids=str,
)
def test_thread_variables(env, expected):
    # The caller is one of them.
    assert run(threads_in_use, env=env | NO_QUOTA) == [expected, expected, expected - 1]


@pytest.mark.promise("thread-count-has-an-order")
@pytest.mark.parametrize("count", [1, 5])
def test_set_num_threads_wins(count):
    env = {"FASTATTN_NUM_THREADS": "7", "OMP_NUM_THREADS": "2"}
    assert run(threads_in_use, count, env=env) == [count, count, count - 1]


def use_a_team_for_less():
    """Return how many threads there are after calls for 4, 2 and 3 threads."""
    before = tasks()
    teams = []
    for setting, heads, threads in ((4, 4, 4), (4, 1, 2), (3, 4, 3)):
        fastattn.set_num_threads(setting)
        array = problem(heads, 4096)  # so few that no two threads share a block's keys
        few = array[..., :17, :]  # two vectors of rows for each head
        assert fastattn.explain(few, array, array)["threads"] == threads
        fastattn.attention(few, array, array)
        teams.append(tasks() - before)
    return teams


def test_team_is_kept_for_smaller_calls():
    assert run(use_a_team_for_less) == [3, 3, 3]  # those that nobody needs sleep


def default_threads():
    return fastattn.get_num_threads()


@pytest.mark.parametrize("garbage", ["", "0", "-2", "many", "3x", "9" * 20])
@pytest.mark.parametrize("variable", ["FASTATTN_NUM_THREADS", "OMP_NUM_THREADS"])
def test_useless_thread_variables_are_ignored(variable, garbage):
    assert run(default_threads, env={variable: garbage, **NO_QUOTA}) == CPUS


def limit_with_threadpoolctl():
    from threadpoolctl import threadpool_limits

    before = tasks()
    with threadpool_limits(1):
        assert fastattn.get_num_threads() == 1
        attend(problem())
        assert tasks() == before
    return fastattn.get_num_threads()


def test_threadpoolctl():
    pytest.importorskip("threadpoolctl")
    assert run(limit_with_threadpoolctl, env={"OMP_NUM_THREADS": "3"}) == 3
    assert run(limit_with_threadpoolctl, env=NO_QUOTA) == CPUS


def threads_after_narrowing(used_before):
    if used_before:
        attend(problem())
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return fastattn.get_num_threads()


@pytest.mark.promise("thread-count-has-an-order")
@pytest.mark.parametrize("used_before", [True, False])
def test_affinity(used_before):
    assert run(threads_after_narrowing, used_before, env=NO_QUOTA) == 1


@pytest.mark.promise("thread-count-has-an-order")
@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "30000 100000\n"}, 1),
        ({"cpu.max": "100001 100000\n"}, 2),
        ({"cpu.max": "1000000 100000\n"}, 10),
        ({"cpu.max": "nonsense\n"}, math.inf),
        ({"cpu.max": "0 0\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "70000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/a/cpu.cfs_quota_us": "70000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 1),
        (
            {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "5\n", "cpu,cpuacct/a/b/cpu.cfs_period_us": "5\n"},
            1,
        ),
        ({f"cpuset/a/cpu.cfs_{name}_us": "5\n" for name in ("quota", "period")}, math.inf),
        ({}, math.inf),
    ],
    ids=str,
)
def test_quota(tmp_path, files, cpus):
    groups = "9:cpuset:/a\nnonsense\n4:cpu,cpuacct:/a/b\n0::/\n"
    for name, text in (files | {"of_process": groups}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    env = {
        "FASTATTN_CGROUP_ROOT": str(tmp_path),
        "FASTATTN_CGROUP_FILE": str(tmp_path / "of_process"),
        "FASTATTN_CPU_ROOT": "/nowhere",
    }
    assert run(default_threads, env=env) == min(CPUS, cpus)
    assert run(default_threads, env=env | {"OMP_NUM_THREADS": "3"}) == 3


@pytest.mark.parametrize("levels", [0, 1])
def test_quota_of_this_group_and_those_around_it(tmp_path, levels):
    groups = Path("/proc/self/cgroup")
    lines = groups.read_text().splitlines() if groups.exists() else []
    own = next((Path(line[3:]) for line in lines if line.startswith("0::/")), None)
    if own is None or ".." in own.parts:
        pytest.skip("in no control group of version 2")
    group = tmp_path / own.relative_to("/")
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.max").write_text("max 100000\n")
    limited = [group, *group.parents][levels]
    if not limited.is_relative_to(tmp_path):
        pytest.skip("in the root control group")
    (limited / "cpu.max").write_text("100000 100000\n")
    assert run(default_threads, env={"FASTATTN_CGROUP_ROOT": str(tmp_path)}) == 1


@pytest.mark.promise("thread-count-has-an-order")
@pytest.mark.parametrize(("siblings", "cores"), [("{cpu}", CPUS), ("0-999", 1), (None, CPUS)])
def test_siblings_of_a_core_count_once(tmp_path, siblings, cores):
    for cpu in os.sched_getaffinity(0) if siblings is not None else ():
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        file = tmp_path / f"cpu{cpu}/topology/thread_siblings_list"
        file.write_text(siblings.format(cpu=cpu) + "\n")
    env = NO_QUOTA | {"FASTATTN_CPU_ROOT": str(tmp_path)}
    assert run(default_threads, env=env) == cores
    assert run(default_threads, env=env | {"FASTATTN_NUM_THREADS": "3"}) == 3


# What the team may run on, when it comes, and what it costs while nobody calls.


def cpus_of_the_team(pinned, every):
    """Return what the threads that a call makes may run on; pinned: its own is bound to a CPU."""
    before = task_ids()
    fastattn.set_num_threads(3)
    expected = attend(problem())
    assert np.abs(expected - fastattn.reference.attention(*[problem()] * 3)).max() < 1e-5

    def call():
        if pinned:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for _ in range(5):
            assert np.array_equal(attend(problem()), expected)

    in_thread(call)
    end = time.monotonic() + 20
    while True:  # until the thread that called is gone, and the others have fallen asleep
        found = []
        for thread in task_ids() - before:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                found.append(sorted(os.sched_getaffinity(thread)))
        if found == [every] * 2 or time.monotonic() > end:
            return found
        time.sleep(0.01)


BINDINGS = [
    {},
    {"OMP_PROC_BIND": "true"},
    {"OMP_PROC_BIND": "spread", "OMP_PLACES": "threads"},
    {"GOMP_CPU_AFFINITY": "0-63"},
    {"OMP_PROC_BIND": "nonsense"},
    {"GOMP_CPU_AFFINITY": "nonsense"},
    {"GOMP_CPU_AFFINITY": "4000-4090"},
    {"OMP_PLACES": "nonsense"},
    {"OMP_PLACES": "{0}:4096:1"},
    {"OMP_WAIT_POLICY": "nonsense"},
    {"OMP_WAIT_POLICY": "active"},
    {"OMP_NUM_THREADS": "nonsense", "OMP_STACKSIZE": "nonsense"},
]


@pytest.mark.promise("the-team-has-the-process-s-cpus")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("env", BINDINGS, ids=str)
def test_team_has_the_cpus_of_the_process(env, pinned):
    every = sorted(os.sched_getaffinity(0))
    assert run(cpus_of_the_team, pinned, every, env=env) == [every] * 2


def change_affinity():
    """Call while the CPUs of the process become fewer and more again; return the teams' CPUs."""
    every = os.sched_getaffinity(0)
    fastattn.set_num_threads(3)
    before = task_ids()
    expected, cpus = attend(problem()), []
    for allowed in ({min(every)}, every):
        os.sched_setaffinity(0, allowed)
        end = time.monotonic() + 20
        while True:  # until each of the team has had an item
            assert np.array_equal(attend(problem()), expected)
            found = {tuple(os.sched_getaffinity(thread)) for thread in task_ids() - before}
            if found == {tuple(allowed)} or time.monotonic() > end:
                break
        cpus.append([sorted(one) for one in found])
    return cpus


def test_affinity_that_changes():
    every = sorted(os.sched_getaffinity(0))
    assert run(change_affinity) == [[[min(every)]], [every]]


def seconds_of(threads):
    """Return the CPU time that these threads have used."""
    ticks = 0
    for thread in threads:
        stat = Path(f"/proc/self/task/{thread}/stat").read_text()
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def helped_late():
    """Begin a long call while a short one has the team; return the shares of caller and team."""
    fastattn.set_num_threads(2)
    before = task_ids()
    attend(problem())
    team = task_ids() - before
    short, long = problem(8, 4096), problem(16, 8192)
    begins = threading.Event()

    def hold_the_team():
        while not begins.is_set():
            attend(short)

    holder = threading.Thread(target=hold_the_team)
    holder.start()
    time.sleep(0.05)
    teams = seconds_of(team)
    begins.set()  # amid a call of the other thread, nearly always; it is the last one
    begin = time.thread_time()
    attend(long)
    mine = time.thread_time() - begin
    holder.join()
    return mine, seconds_of(team) - teams


def test_a_long_call_gets_its_team_when_that_is_free():
    mine, teams = run(helped_late)
    assert teams > mine / 4  # of which the short call alone has less


def idle_seconds(calls):
    """Return the CPU time that the process uses after calls, while it sleeps."""
    fastattn.set_num_threads(4)
    array = problem()
    for _ in range(calls):
        attend(array)
        time.sleep(1e-3)
    begin = time.process_time()
    time.sleep(0.1)
    return time.process_time() - begin


@pytest.mark.promise("nothing-spins")
def test_nothing_spins_after_a_call():
    assert min(run(idle_seconds, 3) for _ in range(3)) < 1e-3


# Arguments that another thread changes during the call.


def change_lengths():
    """Call while a thread writes numbers into lengths that lie far outside the arrays."""
    query = problem(2, 64)[0].swapaxes(0, 1).copy()
    starts, lengths = np.array([0, 64]), np.array([64])
    ended, outcomes = threading.Event(), set()

    def change():
        for number in itertools.cycle((64, 2**50)):  # between two rounds others may run
            starts[1] = lengths[0] = number
            if ended.is_set():
                break

    changing = threading.Thread(target=change)
    changing.start()
    sys.setswitchinterval(1e-5)
    begin = time.monotonic()
    while time.monotonic() < begin + (2 if len(outcomes) == 2 else 20):
        for _ in range(500):
            try:
                fastattn.varlen_attention(query, query, query, starts, starts)
                batch = query.swapaxes(0, 1)[None]
                fastattn.attention(batch, batch, batch, kv_lengths=lengths)
                outcomes.add("computed")
            except ValueError as error:
                if "must be within 0.." in str(error):
                    outcomes.add("refused")
    ended.set()
    changing.join()
    return sorted(outcomes)


def test_lengths_that_another_thread_changes():
    assert run(change_lengths) == ["computed", "refused"]


# Ctrl-C and other signals, the interpreter's lock, its end.


def minutes():
    """Make a call that takes minutes, in little memory."""
    rng = np.random.default_rng(0)
    query = np.broadcast_to(rng.random((1, 1, 1024, 64), np.float32), (1, 4096, 1024, 64))
    key = np.broadcast_to(rng.random((1, 1, 32768, 64), np.float32), (1, 4096, 32768, 64))
    fastattn.attention(query, key, key[..., :1])


def short_sequences():
    """Decode for long, in so many sequences that no part of the work takes long."""
    query = np.broadcast_to(np.float32(1), (2**25, 1, 1, 1))
    fastattn.attention(query, query, query, out=np.zeros(query.shape, np.float32))


def spans():
    """Attend for long with few queries to many keys, whose parts of the work are short."""
    query = np.broadcast_to(np.float32(1), (1, 40, 8))
    key = np.broadcast_to(np.float32(1), (1, 2**28, 8))
    fastattn.attention(query, key, np.broadcast_to(np.float32(1), (1, 2**28, 1500)))


def wait_for_interrupt(call=minutes):
    """Start a call of minutes; say when, and when it was interrupted; make another."""
    query = problem()
    expected = attend(query)
    print("ready", flush=True)
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    assert np.array_equal(attend(query), expected)


@pytest.mark.promise("interrupt-within-a-second")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_interrupt(threads):
    interrupt(wait_for_interrupt, threads)


def wait_for_interrupt_of_short_sequences():
    wait_for_interrupt(short_sequences)


def wait_for_interrupt_of_spans():
    wait_for_interrupt(spans)


@pytest.mark.promise("interrupt-within-a-second")
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("of", ["short_sequences", "spans"])
def test_interrupt_between_short_parts(of, threads):
    interrupt(globals()[f"wait_for_interrupt_of_{of}"], threads)


def handle_another_signal():
    """Let a handler run during calls: results are whole, and what it raises comes out."""
    query = problem(8, 2048)
    expected = attend(query)
    ticks = []
    signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    assert all(np.array_equal(attend(query), expected) for _ in range(10))
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert ticks

    def complain(*_):
        raise ValueError("from the handler")

    signal.signal(signal.SIGALRM, complain)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(ValueError, match="from the handler"):
        minutes()
    assert np.array_equal(attend(query), expected)


@pytest.mark.promise("signal-handlers-run")
def test_other_signals():
    run(handle_another_signal)


def bias_gradient(array):
    """Return the gradient of a bias that all rows share: a sum that grows in its place."""
    bias = np.zeros(array.shape[-2], array.dtype)
    out, lse = fastattn.attention(array, array, array, bias=bias, return_lse=True)
    options = {"bias": bias, "return_dbias": True}
    return fastattn.attention_backward(out, array, array, array, out, lse, **options)[3]


def fork_during(name, raises, seconds):
    query, call = problem(8, 4096), globals()[name]
    expected = call(query)
    return fork_in_a_handler(lambda: np.array_equal(call(query), expected), seconds, raises)


def decode(query):
    """Attend with as many rows as a key head can have in decoding, whose keys are cut."""
    keys = np.resize(query.reshape(-1, 64), (2, 2**17, 64))
    return fastattn.attention(np.resize(query, (32, 16, 64)), keys, keys)


def attend_in_spans(query):
    """Attend with so few queries that threads share a block's keys."""
    keys = np.resize(query.reshape(-1, 64), (1, 2**18, 64))
    return fastattn.attention(query[0, :1, :40], keys, keys)


@pytest.mark.promise("fork-never-hangs")
@pytest.mark.parametrize("raises", [False, True], ids=["goes on", "raises"])
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("name", ["attend", "decode", "attend_in_spans"])
def test_fork_in_a_signal_handler(name, threads, raises):
    env = {"FASTATTN_NUM_THREADS": threads}
    assert run(fork_during, name, raises, 0.1, env=env) == 0


# Some time on, most likely in the backward pass.
@pytest.mark.promise("fork-never-hangs")
@pytest.mark.parametrize("seconds", [0.4, 0.8])
def test_fork_in_a_signal_handler_during_gradients(seconds):
    env = {"FASTATTN_NUM_THREADS": "2"}
    assert run(fork_during, "bias_gradient", False, seconds, env=env) == 0


def cpu_time(threads, call):
    """Return the CPU seconds of all threads in a call, at best."""
    fastattn.set_num_threads(threads)
    call()
    times = []
    for _ in range(5):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def cost_of_a_team(length, window=None):
    """Return how much more CPU time gradients take with two threads than with one."""
    array = np.random.default_rng(0).random((1, 2, length, 64), np.float32)
    options = {} if window is None else {"window": (window, window), "query_offset": 0}
    out, lse = fastattn.attention(array, array, array, return_lse=True, **options)
    call = functools.partial(
        fastattn.attention_backward, out, array, array, array, out, lse, **options
    )
    return cpu_time(2, call) / cpu_time(1, call)


@pytest.mark.skipif(CPUS < 2, reason="one CPU")
def test_gradients_under_a_window_do_not_wait():
    """Held against gradients of rows that see all keys, as cores may share what they have."""
    without_window = run(cost_of_a_team, 2500)
    assert run(cost_of_a_team, 100_000, 64) < 1.25 * max(without_window, 1)


def count_ticks(threads):
    """Return how often another thread woke in a millisecond of a call, on average."""
    fastattn.set_num_threads(threads)
    query = problem(8, 8192)
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.monotonic()
    attend(query)
    end = time.monotonic()
    stop.set()
    ticker.join()
    return sum(begin < at < end for at in ticks) / (end - begin) / 1000


@pytest.mark.promise("gil-is-released")
@pytest.mark.parametrize("threads", [1, 2])
def test_gil_is_released(threads):
    assert run(count_ticks, threads) > 0.02  # without it: one tick at most


def leave_daemons_behind(call):
    """End the process while daemon threads are inside calls."""
    fastattn.set_num_threads(2)
    query = problem(4, 128)

    def keep_attending():
        while True:
            minutes() if call == "one long call" else attend(query)

    for _ in range(8):
        threading.Thread(target=keep_attending, daemon=True).start()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # busy: the daemons wait for the interpreter's lock when it ends
        pass


@pytest.mark.promise("exit-never-hangs")
@pytest.mark.parametrize("call", ["one long call", "many short calls"])
def test_interpreter_exit_in_daemons(call):
    for _ in range(5):
        run(leave_daemons_behind, call, timeout=20)


def leave_a_linear_layer_behind():
    """End the process, which takes its time, while a daemon thread is inside a linear layer."""
    fastattn.set_num_threads(1)
    libc, milliseconds = ctypes.CDLL(None), 300
    usleep = ctypes.cast(libc.usleep, ctypes.c_void_p)
    # At exit, what calls have registered since goes before.
    libc.__cxa_atexit(usleep, ctypes.c_void_p(1000 * milliseconds), None)
    layer = np.ones((4000, 4096), np.float32), quantised(2048, 4096)
    threading.Thread(target=fastattn.linear, args=layer, daemon=True).start()
    time.sleep(0.2)


@pytest.mark.promise("exit-never-hangs")
def test_interpreter_exit_in_a_linear_layer():
    # Memory of this size that is given back is gone.
    run(leave_a_linear_layer_behind, env={"MALLOC_MMAP_THRESHOLD_": "131072"}, timeout=20)


class AttendsAtTheEnd:
    """Once the interpreter ends, a call is right or raises, but does not hang."""

    def __init__(self):
        self.query = problem()
        self.keep = attend, self  # the cycle keeps it until then
        attend(self.query)

    def __del__(self):
        self.keep[0](self.query)


def leave_object_behind():
    globals()["left"] = AttendsAtTheEnd()


@pytest.mark.promise("exit-never-hangs")
def test_interpreter_exit_in_a_destructor():
    run(leave_object_behind, timeout=20)


def import_again():
    """Import the package a second time, in the two ways that there are."""
    query = problem()
    expected = attend(query)
    assert np.array_equal(importlib.reload(fastattn).attention(query, query, query), expected)
    for name in [name for name in sys.modules if name.split(".")[0] == "fastattn"]:
        del sys.modules[name]
    anew = importlib.import_module("fastattn")
    assert anew is not fastattn
    for package in (anew, fastattn):
        assert np.array_equal(package.attention(query, query, query), expected)


@pytest.mark.promise("import-needs-numpy-alone")
def test_import_again():
    run(import_again)


def modules_after_calls():
    """Use what computes on the CPU, and return the modules that are loaded."""
    query = problem()
    out, lse = fastattn.attention(query, query, query, return_lse=True)
    fastattn.attention_backward(out, query, query, query, out, lse)
    cache = fastattn.KVCache(1, 4, 64)
    cache.append(query, query)
    cache.attend(query)
    fastattn.explain(query, query, query)
    return sorted(sys.modules)


@pytest.mark.promise("cpu-needs-no-gpu", "import-needs-numpy-alone")
def test_calls_on_the_cpu_load_nothing_of_a_gpu():
    loaded = set(run(modules_after_calls, imports=["fastattn"]))
    assert "fastattn" in loaded
    assert not loaded & {"numba", "numba_cuda", "cuda", "fastattn.cuda", "torch", "jax"}


@pytest.mark.promise("free-threading")
@pytest.mark.skipif(
    getattr(sys, "_is_gil_enabled", lambda: True)(), reason="not a free-threaded Python"
)
def test_free_threading():
    assert not run(sys._is_gil_enabled, imports=["fastattn"])


# Floating-point modes.


def keep_subnormals():
    """Compute with subnormal numbers, before and after calls, here and in the team's threads."""

    def kept():
        return np.float32(1e-45) * np.float32(1) != 0 and np.float64(5e-324) * 1.0 != 0

    assert kept()
    for threads in (1, 4):
        fastattn.set_num_threads(threads)
        for dtype, least in ((np.float32, 1e-45), (np.float64, 5e-324)):
            query = np.ones((1, 4096, 64, 8), dtype)
            for keys, number in ((1, least), (32, np.finfo(dtype).tiny / 2)):
                value = np.full((1, 4096, keys, 8), number, dtype)
                out = fastattn.attention(query, query[..., :keys, :], value)
                assert np.array_equal(out, np.broadcast_to(value[..., :1, :], out.shape))
    assert kept()
    assert in_thread(kept)


@pytest.mark.promise("floating-point-modes-stay", "subnormals-count")
def test_subnormals_are_kept():
    run(keep_subnormals)


class FloatingPointModes:
    """The x86 control register of the calling thread, through glibc's fegetenv and fesetenv."""

    FLUSH_TO_ZERO = 0x8040  # FTZ and DAZ
    EXCEPTIONS = 0x3F  # which have happened: not a mode
    OFFSET = 28  # of MXCSR in fenv_t

    def __init__(self):
        self.libm = ctypes.CDLL("libm.so.6")
        self.fenv = ctypes.create_string_buffer(32)

    def get(self):
        self.libm.fegetenv(self.fenv)
        mxcsr = int.from_bytes(self.fenv[self.OFFSET : self.OFFSET + 4], "little")
        return mxcsr & ~self.EXCEPTIONS

    def set(self, modes):
        self.libm.fegetenv(self.fenv)
        self.fenv[self.OFFSET : self.OFFSET + 4] = modes.to_bytes(4, "little")
        self.libm.fesetenv(self.fenv)


def keep_modes(isa):
    """Leave the caller's modes as they are, and compute the same whatever they are."""
    _core.set_isa(isa)
    modes = FloatingPointModes()
    query = problem() * np.logspace(-42, 0, 4, dtype=np.float32)[:, None, None]
    usual = modes.get()
    results = []
    weight = quantised(4, 64)
    weight.blocks["scale"], weight.blocks["quants"] = [[2**-24], [2**-20], [1], [2]], 1
    for flush in (modes.FLUSH_TO_ZERO, 0):  # flushing first: the team's threads are made then
        for threads in (2, 1):
            fastattn.set_num_threads(threads)
            modes.set(usual | flush)
            results.append(np.append(attend(query), fastattn.linear(query, weight)))
            assert modes.get() == usual | flush
    modes.set(usual)
    return [np.array_equal(result, results[-1]) for result in results]


@pytest.mark.promise("floating-point-modes-stay")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads an x86 register")
@pytest.mark.parametrize("isa", _core.supported_isas())
def test_floating_point_modes(isa):
    assert run(keep_modes, isa) == [True] * 4
