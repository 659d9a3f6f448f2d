# SPDX-License-Identifier: Apache-2.0
"""A call's arguments, checked, in the form that kernels take: four axes, addresses and strides.

Called by `_attention.py` and `_backward.py`. The rules are those of `fastattn/_arguments.py`, asked
about stand-ins of the same shapes and dtypes: what lies on the GPU is not looked at. Values that
the host has are checked, those that the device has are clamped by the kernels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastattn._arguments import (
    FLOAT_NAMES,
    MASK_NAMES,
    WIDEST,
    Sizes,
    check,
    dropout,
)
from fastattn._arrays import BFLOAT16_BITS, is_cuda_array
from fastattn.cuda._arrays import DeviceArray, device_array, item_bytes

INTEGERS = ("int64", "int32", "int16", "int8", "uint32", "uint16", "uint8")
Shape = tuple[int, ...]
MOST_HEAD_DIM = 2**16  # sums of a thread fit the 512 KiB of local memory that it may have
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
SMALL = ("query_offset", "kv_lengths", "alibi_slopes", "sinks")  # that the host may have


class Options(NamedTuple):
    """What a call asks for, beside query, key and value; arrays with their batch axes."""

    known: Sizes
    mask: DeviceArray | None
    bias: DeviceArray | None
    alibi_slopes: Any  # from here: on the GPU, or NumPy arrays of the host's, or None
    sinks: Any
    lengths: Any  # one per batch element
    offsets: Any
    length: int  # of all, where not one per batch element
    offset: int
    left: int  # WIDEST if unlimited
    right: int
    scale: float
    softcap: float  # 0: none
    dropout_p: float
    seed: int

    @property
    def only_simt(self) -> tuple[str, ...]:
        """Return the arguments given that only the simt kernel knows."""
        arrays = {"mask": self.mask, "bias": self.bias, "alibi_slopes": self.alibi_slopes}
        given = [name for name, x in {**arrays, "sinks": self.sinks}.items() if x is not None]
        return (*given, *(["dropout_p"] if self.dropout_p else []))

    @property
    def may_hide(self) -> bool:
        """Tell whether there may be a key that some row does not see."""
        sides = min(self.left, self.right) < WIDEST
        return sides or self.lengths is not None or self.length < self.known.kv_len


def options(
    query: DeviceArray,
    key: DeviceArray,
    value: DeviceArray,
    stream: int,
    *,
    mask: Any = None,
    bias: Any = None,
    scale: Any = None,
    is_causal: Any = False,
    query_offset: Any = None,
    window: Any = None,
    softcap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Options:
    """Check the options of a call on arrays of a GPU."""
    on_gpu = {}
    for name, x, kinds in (("mask", mask, MASK_NAMES), ("bias", bias, FLOAT_NAMES)):
        if x is not None:
            on_gpu[name] = device_array(name, x, stream, query, kinds)
    small = dict(zip(SMALL, (query_offset, kv_lengths, alibi_slopes, sinks), strict=True))
    for name, x in small.items():
        if (
            x is not None
            and not isinstance(x, int | float | list | np.ndarray)
            and is_cuda_array(x)
        ):
            dtypes: tuple[str, ...] = INTEGERS if name in SMALL[:2] else FLOAT_NAMES
            on_gpu[name] = device_array(name, x, stream, query, dtypes)
    arrays = {"query": query, "key": key, "value": value, **on_gpu}
    facts = tuple((name, x.shape, x.dtype) for name, x in arrays.items())
    from_host = [None if name in on_gpu else x for name, x in small.items()]
    call = (facts, scale, is_causal, window, softcap, *from_host)
    # An array of the host's may hold other numbers at the next call; in a pair, True is like 1.
    are_constant = all(x is None or isinstance(x, int | float) for x in from_host) and (
        not isinstance(window, tuple) or all(x is None or type(x) is int for x in window)
    )
    try:
        known, checked = (_remembered if are_constant else _checked)(*call)
    except TypeError:  # something cannot be hashed, or is wrong, which is then said again
        known, checked = _checked(*call)
    for name, array in (("query", query), ("value", value)):
        if array.shape[-1] > MOST_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head_dim of at most 2**16 on a GPU, got "
                f"{name}.shape={array.shape}: fastattn.attention computes it on the CPU"
            )
    dropout_p, seed = dropout(dropout_p, seed)
    _, _, slopes, logits, offset, lengths, scale, softcap, left, right, *_ = checked
    if query.dtype != "float64":
        scale = within_float32(scale)
        softcap = max(softcap, LEAST) if softcap else softcap
    return Options(
        known,
        on_gpu.get("mask"),
        on_gpu.get("bias"),
        on_gpu.get("alibi_slopes", slopes),
        on_gpu.get("sinks", logits),
        on_gpu.get("kv_lengths", _unlike(lengths)),
        on_gpu.get("query_offset", _unlike(offset)),
        known.kv_len if lengths is None or not lengths.size else int(lengths.flat[0]),
        0 if offset is None or not offset.size else int(offset.flat[0]),
        WIDEST if left < 0 else left,
        WIDEST if right < 0 else right,
        scale,
        softcap,
        dropout_p,
        seed,
    )


def _unlike(numbers: Any) -> Any:
    """Return numbers that are not all the same."""
    return None if numbers is None or (numbers == numbers.flat[0]).all() else numbers


def wide_dtype(dtype: str) -> str:
    """Return the dtype that a query's dtype is computed in: that of lse."""
    return "float64" if dtype == "float64" else "float32"


