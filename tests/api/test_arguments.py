# SPDX-License-Identifier: Apache-2.0
"""Bad arguments: every error there is, word by word; nothing crashes, nothing is half written."""
# ruff: noqa: E501 - the tables of errors have a line per error

import ast
import inspect
import re
import traceback

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.testing import assert_allclose

import fastattn
from fastattn import (
    _arguments,
    _attention,
    _backward,
    _machine,
    _merge,
    _options,
    _sdpa,
    attention,
)
from tests.support.child import run
from tests.support.correctness import assert_same_bits
from tests.support.problems import make_problem

QUERY, KEY, VALUE = make_problem(5, 7, 8, 3, heads=4, kv_heads=2, batch=(2,))
HALF = QUERY.astype(np.float16)
WHOLE = (2, 4, 5, 7)
NAN, INF = np.nan, np.inf
FLOATS = "float16, bfloat16, float32 or float64"


def call(**arguments):
    """Call attention with some arguments replaced; on an error, out is as it was."""
    out = np.full((2, 4, 5, 3), 7, np.float32)
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "out": out} | arguments
    try:
        return attention(**arguments)
    finally:
        assert (out == 7).all()
        assert not MEMORY.any()


def varlen(**arguments):
    """Call varlen_attention with some arguments replaced."""
    arguments = {
        "query": zeros(9, 4, 8),
        "key": zeros(12, 2, 8),
        "value": zeros(12, 2, 3),
        "cu_seqlens_q": [0, 4, 9],
        "cu_seqlens_kv": [0, 7, 12],
    } | arguments
    return fastattn.varlen_attention(**arguments)


def sdpa(*operands, **options):
    return fastattn.scaled_dot_product_attention(*operands, **options)


class NoMemory:
    """An array that cannot be made."""

    def __array__(self, dtype=None, copy=None):
        raise MemoryError("too large")


class OnGPU:
    """An array of a library for GPUs."""

    __cuda_array_interface__ = None


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def ragged_error():
    try:
        np.asarray([[1.0], [1.0, 2.0]])
    except ValueError as error:
        return str(error)


def read_only(x):
    x.flags.writeable = False
    return x


def inside(x, shape, offset):
    """Return an array of the shape in the memory of x, from the element at that offset."""
    return x.reshape(-1)[offset : offset + np.prod(shape)].reshape(shape)


MEMORY = zeros(1000)
LSE = zeros(2, 4, 5)
OUT = (2, 4, 5, 3)
NEEDS_OFFSET = (
    "query_offset must be given with {} if q_len differs from kv_len (0: the first query stands at the "
    "first key; kv_len - q_len: the last at the last), got q_len=5, kv_len=7"
)
NOT_A_PAIR = "window must be a pair (left, right) of integers or None, not {}"
MORE = (
    "{0} must be an array of numbers and nothing beside, not {1}, whose mask, unit, labels or rules "
    "would be lost: numpy.asarray({0}) is the numbers alone"
)
RANK = (
    "{0} must have 2 axes or more, (batch, heads, length, head_dim) or the last of these, "
    "got {0}.shape={1}"
)
BROADCAST = (
    f"{{0}} must broadcast to (batch, q_heads, q_len, kv_len) = {WHOLE}, got {{0}}.shape={{1}}"
)
HEADS = "q_heads must be a multiple of kv_heads, got q_heads={}, kv_heads={} (key.shape={}, query.shape={})"
TOO_MANY = (
    "batch x heads x q_len x value_head_dim must be below 2**60 (0 counts as 1), "
    "got query.shape={}, key.shape={}, value.shape={}"
)

