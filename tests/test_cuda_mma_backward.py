# SPDX-License-Identifier: Apache-2.0
"""The gradients on tensor cores by mma.sync: run in the emulator, and looked at when compiled."""

import math
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import EXTRA_ULPS, HALVES, assert_same_bits, make_problem
from test_backward import Formula, grads_of

pytest.importorskip("numba.cuda")

import cuda_emulator

from fastattn import attention, reference
from fastattn.cuda.kernels import mma_backward
from fastattn.cuda.kernels.rows import UNLIMITED

PADDED = 128  # the rows of lse2 and delta
every_half = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.__name__)
every_dim = pytest.mark.parametrize("head_dim", [64, 128])


class Device:
    """Arrays of a call on the emulated device, with axes swapped where the kernel takes strides."""

    def __init__(self):
        self.memory = cuda_emulator.Memory()

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
    left, right = (UNLIMITED if side is None else side for side in (left, right))
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
        cuda_emulator.run(kernel, blocks, tuple(arguments), device.memory, lanes=lanes)
    if flags is not None:
        flags[:] = found
    return tuple(
        np.ascontiguousarray(view).reshape(x.shape)
        for (view, _, _), x in zip(results, given, strict=True)
    )


def errors(operands, options, seed=1, **more):
    """Return each gradient's largest error, and the most that FlashAttention's rule allows.

    The gate of test_backward.py; the plain formula rounds P and dS to the query's dtype.
    """
    got = grads_of(operands, options, seed, emulated_backward, **more)
    truth = grads_of(
        operands, options, seed, reference.attention_backward, compute_dtype=np.float64
    )
    plain = Formula(operands, options, seed, np.float32).gradients(operands[0].dtype)
    exactly = Formula(operands, options, seed, np.float64)
    lse = attention(*operands, return_lse=True, **options)[1]
    score = np.abs(lse[np.isfinite(lse)]).max(initial=exactly.largest_score)
    eps = np.finfo(np.float32).eps
    pairs = []
    for grad, rough, exact, magnitude in zip(got, plain, truth, exactly.magnitudes(), strict=True):
        assert grad.shape == exact.shape
        assert grad.dtype == exact.dtype
        ulp = EXTRA_ULPS * eps + float(ml_dtypes.finfo(grad.dtype).eps)
        grad, rough, exact = (x.astype(np.float64) for x in (grad, rough, exact))
        assert np.isfinite(grad).all()
        error, rough_error = (np.abs(x - exact).max(initial=0) for x in (grad, rough))
        allowed = 2 * max(rough_error, score * eps * magnitude)
        pairs.append((error, allowed + ulp * np.abs(exact).max(initial=0)))
    return pairs


def assert_within_gate(operands, options, **more):
    for error, allowed in errors(operands, options, **more):
        assert error <= allowed


# q_len, kv_len, make_problem's arguments, options of the call.
CASES = {
    "ragged": (130, 190, {}, {}),
    "one": (1, 1, {}, {"scale": 1.0}),
    "causal": (200, 200, {}, {"is_causal": True}),
    "causal, later": (
        70,
        330,
        {"heads": 4, "kv_heads": 2},
        {"is_causal": True, "query_offset": 260},
    ),
    "window": (200, 260, {}, {"window": (70, 30), "query_offset": 40}),
    "narrow window": (140, 140, {}, {"window": (0, 0)}),
    "left": (150, 150, {}, {"window": (5, None)}),
    "groups": (60, 100, {"heads": 6, "kv_heads": 2, "batch": (2,)}, {}),
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


@every_half
@every_dim
@pytest.mark.parametrize("case", CASES)
def test_within_gate(case, head_dim, dtype):
    q_len, kv_len, shape, options = CASES[case]
    operands = make_problem(q_len, kv_len, head_dim, dtype=dtype, **shape)
    assert_within_gate(operands, options)
