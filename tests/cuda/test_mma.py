# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of mma.sync: results by the emulator, planted faults, machine code."""
# ruff: noqa: E501 - the tables have a line per case

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs the extra `cuda`")

from fastattn import cuda, reference
from fastattn.cuda import _build, _forward, kernels
from fastattn.cuda.kernels import mma, tiles
from tests.cuda import sass
from tests.cuda.cases import DTYPES, assert_right, problem, spilled, with_fault
from tests.cuda.fake_device import fake_device

AMPERE = (8, 0)
MOST_SPILLED = 32  # bytes


@pytest.fixture(autouse=True)
def _alone(request, monkeypatch):
    """Leave out the launch that computes rows anew, but where a test asks for it."""
    if "repair" not in request.fixturenames:
        monkeypatch.setattr(_forward, "simt", lambda *_: None)


@pytest.fixture
def repair():
    """Let rows be computed anew."""


def attend(query, key, value, *, warps_apart=False, **options):
    """Return out, lse and what was launched, of a call on a device of sm_80."""
    with fake_device(AMPERE, warps_apart) as device:
        arrays = map(device.array, (query, key, value))
        out, lse = cuda.attention(*arrays, return_lse=True, **options)
        return device.values(out), device.values(lse), device.launched


def assert_attends(query, key, value, *, warps_apart=False, **options):
    out, lse, launched = attend(query, key, value, warps_apart=warps_apart, **options)
    assert launched[0].startswith("fastattn_mma") or "write" in launched[0]
    assert_right(out, lse, query, key, value, **options)


SHAPES = [  # head_dim, q_len, kv_len, group: about the edges of tiles
    (64, 127, 63, 1),
    (64, 129, 65, 2),
    (96, 128, 64, 3),
    (96, 20, 130, 1),
    (128, 17, 64, 1),
    (128, 130, 193, 2),
    (256, 64, 32, 1),
    (256, 65, 33, 2),
]


@pytest.mark.promise("gpu-means-the-same")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "q_len", "kv_len", "group"), SHAPES)
def test_it_is_attention(dtype, head_dim, q_len, kv_len, group):
    assert_attends(*problem(q_len, kv_len, head_dim, dtype, group=group, kv_heads=2))


OPTIONS = {
    "causal": {"is_causal": True, "query_offset": 60},
    "causal, rows that see nothing": {"is_causal": True, "query_offset": -70},
    "window": {"window": (20, 3), "query_offset": 30},
    "window, to the left alone": {"window": (20, None), "query_offset": 0},
    "window, one key": {"window": (0, 0), "query_offset": 5},
    "all rows see nothing": {"window": (4, 4), "query_offset": 900},
    "softcap": {"softcap": 2.0},
    "softcap far above the scores": {"softcap": 50.0},
    "softcap and causal": {"softcap": 30.0, "is_causal": True, "query_offset": 60},
    "scale": {"scale": 0.7},
    "lengths": {"kv_lengths": [70, 0, 150]},
    "one length": {"kv_lengths": 65},
    "offsets": {"is_causal": True, "query_offset": np.array([60, 0, -90])},
    "lengths, offsets, window": {
        "kv_lengths": [40, 150, 64],
        "query_offset": np.array([36, 98, -3]),
        "window": (80, 1),
    },
}


@pytest.mark.promise("gpu-means-the-same")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    options = OPTIONS[name]
    several = any(np.ndim(x) and not isinstance(x, tuple) for x in options.values())
    arrays = problem(100, 150, 64, dtype, group=2, batch=3 if several else 1)
    assert_attends(*arrays, **options)


FAULTS = {
    "keys are not waited for": ("wait_all_but_one()  # the keys", "None  # the keys"),
    "values are not waited for": ("wait_all_but_one()  # the values", "None  # the values"),
    "keys arrive unseen by other warps": ("the queries before them, are here\n            cuda.syncthreads()", "the queries before them, are here"),
    "values arrive unseen by other warps": (
        "# the values are here\n            cuda.syncthreads()",
        "# the values are here",
    ),
    "wrong half of a matrix": ("(lane >> i32(3)) & i32(1)", "(lane >> i32(4)) & i32(1)"),
    "copied without the exchange": ("chunk ^ ((copy_row", "chunk ^ i32(0) & ((copy_row"),
    "a mask off by one": ("last[m * 2 + h] = end_key(row,", "last[m * 2 + h] = end_key(row + i32(1),"),
    "a window off by one": ("first[m * 2 + h] = first_key(row,", "first[m * 2 + h] = first_key(row - i32(1),"),
    "an edge is taken for inside": ("following > all_to", "following > all_to + i32(64)"),
    "no rescale": ("            scale_sums(acc, rescale)\n\n            wait", "            wait"),
    "the buffer does not change": ("buffer = other_buffer", "buffer = buffer"),
    "a tile too few": ("while start < end:", "while start + i32(k_tile) < end:"),
    "keys beyond the last are copied": ("< end, i32(16), i32(0))", "< end + i32(8), i32(16), i32(0))"),
    "rows of the second half are the first's": (
        "            for h in range(2):\n                row = own_row + i32(m * 16 + h * 8)\n"
        "                for j",
        "            for h in range(2):\n                row = own_row + i32(m * 16)\n"
        "                for j",
    ),
    "the sum of one thread alone": ("whole = row_sum(total[at])", "whole = total[at]"),
    "the next head's keys": ("kv_head = quotient(head, group)", "kv_head = head"),
}  # fmt: skip