# (arguments that replace those of call(), the error's type, its text)
CASES = [
    # query, key, value: what they are
    ({"query": None}, TypeError, f"query must be an array of {FLOATS}, not NoneType"),
    ({"query": "text"}, TypeError, f"query must be an array of {FLOATS}, not str"),
    ({"query": np.ma.array(QUERY)}, TypeError, MORE.format("query", "MaskedArray")),
    ({"key": KEY[0, 0].view(np.matrix)}, TypeError, MORE.format("key", "matrix")),
    ({"value": [[1.0], [1.0, 2.0]]}, TypeError, f"value must be an array of {FLOATS}: {ragged_error()}"),
    ({"value": NoMemory()}, MemoryError, "too large"),
    ({"value": object()}, TypeError, f"value must be an array of {FLOATS}, not object"),
    *(
        ({name: x.astype(dtype)}, TypeError, f"{name} must be an array of {FLOATS}, not {shown}")
        for name, x in (("query", QUERY), ("key", KEY), ("value", VALUE))
        for dtype, shown in [
            (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
            (np.longdouble, np.dtype(np.longdouble).name),
            (np.complex64, "complex64"),
            (np.int32, "int32"),
            (bool, "bool"),
            (object, "object"),
        ]
    ),
    ({"key": KEY.astype(float)}, TypeError, "key must have the dtype of query, float32, not float64"),
    ({"value": VALUE.astype(float)}, TypeError, "value must have the dtype of query, float32, not float64"),
    ({"query": QUERY.astype(float)}, TypeError, "key must have the dtype of query, float64, not float32"),
    ({"query": HALF}, TypeError, "key must have the dtype of query, float16, not float32"),
    ({"query": HALF, "key": KEY.astype(ml_dtypes.bfloat16)}, TypeError, "key must have the dtype of query, float16, not bfloat16"),
    ({"query": QUERY.astype(float), "key": KEY.astype(np.float16)}, TypeError, "key must have the dtype of query, float64, not float16"),
    ({"key": KEY.astype(np.float16)}, TypeError, "value must have the dtype of key, float16, not float32"),
    ({"value": VALUE.astype(np.float16)}, TypeError, "value must have the dtype of query, float32, not float16"),
    # their shapes
    ({"query": zeros()}, ValueError, RANK.format("query", ())),
    ({"key": zeros(8)}, ValueError, RANK.format("key", (8,))),
    ({"value": zeros(0)}, ValueError, RANK.format("value", (0,))),
    ({"query": QUERY[..., :0], "key": KEY[..., :0]}, ValueError, "query must have a head_dim of 1 or more, got query.shape=(2, 4, 5, 0)"),
    ({"query": zeros(0, 2**31)}, ValueError, "query must have a head_dim below 2**31, got query.shape=(0, 2147483648)"),
    ({"value": np.broadcast_to(np.float32(1), (7, 2**31))}, ValueError, "value must have a head_dim below 2**31, got value.shape=(7, 2147483648)"),
    ({"key": KEY[..., :7]}, ValueError, "key has head_dim 7 but query has head_dim 8 (key.shape=(2, 2, 7, 7), query.shape=(2, 4, 5, 8))"),
    ({"query": QUERY[:, :3]}, ValueError, HEADS.format(3, 2, (2, 2, 7, 8), (2, 3, 5, 8))),
    ({"query": QUERY[:, :1]}, ValueError, HEADS.format(1, 2, (2, 2, 7, 8), (2, 1, 5, 8))),
    ({"key": KEY[:, :0]}, ValueError, HEADS.format(4, 0, (2, 0, 7, 8), (2, 4, 5, 8))),
    ({"query": QUERY[0, 0]}, ValueError, HEADS.format(1, 2, (2, 2, 7, 8), (5, 8))),
    ({"value": VALUE[..., :6, :]}, ValueError, "value has kv_len 6 but key has kv_len 7 (value.shape=(2, 2, 6, 3), key.shape=(2, 2, 7, 8))"),
    ({"value": VALUE[:, :1]}, ValueError, "value has 1 heads but key has 2 (value.shape=(2, 1, 7, 3), key.shape=(2, 2, 7, 8))"),
    ({"query": zeros(3, 4, 5, 8)}, ValueError, "the batch axes of query, key and value must broadcast, got query.shape=(3, 4, 5, 8), key.shape=(2, 2, 7, 8), value.shape=(2, 2, 7, 3)"),
    ({"query": zeros(2**30, 2, 0, 8), "key": zeros(2**30, 1, 2, 0, 8), "value": zeros(1, 2, 0, 3)}, ValueError, TOO_MANY.format((2**30, 2, 0, 8), (2**30, 1, 2, 0, 8), (1, 2, 0, 3))),
    # mask, bias
    ({"mask": zeros(5, 7, dtype=int)}, TypeError, f"mask must be an array of bool, {FLOATS}, not int64"),
    ({"mask": 1}, TypeError, f"mask must be an array of bool, {FLOATS}, not int64"),
    ({"mask": "causal"}, TypeError, f"mask must be an array of bool, {FLOATS}, not str"),
    ({"mask": np.ma.array(zeros(5, 7))}, TypeError, MORE.format("mask", "MaskedArray")),
    ({"bias": zeros(5, 7, dtype=bool)}, TypeError, f"bias must be an array of {FLOATS}, not bool"),
    ({"bias": zeros(5, 7, dtype=np.int8)}, TypeError, f"bias must be an array of {FLOATS}, not int8"),
    *(
        ({name: zeros(*shape)}, ValueError, BROADCAST.format(name, shape))
        for name in ("mask", "bias")
        for shape in [(7, 5), (8,), (2, 5, 7), (3, 1, 1, 7), (1, 2, 4, 5, 7), (0, 7), (2, 4, 5, 0), (1, 1, 1, 1, 1)]
    ),
    # scale, softcap
    ({"scale": NAN}, ValueError, "scale must be finite, got scale=nan"),
    ({"scale": -INF}, ValueError, "scale must be finite, got scale=-inf"),
    ({"scale": 10**400}, ValueError, f"scale must be finite, got scale={10**400}"),
    ({"scale": "1"}, TypeError, "scale must be a number, not str"),
    ({"scale": True}, TypeError, "scale must be a number, not bool"),
    ({"scale": 1j}, TypeError, "scale must be a number, not complex"),
    ({"scale": zeros(1)}, TypeError, "scale must be a number, not ndarray"),
    ({"softcap": 0}, ValueError, "softcap must be > 0 (None: off), got softcap=0"),
    ({"softcap": -2.0}, ValueError, "softcap must be > 0 (None: off), got softcap=-2.0"),
    ({"softcap": INF}, ValueError, "softcap must be finite, got softcap=inf"),
    ({"softcap": [1]}, TypeError, "softcap must be a number, not list"),
    # positions
    ({"is_causal": 1}, TypeError, "is_causal must be a bool, not int"),
    ({"is_causal": None}, TypeError, "is_causal must be a bool, not NoneType"),
    ({"is_causal": True}, ValueError, NEEDS_OFFSET.format("is_causal")),
    ({"is_causal": True, "window": (1, 1)}, ValueError, NEEDS_OFFSET.format("is_causal")),
    ({"window": (1, None)}, ValueError, NEEDS_OFFSET.format("window")),
    ({"alibi_slopes": zeros(4)}, ValueError, NEEDS_OFFSET.format("alibi_slopes")),
    ({"query_offset": 0.0}, TypeError, "query_offset must be an array of integers, or an int, not float64"),
    ({"query_offset": True}, TypeError, "query_offset must be an array of integers, or an int, not bool"),
    ({"query_offset": "0"}, TypeError, "query_offset must be an array of integers, or an int, not str"),
    ({"query_offset": [0, 1, 2]}, ValueError, "query_offset must broadcast to the batch shape (2,), got query_offset.shape=(3,)"),
    ({"query_offset": [[0], [1]]}, ValueError, "query_offset must broadcast to the batch shape (2,), got query_offset.shape=(2, 1)"),
    ({"query_offset": 2**61 + 1}, ValueError, f"query_offset must be within -2**61..2**61, got {2**61 + 1}"),
    ({"query_offset": [0, -(2**61) - 1]}, ValueError, f"query_offset must be within -2**61..2**61, got {-(2**61) - 1}"),
    ({"query_offset": np.array([2**64 - 1], np.uint64)}, ValueError, f"query_offset must be within -2**61..2**61, got {2**64 - 1}"),
    ({"query_offset": -(10**40)}, ValueError, f"query_offset must be within -2**61..2**61, got {-(10**40)}"),
    ({"window": 3}, TypeError, NOT_A_PAIR.format(3)),
    ({"window": (1, 2, 3)}, TypeError, NOT_A_PAIR.format((1, 2, 3))),
    ({"window": (1, 2.0)}, TypeError, NOT_A_PAIR.format((1, 2.0))),
    ({"window": (True, 0)}, TypeError, NOT_A_PAIR.format((True, 0))),
    ({"window": "12"}, TypeError, NOT_A_PAIR.format("'12'")),
    ({"window": (-1, 0)}, ValueError, "window must be a pair of integers >= 0 or None, got (-1, 0)"),
    ({"window": (None, -1)}, ValueError, "window must be a pair of integers >= 0 or None, got (None, -1)"),
    # per head and per batch element
    ({"alibi_slopes": zeros(4, dtype=int), "query_offset": 0}, TypeError, f"alibi_slopes must be an array of {FLOATS}, not int64"),
    ({"alibi_slopes": zeros(2), "query_offset": 0}, ValueError, "alibi_slopes must have shape (4,) or (2, 4), got alibi_slopes.shape=(2,)"),
    ({"alibi_slopes": zeros(1, 4), "query_offset": 0}, ValueError, "alibi_slopes must have shape (4,) or (2, 4), got alibi_slopes.shape=(1, 4)"),
    ({"alibi_slopes": 0.5, "query_offset": 0}, ValueError, "alibi_slopes must have shape (4,) or (2, 4), got alibi_slopes.shape=()"),
    ({"alibi_slopes": [0, 1, INF, NAN], "query_offset": 0}, ValueError, "alibi_slopes must be finite, got inf"),
    ({"sinks": zeros(4, dtype=bool)}, TypeError, f"sinks must be an array of {FLOATS}, not bool"),
    ({"sinks": zeros(2, 4)}, ValueError, "sinks must have shape (4,), got sinks.shape=(2, 4)"),
    ({"sinks": [0.0, -INF, NAN, 0.0]}, ValueError, "sinks must be finite or -inf, got nan"),
    ({"sinks": [0.0, -INF, INF, 0.0]}, ValueError, "sinks must be finite or -inf, got inf"),
    ({"kv_lengths": [3.0, 4.0]}, TypeError, "kv_lengths must be an array of integers, or an int, not float64"),
    ({"kv_lengths": [True, False]}, TypeError, "kv_lengths must be an array of integers, or an int, not bool"),
    ({"kv_lengths": -1}, ValueError, "kv_lengths must be within 0..kv_len = 0..7, got -1"),
    ({"kv_lengths": 8}, ValueError, "kv_lengths must be within 0..kv_len = 0..7, got 8"),
    *(
        ({"kv_lengths": [n, 3]}, ValueError, f"kv_lengths must be within 0..kv_len = 0..7, got {n}")
        for n in (-1, 8, 2**31, 2**63 - 1, -(2**63))
    ),
    ({"kv_lengths": [1, 2, 3]}, ValueError, "kv_lengths must broadcast to the batch shape (2,), got kv_lengths.shape=(3,)"),
    # dropout
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be within 0..1, got dropout_p=-0.1"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be within 0..1, got dropout_p=1.5"),
    ({"dropout_p": NAN, "seed": 1}, ValueError, "dropout_p must be within 0..1, got dropout_p=nan"),
    ({"dropout_p": 10**400}, ValueError, f"dropout_p must be within 0..1, got dropout_p={10**400}"),
    ({"dropout_p": "0"}, TypeError, "dropout_p must be a number, not str"),
    ({"dropout_p": False}, TypeError, "dropout_p must be a number, not bool"),
    ({"dropout_p": 0.1}, ValueError, "seed must be given with dropout_p > 0, which draws from it alone, got dropout_p=0.1"),
    ({"seed": 1.0}, TypeError, "seed must be an int, not float"),
    ({"seed": True}, TypeError, "seed must be an int, not bool"),
    ({"seed": -1}, ValueError, "seed must be within 0..2**64 - 1, got seed=-1"),
    ({"dropout_p": 0.5, "seed": 2**64}, ValueError, f"seed must be within 0..2**64 - 1, got seed={2**64}"),
    # the result
    ({"return_lse": 1}, TypeError, "return_lse must be a bool, not int"),
    # the parts of a whole
    ({"key_offset": 0.5}, TypeError, "key_offset must be an array of integers, or an int, not float64"),
    ({"key_offset": None}, TypeError, "key_offset must be an array of integers, or an int, not NoneType"),
    ({"key_offset": 2**62}, ValueError, f"key_offset must be within -2**61..2**61, got {2**62}"),
    ({"key_offset": [1, 2, 3]}, ValueError, "key_offset must broadcast to the batch shape (2,), got key_offset.shape=(3,)"),
    ({"head_offset": -1}, ValueError, "head_offset must be within 0..2**32 - 1, got head_offset=-1"),
    ({"head_offset": True}, TypeError, "head_offset must be an int, not bool"),
    ({"batch_offset": 2**32}, ValueError, f"batch_offset must be within 0..2**32 - 1, got batch_offset={2**32}"),
    ({"batch_offset": [1]}, TypeError, "batch_offset must be an int, not list"),
    ({"accumulate": 1}, TypeError, "accumulate must be a bool, not int"),
    ({"accumulate": True}, ValueError, "lse must be given with accumulate=True, which adds to what it holds, got lse=None"),
    ({"accumulate": True, "out": None}, ValueError, "out must be given with accumulate=True, which adds to what it holds, got out=None"),
    ({"accumulate": True, "lse": LSE, "sinks": zeros(4)}, ValueError, "sinks must not be given with accumulate=True: they count once, at the end, in fastattn.merge((out, lse), sinks=sinks)"),
    ({"lse": LSE.tolist()}, TypeError, "lse must be a NumPy array, not list"),
    ({"lse": LSE[:1]}, ValueError, "lse must have the shape of the result, (2, 4, 5), got lse.shape=(1, 4, 5)"),
    ({"lse": LSE.astype(float)}, TypeError, "lse must have the dtype of the result, float32, not float64"),
    ({"lse": read_only(LSE.copy())}, ValueError, "lse must be writeable, got a read-only array"),
    ({"lse": MEMORY[:40].reshape(2, 4, 5), "out": inside(MEMORY, OUT, 39)}, ValueError, "lse must not overlap an input, got an array that shares its memory"),
    # out
    ({"out": [0.0]}, TypeError, "out must be a NumPy array, not list"),
    ({"out": np.ma.array(zeros(*OUT))}, TypeError, "out must be a NumPy array, not MaskedArray"),
    ({"out": zeros(*OUT, dtype=float)}, TypeError, "out must have the dtype of the result, float32, not float64"),
    ({"out": zeros(*OUT, dtype=">f4")}, TypeError, "out must have the dtype of the result, float32, not >f4"),
    ({"out": zeros(4, 5, 3)}, ValueError, "out must have the shape of the result, (2, 4, 5, 3), got out.shape=(4, 5, 3)"),
    ({"out": zeros(1, 2, 4, 5, 3)}, ValueError, "out must have the shape of the result, (2, 4, 5, 3), got out.shape=(1, 2, 4, 5, 3)"),
    ({"out": read_only(zeros(*OUT))}, ValueError, "out must be writeable, got a read-only array"),
    ({"out": np.ndarray(OUT, np.float32, zeros(122).view(np.int8), 2)}, ValueError, "out must be aligned, got a misaligned array"),
    ({"out": zeros(2, 4, 5, 6)[..., ::2]}, ValueError, "out must be contiguous along its last axis, got out.strides=(480, 120, 24, 8)"),
    ({"out": zeros(2, 4, 3, 5).swapaxes(-1, -2)}, ValueError, "out must be contiguous along its last axis, got out.strides=(240, 60, 4, 20)"),
    ({"out": zeros(*OUT)[..., ::-1]}, ValueError, "out must be contiguous along its last axis, got out.strides=(240, 60, 12, -4)"),
    *(
        ({"out": as_strided(MEMORY, OUT, strides)}, ValueError, f"out must not overlap itself, got out.strides={strides}")
        for strides in [(0, 60, 12, 4), (240, 60, 0, 4), (60, 60, 12, 4), (240, 60, 8, 4), (240, 56, 12, 4)]
    ),
    *(
        ({name: x, "out": inside(MEMORY, OUT, offset)}, ValueError, "out must not overlap an input, got an array that shares its memory")
        for name, shape in [("query", QUERY.shape), ("key", KEY.shape), ("value", VALUE.shape), ("mask", WHOLE), ("bias", (5, 7))]
        for x, offset in [(inside(MEMORY, shape, 100), 100), (inside(MEMORY, shape, 119), 0), (inside(MEMORY, shape, 100), 99 + np.prod(shape)), (inside(MEMORY, shape, 100)[::-1], 99 + np.prod(shape))]
    ),
]  # fmt: skip

