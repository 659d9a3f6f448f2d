# SPDX-License-Identifier: Apache-2.0
"""The backward kernel for Hopper, in the emulator: gradients, what is hidden, flags, and faults."""
# ruff: noqa: E501 - the tables have a line per case

import itertools

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.support.correctness import assert_same_bits
from tests.support.gradients import Formula, gradient_errors
from tests.support.problems import make_problem

pytest.importorskip("numba_cuda")

from fastattn import attention, cuda
from fastattn.cuda import _build
from fastattn.cuda.kernels import MOST_SIDE, padded, wgmma_backward
from tests.cuda import emulator, emulator_sm90, sass
from tests.cuda.cases import with_fault
from tests.cuda.emulator_sm90 import TensorMap, Timing
from tests.cuda.fake_device import fake_device

NAN, INF = np.nan, np.inf
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LOG2E = float(np.log2(np.e))


def strided(array):
    """Return the same numbers, heads innermost but one: as many models lay them out."""
    return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


class Problem:
    """Inputs of the kernel, and what the call before it left."""

    def __init__(self, dtype, head_dim, q_len, kv_len, heads=1, kv_heads=1, batch=1, **options):
        self.dtype, self.head_dim, self.options = dtype, head_dim, options
        self.operands = make_problem(
            q_len, kv_len, head_dim,
            heads=heads, kv_heads=kv_heads, batch=(batch,), dtype=DTYPES[dtype],
        )  # fmt: skip
        self.finish()

    def finish(self):
        """Compute what depends on the operands."""
        self.formula = Formula(self.operands, self.options, 1, np.float64)
        self.grad_out = self.formula.grad_out.astype(DTYPES[self.dtype])
        self.out, self.lse = attention(*self.operands, return_lse=True, **self.options)

    def rows(self):
        """Return lse2 and delta, as `simt_backward.prepare` leaves them."""
        batch, heads, q_len, _ = self.operands[0].shape
        shape = (batch, heads, padded(q_len))
        lse2, delta = np.full(shape, INF, np.float32), np.zeros(shape, np.float32)
        lse2[..., :q_len] = np.where(np.isneginf(self.lse), INF, self.lse * np.float32(LOG2E))
        product = self.grad_out.astype(np.float32) * self.out.astype(np.float32)
        delta[..., :q_len] = product.sum(-1) - self.formula.grad_lse[..., 0].astype(np.float32)
        return lse2, delta

    def span(self):
        """Return left, right, length, offset, lengths and offsets of the options."""
        options = self.options
        left, right = options.get("window") or (None, None)
        if options.get("is_causal"):
            right = 0
        left, right = (MOST_SIDE if x is None else x for x in (left, right))
        lengths, offset = options.get("kv_lengths"), options.get("query_offset", 0)
        length, offsets = self.operands[1].shape[2], None
        if np.ndim(offset):
            offset, offsets = 0, offset
        return left, right, length, offset, lengths, offsets


