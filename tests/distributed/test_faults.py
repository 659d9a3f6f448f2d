# SPDX-License-Identifier: Apache-2.0
"""What goes wrong ends soon, on every rank, with an error that says what and where."""

import os
import signal
import time
from typing import ClassVar

import numpy as np
import pytest

import fastattn.distributed as fd
from fastattn.distributed._comm import engine_of
from tests.distributed.launch import launch
from tests.distributed.threads import World

LAYOUT = fd.contiguous(64, 2)
SOON = 10  # seconds, the start of processes left out


def operands(rank=0, layout=LAYOUT, **change):
    x = {name: np.ones((1, 2, layout.lengths[rank], 8), np.float32) for name in ("query", "key")}
    return {**x, "value": x["key"], "layout": layout} | change


def error_of(call, *given, **named):
    """Return the error of a call, as text."""
    try:
        call(*given, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("there is no error")


def errors_of(world, function):
    """Return the error on each rank."""
    return world.run(lambda comm: error_of(function, comm))


def differing(change, call=fd.attention, **every):
    """Return the errors of 3 ranks of which the last one gives something else."""
    layout = fd.contiguous(64, 3)

    def rank(comm):
        given = operands(comm.rank, layout, comm=comm, **every)
        return call(**(given | (change if comm.rank == 2 else {})))

    return errors_of(World(3), rank)


LONGER = np.ones((1, 2, 22, 9), np.float32)
MORE_HEADS = np.ones((1, 4, 22, 8), np.float32)


@pytest.mark.promise("ranks-agree-first")
@pytest.mark.parametrize(
    ("change", "name", "first", "last"),
    [
        ({"method": "gather"}, "method", "ring", "gather"),
        ({"is_causal": True}, "is_causal", "False", "True"),
        ({"window": (3, 4)}, "window", "None", "(3, 4)"),
        ({"scale": 2}, "scale", "None", "2"),
        ({"softcap": 2.5}, "softcap", "None", "2.5"),
        ({"kv_lengths": 7}, "kv_lengths", "None", "[7] of shape (), int64"),
        (
            {
                "layout": fd.contiguous([20, 22, 22]),
                "query": LONGER[..., :8],
                "key": LONGER[..., :8],
            },
            "layout",
            None,
            "Layout((((0, 20),), ((20, 42),), ((42, 64),)))",
        ),
        ({"query": MORE_HEADS}, "shape of query", "(1, 2) x rows x 8", "(1, 4) x rows x 8"),
        (
            {"value": LONGER.astype(np.float32)},
            "shape of value",
            "(1, 2) x rows x 8",
            "(1, 2) x rows x 9",
        ),
        (
            {name: MORE_HEADS[:, :2].astype(np.float64) for name in ("query", "key", "value")},
            "dtype of query",
            "float32",
            "float64",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and x.isidentifier() else "",
)
def test_ranks_that_differ(change, name, first, last):
    if "layout" in change:
        change["value"] = change["key"]
    errors = differing(change)
    assert len(set(errors)) == 1
    if first is not None:
        assert errors[0] == (
            f"ValueError: all ranks must give attention the same {name}, got {first} on rank 0 and "
            f"{last} on rank 2"
        )
    assert f"the same {name}, got" in errors[0]
    assert errors[0].endswith(f"{last} on rank 2")


@pytest.mark.promise("ranks-agree-first")
def test_ranks_that_make_other_calls():
    def rank(comm):
        given = operands(comm.rank, comm=comm)
        if comm.rank == 0:
            return fd.attention(**given)
        out = np.ones_like(given["query"])
        return fd.attention_backward(grad_out=out, out=out, lse=out[..., 0], **given)

    assert errors_of(World(2), rank) == 2 * [
        "ValueError: all ranks must make the same calls in the same order, got attention on rank 0 "
        "and attention_backward on rank 1"
    ]


@pytest.mark.promise("ranks-agree-first")
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"window": (-1, 0)}, "window must be a pair of integers >= 0 or None, got (-1, 0)"),
        ({"method": "star"}, "method must be one of ring, gather, heads, got 'star'"),
        ({"timeout": 0}, "timeout must be > 0 (None: off), got timeout=0"),
        (
            {"query": np.ones((1, 2, 31, 8), np.float32)},
            "query must have as many rows as rank 1 in layout, 32, got query.shape=(1, 2, 31, 8)",
        ),
        (
            {"key": np.ones((1, 2, 31, 8), np.float32)},
            "key must have as many rows as rank 1 in layout, 32, got key.shape=(1, 2, 31, 8)",
        ),
        ({"layout": fd.contiguous(64, 3)}, "layout must have as many ranks as comm, 2, got 3"),
        (
            {"is_causal": True, "kv_layout": fd.contiguous([40, 32])},
            "query_offset must be given with is_causal if the layouts have different totals "
            "(0: the first query stands at the first key; kv_total - total: the last at the last), "
            "got 64 and 72",
        ),
        (
            {"documents": [0, 64], "kv_lengths": 3},
            "kv_lengths must not be given with documents",
        ),
        (
            {"documents": [0, 64], "kv_layout": fd.contiguous([40, 32])},
            "kv_layout must not be given with documents, whose keys lie as queries do",
        ),
        (
            {"out": np.ones((1, 2, 3, 8), np.float32)},
            "out must have the shape of the result, (1, 2, 32, 8), got out.shape=(1, 2, 3, 8)",
        ),
        (
            {"mask": np.ones((32, 63), bool)},
            "mask must broadcast to (batch, q_heads, q_len, kv_len) = (1, 2, 32, 64), "
            "got mask.shape=(32, 63)",
        ),
    ],
    ids=lambda x: x.split(" ")[0] if isinstance(x, str) else "",
)
def test_a_bad_argument_on_one_rank(change, error):
    """It is refused there, and every other rank says so; then all is well again."""
    world = World(2)

    def rank(comm):
        given = operands(comm.rank, comm=comm)
        error = error_of(fd.attention, **(given | (change if comm.rank == 1 else {})))
        fd.attention(**given)
        return error

    other, own = world.run(rank)
    assert own == f"ValueError: {error}"
    assert other == f"ValueError: rank 1 has refused its arguments of attention: {own}"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layout": [[(0, 64)]]}, "TypeError: layout must be a Layout, not list"),
        (
            {"query": np.ones((1, 2, 32, 8), np.int32)},
            "TypeError: query must be an array of float16, bfloat16, float32 or float64, not int32",
        ),
    ],
)
def test_errors_of_other_kinds(change, error):
    def rank(comm):
        return fd.attention(**(operands(comm.rank, comm=comm) | change))

    assert errors_of(World(2), rank) == [error, error]