OUT_0, LSE_0 = zeros(2, 3, 4), zeros(2, 3)
PAIR = (OUT_0, LSE_0)
GRADS = tuple(zeros(2, 3, 4) for _ in range(3))
HALF_GRADS = tuple(x.astype(np.float16) for x in GRADS)
SHAPES_OF_A_PART = (
    "must have an out of shape (..., q_len, value_head_dim) and an lse of shape (..., q_len), got"
)


# (a call, the error's type, its text)
def backward(grad_out, **options):
    return fastattn.attention_backward(grad_out, *[OUT_0] * 4, LSE_0, **options)


def on_gpu(**options):
    return fastattn.attention_backward(OUT_0, OnGPU(), *[OUT_0] * 3, LSE_0, **options)


def half_backward(*grads, **options):
    arrays = [x.astype(np.float16) for x in (OUT_0,) * 5]
    return fastattn.attention_backward(*arrays, LSE_0, grads=grads, **options)


OTHER_CASES = [
    (lambda: sdpa(QUERY, KEY, VALUE, np.ones((5, 7), bool), is_causal=True, enable_gqa=True), ValueError, "attn_mask must not be given together with is_causal=True"),
    (lambda: sdpa(QUERY, KEY, VALUE), ValueError, "query, key and value must have equally many heads unless enable_gqa=True, got query.shape=(2, 4, 5, 8), key.shape=(2, 2, 7, 8), value.shape=(2, 2, 7, 3)"),
    (lambda: sdpa(QUERY, KEY, VALUE, enable_gqa=1), TypeError, "enable_gqa must be a bool, not int"),
    (lambda: sdpa(QUERY, KEY, VALUE, is_causal=0), TypeError, "is_causal must be a bool, not int"),
    (lambda: sdpa([[1.0], [1.0, 2.0]], KEY, VALUE), TypeError, f"query must be an array of {FLOATS}: {ragged_error()}"),
    (lambda: sdpa(QUERY, KEY, VALUE, zeros(5, 6), enable_gqa=True), ValueError, BROADCAST.format("mask", (5, 6)).replace("mask", "attn_mask")),
    (lambda: varlen(query=zeros(4, 8)), ValueError, "query must have 3 axes, (total, heads, head_dim), got query.shape=(4, 8)"),
    (lambda: varlen(key=zeros(1, 12, 2, 8)), ValueError, "key must have 3 axes, (total, heads, head_dim), got key.shape=(1, 12, 2, 8)"),
    (lambda: varlen(query=zeros(9, 4, 7)), ValueError, "query and key must have one head_dim, of 1 or more, got query.shape=(9, 4, 7), key.shape=(12, 2, 8), value.shape=(12, 2, 3)"),
    (lambda: varlen(query=zeros(9, 4, 0), key=zeros(12, 2, 0)), ValueError, "query and key must have one head_dim, of 1 or more, got query.shape=(9, 4, 0), key.shape=(12, 2, 0), value.shape=(12, 2, 3)"),
    (lambda: varlen(value=zeros(11, 2, 3)), ValueError, "key and value must have equal totals and heads, got query.shape=(9, 4, 8), key.shape=(12, 2, 8), value.shape=(11, 2, 3)"),
    (lambda: varlen(query=zeros(9, 3, 8)), ValueError, "query's heads must be a multiple of key's, got query.shape=(9, 3, 8), key.shape=(12, 2, 8), value.shape=(12, 2, 3)"),
    (lambda: varlen(key=zeros(12, 2, 8, dtype=float)), TypeError, "key must have the dtype of query, float32, not float64"),
    (lambda: varlen(cu_seqlens_q=[0, 4, 10]), ValueError, "cu_seqlens_q must be within 0..9, the rows there are, got 0..10"),
    (lambda: varlen(cu_seqlens_kv=[-1, 4, 10]), ValueError, "cu_seqlens_kv must be within 0..12, the rows there are, got -1..10"),
    (lambda: varlen(cu_seqlens_kv=[0, 13]), ValueError, "cu_seqlens_kv must be within 0..12, the rows there are, got 0..13"),
    (lambda: varlen(cu_seqlens_q=[0, 5, 4, 9]), ValueError, "cu_seqlens_q must ascend, got 5 before 4 at 1"),
    (lambda: varlen(cu_seqlens_q=[0, 9]), ValueError, "cu_seqlens_q and cu_seqlens_kv must be equally long, got 2 and 3 entries"),
    (lambda: varlen(cu_seqlens_q=[[0, 9]]), ValueError, "cu_seqlens_q must have shape (sequences + 1,), got cu_seqlens_q.shape=(1, 2)"),
    (lambda: varlen(cu_seqlens_q=zeros(0, dtype=int)), ValueError, "cu_seqlens_q must have shape (sequences + 1,), got cu_seqlens_q.shape=(0,)"),
    (lambda: varlen(cu_seqlens_q=4), ValueError, "cu_seqlens_q must have shape (sequences + 1,), got cu_seqlens_q.shape=()"),
    (lambda: varlen(cu_seqlens_q=[0.0, 9.0]), TypeError, "cu_seqlens_q must be an array of integers, not float64"),
    (lambda: varlen(cu_seqlens_kv="rows"), TypeError, "cu_seqlens_kv must be an array of integers, not str"),
    (lambda: varlen(is_causal=True), ValueError, "query_offset must be given with is_causal if q_len differs from kv_len (0: the first query stands at the first key; kv_len - q_len: the last at the last), got q_len=4, kv_len=7 in sequence 0"),
    (lambda: varlen(query_offset=[1, 2, 3]), ValueError, "query_offset must broadcast to the batch shape (2,), got query_offset.shape=(3,)"),
    (lambda: varlen(kv_lengths=6), ValueError, "kv_lengths must be within 0..kv_len = 0..5 for sequence 1, got 6"),
    (lambda: varlen(kv_lengths=8), ValueError, "kv_lengths must be within 0..kv_len = 0..7, got 8"),
    (lambda: varlen(mask=zeros(12)), ValueError, "mask must broadcast to (batch, q_heads, q_len, kv_len) = (4, 9, 7), got mask.shape=(12,)"),
    (lambda: varlen(key=OnGPU()), TypeError, "key must be on the CPU, got OnGPU on a GPU"),
    (lambda: varlen(bias=zeros(9, 7, dtype=int)), TypeError, "bias must be an array of float16, bfloat16, float32 or float64, not int64"),
    (lambda: varlen(alibi_slopes=zeros(4), query_offset=0, sinks=zeros(2)), ValueError, "sinks must have shape (4,), got sinks.shape=(2,)"),
    (lambda: varlen(return_lse=1), TypeError, "return_lse must be a bool, not int"),
    (lambda: varlen(out=zeros(4, 9, 3)), ValueError, "out must have the shape of the result, (9, 4, 3), got out.shape=(4, 9, 3)"),
    (lambda: fastattn.attention_weights(QUERY, KEY[..., :3]), ValueError, "key has head_dim 3 but query has head_dim 8 (key.shape=(2, 2, 7, 3), query.shape=(2, 4, 5, 8))"),
    (lambda: fastattn.attention_weights(QUERY, None), TypeError, f"key must be an array of {FLOATS}, not NoneType"),
    (lambda: fastattn.attention_weights(QUERY, [[1.0], [1.0, 2.0]]), TypeError, f"key must be an array of {FLOATS}: {ragged_error()}"),
    (lambda: fastattn.attention_weights(QUERY, KEY, is_causal=True), ValueError, NEEDS_OFFSET.format("is_causal")),
    (lambda: varlen(dropout_p=0.1), ValueError, "seed must be given with dropout_p > 0, which draws from it alone, got dropout_p=0.1"),
    (lambda: sdpa(QUERY, KEY, VALUE, dropout_p="0", enable_gqa=True), TypeError, "dropout_p must be a number, not str"),
    (lambda: fastattn.explain(QUERY, KEY, VALUE, dropout_p=2), ValueError, "dropout_p must be within 0..1, got dropout_p=2"),
    (lambda: fastattn.dropout_mask(QUERY, KEY, dropout_p=0.1, seed=None), ValueError, "seed must be given with dropout_p > 0, which draws from it alone, got dropout_p=0.1"),
    (lambda: fastattn.dropout_mask(QUERY, KEY, dropout_p=-1, seed=1), ValueError, "dropout_p must be within 0..1, got dropout_p=-1"),
    (lambda: fastattn.dropout_mask(QUERY, KEY[..., :3], dropout_p=0.1, seed=1), ValueError, "key has head_dim 3 but query has head_dim 8 (key.shape=(2, 2, 7, 3), query.shape=(2, 4, 5, 8))"),
    (lambda: fastattn.dropout_mask(QUERY, KEY, dropout_p=0.1, seed=1, query_offset=[1, 2, 3]), ValueError, "query_offset must broadcast to the batch shape (2,), got query_offset.shape=(3,)"),
    (lambda: fastattn.dropout_mask(QUERY, KEY, dropout_p=0.1, seed=1, batch_index=-1), ValueError, "batch_index must be within 0..2**32 - 1, got batch_index=-1"),
    (lambda: fastattn.dropout_mask(QUERY, KEY, dropout_p=0.1, seed=1, batch_index=0.5), TypeError, "batch_index must be an int, not float"),
    (lambda: fastattn.explain(QUERY, KEY, VALUE, threads=0), ValueError, "threads must be within 1..1024, got threads=0"),
    (lambda: fastattn.explain(QUERY, KEY, VALUE, threads=1025), ValueError, "threads must be within 1..1024, got threads=1025"),
    (lambda: fastattn.explain(QUERY, KEY, VALUE, threads=2.0), TypeError, "threads must be an int, not float"),
    (lambda: fastattn.explain(QUERY, KEY, VALUE, threads="2"), TypeError, "threads must be an int, not str"),
    (lambda: fastattn.explain(QUERY, KEY, VALUE, softcap=-1), ValueError, "softcap must be > 0 (None: off), got softcap=-1"),
    (lambda: fastattn.explain(*[np.broadcast_to(np.float32(1), (2**32, 1))] * 3), ValueError, "batch x q_heads x q_len x kv_len must be below 2**62 for explain, got lengths 4294967296 and 4294967296, 1 heads in all"),
    (lambda: fastattn.attention(QUERY, KEY, VALUE, causal=None), TypeError, "attention() got an unexpected keyword argument 'causal'"),
    (lambda: backward(OUT_0.astype(float)), TypeError, "grad_out must have dtype float32, not float64"),
    (lambda: backward(OUT_0[:1]), ValueError, "grad_out must have shape (2, 3, 4), got grad_out.shape=(1, 3, 4)"),
    (lambda: backward(OUT_0, return_dbias=True), ValueError, "return_dbias needs bias, got bias=None"),
    (lambda: backward(OUT_0.astype(float), grads=(OUT_0,) * 3), TypeError, "grad_out must have dtype float32, not float64"),
    (lambda: backward(OUT_0, grads=(OUT_0,) * 2), TypeError, "grads must be three arrays (dq, dk, dv), not 2 of them"),
    (lambda: backward(OUT_0, grads=7), TypeError, "grads must be three arrays (dq, dk, dv), not int"),
    (lambda: backward(OUT_0, grads=(None, *GRADS[1:])), TypeError, "dq must be a NumPy array, not NoneType"),
    (lambda: backward(OUT_0, grads=(*GRADS[:2], GRADS[2][:1])), ValueError, "dv must have the shape of the result, (2, 3, 4), got dv.shape=(1, 3, 4)"),
    (lambda: backward(OUT_0, grads=(*GRADS[:2], GRADS[1])), ValueError, "dv must not overlap an input, got an array that shares its memory"),
    (lambda: backward(OUT_0, grads=(*GRADS[:2], OUT_0)), ValueError, "dv must not overlap an input, got an array that shares its memory"),
    (lambda: backward(OUT_0, grads=GRADS, accumulate=1), TypeError, "accumulate must be a bool, not int"),
    (lambda: backward(OUT_0, accumulate=True), ValueError, "grads must be given with accumulate=True, which adds to what it holds, got grads=None"),
    (lambda: on_gpu(cu_seqlens_q=[0, 3]), NotImplementedError, "cu_seqlens_q, cu_seqlens_kv have no kernel for GPUs"),
    (lambda: on_gpu(grads=GRADS), NotImplementedError, "grads, accumulate have no kernel for GPUs"),
    (lambda: on_gpu(accumulate=True), NotImplementedError, "grads, accumulate have no kernel for GPUs"),
    (lambda: attention(OnGPU(), KEY, VALUE, accumulate=True), NotImplementedError, "lse, accumulate have no kernel for GPUs"),
    (lambda: attention(OnGPU(), KEY, VALUE, lse=LSE), NotImplementedError, "lse, accumulate have no kernel for GPUs"),
    (lambda: backward(OUT_0, cu_seqlens_q=[0, 3]), ValueError, "cu_seqlens_kv must be given with the other of cu_seqlens_q, cu_seqlens_kv"),
    (lambda: half_backward(GRADS[0], HALF_GRADS[1], GRADS[2]), TypeError, "dv must have the dtype of dk, float16, not float32"),
    (lambda: half_backward(GRADS[0], *HALF_GRADS[1:], accumulate=True), TypeError, "dk must have dtype float32 with accumulate=True, not float16"),
    (lambda: half_backward(*(x.astype(float) for x in GRADS)), TypeError, "dq must have the dtype of the result, float16, or float32, not float64"),
    (lambda: call(query_offset=2**61, key_offset=-1), ValueError, f"query_offset - key_offset must be within -2**61..2**61, got {2**61 + 1}"),
    (lambda: fastattn.dropout_mask(QUERY, KEY, dropout_p=0.1, seed=1, key_offset=[1, 2, 3]), ValueError, "key_offset must broadcast to the batch shape (2,), got key_offset.shape=(3,)"),
    (lambda: fastattn.dropout_mask(QUERY, KEY, dropout_p=0.1, seed=1, head_offset=2**32), ValueError, "head_offset must be within 0..2**32 - 1, got head_offset=4294967296"),
    (lambda: varlen(accumulate=True, out=zeros(9, 4, 3)), ValueError, "lse must be given with accumulate=True, which adds to what it holds, got lse=None"),
    (lambda: fastattn.set_num_threads(0), ValueError, "n must be within 1..1024, got n=0"),
    (lambda: fastattn.set_num_threads(-(2**70)), ValueError, f"n must be within 1..1024, got n={-(2**70)}"),
    (lambda: fastattn.set_num_threads(1025), ValueError, "n must be within 1..1024, got n=1025"),
    (lambda: fastattn.set_num_threads(2.0), TypeError, "n must be an int, not float"),
    (lambda: fastattn.set_num_threads(None), TypeError, "n must be an int, not NoneType"),
    (lambda: fastattn.merge(), ValueError, "parts must be one (out, lse) or more, got none"),
    (lambda: fastattn.merge(PAIR, OUT_0), TypeError, "parts[1] must be a pair (out, lse), not ndarray"),
    (lambda: fastattn.merge((OUT_0,)), TypeError, "parts[0] must be a pair (out, lse), not tuple"),
    (lambda: fastattn.merge((None, LSE_0)), TypeError, f"out of parts[0] must be an array of {FLOATS}, not NoneType"),
    (lambda: fastattn.merge((OUT_0.astype(int), LSE_0)), TypeError, f"out of parts[0] must be an array of {FLOATS}, not int64"),
    (lambda: fastattn.merge((OUT_0, LSE_0.astype(int))), TypeError, "lse of parts[0] must be an array of float32 or float64, not int64"),
    (lambda: fastattn.merge((OUT_0, OUT_0)), ValueError, f"parts[0] {SHAPES_OF_A_PART} out.shape=(2, 3, 4), lse.shape=(2, 3, 4)"),
    (lambda: fastattn.merge((zeros(4), zeros())), ValueError, f"parts[0] {SHAPES_OF_A_PART} out.shape=(4,), lse.shape=()"),
    (lambda: fastattn.merge(PAIR, (OUT_0[:1], LSE_0[:1])), ValueError, "parts must have equal shapes, got out.shape=(2, 3, 4) in parts[0], (1, 3, 4) in parts[1]"),
    (lambda: fastattn.merge(PAIR, (OUT_0, LSE_0.astype(float))), TypeError, "parts must have equal dtypes, not float32, float32 in parts[0] and float32, float64 in parts[1]"),
    (lambda: fastattn.merge(PAIR, sinks=zeros(3)), ValueError, "sinks must have shape (2,), got sinks.shape=(3,)"),
    (lambda: fastattn.merge((OUT_0[0], LSE_0[0]), sinks=[INF]), ValueError, "sinks must be finite or -inf, got inf"),
]  # fmt: skip
ALL_CASES = [(lambda case=case: call(**case[0]), *case[1:]) for case in CASES] + OTHER_CASES