def run(
    problem, module=wgmma_backward, *, with_dq=True, timing=None, section=None, lengths=None,
    offsets=None, flagged=True,
):  # fmt: skip
    """Return dq, as a sum of float32, dk, dv and flags.

    lengths and offsets: what the device has instead of the problem's.
    """
    query, key, value = problem.operands
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    group = heads // kv_heads
    softcap = problem.options.get("softcap")
    kernel = module.backward(problem.dtype, head_dim, with_dq, softcap is not None)
    memory = emulator.Memory()
    maps = [TensorMap(strided(x), n) for x, n in ((query, 64), (key, 128), (value, 128))]
    maps.append(TensorMap(strided(problem.grad_out), 64))
    lse2, delta = problem.rows()
    dq = np.zeros(query.shape, np.float32)
    tiles = -(-kv_len // 128)
    flags = np.full((batch, kv_heads, tiles), -1, np.int32)
    # Rows of dk lie as heads do not: (batch, row, head, column).
    dk = np.full((batch, kv_len, kv_heads, head_dim), NAN, key.dtype)
    dv = np.full((batch, kv_heads, kv_len, head_dim), NAN, key.dtype)
    left, right, length, offset, *own = problem.span()
    own = [x if y is None else y for x, y in zip(own, (lengths, offsets), strict=True)]
    own = [None if x is None else np.asarray(x, np.int64) for x in own]
    scale = problem.options.get("scale") or head_dim**-0.5
    factors = (scale * LOG2E, 0.0)
    if softcap is not None:
        factors = (softcap * LOG2E, 2 * LOG2E * scale / softcap)
    section = section or module.heads_together(batch, kv_heads, group, q_len, head_dim)
    arguments = (
        *maps,
        *map(memory.place, (lse2, delta, dq, dk, dv)),
        memory.place(flags) if flagged else 0,
        *(0 if x is None else memory.place(x) for x in own),
        q_len, kv_len, batch, kv_heads, group, section, left, right, length, offset,
        kv_len * kv_heads * head_dim, head_dim, kv_heads * head_dim,
        kv_heads * kv_len * head_dim, kv_len * head_dim, head_dim,
        *map(np.float32, (*factors, scale)),
    )  # fmt: skip
    emulator_sm90.run(kernel, module.blocks(batch, kv_heads, kv_len), arguments, memory, timing)
    return dq, dk.transpose(0, 2, 1, 3), dv, flags


def assert_within_gate(problem, got):
    """Assert that the gradients are right; dq may be in float32, in which it is summed."""
    operands, dtype = problem.operands, problem.operands[0].dtype
    errors = gradient_errors(got, operands, problem.options, 1, dtype, own_dtypes=False)
    for name, (error, allowed) in zip(("dq", "dk", "dv"), errors, strict=True):
        assert error <= allowed, name


every_kernel = pytest.mark.parametrize(
    ("dtype", "head_dim"), list(itertools.product(DTYPES, (64, 128)))
)
CASES = {
    "one": {"q_len": 1, "kv_len": 1},
    "whole tiles": {"q_len": 64, "kv_len": 128},
    "ragged": {"q_len": 129, "kv_len": 65, "heads": 2, "kv_heads": 2},
    "few queries": {"q_len": 3, "kv_len": 300},
    "causal": {"q_len": 200, "kv_len": 200, "is_causal": True},
    "causal, offset": {"q_len": 70, "kv_len": 150, "is_causal": True, "query_offset": 77},
    "rows that see nothing": {"q_len": 130, "kv_len": 140, "is_causal": True, "query_offset": -70},
    "window": {"q_len": 260, "kv_len": 260, "window": (70, 9)},
    "diagonal": {"q_len": 100, "kv_len": 150, "window": (0, 0), "query_offset": 20},
    "window to the right": {"q_len": 150, "kv_len": 270, "window": (3, None), "query_offset": 40},
    "wide band": {"q_len": 320, "kv_len": 130, "window": (190, 260), "query_offset": -90},
    "lengths": {"q_len": 90, "kv_len": 140, "batch": 3, "kv_lengths": np.array([0, 131, 77])},
    "offsets": {
        "q_len": 90, "kv_len": 140, "batch": 3, "is_causal": True,
        "query_offset": np.array([-45, 0, 63]), "kv_lengths": np.array([140, 20, 128]),
    },
    "groups": {"q_len": 70, "kv_len": 60, "heads": 6, "kv_heads": 2, "batch": 2},
    "groups, causal": {
        "q_len": 130, "kv_len": 130, "heads": 3, "is_causal": True, "scale": 0.3,
    },
    "softcap": {"q_len": 100, "kv_len": 140, "softcap": 1.5, "scale": 0.4},
    "softcap, edges": {
        "q_len": 100, "kv_len": 140, "softcap": 30.0, "batch": 2, "kv_lengths": np.array([129, 64]),
        "window": (40, 30), "query_offset": 10,
    },
    "wide softcap": {"q_len": 64, "kv_len": 100, "softcap": 1e5},
    "negative scale": {"q_len": 80, "kv_len": 80, "is_causal": True, "scale": -0.2},
}  # fmt: skip


@pytest.mark.promise("gpu-means-the-same")
@every_kernel
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype, head_dim):
    problem = Problem(dtype, head_dim, **CASES[case])
    *gradients, flags = run(problem)
    assert_within_gate(problem, gradients)
    assert (flags == 0).all()