def check(warps_apart):
    """Run what every fault must show in: several tiles, both edges, padding, other heads."""
    arrays = problem(200, 330, 128, group=2, kv_heads=2, seed=1)
    options = {"window": (70, 30), "query_offset": 90, "kv_lengths": 300}
    assert_attends(*arrays, warps_apart=warps_apart, **options)
    assert_attends(*problem(40, 200), is_causal=True, query_offset=100)


@pytest.mark.parametrize("warps_apart", [False, True])
def test_without_a_fault(warps_apart):
    check(warps_apart)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, monkeypatch):
    faulty = with_fault(mma, *FAULTS[name])
    monkeypatch.setattr(kernels, "mma", faulty)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check("other warps" in name)


@pytest.mark.promise("gpu-masked-pair-contributes-nothing")
def test_a_hidden_nan_changes_no_row_that_was_finite(repair):
    query, key, value = problem(40, 80)
    options = {"is_causal": True, "query_offset": 20}
    expected, expected_lse, _ = attend(query, key, value, **options)
    key[..., 45, :] = np.nan
    value[..., 50, 3] = np.inf
    out, lse, launched = attend(query, key, value, **options)
    assert len(launched) == 2
    rows = np.arange(40) + 20
    blind = rows < 45
    np.testing.assert_allclose(
        out[..., blind, :].astype(float), expected[..., blind, :].astype(float), atol=2e-3
    )
    np.testing.assert_allclose(lse[..., blind], expected_lse[..., blind], atol=1e-5)
    assert np.isnan(out[..., ~blind, :].astype(float)).all()


@pytest.mark.promise("gpu-bitwise")
def test_bits_do_not_depend_on_the_batch():
    query, key, value = problem(130, 140, group=2, batch=3)
    together = attend(query, key, value, is_causal=True, query_offset=10)
    for b in range(3):
        alone = attend(
            *(x[b : b + 1] for x in (query, key, value)), is_causal=True, query_offset=10
        )
        np.testing.assert_array_equal(alone[0], together[0][b : b + 1])
        np.testing.assert_array_equal(alone[1], together[1][b : b + 1])


def test_kernels_that_stand_for_each_other_have_the_same_head_dims():
    assert tuple(tiles.MMA) == tuple(tiles.DECODE_ROW_TILES)
    assert tuple(tiles.WGMMA) == tuple(tiles.MMA_DQ_KEYS) == tuple(tiles.MMA_DKDV_QUERIES)


@pytest.mark.promise("gpu-machine-code-is-tight")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "softcapped"),
    [*(("bfloat16", head_dim, False) for head_dim in mma.TILES), ("float16", 128, True)],
)
def test_machine_code(dtype, head_dim, softcapped, tmp_path):
    kernel = mma.forward(dtype, head_dim, softcapped)
    binary = _build.build(kernel, AMPERE)
    assert ".local" not in binary.ptx
    for architecture in ("sm_80", "sm_89", "sm_90a"):
        assert spilled(binary.ptx, architecture) <= MOST_SPILLED
    assert kernel.shared_bytes <= 99 * 1024  # of a block on sm_86 and sm_89
    found = sass.counts(sass.disassemble(binary.cubin, tmp_path))
    tile = mma.TILES[head_dim]
    row_tiles = tile.queries // (16 * tile.warps)
    products = 2 * row_tiles * (tile.keys // 8) * (head_dim // 16)
    assert found["HMMA"] == products
    assert found["LDSM"] == row_tiles * head_dim // 16 + products // (2 * row_tiles)
    assert found["LDGSTS"] > 0


def test_reference_and_kernel_mean_the_same_by_softcap():
    query, key, value = problem(20, 40, seed=3)
    query *= 8
    out, lse, _ = attend(query, key, value, softcap=5.0)
    expected = reference.attention(*(x.astype(float) for x in (query, key, value)), softcap=5.0)
    assert np.abs(out.astype(float) - expected).max() < 3e-3
    assert np.isfinite(lse).all()