def test_more_ranks_than_heads():
    layout = fd.contiguous(64, 3)

    def rank(comm):
        return fd.attention(**operands(comm.rank, layout, comm=comm, method="heads"))

    assert set(errors_of(World(3), rank)) == {
        "ValueError: method must not be heads if there are more ranks than query heads, got 3 "
        "ranks, q_heads=2"
    }


@pytest.mark.parametrize("comm", [None, "world", 3])
def test_no_communicator(comm):
    with pytest.raises(TypeError) as raised:
        fd.attention(**operands(), comm=comm)
    assert str(raised.value) == (
        "comm must be an intracommunicator of mpi4py, or a ProcessGroup or DeviceMesh of "
        f"torch.distributed, not {type(comm).__name__}"
    )


def test_an_array_on_a_gpu():
    class OnGpu:
        __cuda_array_interface__: ClassVar = {
            "shape": (1, 2, 32, 8),
            "typestr": "<f4",
            "version": 3,
        }

    def rank(comm):
        return fd.attention(**operands(comm.rank, comm=comm, query=OnGpu()))

    assert errors_of(World(2), rank)[0] == (
        "TypeError: query must be on the CPU, got an array on a GPU: fastattn.distributed has no "
        "kernels there"
    )


@pytest.mark.promise("waits-for-ranks-end")
def test_a_late_rank_and_what_comes_after():
    """Every rank has its timeout, and says so; the communicator is not used again."""

    def rank(comm):
        if comm.rank == 1:
            time.sleep(1.5)
        given = operands(comm.rank, comm=comm, timeout=0.3)
        return [error_of(fd.attention, **given) for _ in range(2)]

    errors = World(2).run(rank)
    assert errors[0] == [
        "TimeoutError: attention on rank 0: agreeing on the arguments: receiving from rank 1 and "
        "sending to rank 1 was not done after timeout=0.3 s",
        "RuntimeError: comm must be one whose calls have all ended well, got one on which "
        "attention has failed (agreeing on the arguments): make a new communicator",
    ]
    assert errors[1][0].startswith(
        "TimeoutError: attention on rank 1: step 1 of 1: receiving from rank 0 was"
    )


def fail(comm, how):
    """Be the ranks of which the second one fails in some way."""
    if hasattr(comm, "Get_rank"):
        rank, size = comm.rank, comm.size
    else:
        engine = engine_of(comm)
        rank, size = engine.rank, engine.size
    layout = fd.contiguous(64, size)
    given = operands(rank, layout, comm=comm, timeout=2)
    fd.attention(**given)
    if rank == 1:
        if how == "raises":
            raise ValueError("on rank 1 alone")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "is late":
            time.sleep(4)
        if how == "gives less":
            given["query"] = given["query"][..., :5, :]
    if how == "is freed":
        comm = comm.Dup()
        fd.attention(**(given | {"comm": comm}))
        comm.Free()
        given["comm"] = comm
    fd.attention(**given)


LATE = "was not done after timeout=2"


@pytest.mark.promise("waits-for-ranks-end")
@pytest.mark.parametrize(
    ("engine", "how", "first", "second"),
    [
        ("gloo", "raises", "ConnectionError: attention on rank 0", "ValueError: on rank 1 alone"),
        ("gloo", "dies", "ConnectionError: attention on rank 0: agreeing on the arguments", None),
        ("gloo", "is late", LATE, ""),
        ("mpi", "is late", LATE, LATE),
        ("gloo", "gives less", "rank 1 has refused its arguments", "query must have as many rows"),
        ("mpi", "gives less", "rank 1 has refused its arguments", "query must have as many rows"),
        ("mpi", "is freed", "comm must be a communicator in use", "comm must be a communicator in"),
        ("mpi", "raises", LATE, "ValueError: on rank 1 alone"),
        ("mpi", "dies", None, None),
    ],
)
def test_processes(engine, how, first, second, tmp_path):
    told, output = launch(engine, 2, fail, how, folder=tmp_path, timeout=40)
    for x, expected in zip(told, (first, second), strict=True):
        if expected is None:
            assert x is None, output
        else:
            assert x is not None, output
            assert expected in x.error
            assert x.seconds < SOON
    assert "SIGABRT" not in output
    assert "terminate called" not in output
