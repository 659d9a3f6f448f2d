# SPDX-License-Identifier: Apache-2.0
"""What info, explain and selftest say is so, and the number of threads is what was set."""

import functools
import os

import numpy as np
import pytest

import fastattn
from fastattn import _core, explain, info
from tests.support.child import run
from tests.support.problems import make_problem


@pytest.mark.promise("reports-are-dicts")
def test_info():
    report = info()
    assert report["version"] == fastattn.__version__
    assert report["isa"] == _core.isa()
    assert report["isas"] == _core.supported_isas()
    assert report["threads"] == fastattn.get_num_threads()
    assert report["numpy"] == np.__version__
    lines = str(report).splitlines()
    assert lines[0] == "fastattn"
    assert [line.split()[0] for line in lines[1:]] == list(report)
    assert f"isas         {', '.join(_core.supported_isas())}" in str(report)


def test_info_follows(isa, threads, monkeypatch):
    threads(3)
    monkeypatch.setenv("FASTATTN_NUM_THREADS", "3")
    report = info()
    assert report["isa"] == isa
    assert report["threads"] == 3
    assert report["environment"]["FASTATTN_NUM_THREADS"] == "3"
    assert "FASTATTN_NUM_THREADS=3" in str(report)


TILES = {("avx512", 4): 48, ("avx512", 8): 24, ("avx2", 4): 24, ("avx2", 8): 12}


