# SPDX-License-Identifier: Apache-2.0
"""What a call over ranks is said to cost."""

import subprocess
import sys

import numpy as np
import pytest

import fastattn.distributed as fd
from tests.distributed.cases import LAYOUTS

SIZES = {"q_heads": 8, "kv_heads": 2, "head_dim": 64}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (9, 4)},
        {"is_causal": True, "window": (30, None)},
        {"is_causal": True, "query_offset": -7},
        {"is_causal": True, "documents": [0, 13, 14, 14, 60, 101]},
        {"documents": [0, 13, 90]},
    ],
    ids=str,
)
def test_pairs_are_counted(name, options):
    i, j = np.arange(101)[:, None], np.arange(101)
    distance = j - i - options.get("query_offset", 0)
    seen = np.ones((101, 101), bool)
    if options.get("is_causal"):
        seen &= distance <= 0
    left, right = options.get("window", (None, None))
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    if "documents" in options:
        cut = np.array(options["documents"])
        of = np.searchsorted(cut, np.arange(101), side="right")
        inside = (of > 0) & (of < len(cut))
        seen &= (of[:, None] == of) & inside
    for ranks in (1, 2, 3):
        layout = LAYOUTS[name](101, ranks)
        found = fd.plan(layout, **SIZES, **options)
        own = [int(seen[layout.positions(rank)].sum()) for rank in range(ranks)]
        assert list(found["pairs"]) == own


def test_work_and_messages():
    layout = fd.zigzag(2**14, 8)
    found = fd.plan(layout, **SIZES, is_causal=True, flops=1e12, bandwidth=1e15, latency=0)
    work = 2**14 * (2**14 + 1) / 2 * 4 * 8 * 64 / 1e12 / 8
    assert found["seconds"] == pytest.approx(work, rel=1e-3)
    assert found["efficiency"] == pytest.approx(1, rel=1e-3)
    assert set(found["received_bytes"]) == {7 * 2**11 * 2 * 2 * 64 * 4}
    slow = fd.plan(layout, **SIZES, is_causal=True, flops=1e14, bandwidth=1e9)
    assert slow["seconds"] == pytest.approx(found["received_bytes"][0] / 1e9, rel=0.1)
    gradients = fd.plan(layout, **SIZES, is_causal=True, backward=True, bandwidth=1e15, latency=0)
    assert gradients["seconds"] == pytest.approx(2.5 * work, rel=1e-3)


def test_a_window_needs_its_neighbours_alone():
    layout = fd.contiguous(2**14, 8)
    found = fd.plan(layout, **SIZES, window=(100, None), is_causal=True)
    assert found["received_bytes"] == (0, *[2**11 * 2 * 2 * 64 * 4] * 7)


@pytest.mark.parametrize("method", ["ring", "gather", "heads"])
def test_contiguous_causal_queries_wait(method):
    found = fd.plan(fd.contiguous(2**15, 8), **SIZES, is_causal=True, method=method)
    assert found["efficiency"] < (0.6 if method != "heads" else 1.01)


def test_report():
    text = str(fd.plan(fd.zigzag(2**15, 16), **SIZES, is_causal=True))
    first, header, *rows, last = text.splitlines()
    assert first.startswith("fastattn.distributed.plan: ring over 16 ranks, ")
    assert header.split() == ["rank", "rows", "pairs", "received", "computes", "done", "after"]
    assert len(rows) == 8
    assert last == "  .. 16 ranks"


def test_the_table_to_1024_ranks():
    command = [sys.executable, "-m", "fastattn.distributed"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = text.splitlines()
    assert len([line for line in lines if "zigzag" in line]) == 6
    assert next(x.split()[-3] for x in lines if x.startswith("10 Gb/s")) == "47%"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"layout": 8}, TypeError, "layout must be a Layout, not int"),
        ({"method": "star"}, ValueError, "method must be one of ring, gather, heads, got 'star'"),
        ({"bandwidth": 0}, ValueError, "bandwidth must be > 0 (None: off), got bandwidth=0"),
        ({"q_heads": 0}, ValueError, "q_heads must be 1 or more, got q_heads=0"),
    ],
)
def test_errors(change, kind, message):
    with pytest.raises(kind) as raised:
        fd.plan(**({"layout": fd.zigzag(8, 2), **SIZES} | change))
    assert str(raised.value) == message