@pytest.mark.promise("gpu-bitwise")
@every_kernel
def test_what_runs_when_does_not_matter(dtype, head_dim):
    problem = Problem(dtype, head_dim, 140, 100, heads=2, is_causal=True, query_offset=-10)
    _, dk, dv, _ = run(problem)
    for timing in (
        Timing(early_products=True),
        Timing(seed=0),
        Timing(early_products=True, seed=1),
    ):
        again = run(problem, timing=timing)
        assert_same_bits(again[1], dk)
        assert_same_bits(again[2], dv)
        assert_within_gate(problem, again[:3])
    untouched, dk_alone, dv_alone, _ = run(problem, with_dq=False)
    assert (untouched == 0).all()
    assert_same_bits(dk_alone, dk)
    assert_same_bits(dv_alone, dv)


def test_numbers_on_the_device_are_clamped():
    problem = Problem(
        "float16", 64, 50, 70, batch=4, is_causal=True, kv_lengths=np.array([70, 0, 33, 70]),
        query_offset=np.array([5, 0, 2**29, -(2**29)]),
    )  # fmt: skip
    *gradients, _ = run(
        problem, lengths=[10**12, -(10**12), 33, 70], offsets=[5, 0, 10**12, -(10**12)]
    )
    assert_within_gate(problem, gradients)


def test_flags_are_optional():
    problem = Problem("float16", 64, 50, 70)
    *gradients, flags = run(problem, flagged=False)
    assert_within_gate(problem, gradients)
    assert (flags == -1).all()


@pytest.mark.parametrize("section", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("window", [(None, 0), (0, None)])
def test_every_tile_is_somebodys(section, window):
    problem = Problem(
        "float16", 64, 40, 300, heads=3, kv_heads=3, batch=2, window=window, query_offset=120
    )
    assert_within_gate(problem, run(problem, section=section)[:3])


@pytest.mark.parametrize("window", [(None, 0), (0, None), (None, 30)])
def test_the_tiles_that_most_queries_see_come_first(window, monkeypatch):
    fetched = {}
    load = emulator_sm90.Warpgroup.do_bulk_load

    def counted(group, *arguments):
        fetched[group.block.number] = fetched.get(group.block.number, 0) + 1
        load(group, *arguments)

    monkeypatch.setattr(emulator_sm90.Warpgroup, "do_bulk_load", counted)
    run(Problem("float16", 64, 380, 380, heads=2, window=window, query_offset=0), section=2)
    counts = list(fetched.values())
    assert list(fetched) == [0, 1, 2]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


@pytest.mark.promise("gpu-masked-pair-contributes-nothing")
@every_kernel
@pytest.mark.parametrize("junk", [NAN, INF])
def test_hidden_keys_may_hold_anything(dtype, head_dim, junk):
    lengths = np.array([0, 77, 128])
    problem = Problem(dtype, head_dim, 50, 140, batch=3, kv_lengths=lengths)
    expected = run(problem)
    tail = np.arange(140)[None, :] >= lengths[:, None]
    problem.operands[2][:, 0][tail] = junk
    for x, y in zip(run(problem), expected, strict=True):
        assert_same_bits(x, y)
    # Of a hidden key, 0 * NaN reaches dq: `round_dq` says so.
    problem.operands[1][:, 0][tail] = junk
    again = run(problem)
    for x, y in zip(again[1:], expected[1:], strict=True):
        assert_same_bits(x, y)


def test_flags_say_where_a_row_is_not_finite():
    problem = Problem("bfloat16", 64, 300, 300, heads=4, kv_heads=2, is_causal=True)
    problem.grad_out[0, 3, 140, 5] = NAN  # seen from keys 0 to 140, of the second key head
    _, _, dv, flags = run(problem)
    assert_array_equal(flags, [[[0, 0, 0], [1, 1, 0]]])
    bad = ~np.isfinite(dv.astype(np.float32)).all(-1)
    assert bad[0, 1, :141].all()
    assert not bad[0, 0].any()
    assert not bad[0, 1, 256:].any()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"kv_lengths": np.array([0, 30])}, {"is_causal": True, "softcap": 3.0}], ids=str
)
def test_the_whole_call(options, deterministic):
    problem = Problem("float16", 64, 50, 50, heads=2, batch=2, **options)
    hidden = np.arange(50) >= options.get("kv_lengths", np.array([50, 50]))[:, None, None]
    junk = [np.where(hidden[..., None], NAN, x).astype(x.dtype) for x in problem.operands[1:]]
    with fake_device((9, 0)) as device:
        given = problem.grad_out, problem.operands[0], *junk, problem.out, problem.lse
        gradients = cuda.attention_backward(
            *map(device.array, given),
            grad_lse=device.array(problem.formula.grad_lse[..., 0].astype(np.float32)),
            deterministic=deterministic,
            **options,
        )
        assert_within_gate(problem, list(map(device.values, gradients)))
    kernel = "fastattn_wgmma_backward_float16_64" + "_softcap" * ("softcap" in options)
    assert kernel + "_without_dq" * deterministic in device.launched
    assert ("fastattn_round_dq_float16_64" in device.launched) == (not deterministic)