@pytest.mark.promise("explain-says-what-runs", "hidden-tiles-cost-nothing")
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_explain_counts(isa, dtype):
    query, key, value = make_problem(
        480, 1280, 64, 32, heads=4, kv_heads=2, batch=(2,), dtype=dtype
    )
    # More threads may have blocks whose last tile is not full, as suits the work.
    assert explain(query, key, value, threads=3)["threads"] == 3
    alone = functools.partial(explain, query, key, value, threads=1)
    plan = alone()
    assert plan["isa"] == isa
    assert plan["dtype"] == np.dtype(dtype).name
    assert plan["threads"] == 1
    assert plan["key_tile"] == 128
    rows = plan["query_tile"]
    assert rows == TILES.get((isa, query.itemsize), rows)
    blocks = 2 * 2 * -(-960 // rows)
    assert plan["tiles"] == 10 * blocks
    assert plan["tiles_skipped"] == plan["tiles_edge"] == plan["skipped"] == 0
    assert plan["flops"] == 2 * 2 * 4 * 480 * 1280 * (64 + 32)
    assert plan["bytes"] == query.itemsize * 2 * (4 * 480 + 2 * 1280) * (64 + 32)
    assert 0 < plan["scratch_bytes"] < 2**20
    nothing = alone(kv_lengths=0)
    assert nothing["tiles_skipped"] == plan["tiles"]
    assert nothing["skipped"] == 1
    assert nothing["flops"] == 0
    half = alone(kv_lengths=640)
    assert half["skipped"] == 0.5
    assert half["flops"] == plan["flops"] // 2
    mask = np.arange(1280) % 256 < 128
    by_mask = alone(mask=mask)
    assert by_mask["skipped"] == 0.5
    assert by_mask["tiles_edge"] == 0
    mask[5] = False
    assert alone(mask=mask)["tiles_edge"] == blocks
    causal = alone(is_causal=True, query_offset=800)
    assert 0 < causal["skipped"] < 0.3
    assert 0 < causal["tiles_edge"] <= 2 * blocks
    window = alone(window=(100, 0), query_offset=800)
    assert window["skipped"] > 0.7
    assert window["flops"] < 0.3 * plan["flops"]
    everything = alone(softcap=3.0, alibi_slopes=np.ones(4), query_offset=0)
    assert everything["tiles_edge"] == everything["tiles"]


@pytest.mark.promise("explain-says-what-runs")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "query_offset": -40},
        {"window": (300, 0)},
        {"window": (3, 2), "query_offset": [1300, 0, 900]},
        {"window": (700, 600), "query_offset": 300, "kv_lengths": [1500, 0, 1]},
        {"kv_lengths": [700, 700, 700], "softcap": 1.0},
        {"kv_lengths": [1500, 129, 640], "alibi_slopes": np.ones(4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("q_len", [1, 100, 700])
def test_explain_counts_what_is_alike_once(isa, q_len, options):
    """A mask that hides nothing, but says so for each pair, changes no number."""
    query, key, value = make_problem(q_len, 1500, 8, heads=4, kv_heads=2, batch=(3,))
    options = {"query_offset": 800} | options
    expected = explain(query, key, value, **options)
    for shape in ((1500,), (q_len, 1), (4, 1, 1), (3, 1, 1, 1), (3, 4, q_len, 1500)):
        got = explain(query, key, value, mask=np.ones(shape, bool), **options)
        assert got == expected
    if "kv_lengths" not in options:
        seen = np.ones((3, 1, 1, 1500), bool)
        seen[1, ..., 256:] = False
        options["threads"] = 1  # more may cut a batch otherwise than what is in it
        masked = explain(query, key, value, mask=seen, **options)
        each = [
            explain(query[b], key[b], value[b], mask=seen[b], **options | offset)
            for b in range(3)
            for offset in [{"query_offset": np.broadcast_to(options["query_offset"], 3)[b]}]
        ]
        for name in ("tiles", "tiles_skipped", "tiles_edge", "flops"):
            assert masked[name] == sum(one[name] for one in each)


def test_a_window_that_is_wider_than_all_is_no_small_work(threads):
    threads(3)
    operands = make_problem(1000, 1000, 64, heads=4)
    for window in ((10**30, 10**30), (2**62, 2**62), (2**61, 2**61 - 1), (1000, 1000)):
        assert explain(*operands, window=window)["threads"] == 3


def test_explain_of_nothing():
    query, key, value = make_problem(5, 7)
    for arrays in (
        (query[:, :0], key, value),
        (query, key[:, :0], value[:, :0]),
        (query[:0], key[:0], value[:0]),
    ):
        plan = explain(*arrays)
        assert plan["tiles"] == plan["flops"] == plan["skipped"] == 0
        assert "skipped" in str(plan)


@pytest.mark.promise("reports-are-dicts")
def test_explain_report():
    report = str(explain(*make_problem(480, 1280, heads=4)))
    lines = report.splitlines()
    assert lines[0] == "attention"
    shown = {line[2:].split("  ")[0]: line.split("  ")[-1].strip() for line in lines[1:]}
    assert shown["kernel"] == "tiled"
    assert shown["skipped"] == "0.0%"
    assert shown["flops"] == "157.3 MFLOP"
    assert shown["scratch"].endswith("KiB")


def test_report_units():
    from fastattn._report import Report

    report = Report(
        "title", {"a_bytes": 3 * 2**30, "flops": 12345e9, "bytes": 5, "none": [], "no": {}}
    )
    assert str(report).splitlines() == [
        "title",
        "  a      3 GiB",
        "  flops  12.35 TFLOP",
        "  bytes  5 B",
        "  none   -",
        "  no     -",
    ]


@pytest.mark.promise("thread-count-has-an-order")
@pytest.mark.parametrize("count", [1, 2, 64, np.int64(5)])
def test_threads_are_what_was_set(threads, count):
    threads(count)
    assert fastattn.get_num_threads() == count
    query, key, value = make_problem(64, 64, heads=2)
    assert explain(query, key, value)["threads"] <= count
    assert np.isfinite(fastattn.attention(query, key, value)).all()


def attend_with_the_most_threads():

    fastattn.set_num_threads(_core.MOST_THREADS)
    query = np.broadcast_to(np.float32(1), (_core.MOST_THREADS, 1, 64, 64))
    return bool((fastattn.attention(query, query, query) == 1).all())


def test_the_most_threads_that_are_allowed():
    assert run(attend_with_the_most_threads, timeout=60)


def selftest_with_a_child_that_fails():
    from fastattn import _selftest

    parent, attention = os.getpid(), fastattn.attention

    def fail_in_a_child(*arguments):
        if os.getpid() != parent:
            raise MemoryError
        return attention(*arguments)

    fastattn.attention = fail_in_a_child
    try:
        return _selftest._fork()
    except AssertionError as error:
        return str(error) if os.getpid() == parent else "the child went on"


def test_selftest_ends_its_child():
    assert run(selftest_with_a_child_that_fails) == "status 2"
