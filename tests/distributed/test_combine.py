# SPDX-License-Identifier: Apache-2.0
"""Decoding over ranks, and bits that do not depend on how many there are."""

import ml_dtypes
import numpy as np
import pytest

import fastattn
import fastattn.distributed as fd
from fastattn.distributed._comm import engine_of
from tests.distributed.cases import LAYOUTS, OPTIONS, SINKS, Case, joined, worst
from tests.distributed.launch import values
from tests.distributed.threads import World

TOTAL = 5000
SIZES = (1, 2, 3, 4, 7)


def problem(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = ((2, 4, 1, 16), (2, 2, TOTAL, 16), (2, 2, TOTAL, 24))
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def decode(comm, layout, sinks=None, dtype=np.float32):
    """Return the attention of one query over keys that ranks share."""
    query, key, value = problem(dtype)
    own = [layout.take(x, engine_of(comm).rank) for x in (key, value)]
    out, lse = fastattn.attention(query, *own, return_lse=True)
    return fd.combine(out, lse, comm=comm, sinks=sinks)


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
def test_one_process(ranks, sinks):
    query, key, value = problem()
    expected = fastattn.attention(query, key, value, sinks=sinks, return_lse=True)
    for layout_of in LAYOUTS.values():
        layout = layout_of(TOTAL, ranks)
        found = World(ranks).run(lambda comm, layout=layout: decode(comm, layout, sinks))
        for each in found:
            assert max(worst(each, expected).values()) < 1e-6
            for x, y in zip(each, found[0], strict=True):
                np.testing.assert_array_equal(x, y)


def test_half_precision():
    query, key, value = problem(ml_dtypes.bfloat16)
    expected = fastattn.attention(query, key, value, return_lse=True)
    layout = fd.contiguous(TOTAL, 3)
    found = World(3).run(lambda comm: decode(comm, layout, dtype=ml_dtypes.bfloat16))
    assert max(worst(found[0], expected).values()) < 0.01


def test_a_cache_that_ranks_share():
    """A new token is appended by its owner alone."""
    query, key, value = problem()
    layout, new = fd.contiguous(TOTAL, 3), 2

    def rank(comm):
        cache = fastattn.KVCache(batch=2, kv_heads=2, head_dim=16, value_head_dim=24)
        cache.append(*(layout.take(x, comm.rank) for x in (key, value)))
        if comm.rank == new:
            cache.append(query[:, :2], value[:, :, :1])
        out, lse = cache.attend(query, is_causal=False, return_lse=True)
        return fd.combine(out, lse, comm=comm)

    key_and_new = np.concatenate([key, query[:, :2]], axis=-2)
    value_and_new = np.concatenate([value, value[:, :, :1]], axis=-2)
    expected = fastattn.attention(query, key_and_new, value_and_new, return_lse=True)
    for found in World(3).run(rank):
        assert max(worst(found, expected).values()) < 1e-6


def test_ranks_without_keys():
    rows = np.zeros((2, 3), np.float32)

    def rank(comm):
        lse = np.zeros(2, np.float32) if comm.rank == 1 else np.full(2, -np.inf, np.float32)
        return fd.combine(rows + (comm.rank == 1), lse, comm=comm)

    out, lse = World(4).run(rank)[0]
    assert (out == 1).all()
    assert (lse == 0).all()

    def nothing(comm):
        return fd.combine(rows, np.full(2, -np.inf, np.float32), comm=comm, reproducible=True)

    out, lse = World(3).run(nothing)[0]
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def chunked(comm, layout, dtype=np.float32):
    """Return what `decode` does, of chunks of 512 keys, whoever has them."""
    query, key, value = problem(dtype)
    own = []
    for _, start, stop in layout.pieces(engine_of(comm).rank):
        for at in range(start, stop, 512):
            end = min(at + 512, stop)
            part = key[..., at:end, :], value[..., at:end, :]
            own.append(fastattn.attention(query, *part, return_lse=True))
    if not own:
        own.append((np.zeros((2, 4, 1, 24), dtype), np.full((2, 4, 1), -np.inf, np.float32)))
    return fd.combine(*map(list, zip(*own, strict=True)), comm=comm, reproducible=True)


@pytest.mark.promise("reproducible-over-any-ranks")
def test_decoding_over_any_number_of_ranks():
    query, key, value = problem()
    results = []
    for ranks in (1, 2, 3, 10, 12):
        starts = np.arange(0, TOTAL, 512)
        spans = [(int(at), min(int(at) + 512, TOTAL)) for at in starts]
        for order in (spans, spans[::-1]):
            layout = fd.Layout([order[rank::ranks] for rank in range(ranks)])
            results += World(ranks).run(lambda comm, layout=layout: chunked(comm, layout))
    for found in results[1:]:
        for x, y in zip(found, results[0], strict=True):
            np.testing.assert_array_equal(x, y)
    expected = fastattn.attention(query, key, value, return_lse=True)
    assert max(worst(results[0], expected).values()) < 1e-6


@pytest.mark.promise("reproducible-over-any-ranks")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_ring_over_any_number_of_ranks(options):
    """Also with keys that end within a chunk, and layouts that cut it anywhere."""
    case = Case(options, 600)
    expected = case.one_process()[:2]
    first = None
    for ranks in (1, 2, 3, 4):
        for layout_of in LAYOUTS.values():
            layout = layout_of(600, ranks)
            how = {"reproducible": True, "backward": False}
            parts = World(ranks).run(lambda comm, at=layout, how=how: case.rank(comm, at, **how))
            found = joined(parts, layout)
            assert max(worst(found, expected).values()) < 1e-6
            first = first or found
            for x, y in zip(found, first, strict=True):
                np.testing.assert_array_equal(x, y)


def reproducible(comm):
    case, size = Case(OPTIONS["alibi"], 600), engine_of(comm).size
    rank = engine_of(comm).rank
    found = []
    for layout in (fd.zigzag(600, size), fd.contiguous(600, size)):
        out, lse = case.rank(comm, layout, reproducible=True, backward=False)
        found.append((layout.positions(rank), out, lse))
    spans = [(at, min(at + 512, TOTAL)) for at in range(0, TOTAL, 512)]
    decode(comm, fd.contiguous(TOTAL, size))
    return found, chunked(comm, fd.Layout([spans[i::size] for i in range(size)]))


@pytest.mark.promise("reproducible-over-any-ranks")
@pytest.mark.parametrize(("engine", "ranks"), [("mpi", 2), ("mpi", 3), ("gloo", 2)])
def test_bits_of_engines(engine, ranks, tmp_path):
    ((alone, _), decoded) = World(1).run(reproducible)[0]
    for found, of_decoding in values(engine, ranks, reproducible, folder=tmp_path):
        for positions, out, lse in found:
            np.testing.assert_array_equal(out, alone[1][..., positions, :])
            np.testing.assert_array_equal(lse, alone[2][..., positions])
        for x, y in zip(of_decoding, decoded, strict=True):
            np.testing.assert_array_equal(x, y)


def test_large_and_small_parts_have_no_order():
    """Parts of which some are too small to count beside others, and out of any size."""
    rng = np.random.default_rng(2)
    lse = rng.uniform(-80, 80, (12, 50)).astype(np.float32)
    out = (rng.standard_normal((12, 50, 8)) * 10 ** rng.uniform(-30, 30, (12, 50, 1))).astype(
        np.float32
    )
    lse[3] = -np.inf
    parts = [(out[i], lse[i]) for i in range(12)]
    expected = fastattn.merge(*parts)
    results = []
    for ranks in (1, 4):
        for order in (np.arange(12), np.arange(12)[::-1], rng.permutation(12)):

            def rank(comm, order=order, ranks=ranks):
                own = [parts[i] for i in order[comm.rank :: ranks]]
                pair = map(list, zip(*own, strict=True))
                return fd.combine(*pair, comm=comm, reproducible=True)

            results += World(ranks).run(rank)
    for found in results:
        for x, y in zip(found, results[0], strict=True):
            np.testing.assert_array_equal(x, y)
    with np.errstate(all="ignore"):
        size = np.abs(expected[0]).max(axis=-1, keepdims=True)
        assert (np.abs(results[0][0] - expected[0]) / size).max() < 1e-6
    np.testing.assert_allclose(results[0][1], expected[1], rtol=1e-6)


def test_what_is_not_finite():
    out, lse = np.ones((2, 3), np.float32), np.zeros(2, np.float32)
    out[1, 1] = np.nan
    for exactly in (False, True):
        found = World(2).run(
            lambda comm, e=exactly: fd.combine(out, lse, comm=comm, reproducible=e)
        )
        assert np.isnan(found[0][0][1, 1])
        assert (found[0][0][0] == 1).all()


ROWS = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ((ROWS, ROWS), "lse must have shape (2,), got lse.shape=(2, 3)"),
        (([], []), "out and lse must be equally many parts, 1 or more, got 0 and 0"),
        (
            ([ROWS], [ROWS[:, 0]] * 2),
            "out and lse must be equally many parts, 1 or more, got 1 and 2",
        ),
        (
            (ROWS[0], ROWS[0, 0]),
            "out must have 2 axes or more, (batch, q_heads, q_len, value_head_dim) or the last of "
            "these, got out.shape=(3,)",
        ),
    ],
)
def test_errors(given, error):
    def rank(comm):
        with pytest.raises(ValueError, match=r"out|lse") as raised:
            fd.combine(*given, comm=comm)
        return str(raised.value)

    assert World(2).run(rank) == [error, error]


def test_ranks_with_other_queries():
    def rank(comm):
        with pytest.raises(ValueError, match="shape of out") as raised:
            fd.combine(ROWS[comm.rank :], ROWS[comm.rank :, 0], comm=comm)
        return str(raised.value)

    assert set(World(2).run(rank)) == {
        "all ranks must give combine the same shape of out, got (2, 3) on rank 0 and (1, 3) on "
        "rank 1"
    }