@every_kernel
def test_round_dq(dtype, head_dim):
    rng = np.random.default_rng(0)
    source = rng.standard_normal((2, 3, 150, head_dim)).astype(np.float32)
    dq = np.full((2, 150, 3, head_dim), NAN, DTYPES[dtype])
    flags = np.full((2, 3, 2), -1, np.int32)
    source[1, 0, 149, 7] = INF
    source[0, 2, 3, head_dim - 1] = NAN
    memory = emulator.Memory()
    arguments = (
        *map(memory.place, (source, dq, flags)),
        150, 3, 150 * 3 * head_dim, head_dim, 3 * head_dim,
    )  # fmt: skip
    kernel = wgmma_backward.round_dq(dtype, head_dim)
    blocks = wgmma_backward.round_blocks(2, 3, 150)
    emulator_sm90.run(kernel, blocks, arguments, memory)
    got, rounded = (x.astype(np.float32) for x in (dq, source.astype(DTYPES[dtype])))
    assert_same_bits(got.transpose(0, 2, 1, 3), rounded)
    expected = np.zeros_like(flags)
    expected[1, 0, 1] = expected[0, 2, 0] = 1
    assert_array_equal(flags, expected)


def test_heads_together():
    # Of 4 query heads x 1024 queries x 64 x 8 bytes = 2 MiB each, of 32.
    assert wgmma_backward.heads_together(1, 2, 4, 1024, 64) == 2
    assert wgmma_backward.heads_together(8, 8, 4, 1024, 64) == 16
    assert wgmma_backward.heads_together(8, 8, 8, 2**20, 128) == 1


RELEASE = """            if elect(both(own_thread == i32(0), turn > i32(0))):
                mbarrier_arrive(shared + i32(tile_free) + (stage ^ i32(1)) * i32(8))
"""
WAIT_SCORES = "            wait_dk_scores(dk_sum, 0, ds_pairs, 0, s, 0)\n"
FAULTS = {
    "no wait for the tile": ("mbarrier_wait(shared + i32(tile_here) + stage * i32(8), parity_of(turn))", "pass"),
    "no wait for the keys": ("        mbarrier_wait(shared + i32(keys_here), 0)\n", ""),
    "a stage always taken for free": ("shared + i32(tile_free) + stage * i32(8), parity_of(turn) ^ i32(1)", "shared + i32(tile_free) + stage * i32(8), 1"),
    "the same phase always": ("stage * i32(8), parity_of(turn))", "stage * i32(8), 0)"),
    "no release": (RELEASE, ""),
    "release before the last product": (WAIT_SCORES + RELEASE, RELEASE + WAIT_SCORES),
    "too few bytes announced": ("2 * q_bytes + 2 * row_bytes", "2 * q_bytes + row_bytes"),
    "no barrier before dS is read": ("named_sync(1, COMPUTING * 128)", "pass"),
    "a single dS": ("ds_write + stage * i32(ds_bytes)", "ds_write"),
    "dS not swizzled": ("(in_block & i32(7)) << i32(4)", "i32(0)"),
    "no wait for the scores": (WAIT_SCORES, ""),
    "no wait for dP": ("            wait_dp(dp, 0)\n", ""),
    "no wait for dQ": ('(f"wait_dv_dq_{kind}", 1,', '(f"wait_dv_dq_{kind}", 3,'),
    "boxes of another matrix": (", descriptor(q_box), ", ", descriptor(k_box), "),
    "k steps of another matrix": ("along(k_box), along(q_box)", "along(q_box), along(k_box)"),
    "the other warpgroup's keys": ("shared + warpgroup * i32(64 * 128)", "shared"),
    "the other warpgroup's columns": ("shared + warpgroup * i32(own_keys_at)", "shared"),
    "mask off by one": ("own_key + i32(h * 8 + 1) - offset", "own_key + i32(h * 8) - offset"),
    "mask off by one, to the right": ("own_key - offset - right - own_column", "own_key - offset - right - own_column - i32(1)"),
    "too many whole tiles": ("own_first + i32(63 + QUERIES - 1) -", "own_first + i32(QUERIES - 1) -"),
    "too many whole tiles, to the left": ("own_first + i32(1) - offset", "own_first + i32(64) - offset"),
    "padding taken for a whole tile": ("        if own_first + i32(64) > length:\n", "        if False:\n"),
    "a tile of queries too few": ("last_row + i32(QUERIES - 1)", "last_row"),
    "a tile of queries left out": ("maximum(first_key - offset - call.right, i32(0))", "maximum(first_key + i32(128) - offset - call.right, i32(0))"),
    "the same head again": ("row, head - before", "row, own.head - before"),
    "hidden by length, but seen": ("own_key + i32(h * 8) < length", "own_key + i32(h * 8) < call.kv_len"),
    "the second rows masked like the first": ("i32(j * 8 + e - h * 8) >= first", "i32(j * 8 + e) >= first"),
    "rows beyond the last": ("minimum(row + own_row + i32(h * 8), q_len - i32(1))", "row + own_row + i32(h * 8)"),
    "no scale": ("dk_sum[i] = dk_sum[i] * call.scale", "pass"),
    "numbers of other columns": ("stage * i32(2 * row_bytes) + own_column * i32(4)", "stage * i32(2 * row_bytes)"),
}  # fmt: skip


