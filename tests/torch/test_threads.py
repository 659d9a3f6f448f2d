# SPDX-License-Identifier: Apache-2.0
"""Threads and forks beside torch's pool: each in a process of its own."""

import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastattn
import fastattn.torch as ft
from tests.support.child import run
from tests.support.threads import fork_in_a_handler, in_fork, interrupt, tasks
from tests.torch.problems import rand


def big(heads=8, length=512):
    return rand(1, heads, length, 64, dtype=torch.float32, seed=0)


class Dataset(torch.utils.data.Dataset):
    def __init__(self, query, expected):
        self.query, self.expected = query, expected

    def __len__(self):
        return 4

    def __getitem__(self, index):
        signal.alarm(20)
        out = ft.scaled_dot_product_attention(*[self.query] * 3)
        return float(np.abs(out.numpy() - self.expected.numpy()).max())


def use_pool_and_fork():
    """Use torch's pool and ours on this thread, and fork: neither hangs where the other would."""
    torch.set_num_threads(4)
    fastattn.set_num_threads(4)
    query = big().requires_grad_()

    def attends():
        out = ft.scaled_dot_product_attention(query, query, query)
        return np.array_equal(out.detach().numpy(), expected.numpy())  # torch's operators hang

    def gradients_are_there():
        out = ft.scaled_dot_product_attention(query, query.detach(), query.detach())
        return np.isfinite(torch.autograd.grad(out, query, grad_out)[0].numpy()).all()

    expected = ft.scaled_dot_product_attention(query, query, query).detach()
    grad_out = torch.ones_like(expected)
    query.detach().sqrt()
    numpy = query.detach().numpy()
    report = {
        "fork": in_fork(attends),
        "twice": in_fork(lambda: attends() and attends() and in_fork(attends) == "ok"),
        "gradients": in_fork(gradients_are_there),
        "torch": in_fork(lambda: query.detach().sqrt() is not None),
        "numpy": in_fork(
            lambda: np.array_equal(fastattn.attention(numpy, numpy, numpy), expected.numpy())
        ),
    }
    loader = torch.utils.data.DataLoader(
        Dataset(query.detach(), expected), num_workers=2, multiprocessing_context="fork"
    )
    assert report.pop("torch") == "hang"  # or the rest shows nothing
    report["DataLoader"] = "ok" if sum(float(x) for x in loader) == 0 else "wrong"
    report["parent"] = "ok" if attends() else "wrong"
    return report


@pytest.mark.promise("fork-never-hangs")
@pytest.mark.parametrize("imports", [("torch", "fastattn"), ("fastattn", "torch")], ids=str)
def test_forks(imports):
    report = run(use_pool_and_fork, imports=imports, timeout=120)
    assert set(report.values()) == {"ok"}, report


def fork_during_a_call():
    """Fork during a call that runs in the calling thread's pool."""
    fastattn.set_num_threads(2)
    query = big(8, 4096)
    expected = ft.scaled_dot_product_attention(query, query, query)

    def attends():
        out = ft.scaled_dot_product_attention(query, query, query)
        return np.array_equal(out.numpy(), expected.numpy())  # torch's operators hang

    return fork_in_a_handler(attends, 0.1)


@pytest.mark.promise("fork-never-hangs")
def test_fork_in_a_signal_handler():
    assert run(fork_during_a_call) == 0


def wait_for_interrupt(query, key, value):
    """Start a call of minutes in this thread's pool; say when, and when it was interrupted."""
    print("ready", flush=True)
    try:
        ft.scaled_dot_product_attention(query, key, value)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    small = big()
    assert ft.scaled_dot_product_attention(small, small, small).isfinite().all()


def many_short_items():
    query = rand(1, 1, 1024, 64, dtype=torch.float32).expand(1, 4096, -1, -1)
    key = rand(1, 1, 32768, 64, dtype=torch.float32).expand(1, 4096, -1, -1)
    wait_for_interrupt(query, key, key[..., :1])


def long_items():
    query = rand(1, 16, 17, 64, dtype=torch.float32)
    key = rand(1, 1, 1, 64, dtype=torch.float32).expand(1, 16, 2**28, 64)
    wait_for_interrupt(query, key, key)


@pytest.mark.promise("interrupt-within-a-second")
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("call", [many_short_items, long_items])
def test_interrupt(call, threads):
    interrupt(call, threads)


def calls_of_tensors(query):
    """Give tensors to each call that is not torch's alone."""
    out, lse = fastattn.attention(query, query, query, return_lse=True)
    fastattn.attention_backward(out, query, query, query, out, lse)
    fastattn.scaled_dot_product_attention(query, query, query)
    fastattn.attention_statistics(query, query, column_sums=True)
    packed = query[0].swapaxes(0, 1)
    fastattn.varlen_attention(packed, packed, packed, [0, 99, 512], [0, 99, 512])
    cache = fastattn.KVCache(1, 8, 64)
    cache.append(query, query)
    cache.attend(query)


