# SPDX-License-Identifier: Apache-2.0
"""The engines: ranks that are processes, many cases in each start."""

import hashlib
import tracemalloc

import numpy as np
import pytest

import fastattn.distributed as fd
from fastattn.distributed._comm import engine_of
from tests.distributed.cases import LAYOUTS, OPTIONS, Case, worst
from tests.distributed.launch import ENGINES, values
from tests.distributed.threads import World

TOTAL = 333
METHODS = ("ring", "gather", "heads")
STARTS = [("mpi", 1), ("mpi", 3), ("mpi", 4), ("gloo", 4)]  # 2: test_bits_of_engines


def case_of(options):
    return Case(options, TOTAL)


def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()


def matrix(comm):
    """Return each case's results on this rank, as a digest, and how far they are from one process.

    Errors are absolute, for numbers of size 1.
    """
    engine = engine_of(comm)
    found = {}
    for option, options in OPTIONS.items():
        case = case_of(options)
        expected = case.one_process()
        for name in ("zigzag", "uneven"):
            layout = LAYOUTS[name](TOTAL, engine.size)
            for method in METHODS:
                got = case.rank(comm, layout, method=method)
                own = [
                    layout.take(x, engine.rank, axis=-1 if i == 1 else -2)
                    for i, x in enumerate(expected[:5])
                ]
                error = max(worst(got[:5], own).values())
                found[option, name, method] = digest(got), error
    return found


@pytest.mark.promise("ranks-are-one-process")
@pytest.mark.parametrize(("engine", "ranks"), STARTS)
def test_one_process(engine, ranks, tmp_path):
    for found in values(engine, ranks, matrix, folder=tmp_path, timeout=120):
        assert max(error for _, error in found.values()) < 3e-6


@pytest.mark.promise("ring-is-repeatable")
def test_bits_of_engines(tmp_path):
    """A ring has the same bits on every engine."""
    on_threads = World(2).run(matrix)
    assert max(error for found in on_threads for _, error in found.values()) < 3e-6
    for engine in ENGINES:
        folder = tmp_path / engine
        folder.mkdir()
        assert values(engine, 2, matrix, folder=folder, timeout=120) == on_threads


def subgroups(comm):
    """Attend in the two halves of 4 ranks, at the same time, with other messages on their way."""
    if hasattr(comm, "Split"):
        half = comm.Split(comm.rank // 2)
        rank, tag = half.rank, 0
        other = half.isend("mine", 1 - rank, tag)
        incoming = half.irecv(source=1 - rank, tag=tag)
    else:
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        half, rank = mesh["cp"], mesh["cp"].get_local_rank()
        assert distributed.get_world_size(half.get_group()) == 2
        other = incoming = None
    case, layout = case_of({"is_causal": True}), fd.zigzag(TOTAL, 2)
    expected = layout.take(case.one_process()[0], rank)
    query, key, value = (layout.take(x, rank) for x in (case.query, case.key, case.value))
    out = fd.attention(query, key, value, comm=half, layout=layout, is_causal=True)
    if other is not None:
        assert incoming.wait() == "mine"
        other.wait()
        half.Free()
    return float(np.abs(out - expected).max())


@pytest.mark.parametrize("engine", ENGINES)
def test_subgroups(engine, tmp_path):
    assert max(values(engine, 4, subgroups, folder=tmp_path)) < 3e-6


def peak(comm):
    """Return this rank's peak memory beside its arrays and result, in blocks of keys and values."""
    rank, size = engine_of(comm).rank, engine_of(comm).size
    layout = fd.zigzag(8192, size)
    rng = np.random.default_rng(rank)
    query, key, value = rng.standard_normal((3, 1, 4, layout.lengths[rank], 64), np.float32)
    how = {"comm": comm, "layout": layout, "is_causal": True}
    fd.attention(query, key, value, **how)
    tracemalloc.start()
    out = fd.attention(query, key, value, **how)
    found = tracemalloc.get_traced_memory()[1]
    return (found - 2 * out.nbytes) / (key.nbytes + value.nbytes)  # as summed, and as returned


def test_three_blocks_of_keys_at_a_time(tmp_path):
    assert max(values("mpi", 4, peak, folder=tmp_path)) < 3.1


def many_calls(comm):
    """Return how many different results a repeated call has."""
    engine = engine_of(comm)
    case, layout = case_of({"is_causal": True}), fd.zigzag(TOTAL, engine.size)
    return len({digest(case.rank(comm, layout)) for _ in range(20)})


@pytest.mark.promise("ring-is-repeatable")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_ring_is_repeatable(engine, tmp_path):
    """Three ranks on fewer cores, so that they come in many orders."""
    assert values(engine, 3, many_calls, folder=tmp_path) == [1, 1, 1]