FOUND = (AssertionError, IndexError, emulator_sm90.Deadlock, emulator_sm90.Fault)


def check_at_any_time(module):
    """Assert that the gradients are right, for a problem with edges of all kinds."""
    problem = Problem(
        "float16", 128, 200, 140, heads=2, window=(160, 3), query_offset=0,
        kv_lengths=np.array([100]),
    )  # fmt: skip
    for timing in (Timing(), Timing(early_products=True), Timing(seed=0)):
        assert_within_gate(problem, run(problem, module, timing=timing)[:3])


def test_no_fault_planted():
    check_at_any_time(wgmma_backward)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    module = with_fault(wgmma_backward, *FAULTS[fault])
    with pytest.raises(FOUND):
        check_at_any_time(module)


# ---- machine code


@pytest.mark.promise("gpu-machine-code-is-tight")
@pytest.mark.parametrize("with_dq", [True, False], ids=["dq", "no dq"])
@pytest.mark.parametrize(("dtype", "softcapped"), [("float16", False), ("bfloat16", True)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_machine_code(dtype, head_dim, softcapped, with_dq, tmp_path):
    kernel = wgmma_backward.backward(dtype, head_dim, with_dq, softcapped)
    binary = _build.build(kernel, (9, 0))
    if binary.registers is None:
        pytest.skip("ptxas is not here")
    assert binary.architecture == "sm_90a"
    assert ".local" not in binary.ptx
    assert max(binary.spill_stores, binary.spill_loads) <= 32
    assert "serialized" not in binary.log
    assert binary.shared_bytes <= 227 * 1024
    found = sass.counts(sass.disassemble(binary.cubin, tmp_path))
    # S and dP: head_dim / 16 each; dV and dK: 64 queries / 16 each; dQ: 128 or 64 keys / 16.
    assert found["HGMMA"] == 2 * head_dim // 16 + 2 * 4 + head_dim // 16 * with_dq
    # K, V, Q and dO by boxes of 64 columns, lse2 and delta.
    assert found["UTMALDG.4D"] == 4 * head_dim // 64
    assert found["UBLKCP"] == 2
    assert found["REDG"] == (64 // 4 if with_dq else 0)
    assert found["USETMAXREG"] == 2


@every_kernel
def test_machine_code_of_round_dq(dtype, head_dim, tmp_path):
    binary = _build.build(wgmma_backward.round_dq(dtype, head_dim), (8, 0))
    if binary.registers is None:
        pytest.skip("ptxas is not here")
    assert ".local" not in binary.ptx
    assert binary.spill_stores == binary.spill_loads == 0
    found = sass.counts(sass.disassemble(binary.cubin, tmp_path))
    rows_each = 128 * (head_dim // 8) // 256
    assert found["LDG.E.128"] == 2 * rows_each
    assert found["STG.E.128"] == rows_each