def within_float32(x: float) -> float:
    """Return the number nearest to x that float32 has in full precision, or 0."""
    return max(-MOST, min(x, MOST)) if abs(x) >= LEAST else 0.0


def stand_in(shape: Shape, dtype: str) -> Any:
    """Return an array of zeros that takes no memory."""
    kind = BFLOAT16_BITS if dtype == "bfloat16" else np.dtype(dtype)
    return np.broadcast_to(np.zeros((), kind), shape)


def _checked(
    arrays: tuple[tuple[str, Shape, str], ...],
    scale: Any,
    is_causal: Any,
    window: Any,
    softcap: Any,
    *small: Any,
) -> tuple[Sizes, tuple[Any, ...]]:
    """Ask the rules about a call with these arrays on the GPU and these small ones on the host."""
    given = {name: x for name, x in zip(SMALL, small, strict=True) if x is not None}
    given.update((name, stand_in(shape, dtype)) for name, shape, dtype in arrays)
    _, _, _, known, arguments = check(
        given["query"],
        given["key"],
        given["value"],
        given.get("mask"),
        given.get("bias"),
        scale,
        is_causal,
        given.get("query_offset"),
        window,
        softcap,
        given.get("alibi_slopes"),
        given.get("sinks"),
        given.get("kv_lengths"),
        0.0,
        None,
    )
    return known, arguments


# typed: True is not 1 to the rules.
_remembered = functools.lru_cache(maxsize=1024, typed=True)(_checked)


# --- The call in kernels' form -------------------------------------------------------------------