@pytest.mark.promise(
    "error-says-which-rule-and-what",
    "errors-come-before-writing",
    "out-overlaps-no-input",
    "position-must-be-given",
    "added-arrays-have-any-float-dtype",
    "four-dtypes",
)
@pytest.mark.parametrize(
    "number", range(len(ALL_CASES)), ids=lambda i: f"{i}: {ALL_CASES[i][2][:60]}"
)
def test_errors(number):
    function, kind, text = ALL_CASES[number]
    with pytest.raises(kind) as error:
        function()
    assert type(error.value) is kind
    assert str(error.value) == text


@pytest.mark.promise("error-says-which-rule-and-what")
@pytest.mark.parametrize("module", [_arguments, _attention, _backward, _merge, _options, _sdpa])
def test_every_error_is_tested(module):
    source = inspect.getsource(module)
    raises = {
        range(node.lineno, node.end_lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and node.exc is not None  # else it passes one on
    }
    assert raises
    seen = set()
    for function, _, _ in ALL_CASES:
        with pytest.raises(Exception) as error:  # noqa: PT011 - which one, test_errors asks
            function()
        frames = traceback.walk_tb(error.tb)
        seen |= {line for frame, line in frames if frame.f_code.co_filename == module.__file__}
    lines = source.splitlines()
    assert not [lines[span[0] - 1] for span in raises if not seen & set(span)]


@pytest.mark.promise("unknown-variables-warn")
def test_unknown_variables(monkeypatch):
    monkeypatch.setenv("FASTATTN_THREADS", "2")
    text = (
        "FASTATTN_THREADS is not an environment variable of fastattn: "
        "FASTATTN_ISA, FASTATTN_NUM_THREADS, FASTATTN_CGROUP_FILE, FASTATTN_CGROUP_ROOT, "
        "FASTATTN_CPU_ROOT, OMP_NUM_THREADS, FASTATTN_CUDA_KERNEL, FASTATTN_CACHE_DIR"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        _machine.warn_of_unknown_variables()
    monkeypatch.delenv("FASTATTN_THREADS")
    for name in _machine.VARIABLES:
        monkeypatch.setenv(name, "1")
    _machine.warn_of_unknown_variables()  # a warning would be an error


# What is allowed.


def test_kinds_that_are_allowed():
    expected = attention(QUERY, KEY, VALUE, return_lse=True)
    for options in (
        {"scale": 8**-0.5, "dropout_p": 0, "seed": 5, "is_causal": np.False_},
        {"mask": True, "bias": 0.0, "return_lse": np.True_},
        {"mask": [[True]], "bias": [[[0.0]]], "kv_lengths": 7, "query_offset": np.int8(3)},
        {"kv_lengths": [7], "query_offset": np.array([1, 2], np.uint8), "window": (None, None)},
        {"window": [9, np.int64(9)], "query_offset": np.array(0), "sinks": [-INF] * 4},
        {
            "kv_lengths": np.array([7, 7], np.uint64),
            "seed": np.int64(3),
            "dropout_p": np.float32(0),
        },
    ):
        assert_same_bits(attention(QUERY, KEY, VALUE, **{"return_lse": True} | options), expected)
    alone = attention(QUERY[0], KEY[0], VALUE[0], kv_lengths=np.array(7), query_offset=0)
    assert_same_bits(alone, expected[0][0])


def test_weights_of_the_kinds_that_are_allowed():
    """The definition takes them as they are given: integers of few bits must not wrap."""
    expected = fastattn.attention_weights(QUERY, KEY, window=(3, 1), query_offset=1, kv_lengths=6)
    for integer in (np.uint8, np.int64, np.uint64):
        got = fastattn.attention_weights(
            QUERY,
            KEY,
            window=(integer(3), integer(1)),
            query_offset=integer(1),
            kv_lengths=np.full(2, 6, integer),
        )
        assert_same_bits(got, expected)
        got = fastattn.attention_weights(QUERY, KEY, window=(integer(9), None), query_offset=0)
        assert_same_bits(got, fastattn.attention_weights(QUERY, KEY))


@pytest.mark.promise("finite-stays-finite")
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_numbers_that_are_as_good_as_infinite(dtype):
    """Finite, but not in the dtype, or not times log2(e): no NaN comes of it."""
    query, key, value = (x.astype(dtype) for x in (QUERY[0, :2], KEY[0], VALUE[0]))
    plain = attention(query, key, value, return_lse=True)
    for large in (np.finfo(dtype).max, np.finfo(dtype).max / 1.2, np.finfo(np.float64).max):
        out, lse = attention(query, key, value, sinks=np.full(2, large), return_lse=True)
        assert (out == 0).all()
        assert_same_bits(lse, plain[1])
        assert_same_bits(attention(query, key, value, sinks=np.full(2, -large)), plain[0])
        eps = 8 * np.finfo(dtype).eps
        for got, expected in zip(
            attention(query, key, value, softcap=large, return_lse=True), plain, strict=True
        ):
            assert_allclose(got, expected, rtol=eps, atol=eps)
        nearest = attention(query, key, value, alibi_slopes=np.full(2, large), query_offset=1)
        assert_same_bits(nearest, np.ascontiguousarray(value[:, 1:6]))


def out_layouts():
    wide = zeros(2, 4, 10, 5)
    memory = zeros(2, 5, 4, 3)
    return {
        "plain": zeros(*OUT),
        "part": wide[..., 1::2, 1:4],
        "interleaved": memory.swapaxes(1, 2),
        "reversed": zeros(*OUT)[::-1, ::-1, ::-1],
        "fortran but for the last axis": zeros(5, 4, 2, 3).transpose(2, 1, 0, 3),
    }


@pytest.mark.promise("out-is-written-in-place")
@pytest.mark.parametrize("layout", out_layouts())
def test_out(layout):
    out = out_layouts()[layout]
    whole = out if out.base is None else out.base
    expected = attention(QUERY, KEY, VALUE)
    assert attention(QUERY, KEY, VALUE, out=out) is out
    assert_same_bits(np.array(out), expected)
    assert np.count_nonzero(whole) == np.count_nonzero(expected)
    result = attention(QUERY, KEY, VALUE, out=out, return_lse=True)
    assert result[0] is out


@pytest.mark.promise("out-is-written-in-place")
def test_out_beside_its_inputs():
    """In memory of its own between the rows of an input, or where an input is copied first."""
    memory = np.random.default_rng(0).normal(size=(2, 8, 7, 16)).astype(np.float32)
    query, key, value = memory[:, ::2, :, :8], memory[:, 1::4, :, :8], memory[:, 3::4, :, 8:]
    expected = attention(query, key, value)
    attention(query, key, value, out=memory[:, ::2, :, 8:])
    assert_same_bits(np.array(memory[:, ::2, :, 8:]), expected)
    query = memory[0, 0:5:4, :, :8]  # begins before a plain out and ends behind it
    out = memory.reshape(-1)[2 * 7 * 16 :][: 2 * 7 * 8].reshape(2, 7, 8)
    key, value = (memory[1, i : i + 2, :, :8].copy() for i in (1, 3))
    expected = attention(query, key, value)
    assert attention(query, key, value, out=out) is out
    assert_same_bits(out, expected)
    query = memory[:, ::2, :, 7::-1]  # its last axis is not contiguous
    expected = attention(query.copy(), key, value)
    attention(query, key, value, out=memory[:, ::2, :, :8])
    assert_same_bits(np.array(memory[:, ::2, :, :8]), expected)


# Giants: views of little memory, with sizes whose products leave 64 bits.


def repeated(*shape):
    return np.broadcast_to(np.float32(1), shape)


G = 2**50
GIANTS = {
    "query rows": lambda: attention(repeated(G, 8), repeated(7, 8), repeated(7, 3)),
    "query rows, no values": lambda: attention(repeated(G, 8), repeated(7, 8), zeros(7, 0)),
    "query rows, lse": lambda: attention(repeated(G, 8), repeated(7, 8), zeros(7, 0), return_lse=True),
    "query heads": lambda: attention(repeated(G, 5, 1), repeated(1, 7, 1), repeated(1, 7, 1)),
    "batch": lambda: attention(repeated(G, 1, 1, 1), repeated(1, 1, 1, 1), repeated(1, 1, 1, 1)),
    "batch, lengths": lambda: attention(repeated(G, 1, 0, 1), *[repeated(1, 3, 1)] * 2, kv_lengths=2),
    "batch, slopes": lambda: attention(repeated(G, 1, 0, 1), *[repeated(1, 3, 1)] * 2, alibi_slopes=zeros(1), query_offset=0),
    "batch product of 2**63": lambda: attention(repeated(2**31, 1, 1, 1, 1), repeated(2**32, 1, 1, 1), repeated(1, 1, 1)),
    "batch product of 2**63, no values": lambda: attention(repeated(2**31, 1, 1, 1, 1), repeated(2**32, 1, 1, 1), zeros(1, 1, 0)),
    "batch product of 2**64, no rows": lambda: attention(repeated(2**32, 1, 1, 0, 1), repeated(2**32, 1, 1, 1), repeated(1, 1, 1)),
    "heads times batch, no values": lambda: attention(repeated(2**30, 1, 1), repeated(2**40, 1, 1, 1), zeros(1, 1, 0)),
    "head_dim": lambda: attention(repeated(1, G), repeated(1, G), repeated(1, 1)),
    "value_head_dim": lambda: attention(repeated(1, 1), repeated(1, 1), repeated(1, G)),
    "mask": lambda: attention(repeated(1, 5, 8), repeated(1, 7, 8), repeated(1, 7, 8), mask=np.broadcast_to(True, (G, 7))),
    "lengths": lambda: attention(repeated(2, 1, 5, 8), *[repeated(1, 7, 8)] * 2, kv_lengths=np.broadcast_to(3, (G,))),
    "weights": lambda: fastattn.attention_weights(repeated(G, 1), repeated(G, 1)),
    "statistics of rows": lambda: fastattn.attention_statistics(repeated(G, 8), repeated(7, 8), entropy=True),
    "statistics of columns": lambda: fastattn.attention_statistics(repeated(G, 8), repeated(7, 8), column_sums=True),
    "statistics of keys": lambda: fastattn.attention_statistics(repeated(7, 8), repeated(G, 8), column_sums=True),
    "statistics, top": lambda: fastattn.attention_statistics(repeated(7, 8), repeated(7, 8), top=2**54),
    "lengths of no rows": lambda: attention(repeated(G, 1, 0, 1), *[repeated(1, 3, 1)] * 2, kv_lengths=np.broadcast_to(2, (G,))),
    "slopes and sinks of no rows": lambda: attention(repeated(G, 0, 1), *[repeated(1, 3, 1)] * 2, alibi_slopes=repeated(G), sinks=repeated(G), query_offset=0),
    "explain query rows": lambda: fastattn.explain(repeated(G, 8), repeated(7, 8), repeated(7, 8)),
    "explain keys": lambda: fastattn.explain(repeated(7, 8), repeated(G, 8), repeated(G, 8)),
    "explain heads": lambda: fastattn.explain(repeated(2**20, 2**20, 5, 8), *[repeated(2**20, 1, 1000, 8)] * 2, mask=np.broadcast_to(True, (2**20, 5, 1000))),
    "explain keys, window": lambda: fastattn.explain(repeated(700, 8), *[repeated(G, 8)] * 2, window=(2**40, 2**30), query_offset=2**45),
    "explain diagonal": lambda: fastattn.explain(*[repeated(G, 8)] * 3, is_causal=True),
    "explain long diagonal": lambda: fastattn.explain(*[repeated(2**30, 8)] * 3, is_causal=True),
    "explain shorter diagonal": lambda: fastattn.explain(*[repeated(2**27, 8)] * 3, is_causal=True),
    "explain mask": lambda: fastattn.explain(repeated(5, 8), *[repeated(G, 8)] * 2, mask=np.broadcast_to(True, (G,))),
    "explain batch": lambda: fastattn.explain(repeated(2**31, 1, 1, 1, 1), repeated(2**32, 1, 1, 1), repeated(1, 1, 1)),
}  # fmt: skip


AT_ONCE = [
    "query rows, no values",
    "batch, lengths",
    "batch, slopes",
    "lengths of no rows",
    "slopes and sinks of no rows",
    "explain query rows",
    "explain keys",
    "explain heads",
    "explain keys, window",
    "explain shorter diagonal",
]


def ask_giant(name):
    try:
        GIANTS[name]()
    except (MemoryError, ValueError) as error:
        return type(error).__name__
    return "done"


@pytest.mark.promise("giants-are-done-or-refused", "explain-says-what-runs", "nothing-is-expanded")
@pytest.mark.parametrize("name", GIANTS)
def test_giants(name):
    """Each is done at once, or refused; none crashes, hangs or overflows."""
    answer = run(ask_giant, name, timeout=20)
    assert answer in (("done",) if name in AT_ONCE else ("MemoryError", "ValueError"))


@pytest.mark.promise("hidden-tiles-cost-nothing", "nothing-is-expanded")
def test_giant_keys_of_which_few_are_seen():
    query = QUERY[0, 0, :, :1]
    some = KEY[0, 0, :1, :1]
    key = np.broadcast_to(some, (2**60, 1))
    seen = np.broadcast_to(np.array([True]), (2**60,))
    small = np.broadcast_to(some, (7, 1))
    expected = attention(query, small, small, return_lse=True)
    for options in ({"mask": seen}, {"bias": np.broadcast_to(np.float32(0), (2**60,))}, {}):
        got = attention(query, key, key, kv_lengths=7, return_lse=True, **options)
        assert_same_bits(got, expected)
    for offset in (2**60 - 9, 2**59, 0):
        got = attention(query, key, key, window=(6, 0), query_offset=offset, return_lse=True)
        seen = np.minimum(np.arange(5) + offset + 1, 7)
        assert_allclose(got[0], np.broadcast_to(some, (5, 1)), rtol=1e-6)
        assert_allclose(got[1], query[:, 0] * some[0, 0] + np.log(seen), rtol=1e-5)
