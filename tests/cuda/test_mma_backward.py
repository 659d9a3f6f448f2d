# SPDX-License-Identifier: Apache-2.0
"""The gradients on tensor cores by mma.sync: run in the emulator, and looked at when compiled."""
# ruff: noqa: E501 - the tables have a line per case

import contextlib
import math

import numpy as np
import pytest

from tests.support.correctness import assert_same_bits
from tests.support.gradients import gradient_errors, grads_of
from tests.support.problems import every_half, make_problem

pytest.importorskip("numba.cuda")

from fastattn import attention
from fastattn.cuda import _build
from fastattn.cuda.kernels import MOST_SIDE, mma_backward
from tests.cuda import emulator, sass
from tests.cuda.cases import spilled, with_fault

PADDED = 128  # the rows of lse2 and delta
every_dim = pytest.mark.parametrize("head_dim", [64, 128])


class Device:
    """Arrays of a call on the emulated device, with axes swapped where the kernel takes strides."""

    def __init__(self):
        self.memory = emulator.Memory()

    def place(self, array, swapped):
        """Return a copy of (batch, heads, rows, columns) there: array, address and strides."""
        order = (0, 2, 1, 3) if swapped else (0, 1, 2, 3)
        base = np.ascontiguousarray(array.transpose(order))
        view = base.transpose(order)
        return view, self.memory.place(base), [x // array.itemsize for x in view.strides[:3]]


def emulated_backward(
    grad_out, query, key, value, out, lse, *, module=mma_backward, lanes=None, swapped=False,
    flags=None, grad_lse=None, scale=None, is_causal=False, window=None, softcap=None,
    kv_lengths=None, query_offset=None, return_dbias=False, return_dsinks=False,
):  # fmt: skip
    """Return dq, dk, dv by the kernels; flags becomes theirs: one array of dkdv, one of dq."""
    given = (query, key, value)
    query, key, value, grad_out, out = (
        x.reshape(-1, *x.shape[-3:]) for x in (query, key, value, grad_out, out)
    )
    (batch, heads, q_len, head_dim), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    lse, grad_lse = (x.reshape(batch, heads, q_len) for x in (lse, grad_lse))
    # What simt_backward.prepare leaves.
    padded = -(-q_len // PADDED) * PADDED
    lse2 = np.full((batch, heads, padded), np.inf, np.float32)
    delta = np.zeros((batch, heads, padded), np.float32)
    sees = lse > -np.inf
    products = grad_out.astype(np.float32) * out.astype(np.float32)
    lse2[..., :q_len][sees] = lse[sees] * np.float32(math.log2(math.e))
    delta[..., :q_len][sees] = (products.sum(-1) - grad_lse)[sees]

    device = Device()
    placed = [device.place(x, swapped) for x in (query, key, value, grad_out)]
    results = [device.place(np.full_like(x, np.nan), swapped) for x in (query, key, value)]
    dq, dk, dv = results
    tiles = [-(-n // 128) for n in (kv_len, q_len)]
    found = [
        np.full((batch, kv_heads, tiles[0]), -1, np.int32),
        np.full((batch, heads, tiles[1]), -1, np.int32),
    ]
    flag_addresses = [0 if flags is None else device.memory.place(x) for x in found]
    own = []  # lengths and offsets, of each batch element or of all
    for numbers, usual in ((kv_lengths, kv_len), (query_offset, 0)):
        numbers = usual if numbers is None else numbers
        if np.ndim(numbers):
            own.append((device.memory.place(np.asarray(numbers, np.int64)), usual))
        else:
            own.append((0, numbers))
    (lengths, length), (offsets, offset) = own
    left, right = window or (None, None)
    left, right = (MOST_SIDE if side is None else side for side in (left, right))
    right = min(right, 0) if is_causal else right
    scale = head_dim**-0.5 if scale is None else scale
    factors = [scale, scale * math.log2(math.e), 0.0]
    if softcap is not None:
        factors[1:] = [softcap * math.log2(math.e), 2 * math.log2(math.e) * scale / softcap]
    numbers = [device.memory.place(x) for x in (lse2, delta)]
    sizes = [q_len, kv_len, heads, heads // kv_heads, left, right, length, offset]
    strides = [n for _, _, three in placed for n in three]
    for factory, outputs, flag, blocks in (
        (module.dkdv, (dk, dv), flag_addresses[0], batch * kv_heads * tiles[0]),
        (module.dq, (dq,), flag_addresses[1], batch * heads * tiles[1]),
    ):
        kernel = factory(query.dtype.name, head_dim, softcap is not None)
        arguments = [address for _, address, _ in placed] + numbers
        arguments += [address for _, address, _ in outputs] + [flag, lengths, offsets]
        arguments += sizes + strides + [n for _, _, three in outputs for n in three]
        arguments += [np.float32(factor) for factor in factors]
        assert len(arguments) == len(kernel.signature)
        emulator.run(kernel, blocks, tuple(arguments), device.memory, lanes=lanes)
    if flags is not None:
        flags[:] = found
    return tuple(
        np.ascontiguousarray(view).reshape(x.shape)
        for (view, _, _), x in zip(results, given, strict=True)
    )


def errors(operands, options, **more):
    """Return each gradient's largest error, and the most that is allowed."""
    got = grads_of(operands, options, backward=emulated_backward, **more)
    return gradient_errors(got, operands, options, rounded_to=operands[0].dtype)


def assert_within_gate(operands, options, **more):
    for error, allowed in errors(operands, options, **more):
        assert error <= allowed


# q_len, kv_len, make_problem's arguments, options of the call.
CASES = {
    "ragged": (130, 190, {}, {}),
    "one": (1, 1, {}, {"scale": 1.0}),
    "causal": (200, 200, {}, {"is_causal": True}),
    "causal, later": (70, 330, {}, {"is_causal": True, "query_offset": 260}),
    "window": (200, 260, {}, {"window": (70, 30), "query_offset": 40}),
    "narrow window": (140, 140, {}, {"window": (0, 0)}),
    "left": (150, 150, {}, {"window": (5, None)}),
    "groups": (60, 100, {"heads": 6, "kv_heads": 2}, {}),
    "lengths": (
        40,
        270,
        {"batch": (4,)},
        {"kv_lengths": [0, 1, 128, 200], "query_offset": [0, 5, -10, 250], "is_causal": True},
    ),
    "rows that see nothing": (
        270,
        150,
        {"heads": 2, "kv_heads": 1},
        {"is_causal": True, "query_offset": -140},
    ),
    "keys that nobody sees": (30, 300, {}, {"window": (10, 0), "query_offset": 140}),
    "softcap": (100, 140, {}, {"softcap": 1.5, "is_causal": True, "query_offset": 30}),
    "large softcap": (64, 64, {}, {"softcap": 50.0}),
}


@pytest.mark.promise("gpu-means-the-same")
@every_half
@every_dim
@pytest.mark.parametrize("case", CASES)
def test_within_gate(case, head_dim, dtype):
    q_len, kv_len, shape, options = CASES[case]
    operands = make_problem(q_len, kv_len, head_dim, dtype=dtype, **shape)
    assert_within_gate(operands, options)


def gradients(operands, options, **more):
    """Return what the kernels make of operands, and their flags."""
    flags = []
    return grads_of(operands, options, 1, emulated_backward, flags=flags, **more), flags


def tiles_not_finite(*grads):
    """Return the flags that these gradients, of the same rows, should have."""
    finite = np.ones(grads[0].shape[:-1], bool)
    for grad in grads:
        finite &= np.isfinite(grad.astype(np.float32)).all(-1)
    finite = finite.reshape(-1, *finite.shape[-2:])
    starts = np.arange(0, finite.shape[-1], 128)
    return (~np.logical_and.reduceat(finite, starts, axis=-1)).astype(np.int32)


MANY = {"window": (90, 20), "query_offset": [30, -20], "kv_lengths": [190, 150]}


@pytest.mark.promise("gpu-bitwise")
@every_dim
def test_runs_strides_and_warps_change_no_bit(head_dim):
    shape = {"heads": 2, "kv_heads": 1, "batch": (2,)}
    operands = make_problem(70, 190, head_dim, **shape, dtype=np.float16)
    first = grads_of(operands, MANY, 1, emulated_backward)
    for more in ({}, {"swapped": True}, {"lanes": 32}):
        assert_same_bits(grads_of(operands, MANY, 1, emulated_backward, **more), first)


@pytest.mark.promise("gpu-bitwise")
def test_neighbours_change_no_bit():
    operands = make_problem(70, 190, 64, heads=2, kv_heads=1, batch=(2,), dtype=np.float16)
    out, lse = attention(*operands, return_lse=True, **MANY)
    arrays = [np.ones_like(out), *operands, out, lse]
    together = emulated_backward(*arrays, grad_lse=np.zeros_like(lse), **MANY)
    options = {name: numbers[1:] for name, numbers in MANY.items()} | {"window": MANY["window"]}
    alone = emulated_backward(*(x[1:] for x in arrays), grad_lse=np.zeros_like(lse[1:]), **options)
    assert_same_bits(alone, tuple(x[1:] for x in together))


@every_half
def test_lengths_on_the_device_are_clamped(dtype):
    operands = make_problem(100, 190, 64, batch=(3,), dtype=dtype)
    legal = {"kv_lengths": [0, 190, 190], "query_offset": [0, 0, 190], "window": (200, 0)}
    expected = grads_of(operands, legal, 1, emulated_backward)
    far = {"kv_lengths": [-5, 2**40, 190], "query_offset": [0, 0, 190]}

    def with_far_numbers(*args, **more):
        return emulated_backward(*args, **(more | far))

    assert_same_bits(grads_of(operands, legal, 1, with_far_numbers), expected)
    far = {"kv_lengths": [0, 190, 190], "query_offset": [2**50, 0, -(2**50)]}
    dq, dk, dv = grads_of(operands, legal, 1, with_far_numbers)
    for grad, usual in zip((dq, dk, dv), expected, strict=True):
        assert_same_bits(grad[1], usual[1])
        assert_same_bits(grad[::2], np.zeros_like(grad[::2]))


@every_half
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_poison_that_no_row_sees(softcap, poison, dtype):
    operands = make_problem(100, 190, 64, heads=2, dtype=dtype)
    # Rows 0 to 19 see nothing, nobody sees keys from 70 on: both share tiles with others.
    options = {"is_causal": True, "query_offset": -20, "kv_lengths": 70, "softcap": softcap}
    expected, flags = gradients(operands, options)
    assert not any(x.any() for x in flags)
    query, key, value = (x.copy() for x in operands)
    key[:, 70:] = value[:, 70:] = poison
    got, flags = gradients((query, key, value), options)
    assert_same_bits(got, expected)
    assert not any(x.any() for x in flags)
    # 0 * NaN reaches the keys, which is flagged; not the rows themselves.
    query[:, :20] = poison
    (dq, _, _), flags = gradients((query, key, value), options)
    assert_same_bits(dq, expected[0])
    np.testing.assert_array_equal(flags[0][0], [[1, 0]] * 2)
    assert not flags[1].any()


@every_half
def test_poison_of_hidden_pairs(dtype):
    operands = make_problem(150, 150, 128, dtype=dtype)
    options = {"window": (3, 3)}
    expected, _ = gradients(operands, options)
    key, value = (x.copy() for x in operands[1:])
    key[:, 50] = value[:, 50] = np.nan
    out, lse = attention(*operands, return_lse=True, **options)
    rng = np.random.default_rng(1)
    grad_out = rng.standard_normal(out.shape).astype(dtype)
    grad_lse = rng.standard_normal(lse.shape).astype(np.float32)
    flags = []
    # With the clean out and lse: only what the kernels read of key 50 is NaN.
    dq, dk, dv = emulated_backward(
        grad_out, operands[0], key, value, out, lse, grad_lse=grad_lse, flags=flags, **options
    )
    hidden = np.r_[0:50, 51:150]
    assert_same_bits(
        (dk[:, hidden], dv[:, hidden]), (expected[1][:, hidden], expected[2][:, hidden])
    )
    assert np.isnan(dk[:, 50].astype(np.float32)).all()
    assert np.isnan(dq[:, 47:54].astype(np.float32)).all()
    np.testing.assert_array_equal(flags[0], tiles_not_finite(dk, dv))
    np.testing.assert_array_equal(flags[1], tiles_not_finite(dq))
    assert_same_bits(dq[:, 128:], expected[0][:, 128:])  # of a tile that does not see key 50


@every_dim
def test_what_is_not_finite_is_flagged(head_dim):
    shape = {"heads": 2, "kv_heads": 1, "batch": (2,)}
    query, key, value = make_problem(190, 140, head_dim, **shape, dtype=np.float16)
    query[1, 0, 150, 5] = np.nan
    options = {"window": (0, 0), "query_offset": 0}
    (dq, dk, dv), flags = gradients((query, key, value), options)
    np.testing.assert_array_equal(flags[0], tiles_not_finite(dk, dv))
    np.testing.assert_array_equal(flags[1], tiles_not_finite(dq))
    assert not flags[0].any()  # row 150 sees no key
    query[1, 0, 130, 5] = np.nan
    (dq, dk, dv), flags = gradients((query, key, value), options)
    np.testing.assert_array_equal(flags[0], tiles_not_finite(dk, dv))
    np.testing.assert_array_equal(flags[1], tiles_not_finite(dq))
    assert flags[0].tolist() == [[[0, 0]], [[0, 1]]]
    assert flags[1].tolist() == [[[0, 0], [0, 0]], [[0, 1], [0, 0]]]


FAULTS = {
    # What is replaced, by what; None: no fault. 32 lanes let the warps drift apart.
    "none": ("", "", 32),
    "tile not waited for": (
        "            wait_all()\n            cuda.syncthreads()  # this tile",
        "            cuda.syncthreads()  # this tile",
        None,
    ),
    "own rows not waited for": ("        wait_all()\n        cuda.syncthreads()\n        load_left", "        cuda.syncthreads()\n        load_left", None),
    "one buffer": ("buffer = i32(shared + i32(stage_bytes) - (buffer - shared))", "buffer = shared", None),
    "no barrier after a copy": (
        "            wait_all()\n            cuda.syncthreads()  # this tile",
        "            wait_all()  # this tile",
        32,
    ),
    "no barrier after a block's own rows are read": (
        "        cuda.syncthreads()  # from here on",
        "        # from here on",
        32,
    ),
    "copied without exchange": ("((chunk ^ (row & i32(7))) << i32(4))", "(chunk << i32(4))", None),
    "read without exchange": ("row * i32(row_bytes) + ((chunk ^ (lane & i32(7))) << i32(4))", "row * i32(row_bytes) + (chunk << i32(4))", None),
    "not transposed": ("load_matrices_transposed(right", "load_matrices(right", None),
    "first key of a row": ("minimum(q_len, sees + left + i32(1))", "minimum(q_len, sees + left)", None),
    "last key of a row": ("first[h] = sees - right", "first[h] = sees - right + i32(1)", None),
    "length": ("end[h] = select(own_key", "end[h] = select(i32(0) * own_key", None),
    "edge below": ("if start < all_from or following > all_to:", "if following > all_to:", None),
    "edge above": ("if start < all_from or following > all_to:", "if start < all_from:", None),
    "edge of keys": ("or last_key >= end_key(this_row, offset, right, length)\n", "\n", None),
    "first tile": ("quotient(maximum(i32(0), start - offset - right), i32(q_tile))", "quotient(start - offset - right + i32(q_tile), i32(q_tile))", None),
    "last tile": ("length - i32(1)) - offset + left + i32(1))", "length - i32(1)) - offset + left - i32(63))", None),
    "one head of the group": ("end_head = i32(head + group)", "end_head = i32(head + i32(1))", None),
    "lse2 of another head": ("lse2 += number_head", "lse2 += i64(0)", None),
    "no delta": ("s[at] * (dp[at] - delta)\n", "s[at] * dp[at]\n", None),
    "no slope": ("(dp[at] - delta) * slope", "(dp[at] - delta)", None),
    "no scale": ("dk_acc, dk_scale", "dk_acc, f32(1)", None),
    "rows exchanged": ("row_lse2[h], row_delta[h]", "row_lse2[1 - h], row_delta[1 - h]", None),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    was, becomes, lanes = FAULTS[fault]
    faulty = with_fault(mma_backward, was, becomes)
    operands = make_problem(130, 150, 64, heads=2, kv_heads=1, dtype=np.float16)
    with pytest.raises(AssertionError) if fault != "none" else contextlib.nullcontext():
        for options in (
            {"window": (70, 10), "query_offset": 9, "kv_lengths": 140},
            {"is_causal": True, "query_offset": 9, "softcap": 1.5},
        ):
            assert_within_gate(operands, options, module=faulty, lanes=lanes)


# Statements of a warp in the code: products, reads of their factors, copies to shared memory.
COUNTS = {
    ("dkdv", 64): {"HMMA": 128, "LDSM": 8 + 64, "LDGSTS": 8 + 2 * (4 + 2)},
    ("dkdv", 128): {"HMMA": 128, "LDSM": 16 + 64, "LDGSTS": 16 + 2 * (4 + 2)},
    ("dq", 64): {"HMMA": 96, "LDSM": 8 + 48, "LDGSTS": 8 + 2 * 4},
    ("dq", 128): {"HMMA": 192, "LDSM": 16 + 96, "LDGSTS": 16 + 2 * 8},
}


@pytest.mark.promise("gpu-machine-code-is-tight")
@pytest.mark.parametrize(("dtype", "softcapped"), [("float16", False), ("bfloat16", True)])
@every_dim
@pytest.mark.parametrize("name", ["dkdv", "dq"])
def test_machine_code(name, head_dim, dtype, softcapped, tmp_path):
    kernel = getattr(mma_backward, name)(dtype, head_dim, softcapped)
    assert kernel.shared_bytes <= 64 * 1024  # fits any GPU since sm_80
    binary = _build.build(kernel, (8, 0))
    assert ".local" not in binary.ptx
    assert max(binary.spill_stores, binary.spill_loads, binary.stack_bytes) <= 32
    for architecture in ("sm_89", "sm_90a"):
        assert spilled(binary.ptx, architecture) <= 32
    counts = sass.counts(sass.disassemble(binary.cubin, tmp_path))
    expected = COUNTS[name, head_dim]
    assert {instruction: counts[instruction] for instruction in expected} == expected