def count_pools():
    """Return the threads that torch's operators add, and those that ours adds to these."""
    torch.set_num_threads(2)
    before = tasks()
    query = big()
    query.sqrt()
    torch_has = tasks() - before
    for _ in range(3):
        ft.scaled_dot_product_attention(query, query, query)
    with torch.no_grad():
        calls_of_tensors(query)
    both_have = tasks() - before
    fastattn.attention(*[query.numpy()] * 3)
    with Path("/proc/self/maps").open() as maps:
        runtimes = {line.split()[-1] for line in maps if re.search(r"lib[gi]?omp|gomp", line)}
    return [torch_has, both_have, tasks() - before > both_have, len(runtimes)]


# Its threads never sleep, unless there are more of them than CPUs.
AWAKE = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"}


@pytest.mark.promise("torchs-pool-is-shared", "one-openmp-runtime")
@pytest.mark.parametrize("imports", [("torch", "fastattn"), ("fastattn", "torch")], ids=str)
def test_torchs_pool_is_ours(imports):
    assert run(count_pools, imports=imports, env=AWAKE) == [1, 1, True, 1]


def call_after_sleep():
    """Return the threads that a call adds to torch's while these are awake, and when they sleep."""
    torch.set_num_threads(2)
    query = big()
    query.sqrt()
    before = tasks()
    ft.scaled_dot_product_attention(query, query, query)
    time.sleep(0.5)
    expected = ft.scaled_dot_product_attention(query, query, query)
    added = tasks() - before
    assert torch.equal(ft.scaled_dot_product_attention(query, query, query), expected)
    return added


def test_torchs_pool_is_left_asleep():
    assert run(call_after_sleep, env={"OMP_NUM_THREADS": "2"}) == 1
    assert run(call_after_sleep, env=AWAKE) == 0


def call_while_the_pool_is_in_use():
    """Call while a call of another thread has the pool: which ends first, and whether bits change.

    And return the threads that a call of a third thread adds when all have ended: its own pool.
    """
    torch.set_num_threads(2)
    fastattn.set_num_threads(2)
    query, ended, begun = big(), [], threading.Event()
    expected = ft.scaled_dot_product_attention(query, query, query)
    long = big(16, 8192)

    def attend_long():
        begun.set()
        out = ft.scaled_dot_product_attention(long, long, long)
        ended.append("long")
        assert torch.equal(out[:, 3, :20], ft.attention(long[:, 3, :20], long[:, 3], long[:, 3]))

    def attend_small():
        begun.wait()
        time.sleep(0.02)
        outs = [ft.scaled_dot_product_attention(query, query, query) for _ in range(5)]
        ended.append("small" if all(torch.equal(x, expected) for x in outs) else "wrong")

    def count():
        time.sleep(0.5)  # the pools of threads that have ended end, too
        before = tasks()
        ft.scaled_dot_product_attention(query, query, query)
        ended.append(tasks() - before)

    for targets in ((attend_long, attend_small), (count,)):
        threads = [threading.Thread(target=target) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return ended


@pytest.mark.promise("torchs-pool-is-shared", "concurrent-callers-share-one-team")
def test_a_call_does_not_wait_for_the_pool():
    assert run(call_while_the_pool_is_in_use, env=AWAKE) == ["small", "long", 1]


def attend_in_threads():
    """Call and differentiate from many threads at once."""
    fastattn.set_num_threads(4)
    query = big(4, 384).requires_grad_()
    out = ft.scaled_dot_product_attention(query, query, query)
    (expected,) = torch.autograd.grad(out.sum(), query)
    wrong = []

    def keep_attending():
        for _ in range(5):
            mine = ft.scaled_dot_product_attention(query, query, query)
            (grad,) = torch.autograd.grad(mine.sum(), query)
            if not (torch.equal(mine, out) and torch.equal(grad, expected)):
                wrong.append(1)

    threads = [threading.Thread(target=keep_attending) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


@pytest.mark.promise("concurrent-callers-share-one-team")
def test_threads():
    assert run(attend_in_threads) == 0


@pytest.mark.promise("bitwise-threads")
def test_thread_counts_change_no_bit(threads):
    query = big(4, 300)
    mask = rand(300, 300) > -0.5
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(ft.scaled_dot_product_attention(query, query, query, attn_mask=mask))
    assert all(torch.equal(result, results[0]) for result in results)