class Problem(NamedTuple):
    """A call as kernels take it: arrays of (batch, heads, length, dim), or what is left of these.

    Where axes broadcast, strides are 0. None is absent.
    """

    query: DeviceArray
    key: DeviceArray
    value: DeviceArray
    out: DeviceArray
    lse: DeviceArray
    mask: DeviceArray | None
    bias: DeviceArray | None
    alibi_slopes: DeviceArray | None  # (batch, heads)
    sinks: DeviceArray | None  # (heads,)
    lengths: DeviceArray | None  # (batch,), of any integers
    offsets: DeviceArray | None
    options: Options
    first_batch: int  # the number of element 0 in the whole batch
    more: tuple[Any, ...] = ()  # arrays of a gradient: as out, or as lse

    @property
    def batch(self) -> int:
        """The number of batch elements."""
        return self.query.shape[0]

    @property
    def group(self) -> int:
        """The number of query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]


def problems(
    query: DeviceArray,
    key: DeviceArray,
    value: DeviceArray,
    out: DeviceArray,
    lse: DeviceArray,
    asked: Options,
    more: tuple[DeviceArray | None, ...] = (),
) -> Iterator[Problem]:
    """Yield the call's launches: one, unless some batch axes broadcast so that they do not join.

    more: other arrays with the batch axes of out, and heads, that follow the others.
    """
    batch_shape, known = asked.known.batch_shape, asked.known
    ndim = len(batch_shape)
    pairs = (*batch_shape, max(known.q_heads, 1), known.q_len, known.kv_len)
    spread: list[Any] = [
        None if x is None else broadcast(x, (*batch_shape, *x.shape[len(x.shape) - kept :]))
        for x, kept in (
            *((with_heads(x), 3) for x in (query, key, value, out)),
            (with_row_heads(lse), 2),
            (asked.mask and broadcast(asked.mask, pairs), 3),
            (asked.bias and broadcast(asked.bias, pairs), 3),
            (asked.alibi_slopes, 1),
            (asked.lengths, 0),
            (asked.offsets, 0),
            *((x, 0 if x is None else len(x.shape) - ndim) for x in more),
        )
    ]
    axes = joined(batch_shape, [x.strides[:ndim] for x in spread if x is not None])
    for place, first in axes.steps():
        parts: list[Any] = [
            None if x is None else part(x, batch_shape, axes, place) for x in spread
        ]
        q, k, v, o, stats, mask, bias, slopes, lengths, offsets, *others = parts
        yield Problem(
            q, k, v, o, stats, mask, bias, slopes, asked.sinks, lengths, offsets, asked, first,
            tuple(others),
        )  # fmt: skip


# --- Views ---------------------------------------------------------------------------------------


def broadcast(array: DeviceArray, shape: Shape) -> DeviceArray:
    """Return a view of a shape, with strides of 0 along what is repeated."""
    missing = len(shape) - len(array.shape)
    strides = tuple(
        0 if size == 1 else stride for size, stride in zip(array.shape, array.strides, strict=True)
    )
    return array._replace(shape=shape, strides=(0,) * missing + strides)


def with_heads(array: DeviceArray) -> DeviceArray:
    """Return a view with an axis for heads."""
    if len(array.shape) > 2:
        return array
    return array._replace(shape=(1, *array.shape), strides=(0, *array.strides))


def with_row_heads(lse: DeviceArray) -> DeviceArray:
    """Return a view of (..., heads, rows) with that axis for heads."""
    if len(lse.shape) > 1:
        return lse
    return lse._replace(shape=(1, *lse.shape), strides=(0, *lse.strides))


class Axes(NamedTuple):
    """How several batch axes become one: launches over the outer ones, which do not join."""

    outer: Shape  # sizes
    inner: int

    def steps(self) -> Iterator[tuple[Shape, int]]:
        """Yield each launch's place in the outer axes, and its first batch element's number."""
        for i, place in enumerate(itertools.product(*map(range, self.outer))):
            yield place, i * self.inner


def joined(batch_shape: Shape, strides: list[Shape]) -> Axes:
    """Return how the batch axes join, given those strides of every array; axes of 1 always do."""
    axes = [i for i, size in enumerate(batch_shape) if size != 1]
    first = len(axes) - 1  # of the axes that join
    while first > 0 and all(
        each[axes[first - 1]] == each[axes[first]] * batch_shape[axes[first]] for each in strides
    ):
        first -= 1
    sizes = [batch_shape[i] for i in axes]
    first = max(first, 0)
    return Axes(tuple(sizes[:first]), math.prod(sizes[first:]))


def part(array: DeviceArray, batch_shape: Shape, axes: Axes, place: Shape) -> DeviceArray:
    """Return a view of a part of an array whose first axes are the batch axes: one axis of them."""
    kept = [i for i, size in enumerate(batch_shape) if size != 1]
    outer = zip(kept, place, strict=False)
    pointer = array.pointer + sum(array.strides[i] * n for i, n in outer) * item_bytes(array.dtype)
    inner = kept[len(place) :]
    stride = array.strides[inner[-1]] if inner else 0
    ndim = len(batch_shape)
    return array._replace(
        pointer=pointer,
        shape=(axes.inner, *array.shape[ndim:]),
        strides=(stride, *array.strides[ndim:]),
    )
